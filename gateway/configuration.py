"""The gateway's settings, for `torchrelay config` and `torchrelay doctor`."""

from __future__ import annotations

from typing import Final

from common.configuration import Program
from gateway.identity.assembly import check_identity
from gateway.identity.settings import IDENTITY_SETTINGS, IdentitySettings, ProxySettings
from gateway.server import check_plaintext
from gateway.settings import GatewaySettings


def check() -> None:
    """Raise ValueError for what keeps a gateway from starting although each setting is right by itself."""
    check_plaintext(GatewaySettings())
    check_identity(IdentitySettings(), ProxySettings())


PROGRAM: Final = Program("gateway", (GatewaySettings, *IDENTITY_SETTINGS), check)
