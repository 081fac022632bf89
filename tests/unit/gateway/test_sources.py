"""What an encoder reads is what transformers' tokenizers would give it, for each family's way of telling a language."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from transformers import AutoTokenizer

from common.errors import FailedPrecondition, InvalidRequest
from common.generation import SamplingParams
from common.grants import Caps
from common.registry import LanguagePlace, ModelCard, Seq2SeqCard
from gateway import sources
from gateway.catalog import EncodedInput, ServedModel, default_config
from tests.builders_translation import (
    MARIAN_SOURCE,
    MARIAN_TARGET,
    T5_PARAMS,
    marian_ids,
    publish,
    segment,
    served,
    summary,
    texts,
    their_tokenizer,
    translation,
    write_translator,
)
from torchrelay.v1 import generation_pb2 as pb

CONFIG: dict[str, dict[str, Any]] = {"t5": {"task_specific_params": T5_PARAMS}, "bart": {"prefix": " "}}
START = 3  # what decoders of the tiny models begin with


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ServedModel]:
    """Models by the kind of their tokenizer, made when they are asked for."""

    @cache
    def make(kind: str) -> ServedModel:
        folder = write_translator(tmp_path_factory.mktemp("models") / kind, kind, **CONFIG.get(kind, {}))
        return served(publish(folder))

    class Made(dict[str, ServedModel]):
        def __missing__(self, kind: str) -> ServedModel:
            return make(kind)

    return Made()


def trimmed(text: str) -> str:
    """As sentencepiece reads it; what transformers' classes do with spaces differs."""
    return " ".join(text.split())


