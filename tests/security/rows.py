"""The sixty bad inputs, and what each is answered with. Tests name the rows that they show by `pytest.mark.row`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

LIBRARY: Final = "(the library's own answer, no reason)"


@dataclass(frozen=True, slots=True)
class Row:
    """One kind of bad input."""

    number: int
    sent: str
    status: str
    reason: str


_TABLE: Final = """
no credentials | UNAUTHENTICATED | CREDENTIALS_MISSING
a malformed key, or one with a wrong checksum | UNAUTHENTICATED | CREDENTIALS_INVALID
an unknown, revoked or expired key: one text for all | UNAUTHENTICATED | CREDENTIALS_INVALID
a key and a token at once, where the operator is strict about it | UNAUTHENTICATED | CREDENTIALS_AMBIGUOUS
a token signed with no algorithm, or with the public key as if it were a secret | UNAUTHENTICATED | CREDENTIALS_INVALID
a token of another issuer or audience, expired, or not valid yet | UNAUTHENTICATED | CREDENTIALS_INVALID
a model that the key may not use | PERMISSION_DENIED | MODEL_NOT_ALLOWED
a method outside the key's scopes | PERMISSION_DENIED | METHOD_NOT_ALLOWED
a model that the key may not use and an unknown one, where models are not revealed | NOT_FOUND | MODEL_NOT_FOUND
no model | INVALID_ARGUMENT | FIELD_REQUIRED model
no input, or an empty one | INVALID_ARGUMENT | FIELD_REQUIRED input
two inputs at once: the last counts, as protobuf has it | INVALID_ARGUMENT | of the last one
a conversation without messages, or with an unknown role | INVALID_ARGUMENT | FIELD_REQUIRED, FIELD_INVALID
a prompt longer than the context | INVALID_ARGUMENT | CONTEXT_LENGTH_EXCEEDED input
prompt and output longer than the context | INVALID_ARGUMENT | CONTEXT_LENGTH_EXCEEDED config.max_tokens
max_tokens 0, or over the key's cap | INVALID_ARGUMENT | FIELD_OUT_OF_RANGE config.max_tokens
temperature not a number, infinite, negative or above 2 | INVALID_ARGUMENT | FIELD_OUT_OF_RANGE config.temperature
top_p or min_p outside its range, or not a number | INVALID_ARGUMENT | FIELD_OUT_OF_RANGE
too many stop strings, an empty or a long one | INVALID_ARGUMENT | FIELD_OUT_OF_RANGE config.stop
more outputs than the server or the key allows | INVALID_ARGUMENT | FIELD_OUT_OF_RANGE config.num_outputs
a bias for tokens: a field that this server does not have | INVALID_ARGUMENT | UNKNOWN_FIELD
a token id outside the vocabulary | INVALID_ARGUMENT | FIELD_OUT_OF_RANGE input.token_ids.ids
an unknown value of an enum | INVALID_ARGUMENT | FIELD_INVALID priority
a priority that the key does not allow | PERMISSION_DENIED | PRIORITY_NOT_ALLOWED
a grammar: a field that this server does not have | INVALID_ARGUMENT | UNKNOWN_FIELD
a catastrophic regex as a constraint: likewise, and at once | INVALID_ARGUMENT | UNKNOWN_FIELD
a message over 4 MB | RESOURCE_EXHAUSTED | LIBRARY
truncated or random bytes | INVALID_ARGUMENT | MALFORMED_MESSAGE
a string that is not UTF-8 | INVALID_ARGUMENT | MALFORMED_MESSAGE
nesting 101 or 5,000 deep | INVALID_ARGUMENT | MALFORMED_MESSAGE
four million packed numbers, memory bounded | INVALID_ARGUMENT | CONTEXT_LENGTH_EXCEEDED
metadata over the limit | RESOURCE_EXHAUSTED | LIBRARY
a compressed message that grows beyond the limit | RESOURCE_EXHAUSTED | LIBRARY
an unsupported encoding | INTERNAL | LIBRARY
an unknown method or service | UNIMPLEMENTED | LIBRARY
a deadline that has passed, or a time limit of 0 | DEADLINE_EXCEEDED, INVALID_ARGUMENT | FIELD_OUT_OF_RANGE time_limit
a time limit that passes in the queue; nothing is charged | DEADLINE_EXCEEDED | QUEUE_DEADLINE
an idempotency key with another body | FAILED_PRECONDITION | IDEMPOTENCY_KEY_REUSED
an idempotency key that is too long, or has control characters | INVALID_ARGUMENT | FIELD_INVALID idempotency_key
resuming an unknown, foreign or expired generation: one text for all | NOT_FOUND | REQUEST_NOT_FOUND
resuming beyond the log | OUT_OF_RANGE, ABORTED | INDEX_OUT_OF_RANGE, with a chain hash RESULT_LOST
resuming at an absurd event | OUT_OF_RANGE | INDEX_OUT_OF_RANGE
resuming what was cancelled | OK | Finished, FINISH_REASON_CANCELLED
cancelling twice, or after the end | OK | the state that it is in
a full queue | RESOURCE_EXHAUSTED | QUEUE_FULL, RetryInfo
a tenant's or a key's full share of it | RESOURCE_EXHAUSTED | TENANT_QUEUE_FULL, KEY_QUEUE_FULL, RetryInfo
a rate | RESOURCE_EXHAUSTED | RATE_LIMITED, exact RetryInfo, QuotaFailure
the day's tokens | RESOURCE_EXHAUSTED | QUOTA_EXCEEDED, no RetryInfo
what no quota and no worker could ever hold | INVALID_ARGUMENT | REQUEST_TOO_LARGE
a model without a worker: it waits, to its time limit | DEADLINE_EXCEEDED | QUEUE_DEADLINE
no server behind the gateway | UNAVAILABLE | BACKEND_UNAVAILABLE, RetryInfo
a request that ended every worker that tried it | INTERNAL | WORKER_FAILED
a bug in a handler | INTERNAL | INTERNAL and an incident, no text
control tokens in a user's text: plain text | OK |
text with NUL, right-to-left marks, unassigned characters; a megabyte of one letter | OK | CONTEXT_LENGTH_EXCEEDED
the cache salt of another tenant: nothing is shared | OK |
one stream more than a connection may have: it waits at its client | OK |
one call more than a gateway may serve | RESOURCE_EXHAUSTED | GATEWAY_FULL, RetryInfo
reflection where it is off | UNIMPLEMENTED | LIBRARY
HTTP/1.1 or TLS on the port, garbage behind a preface | the connection ends |
"""


def _rows() -> list[Row]:
    lines = [line for line in _TABLE.splitlines() if line]
    cells = [[cell.strip() for cell in line.split("|")] for line in lines]
    return [
        Row(number, sent, status, reason.replace("LIBRARY", LIBRARY))
        for number, (sent, status, reason) in enumerate(cells, start=1)
    ]


ROWS: Final = _rows()
