"""Places for calls in one process, or for the bytes of their bodies, of which no tenant takes all. Pure.

The rule is that of dynamic thresholds for shared buffers (Choudhury and Hahne, 1998): a tenant may have at most a share
of what the others leave free. Alone it comes to that share of all places; n tenants that want as many as they can get
come to equal parts, and with a share of a half to 1/(n+1) each, so that one part is left for whoever comes next.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from common.errors import ResourceExhausted

FEW: Final = 4  # that a tenant may always have, while any are free
RETRY_AFTER_MS: Final = (500, 1500)  # drawn between these: not all come back at the same moment


class Places:
    """At most `num_places` in all, and of a tenant at most `share` of those that the others leave free."""

    def __init__(self, num_places: int, share: float, *, few: int = FEW, of: str = "calls") -> None:
        """`few` are those that a tenant may always have, while any are free; `of` says what they are for."""
        self._num_places = num_places
        self._share = share
        self._few = few
        self._of = of
        self._of_tenant: Counter[str] = Counter()
        self._num_taken = 0

    @property
    def num_taken(self) -> int:
        """Places that are taken now, by all tenants."""
        return self._num_taken

    def limit_of(self, tenant: str) -> int:
        """How many places the tenant may have now; those that it has beyond that it keeps."""
        left = self._num_places - (self._num_taken - self._of_tenant[tenant])
        return min(left, max(self._few, int(left * self._share)))

    @contextmanager
    def take(self, tenant: str, count: int = 1) -> Iterator[None]:
        """Hold so many places. Raises ResourceExhausted with the reason GATEWAY_FULL."""
        limit = self.limit_of(tenant)
        if self._of_tenant[tenant] + count > limit:
            is_full = self._num_taken + count > self._num_places
            raise ResourceExhausted(
                f"this gateway serves as many {self._of} as it may"
                if is_full
                else f"the tenant has its share of this gateway's {self._of}, {limit} at present",
                reason="GATEWAY_FULL",
                metadata={"limit": str(self._num_places), "tenant_limit": str(limit)},
                retry_after_ms=random.randint(*RETRY_AFTER_MS),
            )
        self._of_tenant[tenant] += count
        self._num_taken += count
        try:
            yield
        finally:
            self._num_taken -= count
            self._of_tenant[tenant] -= count
            if not self._of_tenant[tenant]:
                del self._of_tenant[tenant]
