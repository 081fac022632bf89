"""What a worker publishes of an encoder-decoder model: its tasks, languages, layout, defaults."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from common.registry import LanguagePlace, ModelCard, Seq2SeqCard
from tests.builders_models import write_tiny_model
from tests.builders_translation import T5_PARAMS, publish, unigram_pieces, write_spm, write_translator
from worker.engine.model import ModelError


def card_of(folder: Path, kind: str, *, settings: dict[str, Any] | None = None, **config: Any) -> ModelCard:
    return publish(write_translator(folder / kind, kind, settings=settings, **config)).card


def own(card: ModelCard) -> Seq2SeqCard:
    assert card.seq2seq is not None
    return card.seq2seq


def test_a_card_holds_how_a_text_is_laid_out(tmp_path: Path) -> None:
    card, files = publish(write_translator(tmp_path / "marian", "marian-multi", settings={"source_lang": "en"}))
    assert card.tasks == ("generate", "translate")
    assert own(card) == Seq2SeqCard(
        max_source_tokens=256,
        decoder_start_token_ids=(3,),
        after=(0,),
        target_place=LanguagePlace.SOURCE_START,
        languages={"deu": 101, "fra": 102},
        default_source="en",
        unk_token_id=1,
        names_unknown=True,
    )
    assert set(files) == set(card.tokenizer_files) == {"tokenizer.json", "source_tokenizer.json", "special_tokens.json"}


@pytest.mark.parametrize(
    ("params", "tasks", "pairs", "prefix"),
    [
        (T5_PARAMS, ("generate", "translate", "summarize"), 2, "cab: "),
        ({"summarization": {"prefix": "tl;dr: "}}, ("generate", "summarize"), 0, "tl;dr: "),
        ({"translation_en_to_ro": {"prefix": "to ro: "}}, ("generate", "translate"), 1, ""),
        ({}, ("generate",), 0, ""),
        (None, ("generate",), 0, ""),
    ],
)
def test_t5_does_what_its_configuration_describes(
    tmp_path: Path, params: Any, tasks: tuple[str, ...], pairs: int, prefix: str
) -> None:
    card = card_of(tmp_path, "t5", task_specific_params=params)
    assert card.tasks == tasks
    assert (len(own(card).pair_prefixes), own(card).summary_prefix) == (pairs, prefix)


def test_both_kinds_of_mbart_are_told_apart_without_a_name(tmp_path: Path) -> None:
    """By the languages that only the later one has."""
    for kind, place in (("mbart", LanguagePlace.DECODER_START), ("mbart50", LanguagePlace.FIRST_TOKEN)):
        folder = write_translator(tmp_path / kind, kind)
        card, files = publish(folder)
        (folder / "tokenizer.json").write_bytes(files["tokenizer.json"])
        (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
        assert own(publish(folder).card).target_place == own(card).target_place == place


def test_a_model_of_one_target_names_it(tmp_path: Path) -> None:
    languages = own(card_of(tmp_path / "any", "mbart50")).languages
    forced = card_of(tmp_path / "forced", "mbart50", forced_bos_token_id=languages["ro_RO"])
    assert own(forced).default_target == ""  # generation_config.json is what counts
    folder = write_translator(tmp_path / "mbart50", "mbart50")
    path = folder / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "forced_bos_token_id": languages["ro_RO"]}))
    card, _ = publish(folder)
    assert (own(card).default_target, card.defaults.forced_bos_token_id) == ("ro_RO", languages["ro_RO"])
    folder = write_translator(tmp_path / "mbart", "mbart")
    path = folder / "generation_config.json"
    ids = own(publish(folder).card).languages
    path.write_text(json.dumps({**json.loads(path.read_text()), "decoder_start_token_id": ids["fr_XX"]}))
    assert own(publish(folder).card).default_target == "fr_XX"


def test_languages_that_the_tokenizer_does_not_know_are_no_defaults(tmp_path: Path) -> None:
    card = card_of(tmp_path, "nllb", settings={"tgt_lang": "tlh_Latn"})
    assert (own(card).default_source, own(card).default_target) == ("", "")


def test_without_tokens_of_languages_there_is_no_translation(tmp_path: Path) -> None:
    folder = write_translator(tmp_path / "nllb", "nllb")
    folder.joinpath("sentencepiece.bpe.model").unlink()
    bart = write_translator(tmp_path / "bart", "bart")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((bart / name).read_bytes())
    assert publish(folder).card.tasks == ("generate",)


def test_an_operator_may_say_otherwise(tmp_path: Path) -> None:
    folder = write_translator(tmp_path / "t5", "t5", task_specific_params=T5_PARAMS)
    assert publish(folder, tasks=" summarize, generate ").card.tasks == ("generate", "summarize")
    with pytest.raises(ModelError, match="'classify' is no task of an encoder-decoder model; it takes generate"):
        publish(folder, tasks="classify")
    plain = write_tiny_model(tmp_path / "llama")
    with pytest.raises(ModelError, match="no encoder-decoder model"):
        publish(plain, tasks="generate")
    assert publish(plain).card.seq2seq is None


def test_a_source_leaves_a_block_to_the_decoder(tmp_path: Path) -> None:
    folder = write_translator(tmp_path / "bart", "bart")
    found = [own(publish(folder, kv_tokens=kv).card).max_source_tokens for kv in (4096, 272, 271, 48)]
    assert found == [256, 256, 240, 32]
    with pytest.raises(ModelError, match="enlarge it"):
        publish(folder, kv_tokens=16)


def test_a_tokenizer_of_the_source_alone_makes_another_revision(tmp_path: Path) -> None:
    folder = write_translator(tmp_path / "marian", "marian")
    before = publish(folder).card.revision
    assert publish(folder).card.revision == before
    write_spm(folder / "source.spm", unigram_pieces(seed=9))
    assert publish(folder).card.revision != before
