"""Renders and lints charts for tests: requests on stdin, answers on stdout, one JSON object a line each.

Run by the interpreter that has helm-python-sdk, which is not the one that runs the tests; imports nothing of ours.
"""

import json
import sys

from helm_python.chart import Chart, lint
from helm_python.errors import HelmError


def answer(request: dict) -> dict:
    values = request["values"]
    try:
        if request["what"] == "lint":
            return lint(request["chart"], values=values, namespace=request["namespace"], strict=True)
        with Chart.load(request["chart"]) as chart:
            chart.validate_schema(values)
            return {"files": chart.render(values=values, name=request["name"], namespace=request["namespace"])}
    except HelmError as error:
        return {"error": str(error)}


for line in sys.stdin:
    sys.stdout.write(json.dumps(answer(json.loads(line))) + "\n")
    sys.stdout.flush()
