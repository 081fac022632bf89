"""What transformers' own generate makes of a source, for the examples of encoder-decoder models."""

from __future__ import annotations

from typing import Any

from transformers import AutoModelForSeq2SeqLM, AutoTokenizer


class Reference:
    """A model and its tokenizer, from the files that are served."""

    def __init__(self, folder: str) -> None:
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        self.model: Any = AutoModelForSeq2SeqLM.from_pretrained(folder)
        self._params: dict[str, Any] = getattr(self.model.config, "task_specific_params", None) or {}

    def prefix(self, task: str) -> str:
        """The words by which a T5 is told what to do; empty for models that need none."""
        return str(self._params.get(task, {}).get("prefix", ""))

    def generate(self, text: str, max_tokens: int, *, source: str = "", target: str = "", beams: int = 1) -> list[int]:
        """Return the new tokens."""
        extra: dict[str, Any] = {}
        if target and self.model.config.model_type in ("mbart", "m2m_100"):
            self.tokenizer.src_lang = source
            extra["forced_bos_token_id"] = self.tokenizer.convert_tokens_to_ids(target)
        ids = self.tokenizer(text, return_tensors="pt").input_ids
        output = self.model.generate(ids, do_sample=False, num_beams=beams, max_new_tokens=max_tokens, **extra)
        pad = self.model.config.pad_token_id
        return [token for token in output[0].tolist()[1:] if token != pad]
