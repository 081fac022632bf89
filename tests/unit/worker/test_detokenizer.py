from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from worker.detokenizer import IncrementalDetokenizer
from worker.engine.demo import demo_model_dir

_CORPUS = [
    "The quick brown fox jumps over the lazy dog.",
    "Grüße, 世界! 🎉🎊 naïve café",
    "def f(x):\n    return x + 1",
] * 3
_EOS = 0


def byte_level() -> Tokenizer:
    """As GPT-2's: every byte is a token, merges cross characters only by accident."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<eos>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    return tokenizer


def byte_fallback() -> Tokenizer:
    """As Llama 2's: words with a leading mark, characters outside of the vocabulary as byte tokens."""
    letters = ["▁", *"abcdefghijklmnopqrstuvwxyzTQ.,!é"]
    merges = [("▁", "t"), ("▁t", "h"), ("▁th", "e"), ("a", "n"), ("▁", "a"), ("▁", "▁")]
    names = ["<eos>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *letters, *(a + b for a, b in merges)]
    tokenizer = Tokenizer(
        models.BPE({n: i for i, n in enumerate(names)}, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken("<eos>", special=True)])
    return tokenizer


@pytest.fixture(scope="module")
def smollm2() -> Tokenizer:
    return Tokenizer.from_file(str(demo_model_dir() / "tokenizer.json"))


BYTE_LEVEL, BYTE_FALLBACK = byte_level(), byte_fallback()
_texts = st.text(st.one_of(st.characters(codec="utf-8"), st.sampled_from("aé世🎉 \n▁")), max_size=30)


def pieces_of(tokenizer: Tokenizer, token_ids: list[int]) -> list[str]:
    detokenizer = IncrementalDetokenizer(tokenizer)
    return [*(detokenizer.push(token_id) for token_id in token_ids), detokenizer.flush()]


@given(token_ids=st.lists(st.integers(0, BYTE_LEVEL.get_vocab_size() - 1), max_size=40))
def test_pieces_join_to_the_decoded_whole_whatever_the_bytes(token_ids: list[int]) -> None:
    assert "".join(pieces_of(BYTE_LEVEL, token_ids)) == BYTE_LEVEL.decode(token_ids)


@settings(deadline=None)
@given(data=st.data())
def test_pieces_of_smollm2_join_to_the_decoded_whole(smollm2: Tokenizer, data: st.DataObject) -> None:
    common = st.integers(0, smollm2.get_vocab_size() - 1)
    single_bytes = st.sampled_from(smollm2.encode("🎉世é", add_special_tokens=False).ids)
    token_ids = data.draw(st.lists(st.one_of(common, single_bytes), max_size=40))
    assert "".join(pieces_of(smollm2, token_ids)) == smollm2.decode(token_ids)


@pytest.mark.parametrize("tokenizer", [BYTE_LEVEL, BYTE_FALLBACK], ids=["byte_level", "byte_fallback"])
@given(text=_texts)
def test_text_comes_back_and_never_half_a_character(tokenizer: Tokenizer, text: str) -> None:
    token_ids = tokenizer.encode(text).ids
    pieces = pieces_of(tokenizer, token_ids)
    assert "".join(pieces) == tokenizer.decode(token_ids)
    assert "".join(pieces).count("\ufffd") == text.count("\ufffd")


@given(text=_texts, cut=st.integers(0, 60))
def test_a_replay_of_the_first_tokens_changes_nothing_of_the_rest(text: str, cut: int) -> None:
    token_ids = BYTE_LEVEL.encode(text).ids
    pieces = pieces_of(BYTE_LEVEL, token_ids)
    resumed = IncrementalDetokenizer(BYTE_LEVEL)
    for token_id in token_ids[:cut]:
        resumed.push(token_id)
    assert [*(resumed.push(t) for t in token_ids[cut:]), resumed.flush()] == pieces[min(cut, len(token_ids)) :]


@pytest.mark.parametrize("tokenizer", [BYTE_LEVEL, BYTE_FALLBACK], ids=["byte_level", "byte_fallback"])
def test_a_character_appears_with_its_last_byte(tokenizer: Tokenizer) -> None:
    token_ids = tokenizer.encode("🦉").ids
    pieces = [piece for piece in pieces_of(tokenizer, token_ids) if piece]
    assert pieces == ["🦉"]
    assert pieces_of(tokenizer, token_ids)[-2] == "🦉"


def test_special_tokens_leave_no_trace_not_even_inside_a_character() -> None:
    token_ids = BYTE_LEVEL.encode("🦉a").ids
    mixed = [_EOS, *token_ids[:2], _EOS, *token_ids[2:], _EOS]
    assert "".join(pieces_of(BYTE_LEVEL, mixed)) == "🦉a"


def test_an_incomplete_character_is_flushed_as_a_replacement() -> None:
    token_ids = BYTE_LEVEL.encode("a🦉").ids[:-1]
    assert [piece for piece in pieces_of(BYTE_LEVEL, token_ids) if piece] == ["a", "\ufffd"]
    assert pieces_of(BYTE_LEVEL, token_ids)[-1] == "\ufffd"


def test_an_invalid_byte_does_not_hold_up_the_stream() -> None:
    bad = BYTE_LEVEL.token_to_id("ÿ")  # the byte 0xFF, which begins no character
    pieces = pieces_of(BYTE_LEVEL, [bad] * 600)
    assert "".join(pieces) == "\ufffd" * 600
    assert max(len(piece) for piece in pieces) <= 4


def test_endless_special_tokens_cost_the_same_each() -> None:
    detokenizer = IncrementalDetokenizer(BYTE_FALLBACK)
    for _ in range(2000):
        assert detokenizer.push(_EOS) == ""
    assert len(detokenizer._window) < 300
    assert "".join(detokenizer.push(t) for t in BYTE_FALLBACK.encode("the an").ids) == "the an"


def test_spaces_between_words_survive_a_decoder_that_strips_the_first() -> None:
    token_ids = BYTE_FALLBACK.encode("the the  an").ids
    assert "".join(pieces_of(BYTE_FALLBACK, token_ids)) == "the the  an"


def test_a_byte_run_that_turns_out_invalid_does_not_change_what_was_shown() -> None:
    owl = BYTE_FALLBACK.encode("🦉").ids[1:]
    bad, letter = BYTE_FALLBACK.token_to_id("<0xFF>"), BYTE_FALLBACK.token_to_id("a")
    assert "".join(pieces_of(BYTE_FALLBACK, [*owl, bad, letter])) == "🦉\ufffda"
