"""Tokenizers of encoder-decoder models made of the sentencepiece files that they were published with.

transformers makes such tokenizers with the library sentencepiece, which is not needed here: the files are protobuf
messages, whose pieces and scores the library tokenizers segments by alike (unigram: Viterbi over the scores, Kudo 2018;
BPE: the best pair first). What follows the pieces in a family's vocabulary stands where its tokenizer class in
transformers has it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

from google.protobuf.message import DecodeError
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE, Unigram
from transformers.convert_slow_tokenizer import generate_merges
from transformers.utils import sentencepiece_model_pb2_new as sentencepiece_model

from worker.engine.model_dir import ModelError, read_json, read_limited

_UNIGRAM: Final = 1
_BPE: Final = 2
_UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 2, 3, 4, 6  # of a piece; the others are ordinary
_SPACE: Final = "\u2581"
_MAX_SENTINELS: Final = 10_000
_MAX_IDS: Final = 1 << 22
_BEHIND_ALL: Final = 100.0  # below the score of any way through a text that has one
_CONTROL_TOKENS: Final = ("<s>", "<pad>", "</s>", "<unk>")
# In a word there is no second mark of a space, and no space itself: such a piece is found in no text.
_NOWHERE: Final = f"{_SPACE * 2}unused "

_M2M100: Final = (
    "af am ar ast az ba be bg bn br bs ca ceb cs cy da de el en es et fa ff fi fr fy ga gd gl gu ha he hi hr ht hu hy "
    "id ig ilo is it ja jv ka kk km kn ko lb lg ln lo lt lv mg mk ml mn mr ms my ne nl no ns oc or pa pl ps pt ro ru "
    "sd si sk sl so sq sr ss su sv sw ta th tl tn tr uk ur uz vi wo xh yi yo zh zu"
)
_LANGUAGES_OF_M2M100: Final = {"m2m100": _M2M100, "wmt21": "en ha is ja cs ru zh de"}


class Converted(NamedTuple):
    """A tokenizer, and the one of what an encoder reads where that is another."""

    tokenizer: Tokenizer
    source: Tokenizer | None = None


class _Pieces(NamedTuple):
    """What a sentencepiece file holds."""

    pieces: tuple[tuple[str, float], ...]  # by id
    types: tuple[int, ...]  # likewise
    model_type: int
    charsmap: bytes  # of its normalization; empty: none

    @property
    def scores(self) -> dict[str, float]:
        """Of the pieces that a text is made of."""
        return {
            piece: score
            for (piece, score), kind in zip(self.pieces, self.types, strict=True)
            if kind not in (_UNKNOWN, _CONTROL)
        }

    def named(self, kind: int) -> list[str]:
        """The pieces of one type."""
        return [piece for (piece, _), own in zip(self.pieces, self.types, strict=True) if own == kind]


def convert(folder: Path, settings: Mapping[str, Any], model_type: str) -> Converted | None:
    """Return the tokenizer of a directory without tokenizer.json; None where it is of none of these families.

    `settings` is its tokenizer_config.json, `model_type` is config.json's. Raises ModelError where a file is damaged,
    missing, or of a kind that cannot be converted.
    """
    name = str(settings.get("tokenizer_class") or "").removesuffix("Fast") or _usual_class(folder, model_type)
    make = _FAMILIES.get(name)
    if make is None:
        return None
    return make(folder, {**read_json(folder / "special_tokens_map.json"), **settings})


def _usual_class(folder: Path, model_type: str) -> str:
    """The tokenizer's class where its configuration does not name it."""
    if model_type == "m2m_100":
        return "M2M100Tokenizer" if (folder / "vocab.json").is_file() else "NllbTokenizer"
    usual = {"t5": "T5Tokenizer", "mt5": "T5Tokenizer", "marian": "MarianTokenizer", "mbart": "MBartTokenizer"}
    return usual.get(model_type, "")


def _t5(folder: Path, settings: Mapping[str, Any]) -> Converted:
    """The pieces, then the sentinels from the last to the first. `T5Tokenizer`."""
    found = _read(_file(folder, "spiece.model"))
    extra = settings.get("extra_ids", 100)
    if type(extra) is not int or not 0 <= extra <= _MAX_SENTINELS:
        raise ModelError(f"{folder / 'tokenizer_config.json'}: extra_ids is not a number up to {_MAX_SENTINELS}")
    sentinels = [f"<extra_id_{number}>" for number in reversed(range(extra))]
    tokenizer = _tokenizer(folder, settings, found, [*found.pieces, *_unscored(sentinels)], sentinels)
    return Converted(_ending(tokenizer, "$A </s>"))