class TestLayout:
    """Ids, what the decoder begins with, and what is forced."""

    @pytest.mark.parametrize("kind", ["mbart50", "nllb", "nllb-legacy"])
    @settings(deadline=None)  # models are made when they are first asked for
    @given(text=texts)
    async def test_the_target_is_forced(self, kind: str, text: str, models: dict[str, ServedModel]) -> None:
        source, target = ("de_DE", "gl_ES") if kind == "mbart50" else ("eng_Latn", "zul_Latn")
        if not trimmed(text):
            return
        theirs = their_tokenizer(kind)._build_translation_inputs(
            trimmed(text), return_tensors=None, src_lang=source, tgt_lang=target
        )
        found = await models[kind].encode(translation(text, target, source))
        assert found.source_token_ids == theirs["input_ids"]
        assert (found.token_ids, found.forced_bos_token_id) == ([START], theirs["forced_bos_token_id"])

    @settings(deadline=None)  # models are made when they are first asked for
    @given(text=texts)
    async def test_or_the_decoder_begins_with_it(self, text: str, models: dict[str, ServedModel]) -> None:
        if not trimmed(text):
            return
        theirs = their_tokenizer("mbart", src_lang="ro_RO")
        found = await models["mbart"].encode(translation(text, "fr_XX", "ro_RO"))
        assert found.source_token_ids == theirs(trimmed(text))["input_ids"]
        assert (found.token_ids, found.forced_bos_token_id) == ([theirs.convert_tokens_to_ids("fr_XX")], None)

    @settings(deadline=None)  # models are made when they are first asked for
    @given(text=texts)
    async def test_or_words_ask_for_it(self, text: str, models: dict[str, ServedModel]) -> None:
        theirs = their_tokenizer("t5")
        for wanted, prefix in (
            (translation(text, "fr", "en"), "abba jab: "),
            (translation(text, "de", "en"), "abba jig: "),
            (summary(text), "cab: "),
        ):
            if text:
                found = await models["t5"].encode(wanted)
                assert found.source_token_ids == theirs(prefix + text)["input_ids"]
                assert (found.token_ids, found.forced_bos_token_id) == ([START], None)

    @settings(deadline=None)  # models are made when they are first asked for
    @given(text=texts)
    async def test_marian_looks_pieces_up_in_one_vocabulary(self, text: str, models: dict[str, ServedModel]) -> None:
        ids, scores = marian_ids(">>deu<<", ">>fra<<"), dict(MARIAN_SOURCE)
        if not trimmed(text):
            return
        expected = [ids[">>fra<<"], *(ids.get(piece, ids["<unk>"]) for piece in segment(scores, text)), ids["</s>"]]
        found = await models["marian-multi"].encode(translation(text, "fra"))
        assert found.source_token_ids == expected
        assert (found.token_ids, found.forced_bos_token_id) == ([START], None)

    async def test_what_the_source_does_not_know_the_target_may(self, models: dict[str, ServedModel]) -> None:
        """Names are copied: a letter that only the other side has is no unknown one."""
        ids = marian_ids(">>deu<<", ">>fra<<")
        known = [letter for letter in "ßxy" if letter in ids]
        assert known
        assert not set(known) & dict(MARIAN_SOURCE).keys()
        for letter in known:
            found = await models["marian-multi"].encode(translation(f"cab {letter} cab", "fra"))
            assert ids[letter] in found.source_token_ids
        assert dict(MARIAN_TARGET).keys() >= set(known)

    async def test_m2m100_names_languages_between_lines(self, models: dict[str, ServedModel]) -> None:
        model = models["m2m100"]
        found = await model.encode(translation("cab", "zu", "fr"))
        vocab = {code: model.codec.id_of(f"__{code}__") for code in ("zu", "fr")}
        assert vocab == {"zu": None, "fr": None}  # no text can name them
        languages = model.card.seq2seq.languages if model.card.seq2seq else {}
        assert (found.source_token_ids[0], found.forced_bos_token_id) == (languages["fr"], languages["zu"])
        assert model.codec.decode([languages["zu"]], keep_special_tokens=True) == "__zu__"

    @settings(deadline=None)  # models are made when they are first asked for
    @given(text=texts)
    async def test_bart_has_no_words_for_a_summary(self, text: str, models: dict[str, ServedModel], bart: Any) -> None:
        if text:
            found = await models["bart"].encode(summary(text))
            assert found.source_token_ids == bart(" " + text)["input_ids"]  # its configuration's own prefix
            assert found.token_ids == [START]

    @pytest.fixture(scope="class")
    @classmethod
    def bart(cls, tmp_path_factory: pytest.TempPathFactory) -> Any:
        return AutoTokenizer.from_pretrained(write_translator(tmp_path_factory.mktemp("bart") / "bart", "bart"))

    @pytest.mark.parametrize("kind", ["t5", "mbart", "mbart50", "nllb", "bart"])
    async def test_plain_text_gets_what_the_tokenizer_adds(
        self, kind: str, models: dict[str, ServedModel], bart: Any
    ) -> None:
        theirs = bart if kind == "bart" else their_tokenizer(kind)
        found = await models[kind].encode(pb.GenerationInput(text="abba cab"))
        assert found == EncodedInput([START], source_token_ids=theirs("abba cab")["input_ids"])
        assert found.num_tokens == len(found.source_token_ids)

    async def test_ids_are_taken_as_they_are(self, models: dict[str, ServedModel]) -> None:
        found = await models["nllb"].encode(pb.GenerationInput(token_ids=pb.TokenIds(ids=[5, 6])))
        assert found == EncodedInput([START], source_token_ids=[5, 6])


async def test_a_summary_is_told_the_languages_that_a_fine_tune_names(tmp_path: Path) -> None:
    languages = {"src_lang": "ro_RO", "tgt_lang": "de_DE"}
    for kind in ("mbart", "mbart50"):
        folder = write_translator(tmp_path / kind, kind, settings=languages)
        model = served(publish(folder, tasks="generate,translate,summarize"))
        assert await model.encode(summary("cab")) == await model.encode(translation("cab", "de_DE", "ro_RO"))


def test_what_is_read_does_not_count_as_context(models: dict[str, ServedModel]) -> None:
    assert models["t5"].max_input_tokens == 512
    card = _card(None, "generate")
    assert ServedModel(card, models["t5"].codec, default_config(card)).max_input_tokens == 63


