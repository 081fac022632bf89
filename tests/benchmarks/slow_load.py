"""The callers of `slow_clients`, a process of their own: many streams, of which some can be told to read slowly.

Reads a line from standard input for each thing to do and answers with a line of JSON: `fast` and `slow` begin a phase,
`end` reports what the streams that are always fast have seen in it. Ends with its input. Expects TORCHRELAY_ADDRESS,
TORCHRELAY_API_KEY and TORCHRELAY_MODEL.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import contextlib
import json
import os
import sys
import time
from dataclasses import dataclass, field
from typing import Any, Final

from tests.benchmarks.budgets import percentile
from torchrelay.client import AsyncClient, RelayError, RetryPolicy
from torchrelay.client import channel as channels

_SLOW_PAUSE_S: Final = 1.0
_MAX_TOKENS: Final = 1900
_NUM_CONNECTIONS: Final = 4
# Without these a slow reader's library would take minutes of text in advance, and the gateway would notice nothing.
_SMALL_WINDOW: Final = (("grpc.http2.lookahead_bytes", 128), ("grpc.http2.bdp_probe", 0))


@dataclass
class Phase:
    """What was seen since the phase began."""

    gaps_ms: list[float] = field(default_factory=list)  # between messages with tokens, of fast streams
    num_tokens: int = 0
    num_slow_messages: int = 0
    num_slow_tokens: int = 0
    num_violations: int = 0  # a token that was missing or came twice
    errors: collections.Counter[str] = field(default_factory=collections.Counter)

    def report(self) -> dict[str, Any]:
        return {
            "p50_ms": percentile(self.gaps_ms, 50),
            "p99_ms": percentile(self.gaps_ms, 99),
            "messages": len(self.gaps_ms),
            "tokens": self.num_tokens,
            "slow_messages": self.num_slow_messages,
            "slow_tokens": self.num_slow_tokens,
            "violations": self.num_violations,
            "errors": dict(self.errors),
        }


class Load:
    """Keeps streams open, one generation after another in each."""

    def __init__(self, num_streams: int, slow_every: int) -> None:
        self._num_streams = num_streams
        self._slow_every = slow_every
        self._is_slow = False
        self._phase = Phase()
        self._num_begun = 0

    async def run(self) -> None:
        """Obey standard input until it ends."""
        async with contextlib.AsyncExitStack() as stack:
            fast = [await stack.enter_async_context(_client()) for _ in range(_NUM_CONNECTIONS)]
            channels.OPTIONS = (*channels.OPTIONS, *_SMALL_WINDOW)
            slow = [await stack.enter_async_context(_client()) for _ in range(_NUM_CONNECTIONS)]
            streams = [
                asyncio.create_task(self._stream((slow if self._may_be_slow(i) else fast)[i % _NUM_CONNECTIONS], i))
                for i in range(self._num_streams)
            ]
            loop = asyncio.get_running_loop()
            while line := await loop.run_in_executor(None, sys.stdin.readline):
                print(json.dumps(await self._obey(line.strip())), flush=True)  # noqa: T201
            for stream in streams:
                stream.cancel()
            await asyncio.gather(*streams, return_exceptions=True)

    def _may_be_slow(self, index: int) -> bool:
        return index % self._slow_every == 0

    async def _obey(self, command: str) -> dict[str, Any]:
        if command == "end":
            return self._phase.report()
        while self._num_begun < self._num_streams:  # noqa: ASYNC110 - until all have begun
            await asyncio.sleep(0.1)
        self._is_slow = command == "slow"
        self._phase = Phase()
        return {"phase": command}

    async def _stream(self, client: AsyncClient, index: int) -> None:
        prompt = [3 + (index * 7 + i) % 250 for i in range(16)]
        begun = False
        while True:
            last, num_tokens = 0.0, 0
            try:
                options: Any = {"max_tokens": _MAX_TOKENS, "temperature": 1.0, "seed": index}
                async for event in client.stream(prompt, model=os.environ["TORCHRELAY_MODEL"], **options):
                    if not event.HasField("deltas"):
                        continue
                    now = time.perf_counter()
                    count = self._count(event.deltas.deltas, num_tokens)
                    num_tokens += count
                    self._num_begun += not begun
                    begun = True
                    if self._may_be_slow(index):
                        self._phase.num_slow_messages += 1
                        self._phase.num_slow_tokens += count
                        if self._is_slow:
                            await asyncio.sleep(_SLOW_PAUSE_S)
                    else:
                        self._phase.num_tokens += count
                        if last:
                            self._phase.gaps_ms.append((now - last) * 1000)
                    last = now
            except RelayError as error:
                self._phase.errors[f"{error.code.name} {error.reason}"] += 1
                await asyncio.sleep(1)

    def _count(self, deltas: Any, expected: int) -> int:
        """Return how many tokens came, which must begin with the expected one."""
        count = 0
        for delta in deltas:
            self._phase.num_violations += delta.first_token_index != expected + count
            count += len(delta.token_ids)
        return count


def _client() -> AsyncClient:
    return AsyncClient(
        os.environ["TORCHRELAY_ADDRESS"],
        api_key=os.environ["TORCHRELAY_API_KEY"],
        insecure=True,
        retry=RetryPolicy(give_up_after_s=60),
        disconnect_grace_s=0,
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=256)
    parser.add_argument("--slow-every", type=int, default=8)
    args = parser.parse_args()
    asyncio.run(Load(args.streams, args.slow_every).run())
    return 0


if __name__ == "__main__":
    sys.exit(main())