def _mbart(folder: Path, settings: Mapping[str, Any]) -> Converted:
    from transformers.models.mbart.tokenization_mbart import FAIRSEQ_LANGUAGE_CODES

    return _fairseq(folder, settings, FAIRSEQ_LANGUAGE_CODES, f"$A </s> {_source_of(settings, 'en_XX')}")


def _mbart50(folder: Path, settings: Mapping[str, Any]) -> Converted:
    from transformers.models.mbart50.tokenization_mbart50 import FAIRSEQ_LANGUAGE_CODES

    return _fairseq(folder, settings, FAIRSEQ_LANGUAGE_CODES, f"{_source_of(settings, 'en_XX')} $A </s>")


def _nllb(folder: Path, settings: Mapping[str, Any]) -> Converted:
    from transformers.models.nllb.tokenization_nllb import FAIRSEQ_LANGUAGE_CODES

    source = _source_of(settings, "eng_Latn")
    layout = f"$A </s> {source}" if settings.get("legacy_behaviour") else f"{source} $A </s>"
    return _fairseq(folder, settings, FAIRSEQ_LANGUAGE_CODES, layout)


def _source_of(settings: Mapping[str, Any], usual: str) -> str:
    source = settings.get("src_lang")
    return source if isinstance(source, str) and source else usual


def _fairseq(folder: Path, settings: Mapping[str, Any], languages: Sequence[str], layout: str) -> Converted:
    """fairseq's four control tokens, the pieces behind sentencepiece's own three, the languages, the mask."""
    found = _read(_file(folder, "sentencepiece.bpe.model"))
    control = ["<s>", "<pad>", "</s>", "<unk>"]
    vocab = [*_unscored(control), *found.pieces[3:], *_unscored([*languages, "<mask>"])]
    tokenizer = _tokenizer(folder, settings, found, vocab, [*control, *languages])
    tokenizer.add_special_tokens([AddedToken("<mask>", lstrip=True, normalized=False, special=True)])
    return Converted(_ending(tokenizer, layout))


def _m2m100(folder: Path, settings: Mapping[str, Any]) -> Converted:
    """Pieces by vocab.json, then the languages. `M2M100Tokenizer`."""
    which = str(settings.get("language_codes") or "m2m100")
    if which not in _LANGUAGES_OF_M2M100:
        raise ModelError(f"{folder / 'tokenizer_config.json'}: language_codes is none of {[*_LANGUAGES_OF_M2M100]}")
    ids = _vocab(folder / "vocab.json")
    languages = [f"__{code}__" for code in _LANGUAGES_OF_M2M100[which].split()]
    ids |= {language: len(ids) + index for index, language in enumerate(languages)}
    found = _read(_file(folder, "sentencepiece.bpe.model"))
    tokenizer = _renumbered(folder, settings, found, ids, languages)
    return Converted(_ending(tokenizer, f"__{_source_of(settings, 'en')}__ $A </s>"))


def _marian(folder: Path, settings: Mapping[str, Any]) -> Converted:
    """Two segmentations of one vocabulary, or of two. `MarianTokenizer`."""
    ids = _vocab(folder / "vocab.json")
    target_ids = _vocab(folder / "target_vocab.json") if settings.get("separate_vocabs") else ids
    target, source = (_read(_file(folder, name)) for name in ("target.spm", "source.spm"))
    tokenizer = _renumbered(folder, settings, target, target_ids, _marks(target_ids))
    reader = _renumbered(folder, settings, source, ids, _marks(ids), reads_only=True)
    return Converted(_ending(tokenizer, "$A </s>"), _ending(reader, "$A </s>"))


def _marks(ids: Mapping[str, int]) -> list[str]:
    """Tokens that name the language that is wanted, such as >>fra<<."""
    return [token for token in ids if token.startswith(">>") and token.endswith("<<")]


