"""Which models are encoders, what their files make of them, and which are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from common.tasks import EmbedTask, EncodedText, ScoreFunction, pack_ids
from tests.builders_models import write_tiny_model
from tests.builders_tasks import real_sentence_model, write_encoder
from worker.engine.model_files import ModelError
from worker.settings import WorkerSettings
from worker.tasks.answers import answer
from worker.tasks.assembly import make_encoder_card
from worker.tasks.facts import Head
from worker.tasks.loading import LoadedEncoder, find_head, load_encoder
from worker.tasks.report import check_encoder, describe_encoder
from worker.tasks.runner import Text

CPU = torch.device("cpu")


def load(folder: Path, **options: Any) -> LoadedEncoder:
    head = find_head(str(folder))
    assert head is not None
    return load_encoder(str(folder), head, torch.float32, CPU, **options)


def change(folder: Path, file: str = "config.json", **values: Any) -> None:
    path = folder / file
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**content, **values}))


def write_sentence_files(folder: Path, pooling: str = "mean", *, dense: bool = False, normalize: bool = True) -> None:
    """As sentence-transformers writes them beside a model."""
    modules = [("0", "", "Transformer"), ("1", "1_Pooling", "Pooling")]
    modules += [("2", "2_Dense", "Dense")] if dense else []
    modules += [("3", "3_Normalize", "Normalize")] if normalize else []
    entries = [
        {"idx": int(i), "name": i, "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, path, kind in modules
    ]
    (folder / "modules.json").write_text(json.dumps(entries))
    (folder / "1_Pooling").mkdir(exist_ok=True)
    modes = {"cls": "cls_token", "mean": "mean_tokens", "max": "max_tokens", "last": "lasttoken"}
    config = {f"pooling_mode_{name}": mode == pooling for mode, name in modes.items()}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(config))
    if dense:
        (folder / "2_Dense").mkdir(exist_ok=True)
        activation = "torch.nn.modules.activation.Tanh"
        config_of_dense = {"in_features": 48, "out_features": 20, "bias": True, "activation_function": activation}
        (folder / "2_Dense" / "config.json").write_text(json.dumps(config_of_dense))
        torch.manual_seed(3)
        save_file(
            {"linear.weight": torch.randn(20, 48), "linear.bias": torch.randn(20)},
            folder / "2_Dense" / "model.safetensors",
        )


def test_what_a_model_is_for_is_told_by_its_class_and_its_files(tmp_path: Path) -> None:
    for head, found in (
        ("body", Head.VECTOR),
        ("labels", Head.LABELS),
        ("tokens", Head.TOKEN_LABELS),
        ("spans", Head.SPANS),
    ):
        assert find_head(str(write_encoder(tmp_path / head, "bert", head))) is found
    for family in ("llama", "gpt2"):  # the one's class is LlamaForCausalLM, the other's GPT2LMHeadModel
        assert find_head(str(write_tiny_model(tmp_path / family, family))) is None
    assert find_head(str(real_sentence_model())) is Head.VECTOR
    change(tmp_path / "labels", is_encoder_decoder=True)
    with pytest.raises(ModelError, match="classifier behind a decoder"):
        find_head(str(tmp_path / "labels"))
    write_sentence_files(tmp_path / "llama")
    assert find_head(str(tmp_path / "llama")) is Head.VECTOR


def test_scores_are_what_the_model_was_trained_with(tmp_path: Path) -> None:
    folder = write_encoder(tmp_path / "m")
    assert load(folder).facts.function is ScoreFunction.SOFTMAX
    change(folder, problem_type="multi_label_classification")
    assert load(folder).facts.function is ScoreFunction.SIGMOID
    change(folder, problem_type="regression")
    assert load(folder).facts.function is ScoreFunction.NONE
    single = load(write_encoder(tmp_path / "single", labels=("only",)))
    assert single.facts.function is ScoreFunction.SIGMOID
    assert single.facts.tasks == ("classify", "rerank")


@pytest.mark.parametrize("pooling", ["mean", "cls", "max", "last"])
def test_vectors_are_made_as_sentence_transformers_files_say(tmp_path: Path, pooling: str) -> None:
    folder = write_encoder(tmp_path / "m", "bert", "body")
    write_sentence_files(folder, pooling, dense=True)
    change(folder, "sentence_bert_config.json", max_seq_length=40)
    loaded = load(folder)
    assert (loaded.max_tokens, loaded.facts.dimensions, loaded.facts.normalizes) == (40, 20, True)
    ids = np.arange(5, 16, dtype=np.int32)
    with torch.no_grad():
        hidden = loaded.module.body(input_ids=torch.tensor(ids).long()[None]).last_hidden_state[0]
        pooled = {"mean": hidden.mean(0), "cls": hidden[0], "max": hidden.amax(0), "last": hidden[-1]}[pooling]
        torch.manual_seed(3)
        weight, bias = torch.randn(20, 48), torch.randn(20)
        expected = torch.nn.functional.normalize(torch.tanh(weight @ pooled + bias), dim=0)
    outputs = loaded.module.run([Text(ids), Text(np.arange(4, 30, dtype=np.int32))])[:1]
    result: Any = answer(EmbedTask((EncodedText(pack_ids(ids.tolist())),)), outputs, loaded.facts)
    assert np.allclose(np.frombuffer(result.vectors[0], "<f4"), expected, atol=1e-5)


def test_the_files_beside_a_model_are_part_of_its_revision(tmp_path: Path) -> None:
    folder = write_encoder(tmp_path / "m", "bert", "body")
    revisions = [load(folder).revision]
    for pooling in ("mean", "cls"):
        write_sentence_files(folder, pooling)
        revisions.append(load(folder).revision)
    change(folder, "sentence_bert_config.json", max_seq_length=40)
    revisions.append(load(folder).revision)
    assert len(set(revisions)) == 4


def test_a_card_without_weights_is_that_of_a_worker_but_for_its_size(tmp_path: Path) -> None:
    folder = write_encoder(tmp_path / "m", "xlm-roberta", "tokens")
    whole, described = (make_encoder_card(load(folder, with_weights=w), "m") for w in (True, False))
    assert whole.card.weight_bytes > 0
    assert {**vars_of(whole.card), "weight_bytes": 0} == vars_of(described.card)
    assert whole.files == described.files


def vars_of(card: Any) -> dict[str, Any]:
    return {name: getattr(card, name) for name in card.__struct_fields__}


@pytest.mark.parametrize(
    ("file", "values", "message"),
    [
        ("config.json", {"id2label": dict(zip("012349", "abcdef", strict=True))}, "label for each"),
        ("config.json", {"num_hidden_layers": 3}, "missing_keys|do not fit"),
        ("config.json", {"intermediate_size": 65}, "mismatched_keys|do not fit"),
        (
            "config.json",
            {"auto_map": {"AutoModel": "x.y"}, "model_type": "mine"},
            "code that comes with the model|transformers",
        ),
    ],
)
def test_a_broken_model_is_refused_with_its_reason(
    tmp_path: Path, file: str, values: dict[str, Any], message: str
) -> None:
    folder = write_encoder(tmp_path / "m")
    change(folder, file, **values)
    with pytest.raises(ModelError, match=message):
        load(folder)


def test_parts_that_are_not_served_are_refused(tmp_path: Path) -> None:
    folder = write_encoder(tmp_path / "m", "bert", "body")
    write_sentence_files(folder, dense=True)
    good = (folder / "modules.json").read_text()
    (folder / "modules.json").write_text(good.replace("models.Normalize", "models.LSTM"))
    with pytest.raises(ModelError, match="'LSTM'"):
        load(folder)
    (folder / "modules.json").write_text(good.replace("1_Pooling", "../1_Pooling"))
    with pytest.raises(ModelError, match="names the directory"):
        load(folder)
    (folder / "modules.json").write_text("{}")
    with pytest.raises(ModelError, match="list of parts"):
        load(folder)
    (folder / "modules.json").write_text(good)
    (folder / "1_Pooling" / "config.json").write_text(
        json.dumps({"pooling_mode_cls_token": True, "pooling_mode_max_tokens": True})
    )
    with pytest.raises(ModelError, match="must choose one"):
        load(folder)
    write_sentence_files(folder, dense=True)
    change(folder / "2_Dense", activation_function="torch.nn.modules.activation.GELU")
    with pytest.raises(ModelError, match="activation"):
        load(folder)
    write_sentence_files(folder, dense=True)
    change(folder / "2_Dense", out_features=21)
    with pytest.raises(ModelError, match="does not hold the layer"):
        load(folder)
    outside = tmp_path / "outside"
    (folder / "1_Pooling").rename(outside)
    (folder / "1_Pooling").symlink_to(outside)
    with pytest.raises(ModelError, match="link to outside"):
        load(folder)


def test_the_report_tells_what_a_model_does(tmp_path: Path) -> None:
    folder = write_encoder(tmp_path / "m")
    report = check_encoder(WorkerSettings(model=str(folder), dtype="float32", device="cpu", num_threads=1), Head.LABELS)
    assert (report.tasks, report.context_tokens, report.labels[0]) == (("classify",), 96, "O")
    assert report.load_check_error < report.load_check_tolerance
    text = describe_encoder(report)
    assert "tasks         classify" in text
    assert "labels        O, B-PER" in text
