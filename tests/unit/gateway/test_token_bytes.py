"""The bytes of tokens, joined, are the text."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from gateway.token_bytes import TokenBytes
from worker.engine.demo import demo_model_dir

CONTENT = (demo_model_dir() / "tokenizer.json").read_bytes()
BYTE_LEVEL = Tokenizer.from_buffer(CONTENT)
BYTE_LEVEL_BYTES = TokenBytes(CONTENT, BYTE_LEVEL)


# Some bytes of control characters and of higher planes are not in the demo model's vocabulary.
@given(st.text(st.characters(exclude_categories=["Cs", "Cc"], max_codepoint=0xFFFF), max_size=40))
@settings(deadline=None)
def test_of_a_byte_level_vocabulary(text: str) -> None:
    ids = BYTE_LEVEL.encode(text, add_special_tokens=False).ids
    assert b"".join(map(BYTE_LEVEL_BYTES, ids)) == text.encode()


def test_parts_of_characters_are_told_apart() -> None:
    ids = BYTE_LEVEL.encode("🦉").ids
    assert len(ids) > 1
    assert b"".join(map(BYTE_LEVEL_BYTES, ids)) == "🦉".encode()
    assert b"\xef\xbf\xbd" not in map(BYTE_LEVEL_BYTES, ids)


def test_of_a_vocabulary_with_byte_tokens() -> None:
    vocab = {"<unk>": 0, "▁": 1, "a": 2, **{f"<0x{byte:02X}>": 3 + byte for byte in range(256)}}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(steps)  # type: ignore[arg-type]
    tokenizer.add_special_tokens([AddedToken("</s>", special=True)])
    found = TokenBytes(tokenizer.to_str().encode(), tokenizer)
    ids = tokenizer.encode("a é</s>", add_special_tokens=False).ids
    assert b"".join(map(found, ids)) == " a é</s>".encode()
    assert found(10**6) == b""
