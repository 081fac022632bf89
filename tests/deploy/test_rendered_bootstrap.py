"""The Job that makes the first administrator's key: off by default, and with rights over one Secret."""

from __future__ import annotations

from tests.deploy.charts import CHART
from tests.deploy.conftest import Render

ON = {"bootstrap": {"enabled": True, "tenant": "platform"}}


def test_by_default_there_is_no_job_and_no_role(render: Render) -> None:
    rendered = render()
    for kind in ("Job", "Role", "RoleBinding"):
        assert rendered.all(kind) == []


def test_its_rights_end_at_the_secret_that_it_fills(render: Render) -> None:
    rendered = render(**ON)
    (rule,) = rendered.get("Role", "bootstrap")["rules"]
    assert rule == {
        "apiGroups": [""],
        "resources": ["secrets"],
        "resourceNames": ["demo-torchrelay-first-admin"],
        "verbs": ["get", "patch"],
    }
    binding = rendered.get("RoleBinding", "bootstrap")
    assert binding["roleRef"]["name"] == "demo-torchrelay-bootstrap"
    assert [subject["name"] for subject in binding["subjects"]] == ["demo-torchrelay-bootstrap"]
    assert "data" not in rendered.get("Secret", "first-admin")  # an upgrade would put it back in place of the key


def test_the_script_gets_a_token_that_no_other_pod_has(render: Render) -> None:
    rendered = render(**ON)
    with_token = [
        manifest["metadata"]["name"]
        for manifest, pod in rendered.pods()
        for volume in pod["spec"]["volumes"]
        if any("serviceAccountToken" in source for source in volume.get("projected", {}).get("sources", ()))
    ]
    assert with_token == ["demo-torchrelay-bootstrap"]
    container = rendered.container("Job", "bootstrap")
    assert container.spec["command"] == ["python", "/scripts/bootstrap.py", "demo-torchrelay-first-admin", "platform"]
    script = rendered.get("ConfigMap", "bootstrap")["data"]["bootstrap.py"]
    assert script.strip() == (CHART / "files" / "bootstrap.py").read_text().strip()
    assert container.env["TORCHRELAY_GATEWAY_ADMIN_REDIS_URL"].startswith("redis://admin:")
