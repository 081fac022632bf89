"""What each reason of an error means, and what a caller does about it.

Statuses are not written here: they are read from the code (`sent.py`), and so is which reasons there are.
"""

from __future__ import annotations

from typing import Final, NamedTuple


class Explanation(NamedTuple):
    """One row of the table."""

    meaning: str
    to_do: str


# Of commands alone: their message says everything, and no gateway sends them.
OF_COMMANDS: Final = frozenset({"FAILED_PRECONDITION", "UNAVAILABLE"})

REASONS: Final[dict[str, Explanation]] = {
    name: Explanation(meaning, to_do)
    for name, meaning, to_do in (
        # Who calls, and what they may do.
        (
            "CREDENTIALS_MISSING",
            "The call bears no credential.",
            "Send an API key or a token as `authorization: Bearer ...`.",
        ),
        (
            "CREDENTIALS_INVALID",
            "The key or token is not known, was revoked, has expired, or is not accepted here.",
            "Use another; an operator makes one with `torchrelay keys create`.",
        ),
        ("CREDENTIALS_AMBIGUOUS", "The call bears two credentials, and this gateway takes one.", "Send one of them."),
        (
            "IDENTITY_UNAVAILABLE",
            "The keys of the tokens' issuer cannot be had now.",
            "Send the call again; an operator looks at the issuer.",
        ),
        ("METHOD_NOT_ALLOWED", "The caller lacks the scope that metadata `scope` names.", "Use a key that has it."),
        (
            "MODEL_NOT_ALLOWED",
            "The key may not use this model.",
            "Use another model, or have the key's models widened.",
        ),
        (
            "PRIORITY_NOT_ALLOWED",
            "The key may not ask for this priority.",
            "Leave `priority` unset, or ask for a lower one.",
        ),
        (
            "SCOPE_NOT_ALLOWED",
            "Nobody grants an administrative scope without having it.",
            "Have it done by an administrator who has it.",
        ),
        (
            "API_KEY_ENDED",
            "The key was revoked or has expired: one that is to be rotated, or the one that a batch runs by.",
            "Make another key.",
        ),
        # What is not there.
        (
            "MODEL_NOT_FOUND",
            "No such model, or the caller may not learn of it.",
            "`ListModels` shows those that the caller may use.",
        ),
        (
            "ADAPTER_NOT_FOUND",
            "The model has no such adapter, or it was removed or changed before the generation ended.",
            "`GetModel` lists its adapters; send the request again.",
        ),
        (
            "REQUEST_NOT_FOUND",
            "No such generation, another tenant's, or one whose result has expired.",
            "Nothing is left to resume; send the request again if its result is needed.",
        ),
        (
            "BATCH_NOT_FOUND",
            "No such batch, another tenant's, or one whose results have expired.",
            "`ListBatches` shows the caller's.",
        ),
        ("API_KEY_NOT_FOUND", "No such key.", "`ListApiKeys` shows their ids."),
        (
            "WORKER_NOT_FOUND",
            "No worker of this id: it has left, or started anew under another.",
            "`ListWorkers` shows them.",
        ),
        ("TENANT_NOT_FOUND", "No record of this tenant.", "`ListTenants` shows those that have one."),
        # What is wrong with a request: a BadRequest names each field.
        ("FIELD_REQUIRED", "A field is missing or empty.", "Set it."),
        ("FIELD_INVALID", "A field does not have the form that it needs.", "Correct it; the description says how."),
        (
            "FIELD_OUT_OF_RANGE",
            "A number, or the size of a list or text, is out of its range.",
            "Keep to the limit that the description and metadata `limit` name.",
        ),
        ("FIELD_CONFLICT", "Two fields exclude each other.", "Leave one of them unset."),
        (
            "UNKNOWN_FIELD",
            "A field is not known to this server: a newer client, or a misspelt parameter over HTTP.",
            "Leave it out, or upgrade the server; nothing is ignored.",
        ),
        ("UNSUPPORTED", "A value or a combination is not served with this model.", "Leave it out."),
        ("UNSUPPORTED_PART", "A message's part is of a type that is not served.", "Send text alone."),
        ("MALFORMED_MESSAGE", "The bytes are no valid message, or no valid JSON.", "Correct the client."),
        (
            "CONTEXT_LENGTH_EXCEEDED",
            "The input, or the input and its output together, is longer than the model takes.",
            "Shorten it, or ask for fewer tokens; where there is `truncation`, set it.",
        ),
        (
            "REQUEST_TOO_LARGE",
            "It could never fit: into a quota, or into what is stored of one generation.",
            "Ask for less, or have the quota raised.",
        ),
        (
            "CHAT_REFUSED",
            "The model's chat template refuses this conversation, such as two turns of one role.",
            "Order the messages as the model wants them.",
        ),
        ("NO_CHAT_TEMPLATE", "The model has no chat template.", "Send text or token ids."),
        (
            "TASK_NOT_SERVED",
            "The model does not do this task; metadata `tasks` names what it does.",
            "Use another model.",
        ),
        ("TOOLS_NOT_SERVED", "The operator has switched tools off for this model.", "Leave `tools` out."),
        (
            "TOO_MANY_ROWS",
            "A report would have more rows than are sent.",
            "Ask for fewer dimensions or a shorter time.",
        ),
        # Structured output and tools.
        (
            "GRAMMAR_INVALID",
            "A schema, expression or grammar is not valid, or uses a keyword that cannot be kept to.",
            "Leave out what the description names.",
        ),
        ("GRAMMAR_TOO_LARGE", "It is larger than is taken.", "Make it smaller."),
        (
            "GRAMMAR_TOO_COMPLEX",
            "It takes more steps or states than are allowed.",
            "Simplify it: fewer alternatives, smaller bounds on repetition.",
        ),
        (
            "GRAMMAR_STUCK",
            "Generation came to where the grammar allows no token of the model.",
            "Change the grammar, so that what it begins can be ended.",
        ),
        (
            "STRUCTURED_OUTPUT_UNSUPPORTED",
            "The model's tokenizer or workers do not allow for structured output.",
            "Use another model, or leave it out.",
        ),
        ("ALL_TOKENS_FORBIDDEN", "The request's own parameters left no token to choose.", "Forbid less."),
        # What is stored contradicts.
        ("IDEMPOTENCY_KEY_REUSED", "The key was used with another request.", "Use a new key for a new request."),
        (
            "INDEX_OUT_OF_RANGE",
            "A resume names an event or result behind the last there is; metadata `limit` names that.",
            "Resume after one that was received.",
        ),
        # Streams that end before their generation.
        (
            "RESULT_LOST",
            "What was received is not part of what is stored: a failover lost acknowledged writes.",
            "Drop what was received, and send the request again under a new idempotency key.",
        ),
        (
            "SUPERSEDED",
            "A later call took the stream over.",
            "Nothing, where that was meant; two consumers of one stream take it from each other.",
        ),
        ("CLIENT_TOO_SLOW", "A message was left unread for too long.", "Resume after the last event that was read."),
        ("CLIENT_STALLED", "The client sent nothing of its request for too long.", "Send the call again."),
        ("CANCELLED", "What was waited for was cancelled by another call.", "Nothing, where that was meant."),
        # Limits.
        (
            "RATE_LIMITED",
            "A rate of the key or tenant (metadata `subject`) is used up.",
            "Wait for RetryInfo's delay, which is exact if nobody else asks meanwhile.",
        ),
        ("QUOTA_EXCEEDED", "The quota of the day is spent.", "Wait for the next day (UTC), or have it raised."),
        ("QUEUE_FULL", "The model's queue is full.", "Wait for RetryInfo's delay; an operator adds workers."),
        (
            "TENANT_QUEUE_FULL",
            "The tenant has as many generations of this model waiting as it may.",
            "Wait for RetryInfo's delay.",
        ),
        (
            "TENANT_CONCURRENCY",
            "The tenant has as many generations of this model in flight as it may.",
            "Wait until one ends.",
        ),
        (
            "KEY_QUEUE_FULL",
            "The key has as many generations of this model waiting as it may.",
            "Wait for RetryInfo's delay.",
        ),
        (
            "KEY_CONCURRENCY",
            "The key has as many generations of this model in flight as it may.",
            "Wait until one ends.",
        ),
        (
            "GATEWAY_FULL",
            "This gateway has as many calls as it may, or as many of this tenant's as its share allows.",
            "Wait for RetryInfo's delay; an operator adds gateways.",
        ),
        (
            "BACKEND_FULL",
            "The queue's server is short of memory: running work ends, new work is refused.",
            "Wait; an operator gives it memory or shortens retention.",
        ),
        ("TOO_MANY_BATCHES", "The tenant has as many batches as it may.", "Delete one, or wait until one expires."),
        # Time.
        (
            "QUEUE_DEADLINE",
            "The time limit passed before a worker was free. Nothing was computed.",
            "Allow more time; an operator adds workers.",
        ),
        ("DEADLINE_TOO_SHORT", "The deadline or time limit left no time when the call arrived.", "Allow more."),
        (
            "TIME_LIMIT",
            "The time limit of a task passed before it had its answer.",
            "Allow more, or send fewer texts a call.",
        ),
        # Nothing was queued, or it is not known whether it was.
        (
            "MODEL_NOT_READY",
            "The gateway cannot read what it needs of this model, such as its tokenizer.",
            "Send the call again.",
        ),
        ("GATEWAY_STOPPING", "This gateway is stopping.", "Send the call again; another one takes it."),
        (
            "BACKEND_UNAVAILABLE",
            "The queue's server did not answer in time.",
            "Send the call again with the same idempotency key.",
        ),
        (
            "BACKEND_UNTRUSTED",
            "The queue's server shows a certificate that is not trusted.",
            "An operator mends `TORCHRELAY_REDIS_*` or the certificate.",
        ),
        (
            "REPLICATION_UNCONFIRMED",
            "Too few replicas confirmed the request in time; whether it is kept is not known.",
            "Send it again with the same idempotency key.",
        ),
        (
            "BATCH_LOST",
            "The items were lost before the batch was made, or the batch of this key has just expired.",
            "Make it again.",
        ),
        # Faults. A repeat would probably meet them again.
        (
            "WORKER_FAILED",
            "The generation failed on every worker that tried it; it is a dead letter now.",
            "Look at `torchrelay dead-letters list`; `retry` sends it again.",
        ),
        (
            "LOG_LIMIT",
            "The generation's events outgrew the bound on what is stored.",
            "Ask for fewer tokens or log-probabilities.",
        ),
        (
            "BACKEND_REFUSED",
            "The queue's server refuses the gateway's commands: password, rights or type.",
            "An operator mends the deployment; `torchrelay acl` prints the rights.",
        ),
        (
            "SCHEMA_MISMATCH",
            "Programs of two versions that cannot share a queue meet in it.",
            "An operator finishes the upgrade.",
        ),
        (
            "SEAL_BROKEN",
            "A stored record cannot be opened: it was changed, moved, or sealed by another key.",
            "Send the request again; an operator looks into it.",
        ),
        (
            "ENCRYPTION_KEY_MISSING",
            "A record is sealed by a key that this gateway does not have.",
            "An operator gives every process the same key file.",
        ),
        (
            "NOT_SEALED",
            "A record is stored plain where only sealed ones are accepted.",
            "An operator finishes switching encryption on.",
        ),
        ("MALFORMED", "A batch's item cannot be read any more.", "Make the item again."),
        ("INTERNAL", "A fault of the server; metadata `incident` is in its log.", "Report it with the incident."),
        # Results of a batch's items.
        ("BATCH_CANCELLED", "The batch was cancelled before this item ended.", "Make it again, if it is needed."),
        (
            "BATCH_EXPIRED",
            "The batch had run for as long as it may before this item ended.",
            "Make it again, smaller or with a higher priority.",
        ),
    )
}


def difference(sent: set[str]) -> list[str]:
    """Return what the table lacks of what is sent, and what it has too much."""
    known, sent = set(REASONS), sent - OF_COMMANDS
    return [f"{name} has no row" for name in sorted(sent - known)] + [
        f"{name} is never sent" for name in sorted(known - sent)
    ]