class TestControlTokens:
    """In a text they are plain text, also where a model has them among its pieces."""

    @pytest.mark.parametrize(
        ("kind", "text"),
        [
            ("t5", "ab </s> cab"), ("t5", "</s>"), ("mbart", "ab ro_RO cab</s>"), ("mbart50", "gl_ES<mask>"),
            ("nllb", "zul_Latn </s>"), ("marian-multi", ">>deu<< </s><pad>"), ("m2m100", "__zu__ </s>"),
            ("bart", "<s>ab</s>"),
        ],
    )  # fmt: skip
    async def test_none_is_found_in_a_text(self, kind: str, text: str, models: dict[str, ServedModel]) -> None:
        model = models[kind]
        own = model.card.seq2seq
        assert own is not None
        plain = model.sources.encode(pb.GenerationInput(text=text)) if model.sources else None
        assert plain is not None
        control = {token for piece in ("<s>", "<pad>", "</s>", "<mask>") if (token := _id(model, piece)) is not None}
        control |= set(own.languages.values())
        around = model.sources.encode(pb.GenerationInput(text="a")).token_ids if model.sources else []
        num_around = sum(token in control for token in around)
        assert sum(token in control for token in plain.token_ids) == num_around


def _id(model: ServedModel, piece: str) -> int | None:
    token_id = model.codec._with_control.token_to_id(piece)
    return None if token_id is None else int(token_id)


LONG = "abba cab jig dad " * 40


