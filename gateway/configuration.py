"""All settings of one gateway process, for itself and for `torchrelay config` and `torchrelay doctor`."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import version
from typing import Final, Self

from common.configuration import Program
from common.sealing import EncryptionSettings, Sealer
from common.settings import MetricsSettings, QueueSettings, RedisSettings
from common.telemetry.tracing import Tracing, TracingSettings, make_tracing
from gateway.identity.assembly import check_identity
from gateway.identity.settings import IDENTITY_SETTINGS, IdentitySettings, ProxySettings
from gateway.server import check_plaintext
from gateway.settings import GatewaySettings


@dataclass(frozen=True, slots=True)
class GatewayConfiguration:
    """What the environment says, and what is made of it at once, so that faults in it end the start."""

    gateway: GatewaySettings
    identity: IdentitySettings
    proxies: ProxySettings
    redis: RedisSettings
    queue: QueueSettings
    metrics: MetricsSettings
    sealer: Sealer
    tracing: Tracing | None  # None: no spans

    @classmethod
    def read(cls) -> Self:
        """Raises ValidationError and ValueError for settings that are wrong or do not agree."""
        gateway, identity, proxies = GatewaySettings(), IdentitySettings(), ProxySettings()
        check_plaintext(gateway)
        check_identity(identity, proxies)
        return cls(
            gateway,
            identity,
            proxies,
            RedisSettings(),
            QueueSettings(),
            MetricsSettings(),
            Sealer.from_settings(EncryptionSettings()),
            make_tracing(TracingSettings(), "gateway", {"service.version": version("torchrelay")}),
        )


def check() -> None:
    """Raise ValueError for what keeps a gateway from starting although each setting is right by itself."""
    check_plaintext(GatewaySettings())
    check_identity(IdentitySettings(), ProxySettings())


PROGRAM: Final = Program("gateway", (GatewaySettings, *IDENTITY_SETTINGS), check)
