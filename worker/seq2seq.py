"""What a model's files say of how an encoder-decoder model is asked: its tasks, its languages, its layout of a text.

Families are transformers' (`config.model_type`); where a family has several tokenizers, the tokenizer's class and its
tokens tell them apart.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import msgspec
from tokenizers import Tokenizer

from common.registry import LanguagePlace, Seq2SeqCard
from common.tasks import TaskName
from worker.engine.model_files import ModelError, read_json

if TYPE_CHECKING:
    from worker.engine.model import LoadedModel

_PAIR: Final = re.compile(r"translation_(\w+?)_to_(\w+)")
# How tokens of languages are written, with the code that requests use.
_MARIAN_MARK: Final = re.compile(r">>(.+)<<")
_M2M100_MARK: Final = re.compile(r"__([a-z]{2,3})__")
_NLLB_MARK: Final = re.compile(r"([a-z]{3}_[A-Z][a-z]{3})")
_MBART_MARK: Final = re.compile(r"([a-z]{2}_[A-Z]{2})")


@dataclass(frozen=True, slots=True)
class _Files:
    """What is read of a model's directory."""

    config: Mapping[str, Any]
    forced_bos_token_id: int | None  # where a request sets none
    settings: Mapping[str, Any]  # of the tokenizer
    tokenizer: Tokenizer
    special: Mapping[str, str]
    vocab_size: int  # of the model

    def token_id(self, name: str, *usual: str) -> int:
        """The id of a special token, by its name in configurations, such as eos_token. Raises ModelError."""
        value = self.config.get(f"{name}_id")
        for text in (self.special.get(name), *usual):
            found = None if text is None else self.tokenizer.token_to_id(text)
            if found is not None:
                return int(found)
        if type(value) is int:
            return value
        raise ModelError(f"the tokenizer has no {name}, which stands in every text that the model reads")

    def languages(self, mark: re.Pattern[str]) -> dict[str, int]:
        """The tokens that name a language, by its code; those of the vocabulary itself only where none was added."""
        added = {token.content: i for i, token in self.tokenizer.get_added_tokens_decoder().items()}
        for tokens in (added, self.tokenizer.get_vocab()):
            marked = ((mark.fullmatch(text), i) for text, i in tokens.items() if i < self.vocab_size)
            found = {match.group(1): i for match, i in marked if match}
            if found:
                return dict(sorted(found.items()))
        return {}

    def code_of(self, setting: str) -> str:
        value = self.settings.get(setting)
        return value if isinstance(value, str) else ""


def read_seq2seq(loaded: LoadedModel, longest: int) -> tuple[Seq2SeqCard, tuple[TaskName, ...]]:
    """Return an encoder-decoder model as its gateway sees it, and its tasks; it reads up to `longest` tokens.

    Raises ModelError where its files do not tell how it is asked.
    """
    make = _FAMILIES.get(loaded.family)
    if make is None:
        raise ModelError(f"{loaded.source}: how texts are laid out for the family {loaded.family} is not known")
    if loaded.decoder_start_token_id is None:
        raise ModelError(
            f"{loaded.source}: neither generation_config.json nor config.json says what a decoder begins with"
        )
    if longest < 1:
        raise ModelError(f"{loaded.source}: the KV cache has no room for a source and an output: enlarge it")
    text, defaults = loaded.text, loaded.generation_defaults
    files = _Files(
        {**loaded.config.to_dict(), **read_json(loaded.folder / "config.json")},
        defaults.get("forced_bos_token_id"),
        read_json(loaded.folder / "tokenizer_config.json"),
        text.tokenizer,
        text.special_tokens,
        loaded.vocab_size,
    )
    card, tasks = make(files, longest, (loaded.decoder_start_token_id,))
    unk = text.tokenizer.token_to_id(text.special_tokens.get("unk_token", "<unk>"))
    shared = text.source_tokenizer_json is not None and not files.settings.get("separate_vocabs")
    return msgspec.structs.replace(card, unk_token_id=unk or 0, names_unknown=shared), tasks


def choose_tasks(wanted: str, own: Sequence[TaskName]) -> tuple[TaskName, ...]:
    """Return the tasks of an encoder-decoder model: `wanted`, names between commas, or where that is empty its own.

    Raises ModelError for another task.
    """
    names = [name.strip() for name in wanted.split(",") if name.strip()]
    if not names:
        return tuple(own)
    for name in names:
        if name not in _POSSIBLE:
            raise ModelError(f"{name!r} is no task of an encoder-decoder model; it takes {', '.join(_POSSIBLE)}")
    return tuple(task for task in _POSSIBLE if task in names)


_POSSIBLE: Final = (TaskName.GENERATE, TaskName.TRANSLATE, TaskName.SUMMARIZE)
_TRANSLATOR: Final = (TaskName.GENERATE, TaskName.TRANSLATE)


