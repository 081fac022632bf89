"""How much of each parameter is taken, of requests by gateways and of a model's own defaults by workers."""

from __future__ import annotations

from typing import Final

MAX_BAD_WORDS: Final = 128
MAX_BAD_WORD_BYTES: Final = 256
MAX_PHRASES: Final = 256  # sequences of bad_words_ids, and of sequence_bias
MAX_PHRASE_IDS: Final = 64
MAX_TOKEN_IDS: Final = 1024  # of logit_bias, suppress_tokens and begin_suppress_tokens each
MAX_BIAS: Final = 100.0
MAX_PENALTY: Final = 2.0
MAX_FACTOR: Final = 10.0
MAX_NGRAM: Final = 64
MAX_BEAMS: Final = 16
MAX_LENGTH_PENALTY: Final = 5.0  # beyond it lengths to this power leave the range of scores
