"""Tokenizers are made of sentencepiece files as transformers' classes, or sentencepiece itself, would read them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase
from transformers.utils import sentencepiece_model_pb2_new as sentencepiece_model

from tests.builders_translation import (
    BPE,
    BPE_PIECES,
    FAIRSEQ_CONTROL,
    KNOWN,
    MARIAN_SOURCE,
    MARIAN_TARGET,
    PIECES,
    SPACE,
    bpe_pieces,
    lower_case_charsmap,
    marian_ids,
    numbered,
    segment,
    texts,
    their_tokenizer,
    unigram_pieces,
    write_original_tokenizer,
    write_settings,
    write_spm,
)
from worker.engine.model_files import TextFiles, read_text_files
from worker.engine.sentencepiece_files import ModelError


def read(folder: Path) -> Tokenizer:
    return read_text_files(folder).tokenizer


class TestT5:
    """The sentinels stand behind the pieces, the last one first."""

    @pytest.fixture(scope="class")
    @classmethod
    def made(cls, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
        return read(write_original_tokenizer(tmp_path_factory.mktemp("t5"), "t5"))

    @pytest.fixture(scope="class")
    @classmethod
    def theirs(cls) -> PreTrainedTokenizerBase:
        return their_tokenizer("t5")

    @given(text=texts)
    def test_ids_are_transformers(self, text: str, made: Tokenizer, theirs: PreTrainedTokenizerBase) -> None:
        if text.strip(" "):
            assert made.encode(text).ids == theirs(text)["input_ids"]

    def test_sentinels_have_their_places(self, made: Tokenizer, theirs: PreTrainedTokenizerBase) -> None:
        text = "ab <extra_id_0> cd <extra_id_99>"
        assert made.encode(text).ids == theirs(text)["input_ids"]
        assert made.token_to_id("<extra_id_0>") == made.get_vocab_size() - 1 == 3 + len(PIECES) + 99
        assert made.decode(made.encode(text).ids) == "ab cd"

    def test_their_number_is_the_configuration_s(self, tmp_path: Path) -> None:
        write_spm(tmp_path / "spiece.model", PIECES, control=("<pad>", "</s>", "<unk>"))
        write_settings(tmp_path, "T5Tokenizer", extra_ids=3)
        assert read(tmp_path).get_vocab_size() == 3 + len(PIECES) + 3
        write_settings(tmp_path, "T5Tokenizer", extra_ids="many")
        with pytest.raises(ModelError, match="extra_ids is not a number"):
            read(tmp_path)


class TestMbart:
    """Four control tokens before the pieces, languages and the mask behind them."""

    @given(text=texts)
    def test_ids_are_transformers(self, text: str, both: tuple[Tokenizer, PreTrainedTokenizerBase]) -> None:
        made, theirs = both
        if text.strip(" "):  # sentencepiece leaves spaces out at the end, which their class for the later kind does not
            assert made.encode(text).ids == theirs(text.strip(" "))["input_ids"]

    @pytest.fixture(scope="class", params=["mbart", "mbart50"])
    @classmethod
    def both(
        cls, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
    ) -> tuple[Tokenizer, PreTrainedTokenizerBase]:
        folder = write_original_tokenizer(tmp_path_factory.mktemp("mbart"), request.param, src_lang="de_DE")
        return read(folder), their_tokenizer(request.param, src_lang="de_DE")

    def test_all_tokens_have_the_same_ids(self, both: tuple[Tokenizer, PreTrainedTokenizerBase]) -> None:
        made, theirs = both
        assert made.get_vocab() == theirs.get_vocab()
        special = {token.content for token in made.get_added_tokens_decoder().values() if token.special}
        assert special >= {"de_DE", "ro_RO", "<mask>", "</s>"}


class TestNllb:
    """BPE, with the languages behind the pieces."""

    @pytest.fixture(scope="class", params=["nllb", "nllb-legacy"])
    @classmethod
    def both(
        cls, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
    ) -> tuple[Tokenizer, PreTrainedTokenizerBase]:
        folder = write_original_tokenizer(tmp_path_factory.mktemp("nllb"), request.param, src_lang="fra_Latn")
        return read(folder), their_tokenizer(request.param, src_lang="fra_Latn")

    @given(text=texts)
    def test_ids_are_transformers(self, text: str, both: tuple[Tokenizer, PreTrainedTokenizerBase]) -> None:
        made, theirs = both
        if text.strip(" "):  # the rest of their normalization is a part of the file that this one lacks
            assert made.encode(text).ids == theirs(" ".join(text.split()))["input_ids"]

    def test_languages_have_the_ids_of_the_published_model(self, both: tuple[Tokenizer, object]) -> None:
        made, first = both[0], len(FAIRSEQ_CONTROL) + len(BPE_PIECES)
        # With its 255,997 pieces the first language is 256001 and the mask 256203, as all NLLB models have it.
        places = [
            made.token_to_id(token) - first for token in ("ace_Arab", "eng_Latn", "fra_Latn", "zul_Latn", "<mask>")
        ]
        assert places == [0, 46, 56, 201, 202]


class TestMarian:
    """Two segmentations, one vocabulary whose ids are those of neither."""

    @pytest.fixture(scope="class")
    @classmethod
    def ids(cls) -> dict[str, int]:
        return marian_ids(">>deu<<", ">>fra<<")

    @pytest.fixture(scope="class")
    @classmethod
    def made(cls, tmp_path_factory: pytest.TempPathFactory) -> TextFiles:
        return read_text_files(write_original_tokenizer(tmp_path_factory.mktemp("marian"), "marian-multi"))

    @given(text=texts)
    def test_sources_are_segmented_by_their_own_pieces(self, text: str, made: TextFiles, ids: dict[str, int]) -> None:
        source = Tokenizer.from_buffer(made.source_tokenizer_json)
        scores = dict(MARIAN_SOURCE)
        found = source.encode(text)
        expected = segment(scores, text)
        assert found.tokens == [*expected, "</s>"]
        known = [token_id if token_id < len(ids) else ids["<unk>"] for token_id in found.ids]
        assert known == [*(ids.get(piece, 1) if piece in scores else 1 for piece in expected), ids["</s>"]]

    def test_what_the_model_writes_is_read_by_vocab_json(self, made: TextFiles, ids: dict[str, int]) -> None:
        for piece, token_id in ids.items():
            assert made.tokenizer.id_to_token(token_id) == piece
        words = [piece for piece in ids if piece.startswith(SPACE) and len(piece) > 1][:5]
        text = "".join(words).replace(SPACE, " ").strip()
        assert made.tokenizer.decode([*(ids[word] for word in words), ids["</s>"]]) == text

    @given(text=texts)
    def test_words_of_the_target_are_segmented_by_its_pieces(self, text: str, made: TextFiles) -> None:
        text = "".join(letter for letter in text if letter in "abcdeßxy ")  # unknown ones fall back on the source's
        tokens = made.tokenizer.encode(text, add_special_tokens=False).tokens
        assert tokens == segment(dict(MARIAN_TARGET), text)

    def test_ids_without_a_meaning_write_nothing(self, tmp_path: Path) -> None:
        """A model may have more ids than its vocabulary."""
        folder = write_original_tokenizer(tmp_path, "marian")
        (folder / "config.json").write_text(json.dumps({"model_type": "marian", "vocab_size": 200}))
        made, ids = read_text_files(folder), marian_ids()
        word = next(token_id for piece, token_id in ids.items() if piece.startswith(SPACE) and len(piece) > 2)
        alone = made.tokenizer.decode([word])
        assert alone
        assert made.tokenizer.decode([len(ids), word, 199]) == alone
        source = Tokenizer.from_buffer(made.source_tokenizer_json)
        missing = next(piece for piece, _ in MARIAN_SOURCE if piece not in ids)
        assert source.token_to_id(missing) >= 200

    def test_two_vocabularies_are_kept_apart(self, tmp_path: Path) -> None:
        folder = write_settings(tmp_path, "MarianTokenizer", separate_vocabs=True)
        write_spm(folder / "source.spm", MARIAN_SOURCE)
        write_spm(folder / "target.spm", MARIAN_TARGET)
        for name, pieces in (("vocab.json", MARIAN_SOURCE), ("target_vocab.json", MARIAN_TARGET)):
            ids = numbered(["</s>", "<unk>", *(piece for piece, _ in reversed(pieces)), "<pad>"])
            (folder / name).write_text(json.dumps(ids))
        made = read_text_files(folder)
        source = Tokenizer.from_buffer(made.source_tokenizer_json)
        for tokenizer, pieces in ((source, MARIAN_SOURCE), (made.tokenizer, MARIAN_TARGET)):
            assert [tokenizer.token_to_id(piece) for piece, _ in reversed(pieces)] == [*range(2, 2 + len(pieces))]


class TestM2M100:
    """Pieces by vocab.json, languages behind it."""

    @pytest.mark.parametrize("kind", ["unigram", "bpe"])
    def test_ids_are_those_of_vocab_json(self, tmp_path: Path, kind: str) -> None:
        pieces = unigram_pieces(seed=4) if kind == "unigram" else bpe_pieces(seed=4)
        ids = numbered(["<s>", "<pad>", "</s>", "<unk>", *(piece for piece, _ in reversed(pieces))])
        folder = write_settings(tmp_path, "M2M100Tokenizer", src_lang="de")
        write_spm(folder / "sentencepiece.bpe.model", pieces, kind=1 if kind == "unigram" else BPE)
        (folder / "vocab.json").write_text(json.dumps(ids))
        made = read(folder)
        first, text = len(ids), "abba  jig x cab"
        # With its 128,004 tokens en is 128022, as the published models have it.
        assert [made.token_to_id(f"__{code}__") - first for code in ("af", "de", "en", "zu")] == [0, 16, 18, 99]
        encoded = made.encode(text)
        assert (encoded.tokens[0], encoded.tokens[-1]) == ("__de__", "</s>")
        assert encoded.ids[1:-1] == [ids.get(token, ids["<unk>"]) for token in encoded.tokens[1:-1]]
        if kind == "unigram":
            assert encoded.tokens[1:-1] == segment(dict(pieces), text)
        assert made.decode(encoded.ids) == "abba jig  cab"


def test_texts_are_normalized_as_the_file_says(tmp_path: Path) -> None:
    write_settings(tmp_path, "T5Tokenizer", extra_ids=0)
    write_spm(tmp_path / "spiece.model", PIECES, control=("<pad>", "</s>", "<unk>"), charsmap=lower_case_charsmap())
    made = read(tmp_path)
    assert made.encode("ABBA Jig").ids == made.encode("abba jig").ids
    assert made.encode("ABBA Jig").tokens == [*segment(dict(PIECES), "abba jig"), "</s>"]


def test_pieces_of_its_maker_are_found_first(tmp_path: Path) -> None:
    write_settings(tmp_path, "T5Tokenizer", extra_ids=0)
    write_spm(tmp_path / "spiece.model", PIECES, control=("<pad>", "</s>", "<unk>"), defined=["cab"])
    assert "cab" in read(tmp_path).encode("abcaba").tokens


class TestAddedTokens:
    """What a fine-tune has added behind the files."""

    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        write_spm(tmp_path / "spiece.model", PIECES, control=("<pad>", "</s>", "<unk>"))
        return write_settings(tmp_path, "T5Tokenizer", extra_ids=0)

    def test_it_has_its_ids(self, folder: Path) -> None:
        size = 3 + len(PIECES)
        (folder / "added_tokens.json").write_text(json.dumps({"<new>": size, "<far>": size + 2}))
        made = read(folder)
        assert (made.token_to_id("<new>"), made.token_to_id("<far>")) == (size, size + 2)
        assert made.encode("ab<new>ab").ids.count(size) == 1

    def test_it_may_not_take_another_s(self, folder: Path) -> None:
        write_settings(folder, "T5Tokenizer", extra_ids=0, added_tokens_decoder={"5": {"content": "<new>"}})
        with pytest.raises(ModelError, match="adds the token '<new>' with the id 5, which"):
            read(folder)
        write_settings(folder, "T5Tokenizer", extra_ids=0, added_tokens_decoder={"1": {"content": "</s>"}})
        assert read(folder).encode("").ids == [1]


def changed(path: Path, **fields: Any) -> None:
    message: Any = sentencepiece_model.ModelProto()
    message.ParseFromString(path.read_bytes())
    for name, value in fields.items():
        setattr(message.trainer_spec, name, value)
    path.write_bytes(message.SerializeToString())


@pytest.mark.parametrize(
    ("fields", "what"),
    [
        ({"model_type": 3}, "neither as unigram nor as BPE"),
        ({"byte_fallback": True}, "falls back to bytes"),
        ({"treat_whitespace_as_suffix": True}, "treats spaces in a way"),
    ],
)
def test_kinds_that_cannot_be_had_are_refused_by_name(tmp_path: Path, fields: dict[str, Any], what: str) -> None:
    write_settings(tmp_path, "T5Tokenizer")
    changed(write_spm(tmp_path / "spiece.model", PIECES, control=("<pad>", "</s>", "<unk>")), **fields)
    with pytest.raises(ModelError, match=rf"spiece\.model.*{what}"):
        read(tmp_path)


def test_damaged_and_missing_files_are_named(tmp_path: Path) -> None:
    write_settings(tmp_path, "MarianTokenizer")
    (tmp_path / "vocab.json").write_text(json.dumps(numbered(["</s>", "<unk>", *KNOWN])))
    with pytest.raises(ModelError, match=r"target\.spm, of which one could be made, is missing"):
        read(tmp_path)
    (tmp_path / "target.spm").write_bytes(b"\xff\xff no message")
    with pytest.raises(ModelError, match=r"target\.spm is no sentencepiece model"):
        read(tmp_path)
    (tmp_path / "vocab.json").write_text(json.dumps({"</s>": 0, "<unk>": 0}))
    with pytest.raises(ModelError, match=r"vocab\.json gives one id to several tokens"):
        read(tmp_path)
    (tmp_path / "vocab.json").write_text(json.dumps({"a": 0}))
    with pytest.raises(ModelError, match=r"vocab\.json has no </s>"):
        read(tmp_path)


def test_the_same_piece_twice_is_refused(tmp_path: Path) -> None:
    write_settings(tmp_path, "T5Tokenizer")
    write_spm(tmp_path / "spiece.model", [*PIECES, PIECES[5]], control=("<pad>", "</s>", "<unk>"))
    with pytest.raises(ModelError, match="a piece that is there twice"):
        read(tmp_path)