_FAMILIES: Final[Mapping[str, Callable[[Path, Mapping[str, Any]], Converted]]] = {
    "T5Tokenizer": _t5,
    "MBartTokenizer": _mbart,
    "MBart50Tokenizer": _mbart50,
    "NllbTokenizer": _nllb,
    "M2M100Tokenizer": _m2m100,
    "MarianTokenizer": _marian,
}


def _file(folder: Path, name: str) -> Path:
    path = folder / name
    if not path.is_file():
        raise ModelError(f"{folder} has no tokenizer.json, and {name}, of which one could be made, is missing too")
    return path


def _read(path: Path) -> _Pieces:
    message: Any = sentencepiece_model.ModelProto()  # type: ignore[attr-defined]
    try:
        message.ParseFromString(read_limited(path))
    except DecodeError as error:
        raise ModelError(f"{path} is no sentencepiece model: it may be damaged; download it again") from error
    kind = message.trainer_spec.model_type
    if not message.pieces:
        raise ModelError(f"{path} is no sentencepiece model: it has no pieces")
    if kind not in (_UNIGRAM, _BPE):
        raise ModelError(f"{path} segments neither as unigram nor as BPE, and other kinds cannot be converted")
    if message.trainer_spec.byte_fallback or any(piece.type == _BYTE for piece in message.pieces):
        raise ModelError(f"{path} falls back to bytes, which none of these families does; save a fast tokenizer")
    spec = message.normalizer_spec
    if message.trainer_spec.treat_whitespace_as_suffix or not spec.add_dummy_prefix or not spec.escape_whitespaces:
        raise ModelError(f"{path} treats spaces in a way that cannot be converted; save a fast tokenizer")
    pieces = tuple((piece.piece, piece.score) for piece in message.pieces)
    return _Pieces(pieces, tuple(piece.type for piece in message.pieces), kind, spec.precompiled_charsmap)


def _vocab(path: Path) -> dict[str, int]:
    vocab = read_json(path)
    ids = list(vocab.values())
    if not ids or not all(type(token_id) is int and 0 <= token_id < _MAX_IDS for token_id in ids):
        raise ModelError(f"{path} is no vocabulary: it must be an object of tokens and their ids")
    if len(set(ids)) < len(ids):
        raise ModelError(f"{path} gives one id to several tokens")
    for token in ("</s>", "<unk>"):
        if token not in vocab:
            raise ModelError(f"{path} has no {token}")
    return vocab


def _unscored(tokens: Sequence[str]) -> list[tuple[str, float]]:
    return [(token, 0.0) for token in tokens]


def _renumbered(
    folder: Path,
    settings: Mapping[str, Any],
    found: _Pieces,
    ids: Mapping[str, int],
    special: Sequence[str],
    *,
    reads_only: bool = False,
) -> Tokenizer:
    """A segmentation whose ids are others than the file's.

    Pieces that the model does not have stand behind all of its ids; they mean the unknown token. Tokens that are no
    pieces are what the model writes; in a text they are found where nothing else is, with `reads_only` never.
    """
    scores = found.scores
    special = [token for token in (*_CONTROL_TOKENS, *special) if token in ids]
    last = min(scores.values(), default=0.0) - _BEHIND_ALL
    size = max(max(ids.values()) + 1, _vocab_size(folder))
    vocab = _unscored([f"{_NOWHERE}{number}" for number in range(size)])
    for token, number in ids.items():
        if token in special:
            vocab[number] = (token, 0.0)
        elif token in scores or not reads_only:
            vocab[number] = (token, scores.get(token, last))
    vocab += [(piece, score) for piece, score in scores.items() if piece not in ids]
    return _tokenizer(folder, settings, found, vocab, special, writes=not reads_only)


def _vocab_size(folder: Path) -> int:
    size = read_json(folder / "config.json").get("vocab_size")
    return size if type(size) is int and 0 < size < _MAX_IDS else 0