class TestTruncation:
    """What is too long is refused, or cut where the caller says; what stands around a text stays."""

    LIMIT = 12

    def cut(self, model: ServedModel) -> ServedModel:
        assert model.card.seq2seq is not None
        own = msgspec.structs.replace(model.card.seq2seq, max_source_tokens=self.LIMIT)
        card = msgspec.structs.replace(model.card, seq2seq=own)
        reader = model.sources._reader if model.sources else None
        return ServedModel(card, model.codec, model.defaults, sources=sources.SourceEncoder(card, model.codec, reader))

    CASES = (
        ("t5", translation(LONG, "de", "en"), 3, 1), ("t5", summary(LONG), 2, 1), ("bart", summary(LONG), 1, 1),
        ("mbart", translation(LONG, "ro_RO", "en_XX"), 0, 2), ("nllb", translation(LONG, "zul_Latn", "eng_Latn"), 1, 1),
        ("marian-multi", translation(LONG, "deu"), 1, 1),
    )  # fmt: skip

    @pytest.mark.parametrize(("kind", "wanted", "before", "after"), CASES)
    async def test_the_end_or_the_beginning_is_left_out(
        self, kind: str, wanted: pb.GenerationInput, before: int, after: int, models: dict[str, ServedModel]
    ) -> None:
        whole = _whole(models[kind]).encode(wanted).token_ids
        if kind == "t5":  # words that ask for the task are as many tokens as their letters make
            before = (
                len(their_tokenizer("t5")("abba jig:" if wanted.HasField("translation") else "cab:")["input_ids"]) - 1
            )
        small = self.cut(models[kind])
        message = getattr(wanted, wanted.WhichOneof("input") or "")
        for truncation, kept in (
            (pb.TRUNCATION_END, whole[: self.LIMIT - after] + whole[len(whole) - after :]),
            (pb.TRUNCATION_START, whole[:before] + whole[len(whole) - (self.LIMIT - before) :]),
        ):
            message.truncation = truncation
            found = await small.encode(wanted)
            assert found.source_token_ids == kept
            assert len(kept) == self.LIMIT
        message.truncation = pb.TRUNCATION_UNSPECIFIED
        with pytest.raises(InvalidRequest) as raised:
            await small.encode(wanted)
        error = raised.value
        assert error.reason == "CONTEXT_LENGTH_EXCEEDED"
        assert (error.metadata["limit"], error.metadata["field"]) == ("12", f"input.{wanted.WhichOneof('input')}.text")
        if len(LONG) <= self.LIMIT * 64:
            assert error.metadata["got"] == str(len(whole))

    async def test_what_fits_is_not_cut(self, models: dict[str, ServedModel]) -> None:
        small = self.cut(models["nllb"])
        wanted = translation("cab", "zul_Latn", "eng_Latn")
        whole = (await small.encode(wanted)).source_token_ids
        wanted.translation.truncation = pb.TRUNCATION_START
        assert (await small.encode(wanted)).source_token_ids == whole

    @pytest.mark.parametrize("kind", ["text", "ids"])
    async def test_plain_input_is_refused(self, kind: str, models: dict[str, ServedModel]) -> None:
        small = self.cut(models["nllb"])
        for number in (self.LIMIT, self.LIMIT + 1):
            source = pb.GenerationInput(token_ids=pb.TokenIds(ids=[5] * number))
            if kind == "text":
                source = pb.GenerationInput(text=" ".join(["x"] * ((number - 2) // 2)) + (" " if number % 2 else ""))
            if number == self.LIMIT:
                assert len((await small.encode(source)).source_token_ids) == number
            elif kind == "ids":
                with pytest.raises(InvalidRequest) as raised:
                    await small.encode(source)
                assert raised.value.metadata == {"field": "input.token_ids.ids", "limit": "12", "got": "13"}

    async def test_a_huge_text_is_refused_before_it_is_read(
        self, models: dict[str, ServedModel], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        small = self.cut(models["nllb"])
        read: list[int] = []
        assert small.sources is not None
        plain = small.sources._ids
        monkeypatch.setattr(
            sources.SourceEncoder, "_ids", lambda self, text, **how: (read.append(len(text)), plain(text, **how))[1]
        )
        wanted = translation("cab " * 5000, "zul_Latn", "eng_Latn")
        with pytest.raises(InvalidRequest, match="longer than any"):
            await small.encode(wanted)
        assert read == []
        wanted.translation.truncation = pb.TRUNCATION_END
        await small.encode(wanted)
        assert max(read) == self.LIMIT * 64

    async def test_unknown_ways_to_cut_are_refused(self, models: dict[str, ServedModel]) -> None:
        for wanted in (translation("cab", "zul_Latn", "eng_Latn", truncation=7), summary("cab", truncation=7)):
            model = models["nllb" if wanted.HasField("translation") else "bart"]
            with pytest.raises(InvalidRequest) as raised:
                await model.encode(wanted)
            field = f"input.{wanted.WhichOneof('input')}.truncation"
            assert (raised.value.reason, raised.value.metadata["field"]) == ("UNSUPPORTED", field)


def _whole(model: ServedModel) -> sources.SourceEncoder:
    """One that takes any length."""
    assert model.card.seq2seq is not None
    assert model.sources is not None
    own = msgspec.structs.replace(model.card.seq2seq, max_source_tokens=1 << 20)
    return sources.SourceEncoder(msgspec.structs.replace(model.card, seq2seq=own), model.codec, model.sources._reader)


class TestLanguages:
    """Which ones a request may name, and has to."""

    @pytest.mark.parametrize(
        ("kind", "target", "source", "field", "reason", "text"),
        [
            ("nllb", "", "eng_Latn", "target", "FIELD_REQUIRED", "ace_Arab, ace_Latn"),
            ("nllb", "zul_Latn", "", "source", "FIELD_REQUIRED", "and 178 more, which GetModel names"),
            ("nllb", "de", "eng_Latn", "target", "FIELD_INVALID", "is none of the model's: ace_Arab"),
            ("mbart50", "gl_ES", "eng_Latn", "source", "FIELD_INVALID", "is none of the model's: af_ZA"),
            ("marian-multi", "", "", "target", "FIELD_REQUIRED", "one of deu, fra"),
            ("marian-multi", "deu", "en", "source", "FIELD_INVALID", "must be empty: the model does not name its own"),
            ("marian", "deu", "", "target", "FIELD_INVALID", "must be empty"),
            ("t5", "de", "", "source", "FIELD_REQUIRED", "one of en"),
            ("t5", "en", "en", "target", "FIELD_INVALID", "is none of the model's: de, fr"),
        ],
    )
    async def test_others_are_refused_with_those_that_it_knows(
        self, kind: str, target: str, source: str, field: str, reason: str, text: str, models: dict[str, ServedModel]
    ) -> None:
        with pytest.raises(InvalidRequest) as raised:
            await models[kind].encode(translation("cab", target, source))
        error = raised.value
        assert (error.reason, error.metadata["field"]) == (reason, f"input.translation.{field}_language")
        assert text in error.message
        assert len(error.message) < 500

    async def test_a_pair_that_was_not_learned_is_refused(self) -> None:
        own = Seq2SeqCard(
            max_source_tokens=50, decoder_start_token_ids=(0,), pair_prefixes=(("en", "de", "x"), ("fr", "ro", "y"))
        )
        with pytest.raises(InvalidRequest, match=r"from this source language: de$") as raised:
            sources.SourceEncoder(_card(own), None).check(translation("cab", "ro", "en"))  # type: ignore[arg-type]
        assert raised.value.metadata["field"] == "input.translation.target_language"

    async def test_those_of_a_fine_tune_need_not_be_named(self, tmp_path: Path) -> None:
        languages = {"src_lang": "eng_Latn", "tgt_lang": "zul_Latn"}
        model = served(publish(write_translator(tmp_path / "nllb", "nllb", settings=languages)))
        named = await model.encode(translation("cab", "zul_Latn", "eng_Latn"))
        assert await model.encode(translation("cab")) == named
        pair = {"source_lang": "en", "target_lang": "de"}
        one = served(publish(write_translator(tmp_path / "marian", "marian", settings=pair)))
        assert await one.encode(translation("cab", "de", "en")) == await one.encode(translation("cab"))
        with pytest.raises(InvalidRequest, match="is none of the model's: de"):
            await one.encode(translation("cab", "fr"))
        assert sources.languages_of(one.card.seq2seq) == ["de", "en"]

    def test_all_of_them_are_listed(self, models: dict[str, ServedModel]) -> None:
        def listed(kind: str) -> list[str]:
            return sources.languages_of(models[kind].card.seq2seq)

        assert listed("t5") == ["de", "en", "fr"]
        assert listed("marian-multi") == ["deu", "fra"]
        assert listed("bart") == listed("marian") == sources.languages_of(None) == []
        assert [len(listed(kind)) for kind in ("mbart", "mbart50", "nllb", "m2m100")] == [25, 52, 202, 100]
        assert listed("mbart") == sorted(listed("mbart"))


def _card(own: Seq2SeqCard | None, *tasks: str) -> ModelCard:
    return ModelCard(
        name="tiny", revision="r", shard="tiny", vocab_size=50, context_tokens=64, max_output_tokens=63,
        tasks=tasks or ("generate", "translate", "summarize"), seq2seq=own,
    )  # fmt: skip


class TestTasks:
    """A task that a model does not serve is refused with those that it does."""

    @pytest.mark.parametrize(
        ("kind", "wanted", "tasks"),
        [
            ("bart", translation("cab", "de", "en"), "generate,summarize"),
            ("nllb", summary("cab"), "generate,translate"),
            ("marian", summary("cab"), "generate,translate"),
        ],
    )
    async def test_of_an_encoder_decoder_model(
        self, kind: str, wanted: pb.GenerationInput, tasks: str, models: dict[str, ServedModel]
    ) -> None:
        with pytest.raises(FailedPrecondition) as raised:
            await models[kind].encode(wanted)
        assert (raised.value.reason, raised.value.metadata) == ("TASK_NOT_SERVED", {"tasks": tasks})

    async def test_of_another(self, models: dict[str, ServedModel]) -> None:
        card = _card(None, "generate")
        plain = ServedModel(card, models["nllb"].codec, default_config(card))
        for wanted in (translation("cab"), summary("cab")):
            with pytest.raises(FailedPrecondition) as raised:
                await plain.encode(wanted)
            assert (raised.value.reason, raised.value.metadata) == ("TASK_NOT_SERVED", {"tasks": "generate"})

    async def test_plain_input_is_a_task_too(self, models: dict[str, ServedModel]) -> None:
        own = models["nllb"].card.seq2seq
        assert own is not None
        card = _card(own, "translate")
        model = ServedModel(
            card, models["nllb"].codec, default_config(card), sources=sources.SourceEncoder(card, models["nllb"].codec)
        )
        for plain in (pb.GenerationInput(text="cab"), pb.GenerationInput(token_ids=pb.TokenIds(ids=[5]))):
            with pytest.raises(FailedPrecondition):
                await model.encode(plain)
        assert (await model.encode(translation("cab", "zul_Latn", "eng_Latn"))).source_token_ids

    async def test_chats_are_not_served(self, models: dict[str, ServedModel]) -> None:
        message = pb.ChatMessage(role=pb.ROLE_USER, parts=[pb.ContentPart(text="cab")])
        with pytest.raises(FailedPrecondition) as raised:
            await models["t5"].encode(pb.GenerationInput(chat=pb.ChatInput(messages=[message])))
        assert raised.value.reason == "NO_CHAT_TEMPLATE"

    @pytest.mark.parametrize(
        ("wanted", "field"),
        [
            (translation("", "zul_Latn", "eng_Latn"), "input.translation.text"),
            (translation("   ", "zul_Latn", "eng_Latn"), "input.translation.text"),
            (pb.GenerationInput(text=""), "input.text"),
            (pb.GenerationInput(token_ids=pb.TokenIds()), "input.token_ids.ids"),
            (pb.GenerationInput(), "input"),
        ],
    )
    async def test_something_must_be_there(
        self, wanted: pb.GenerationInput, field: str, models: dict[str, ServedModel]
    ) -> None:
        with pytest.raises(InvalidRequest) as raised:
            await models["nllb"].encode(wanted)
        assert (raised.value.reason, raised.value.metadata["field"]) == ("FIELD_REQUIRED", field)


def test_the_prompt_is_neither_repeated_nor_scored() -> None:
    config = pb.GenerationConfig(echo=True, prompt_logprobs=0)
    with pytest.raises(InvalidRequest) as raised:
        sources.check_config(config, 5, Caps())
    found = [(one.field, one.reason) for one in raised.value.violations]
    assert found == [("config.echo", "UNSUPPORTED"), ("config.prompt_logprobs", "UNSUPPORTED")]
    sources.check_config(pb.GenerationConfig(echo=False), 5, Caps())


def test_a_key_s_context_holds_for_sources_too() -> None:
    sources.check_config(pb.GenerationConfig(), 9, Caps(max_context_tokens=10))
    with pytest.raises(InvalidRequest) as raised:
        sources.check_config(pb.GenerationConfig(), 10, Caps(max_context_tokens=10))
    assert (raised.value.reason, raised.value.metadata["limit"]) == ("CONTEXT_LENGTH_EXCEEDED", "9")


def test_a_language_and_a_first_token_cannot_both_be_forced() -> None:
    config = pb.GenerationConfig(max_tokens=3)
    assert sources.with_forced(config, None) is config
    forced = sources.with_forced(config, 7)
    assert forced == pb.GenerationConfig(max_tokens=3, forced_bos_token_id=7)
    assert not config.HasField("forced_bos_token_id")
    with pytest.raises(InvalidRequest) as raised:
        sources.with_forced(forced, 7)
    assert (raised.value.reason, raised.value.metadata["field"]) == ("FIELD_CONFLICT", "config.forced_bos_token_id")


def test_places_of_languages_are_told_apart(models: dict[str, ServedModel]) -> None:
    def places(kind: str) -> tuple[LanguagePlace, LanguagePlace]:
        own = models[kind].card.seq2seq
        assert own is not None
        return own.source_place, own.target_place

    assert places("mbart") == (LanguagePlace.SOURCE_END, LanguagePlace.DECODER_START)
    assert places("mbart50") == places("nllb") == (LanguagePlace.SOURCE_START, LanguagePlace.FIRST_TOKEN)
    assert places("nllb-legacy") == (LanguagePlace.SOURCE_END, LanguagePlace.FIRST_TOKEN)
    assert places("marian-multi") == (LanguagePlace.NONE, LanguagePlace.SOURCE_START)


class TestBlocks:
    """A source is kept in blocks of its own."""

    def test_they_are_counted_beside_the_decoder_s(self, models: dict[str, ServedModel]) -> None:
        model = models["nllb"]
        sampling = SamplingParams(max_tokens=20)
        assert model.kv_tokens(1, sampling) == (32, 32)
        assert model.kv_tokens(1, sampling, 1) == (48, 48)
        assert model.kv_tokens(1, sampling, 33) == (80, 80)
        beams = SamplingParams(max_tokens=20, num_beams=3)
        assert model.kv_tokens(1, beams, 33) == (48 + 64, 48 + 96)
        with pytest.raises(InvalidRequest) as raised:
            model.kv_tokens(1, sampling, 4096)
        assert raised.value.metadata["got"] == str(4096 + 32)
        config = pb.GenerationConfig(num_beams=2, max_tokens=200)
        assert model.has_room_for_beams(1, config, 4096 - 2 * 208)
        assert not model.has_room_for_beams(1, config, 4096 - 2 * 208 + 1)
