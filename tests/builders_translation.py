"""Tiny sentencepiece models and tokenizers of encoder-decoder families, as their makers publish them, and how
sentencepiece itself would segment a text."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from hypothesis import strategies as st
from transformers import MBart50Tokenizer, MBartTokenizer, NllbTokenizer, PreTrainedTokenizerBase, T5Tokenizer
from transformers.convert_slow_tokenizer import generate_merges
from transformers.utils import sentencepiece_model_pb2_new as sentencepiece_model

from common.registry import SOURCE_TOKENIZER_FILE, TOKENIZER_FILE
from gateway.catalog import ServedModel, default_config
from gateway.sources import SourceEncoder
from gateway.tokenization import TextCodec
from tests.builders_seq2seq import write_tiny_seq2seq
from torchrelay.v1 import generation_pb2 as pb
from worker.engine.model import load_model
from worker.registration import Publication, make_card

UNIGRAM: Final = 1
BPE: Final = 2
SPACE: Final = "\u2581"
CONTROL: Final = 3
UNKNOWN: Final = 2
USER_DEFINED: Final = 4
BYTE: Final = 6

KNOWN: Final = "abcdefghij"  # letters that are pieces
LETTERS: Final = KNOWN + "xyß<>/_"  # and some that are not
# As sentencepiece reads texts: words and spaces, wherever they stand.
texts: Final = st.text(LETTERS + "  ", max_size=40)

Pieces = Sequence[tuple[str, float]]


def unigram_pieces(letters: str = KNOWN, *, seed: int = 0, count: int = 60) -> list[tuple[str, float]]:
    """Pieces of one to four letters, some of them beginning a word, each with a score of its own."""
    rng = random.Random(seed)
    pieces = [SPACE, *letters]
    while len(pieces) < count:
        piece = "".join(rng.choices(letters, k=rng.randint(1, 4)))
        piece = SPACE + piece if rng.random() < 0.5 else piece
        if piece not in pieces:
            pieces.append(piece)
    return [(piece, round(-rng.uniform(2, 6) - 0.7 * len(piece), 4)) for piece in pieces]


def bpe_pieces(letters: str = KNOWN, *, seed: int = 0, count: int = 60) -> list[tuple[str, float]]:
    """Pieces that grow out of earlier ones, the earliest first, then single letters: as its trainer orders them."""
    rng = random.Random(seed)
    single = [SPACE, *letters]
    merged: list[str] = []
    while len(merged) + len(single) < count:
        left, right = rng.choice([*single, *merged]), rng.choice([*letters, *merged])
        piece = left + right
        if len(piece) <= 5 and SPACE not in piece[1:] and piece not in merged:
            merged.append(piece)
    return [(piece, float(-rank)) for rank, piece in enumerate([*merged, *single])]


def write_spm(
    path: Path,
    pieces: Pieces,
    *,
    control: Sequence[str] = ("<unk>", "<s>", "</s>"),
    kind: int = UNIGRAM,
    charsmap: bytes = b"",
    defined: Sequence[str] = (),
    **spec: Any,
) -> Path:
    """Write a sentencepiece model; further fields are those of its normalizer."""
    message: Any = sentencepiece_model.ModelProto()
    message.trainer_spec.model_type = kind
    message.normalizer_spec.precompiled_charsmap = charsmap
    for name, value in spec.items():
        setattr(message.normalizer_spec, name, value)
    for token in control:
        message.pieces.add(piece=token, score=0.0, type=UNKNOWN if token == "<unk>" else CONTROL)
    for piece, score in pieces:
        message.pieces.add(piece=piece, score=score)
    for piece in defined:
        message.pieces.add(piece=piece, score=0.0, type=USER_DEFINED)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(message.SerializeToString())
    return path


def write_settings(folder: Path, tokenizer_class: str, *, model_type: str = "", **settings: Any) -> Path:
    """Write a directory's configurations."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": tokenizer_class, **settings}))
    if model_type:
        (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    return folder


def lower_case_charsmap() -> bytes:
    """A normalization as sentencepiece files hold it, a double array (Darts-clone): capital letters to small ones."""
    units = [0] * 1024
    units[0] = 256 << 10  # the root's children stand at 256 ^ their byte
    normalized = b""
    for letter in range(ord("A"), ord("Z") + 1):
        node = 256 ^ letter
        units[node] = letter | 1 << 8 | 512 << 10  # ends a key; its value stands at node ^ 512
        units[node ^ 512] = len(normalized)
        normalized += bytes([letter]).lower() + b"\0"
    array = struct.pack(f"<{len(units)}I", *units)
    return struct.pack("<I", len(array)) + array + normalized


def segment(pieces: Mapping[str, float], text: str) -> list[str]:
    """Return a unigram model's most probable segmentation, unknown letters in a row as one piece.

    As `EncodeOptimized` of sentencepiece: an unknown letter costs 10 more than the least probable piece.
    """
    text = " ".join(word for word in text.split(" ") if word)
    if not text:
        return []
    text = SPACE + text.replace(" ", SPACE)
    longest, unknown = max(map(len, pieces)), min(pieces.values()) - 10
    best: list[tuple[float, int]] = [(0.0, 0)]
    for end in range(1, len(text) + 1):
        ways = [
            (best[start][0] + pieces[text[start:end]], start)
            for start in range(max(0, end - longest), end)
            if text[start:end] in pieces
        ]
        if text[end - 1] not in pieces:
            ways.append((best[end - 1][0] + unknown, end - 1))
        best.append(max(ways, key=lambda way: way[0]))
    found: list[str] = []
    end = len(text)
    while end:
        start = best[end][1]
        found.insert(0, text[start:end])
        end = start
    joined: list[str] = []
    for piece in found:
        if joined and piece not in pieces and joined[-1] not in pieces:
            joined[-1] += piece
        else:
            joined.append(piece)
    return joined


def merges_of(pieces: Pieces, ids: Mapping[str, int]) -> list[tuple[str, str]]:
    """The merges that a BPE model's pieces stand for, the best first."""
    known = {piece: ids[piece] for piece, _ in pieces}
    merges: list[tuple[str, str]] = generate_merges(known, list(pieces))
    return merges


def numbered(tokens: Iterable[str]) -> dict[str, int]:
    return {token: number for number, token in enumerate(tokens)}


FAIRSEQ_CONTROL: Final = ("<s>", "<pad>", "</s>", "<unk>")
PIECES: Final = unigram_pieces()
BPE_PIECES: Final = bpe_pieces()
MARIAN_SOURCE: Final = unigram_pieces(seed=1)
MARIAN_TARGET: Final = unigram_pieces("abcdeßxy", seed=2)
T5_PARAMS: Final = {
    "summarization": {"prefix": "cab: ", "max_length": 200},
    "translation_en_to_de": {"prefix": "abba jig: "},
    "translation_en_to_fr": {"prefix": "abba jab: "},
}
KINDS: Final = {  # of tokenizers, by the family of their model
    "t5": "t5",
    "bart": "bart",
    "marian": "marian",
    "marian-multi": "marian",
    "mbart": "mbart",
    "mbart50": "mbart",
    "nllb": "m2m_100",
    "nllb-legacy": "m2m_100",
    "m2m100": "m2m_100",
}


def marian_ids(*marks: str) -> dict[str, int]:
    """A vocabulary of both sides' pieces, but of every ninth, as rare ones are missing; the padding last."""
    pieces = dict.fromkeys(piece for piece, _ in [*MARIAN_TARGET, *MARIAN_SOURCE])
    kept = [piece for number, piece in enumerate(pieces) if number % 9]
    return numbered(["</s>", "<unk>", *kept, *marks, "<pad>"])


def write_original_tokenizer(folder: Path, kind: str, **settings: Any) -> Path:
    """Write the files that tokenizers of a kind were first published with; there is no tokenizer.json then."""
    (folder / "tokenizer.json").unlink(missing_ok=True)
    (folder / "vocab.json").unlink(missing_ok=True)
    if kind == "t5":
        write_spm(folder / "spiece.model", PIECES, control=("<pad>", "</s>", "<unk>"))
        return write_settings(folder, "T5Tokenizer", eos_token="</s>", **settings)
    if kind.startswith("marian"):
        marks = (">>deu<<", ">>fra<<") if kind == "marian-multi" else ()
        write_spm(folder / "source.spm", MARIAN_SOURCE)
        write_spm(folder / "target.spm", MARIAN_TARGET)
        (folder / "vocab.json").write_text(json.dumps(marian_ids(*marks)))
        return write_settings(folder, "MarianTokenizer", eos_token="</s>", unk_token="<unk>", **settings)
    if kind == "m2m100":
        ids = numbered([*FAIRSEQ_CONTROL, *(piece for piece, _ in reversed(PIECES))])
        write_spm(folder / "sentencepiece.bpe.model", PIECES)
        (folder / "vocab.json").write_text(json.dumps(ids))
        return write_settings(folder, "M2M100Tokenizer", eos_token="</s>", **settings)
    if kind == "bart":
        from tokenizers import pre_tokenizers
        from transformers import RobertaTokenizer

        ids = numbered([*FAIRSEQ_CONTROL, *sorted(pre_tokenizers.ByteLevel.alphabet()), "<mask>"])
        RobertaTokenizer(vocab=ids, merges=[]).save_pretrained(folder)
        return folder
    pieces, model_kind = (BPE_PIECES, BPE) if kind.startswith("nllb") else (PIECES, UNIGRAM)
    write_spm(folder / "sentencepiece.bpe.model", pieces, kind=model_kind)
    name = {"mbart": "MBartTokenizer", "mbart50": "MBart50Tokenizer"}.get(kind, "NllbTokenizer")
    legacy = {"legacy_behaviour": True} if kind == "nllb-legacy" else {}
    return write_settings(folder, name, eos_token="</s>", **legacy, **settings)


def write_translator(folder: Path, kind: str, *, settings: Mapping[str, Any] | None = None, **config: Any) -> Path:
    """Save a tiny random model with the original tokenizer of a kind; `config` changes its config.json."""
    write_tiny_seq2seq(folder, KINDS[kind])
    write_original_tokenizer(folder, kind, **(settings or {}))
    path = folder / "config.json"
    config = {"eos_token_id": 1 if kind == "t5" else 0 if kind.startswith("marian") else 2, **config}
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    return folder


def publish(folder: Path, name: str = "translator", *, kv_tokens: int = 4096, **options: Any) -> Publication:
    """Return what a worker would publish of a directory."""
    loaded = load_model(
        str(folder), torch.float32, torch.device("cpu"), cache_root=folder.parent / "cache", with_weights=False
    )
    limit = loaded.context_length
    return make_card(loaded, name=name, context_tokens=limit, block_tokens=16, kv_tokens=kv_tokens, **options)


def scored(tokens: Iterable[str]) -> list[tuple[str, float]]:
    return [(token, 0.0) for token in tokens]


def their_tokenizer(kind: str, **languages: Any) -> PreTrainedTokenizerBase:
    """transformers' own tokenizer of a kind, where it can be made without the library sentencepiece."""
    from transformers.models.mbart import tokenization_mbart
    from transformers.models.nllb import tokenization_nllb

    if kind == "t5":
        sentinels = scored(f"<extra_id_{number}>" for number in reversed(range(100)))
        return T5Tokenizer(vocab=[*scored(["<pad>", "</s>", "<unk>"]), *PIECES, *sentinels])
    if kind == "mbart":
        last = scored([*tokenization_mbart.FAIRSEQ_LANGUAGE_CODES, "<mask>"])
        return MBartTokenizer(vocab=[*scored(FAIRSEQ_CONTROL), *PIECES, *last], **languages)
    if kind == "mbart50":  # it puts sentencepiece's order in fairseq's
        return MBart50Tokenizer(vocab=[*scored(["<unk>", "<s>", "</s>"]), *PIECES], **languages)
    pieces = [piece for piece, _ in BPE_PIECES]
    vocab = numbered([*FAIRSEQ_CONTROL, *pieces, *tokenization_nllb.FAIRSEQ_LANGUAGE_CODES, "<mask>"])
    legacy = kind == "nllb-legacy"
    return NllbTokenizer(vocab=vocab, merges=merges_of(BPE_PIECES, vocab), legacy_behaviour=legacy, **languages)


def served(publication: Publication) -> ServedModel:
    """A model as a gateway holds it."""
    card, files = publication
    codec = TextCodec(files[TOKENIZER_FILE], None)
    reader = TextCodec(files[SOURCE_TOKENIZER_FILE], None) if SOURCE_TOKENIZER_FILE in files else None
    return ServedModel(card, codec, default_config(card), sources=SourceEncoder(card, codec, reader))


def translation(text: str, target: str = "", source: str = "", **fields: Any) -> pb.GenerationInput:
    wanted = pb.TranslationInput(text=text, source_language=source, target_language=target, **fields)
    return pb.GenerationInput(translation=wanted)


def summary(text: str, **fields: Any) -> pb.GenerationInput:
    return pb.GenerationInput(summarization=pb.SummarizationInput(text=text, **fields))
