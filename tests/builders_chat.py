"""Conversations for tests, and what they come to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gateway.conversation import Conversation, Message
from gateway.tokenization import TextCodec


def chat_ids(codec: TextCodec, messages: Sequence[Message], **fields: Any) -> list[int]:
    """Return the ids of a conversation."""
    return codec.encode_chat(Conversation(tuple(messages), **fields)).token_ids