def _tokenizer(
    folder: Path,
    settings: Mapping[str, Any],
    found: _Pieces,
    vocab: Sequence[tuple[str, float]],
    special: Sequence[str],
    *,
    writes: bool = True,
) -> Tokenizer:
    """Segments as the file says, by a vocabulary in the order of ids. `special` are control tokens, beside its own.

    What it `writes` does not show ids that have no meaning: they are control tokens then.
    """
    added = _added_tokens(folder, settings)
    vocab = _with_added(folder, vocab, added)
    ids = {piece: number for number, (piece, _) in enumerate(vocab)}
    if len(ids) < len(vocab):
        raise ModelError(f"{folder} has a sentencepiece model with a piece that is there twice")
    unknown = [piece for piece in [*found.named(_UNKNOWN), "<unk>"] if piece in ids]
    if not unknown:
        raise ModelError(f"{folder} has a sentencepiece model without an unknown piece")
    if found.model_type == _UNIGRAM:
        tokenizer = Tokenizer(Unigram([*vocab], unk_id=ids[unknown[0]], byte_fallback=False))
    else:
        scores = {piece: score for piece, score in found.scores.items() if piece in ids}
        merges = generate_merges({piece: ids[piece] for piece in scores}, [*scores.items()])
        model = BPE(vocab=ids, merges=merges, unk_token=unknown[0], fuse_unk=True, byte_fallback=False)
        tokenizer = Tokenizer(model)
    steps = [normalizers.Strip(left=False, right=True), normalizers.Replace(Regex(" {2,}"), _SPACE)]
    if found.charsmap:
        steps.insert(0, normalizers.Precompiled(found.charsmap))
    tokenizer.normalizer = normalizers.Sequence(steps)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement=_SPACE, prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(replacement=_SPACE, prepend_scheme="always")
    unused = [token for token, _ in vocab if token.startswith(_NOWHERE)] if writes else []
    control = [
        token for token in dict.fromkeys([*found.named(_CONTROL), unknown[0], *special, *unused]) if token in ids
    ]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in control])
    own = [piece for piece in found.named(_USER_DEFINED) if piece in ids and piece not in control]
    tokenizer.add_tokens([AddedToken(piece, normalized=False) for piece in own])
    for _, token in sorted(added.items()):
        if token.content not in control:
            tokenizer.add_tokens([token])
    return tokenizer


def _added_tokens(folder: Path, settings: Mapping[str, Any]) -> dict[int, AddedToken]:
    """What was added to the vocabulary behind its files, by id. Raises ModelError."""
    found: dict[int, AddedToken] = {}
    for content, number in read_json(folder / "added_tokens.json").items():
        if type(number) is not int:
            raise ModelError(f"{folder / 'added_tokens.json'} is no vocabulary: it must hold tokens and their ids")
        found[number] = AddedToken(content, normalized=False, special=True)
    decoder = settings.get("added_tokens_decoder")
    for number_text, token in decoder.items() if isinstance(decoder, dict) else ():
        if not number_text.isdecimal() or not isinstance(token, dict) or not isinstance(token.get("content"), str):
            raise ModelError(f"{folder / 'tokenizer_config.json'}: added_tokens_decoder does not hold tokens by id")
        flags = {name: bool(token.get(name)) for name in ("lstrip", "rstrip", "single_word", "normalized", "special")}
        found[int(number_text)] = AddedToken(token["content"], **flags)
    return found


def _with_added(
    folder: Path, vocab: Sequence[tuple[str, float]], added: Mapping[int, AddedToken]
) -> list[tuple[str, float]]:
    """A vocabulary with the tokens that were added. Raises ModelError where one has another's place."""
    whole = [*vocab]
    for number, token in sorted(added.items()):
        if number >= _MAX_IDS:
            raise ModelError(f"{folder} adds the token {token.content!r} with the id {number}, which is too high")
        whole += _unscored([f"{_NOWHERE}{filled}" for filled in range(len(whole), number + 1)])
        if whole[number][0] != token.content:
            if not whole[number][0].startswith(_NOWHERE):
                raise ModelError(
                    f"{folder} adds the token {token.content!r} with the id {number}, which {whole[number][0]!r} has"
                )
            whole[number] = (token.content, 0.0)
    return whole


def _ending(tokenizer: Tokenizer, layout: str) -> Tokenizer:
    """Give a tokenizer what it adds around a text. Raises ModelError for a token that it does not have."""
    tokens = [part for part in layout.split() if part != "$A"]
    ids = {token: tokenizer.token_to_id(token) for token in tokens}
    for token, token_id in ids.items():
        if token_id is None:
            raise ModelError(f"the tokenizer has no token {token!r}, which stands around every text")
    tokenizer.post_processor = processors.TemplateProcessing(
        single=layout, pair=layout.replace("$A", "$A $B"), special_tokens=[*ids.items()]
    )
    return tokenizer
