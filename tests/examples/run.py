"""`make examples`: serves a model for each example, real weights where a package carries them, and runs them all."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from tests.builders_compat import openai_python
from tests.builders_models import write_tiny_model
from tests.builders_seq2seq import write_tiny_seq2seq
from tests.builders_system import System, running_system
from tests.builders_tasks import real_sentence_model, write_encoder
from tests.builders_translation import T5_PARAMS, their_tokenizer
from tests.examples.common import RANDOM_MARK
from worker.engine.demo import demo_model_dir

# Each script with the model that it is run with.
EXAMPLES: Final[Mapping[str, str]] = {
    "generate": "gpt2",
    "completion": "smollm2",
    "chat": "smollm2",
    "classify": "bert",
    "sentiment": "distilbert",
    "find_entities": "ner",
    "answer_question": "reader",
    "translate": "t5",
    "summarize": "t5",
    "embed": "minilm",
}


def write_models(base: Path) -> dict[str, Path]:
    """Return a directory for each model; those with random weights are marked so."""
    random = {
        "gpt2": write_gpt2(base / "gpt2"),
        "bert": write_encoder(base / "bert", "bert", labels=("entailment", "neutral", "contradiction")),
        "distilbert": write_encoder(base / "distilbert", "distilbert", labels=("NEGATIVE", "POSITIVE")),
        "ner": write_encoder(base / "ner", "bert", "tokens"),
        "reader": write_encoder(base / "reader", "bert", "spans"),
        "t5": write_t5(base / "t5"),
    }
    for folder in random.values():
        (folder / RANDOM_MARK).touch()
    return {**random, "smollm2": demo_model_dir(), "minilm": real_sentence_model()}


def write_gpt2(folder: Path) -> Path:
    """A tiny GPT-2 whose tokenizer transformers loads too."""
    write_tiny_model(folder, "gpt2")
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token": "<eos>"}))
    return folder


def write_t5(folder: Path) -> Path:
    """A tiny T5 with a tokenizer of its own, that is told its tasks by prefixes."""
    tokenizer = their_tokenizer("t5")
    write_tiny_seq2seq(
        folder, "t5", vocab_size=len(tokenizer), eos_token_id=1, pad_token_id=0, decoder_start_token_id=0
    )
    (folder / "tokenizer.json").unlink()
    tokenizer.save_pretrained(folder)
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "task_specific_params": T5_PARAMS}))
    return folder


def run_all(system: System, folders: Mapping[str, Path]) -> dict[str, int]:
    """Run the scripts one after another; return their exit statuses."""
    gateway = system.gateways[0]
    key = system.create_key("examples")
    statuses = {}
    for script, model in EXAMPLES.items():
        sys.stdout.write(f"\n== {script} ({model})\n")
        sys.stdout.flush()
        arguments = ["--model", str(folders[model]), "--name", model, "--address", gateway.address, "--key", key]
        arguments += ["--openai-url", f"http://{gateway.openai_address}/v1"]
        command = [sys.executable, "-m", f"tests.examples.{script}", *arguments]
        env = {**os.environ, **({"PYTHONPATH": openai_path()} if script == "completion" else {})}
        statuses[script] = subprocess.run(command, check=False, timeout=300, env=env).returncode
    return statuses


def openai_path() -> str:
    """Where `openai` is installed: in an environment of its own, since nothing here depends on it."""
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    found = subprocess.run([openai_python(), "-c", code], check=True, capture_output=True, text=True)
    return found.stdout.strip()


def main() -> int:
    with tempfile.TemporaryDirectory() as name:
        base = Path(name)
        folders = write_models(base)
        with running_system(base) as system:
            system.add_gateway()
            for model in sorted(set(EXAMPLES.values())):
                system.add_worker(folders[model], model)
            asyncio.run(system.ready(*set(EXAMPLES.values())))
            statuses = run_all(system, folders)
    failed = [script for script, status in statuses.items() if status]
    sys.stdout.write(json.dumps({"target": "examples", "run": len(statuses), "failed": failed}) + "\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