def _t5(files: _Files, longest: int, start: tuple[int, ...]) -> tuple[Seq2SeqCard, tuple[TaskName, ...]]:
    """T5 is told by words. Which ones, and so which tasks, its task_specific_params say.

    Without them it can do neither: the first weights that were trained on no task (v1.1, mT5) come so, and a
    fine-tune takes its own words, in plain text.
    """
    pairs = []
    for name, prefix in _prefixes(files.config).items():
        match = _PAIR.fullmatch(name)
        if match:
            pairs.append((match.group(1), match.group(2), prefix))
    card = Seq2SeqCard(
        max_source_tokens=longest,
        decoder_start_token_ids=start,
        after=(files.token_id("eos_token", "</s>"),),
        pair_prefixes=tuple(sorted(pairs)),
        summary_prefix=_summary_prefix(files.config),
    )
    tasks = [TaskName.GENERATE]
    if pairs:
        tasks.append(TaskName.TRANSLATE)
    if "summarization" in _prefixes(files.config):
        tasks.append(TaskName.SUMMARIZE)
    return card, tuple(tasks)


def _prefixes(config: Mapping[str, Any]) -> dict[str, str]:
    """What stands before a text, by task, of those that config.json describes."""
    params = config.get("task_specific_params")
    found = {}
    for name, values in params.items() if isinstance(params, dict) else ():
        if isinstance(values, dict) and isinstance(values.get("prefix", ""), str):
            found[name] = values.get("prefix", "")
    return found


def _summary_prefix(config: Mapping[str, Any]) -> str:
    own = config.get("prefix")
    return _prefixes(config).get("summarization") or (own if isinstance(own, str) else "")


def _bart(files: _Files, longest: int, start: tuple[int, ...]) -> tuple[Seq2SeqCard, tuple[TaskName, ...]]:
    """BART summarizes; its makers published it for that, without words that ask for it."""
    card = Seq2SeqCard(
        max_source_tokens=longest,
        decoder_start_token_ids=start,
        before=(files.token_id("bos_token", "<s>"),),
        after=(files.token_id("eos_token", "</s>"),),
        summary_prefix=_summary_prefix(files.config),
    )
    return card, (TaskName.GENERATE, TaskName.SUMMARIZE)


def _marian(files: _Files, longest: int, start: tuple[int, ...]) -> tuple[Seq2SeqCard, tuple[TaskName, ...]]:
    """One pair of languages; or several targets, each with a token that begins the source."""
    languages = files.languages(_MARIAN_MARK)
    card = Seq2SeqCard(
        max_source_tokens=longest,
        decoder_start_token_ids=start,
        after=(files.token_id("eos_token", "</s>"),),
        target_place=LanguagePlace.SOURCE_START if languages else LanguagePlace.NONE,
        languages=languages,
        default_source=files.code_of("source_lang"),
        default_target="" if languages else files.code_of("target_lang"),
    )
    return card, _TRANSLATOR


def _mbart(files: _Files, longest: int, start: tuple[int, ...]) -> tuple[Seq2SeqCard, tuple[TaskName, ...]]:
    """Both of its kinds have the family's name; the languages that only the later one has tell them apart."""
    languages = files.languages(_MBART_MARK)
    named = str(files.settings.get("tokenizer_class") or "").removesuffix("Fast")
    is_later = named == "MBart50Tokenizer" or (named != "MBartTokenizer" and "af_ZA" in languages)
    source = LanguagePlace.SOURCE_START if is_later else LanguagePlace.SOURCE_END
    target = LanguagePlace.FIRST_TOKEN if is_later else LanguagePlace.DECODER_START
    return _by_tokens(files, longest, start, languages, source, target)


def _m2m100(files: _Files, longest: int, start: tuple[int, ...]) -> tuple[Seq2SeqCard, tuple[TaskName, ...]]:
    """M2M100, and NLLB, whose codes are others and whose first tokenizers had the source language behind the text."""
    languages = files.languages(_M2M100_MARK) or files.languages(_NLLB_MARK)
    source = LanguagePlace.SOURCE_END if files.settings.get("legacy_behaviour") else LanguagePlace.SOURCE_START
    return _by_tokens(files, longest, start, languages, source, LanguagePlace.FIRST_TOKEN)


def _by_tokens(
    files: _Files,
    longest: int,
    start: tuple[int, ...],
    languages: Mapping[str, int],
    source: LanguagePlace,
    target: LanguagePlace,
) -> tuple[Seq2SeqCard, tuple[TaskName, ...]]:
    """A model that is told by tokens; one whose tokenizer has none for languages only goes on from plain text."""
    card = Seq2SeqCard(
        max_source_tokens=longest,
        decoder_start_token_ids=start,
        after=(files.token_id("eos_token", "</s>"),),
    )
    if not languages:
        return card, (TaskName.GENERATE,)
    told = start[0] if target is LanguagePlace.DECODER_START else files.forced_bos_token_id
    usual = next((code for code, token_id in languages.items() if token_id == told), "")
    defaults = [code if code in languages else "" for code in (files.code_of("src_lang"), files.code_of("tgt_lang"))]
    card = msgspec.structs.replace(
        card,
        source_place=source,
        target_place=target,
        languages=dict(languages),
        default_source=defaults[0],
        default_target=defaults[1] or usual,
    )
    return card, _TRANSLATOR


_FAMILIES: Final = {"t5": _t5, "bart": _bart, "marian": _marian, "mbart": _mbart, "m2m_100": _m2m100}
