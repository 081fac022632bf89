"""What a credential may do, and what a tenant may use: rights, caps and quotas. Pure data.

Stored as JSON beside keys and tenants. These structs only grow: a new field gets a default, and a program that does
not know a scope or a field leaves it alone.
"""

from __future__ import annotations

import re
from enum import StrEnum
from typing import Final

import msgspec

TENANT_NAME: Final = re.compile(r"[a-z0-9_.-]{1,64}")  # of tenants and their trust groups

PRIORITY_HIGH: Final = 0
PRIORITY_NORMAL: Final = 1
PRIORITY_LOW: Final = 2


class Scope(StrEnum):
    """An area of the API."""

    GENERATE = "generate"  # GenerationService
    TASKS = "tasks"  # embeddings, classification and the like
    BATCH = "batch"  # many requests at once
    ADMIN_KEYS = "admin.keys"
    ADMIN_TENANTS = "admin.tenants"
    ADMIN_FLEET = "admin.fleet"
    ADMIN_USAGE = "admin.usage"


DATA_SCOPES: Final = (Scope.GENERATE.value, Scope.TASKS.value, Scope.BATCH.value)
ADMIN_SCOPES: Final = tuple(scope.value for scope in Scope if scope.value.startswith("admin."))


class Quotas(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Bounds over time and in number; 0 is none. Tokens are prompt plus completion."""

    requests_per_minute: int = 0
    tokens_per_minute: int = 0
    tokens_per_day: int = 0  # of the UTC day
    max_queued: int = 0  # waiting generations of one model
    max_live: int = 0  # waiting and running generations of one model

    @property
    def are_metered(self) -> bool:
        """Whether any of them is counted over time."""
        return bool(self.requests_per_minute or self.tokens_per_minute or self.tokens_per_day)


class Caps(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Most that one request may ask for; None is what the server allows."""

    max_tokens: int | None = None
    max_outputs: int | None = None
    max_context_tokens: int | None = None  # prompt and one output together
    max_disconnect_grace_ms: int | None = None


NO_CAPS: Final = Caps()


class Grants(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The rights of one credential."""

    scopes: tuple[str, ...] = DATA_SCOPES
    models: tuple[str, ...] = ()  # names, or prefixes that end in '*'; empty is all
    priorities: tuple[int, ...] = (PRIORITY_NORMAL, PRIORITY_LOW)
    caps: Caps = NO_CAPS
    quotas: Quotas = Quotas()

    def allows_model(self, name: str) -> bool:
        return not self.models or any(
            name.startswith(model[:-1]) if model.endswith("*") else name == model for model in self.models
        )


class TenantPolicy(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What holds for all credentials of a tenant."""

    weight: float = 1.0  # its share of the service against other tenants with waiting work
    trust_group: str = ""  # tenants of one group share cached prefixes; empty: it shares with nobody
    retention_ms: int | None = None  # how long its results are kept at most
    quotas: Quotas = Quotas()


NO_GRANTS_GIVEN: Final = Grants()  # what a key has whose maker said nothing
NO_POLICY: Final = TenantPolicy()  # what a tenant has that has no record
