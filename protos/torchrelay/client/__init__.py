"""Client of torchrelay: connects, retries what is safe, and resumes broken streams at the next event."""

from torchrelay.client.aio import AsyncClient, AsyncGenerationStream
from torchrelay.client.batches import AsyncBatchResults, BatchResults, ResultPosition
from torchrelay.client.channel import Tls
from torchrelay.client.errors import FieldViolation, RelayError
from torchrelay.client.requests import GenerationOptions, Prompt, make_chat, make_summarization, make_translation
from torchrelay.client.resume import RetryPolicy, StreamPosition
from torchrelay.client.sync import Client, GenerationStream

__all__ = [
    "AsyncBatchResults",
    "AsyncClient",
    "AsyncGenerationStream",
    "BatchResults",
    "Client",
    "FieldViolation",
    "GenerationOptions",
    "GenerationStream",
    "Prompt",
    "RelayError",
    "ResultPosition",
    "RetryPolicy",
    "StreamPosition",
    "Tls",
    "make_chat",
    "make_summarization",
    "make_translation",
]
