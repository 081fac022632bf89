"""What is explored: small systems in which some faults may strike, each at any moment.

Every fault multiplies the states, so each configuration lets a few of them meet. `QUICK` runs with the tests, `LONG`
with `make protocol`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from tests.protocol.explorer import Explored, Explorer
from tests.protocol.model import Config, Protocol, tells_all_ends
from tests.protocol.properties import broken
from tests.protocol.state import Budget

QUICK: Final[Mapping[str, Config]] = {
    "takeover and reconnect": Config(Budget(reaps=1, drops=1)),
    "lost replies while the engine goes on": Config(Budget(lost=1, reaps=1, backlogs=1)),
    "lost replies of a client's gateway": Config(Budget(lost=1, drops=1), length=1),
    "crashes": Config(Budget(worker_crashes=1, gateway_crashes=1, reaps=1)),
    "trimmed reply stream": Config(Budget(trims=1, drops=1)),
    "the lease of a living gateway ends": Config(Budget(lapses=1, drops=1), length=1),
    "no disconnect grace": Config(Budget(lapses=1, drops=1), has_grace=False),
    "cancel and deadline": Config(Budget(cancels=1, deadlines=1, drops=1), length=1),
    "fruitless attempts": Config(Budget(reaps=3, empties=1, failures=1), length=1, max_claims=4),
    "drain": Config(Budget(releases=1, reaps=1), length=1),
    "server restart": Config(Budget(restarts=1, lost=1, forgets=1)),
    "failover and takeover": Config(Budget(failovers=1, reaps=1)),
    "failover and reconnect": Config(Budget(failovers=1, drops=1), length=1),
    "two outputs": Config(Budget(reaps=1), num_outputs=2, length=1),
    "two jobs": Config(Budget(cancels=1), num_clients=2, length=1, num_gateways=1),
    "two clients of one job": Config(Budget(reaps=1), num_rivals=1, length=1),
}

LONG: Final[Mapping[str, Config]] = {
    "takeovers and reconnects": Config(Budget(reaps=2, drops=1, cancels=1)),
    "lost replies, takeover and reconnect": Config(Budget(lost=1, reaps=1, drops=1), length=1),
    "lost replies while the engine goes on": Config(Budget(lost=1, reaps=2, backlogs=1), max_claims=4),
    "crashes and lost replies": Config(Budget(worker_crashes=1, gateway_crashes=1, reaps=1, lost=1), length=1),
    "trimmed reply stream and takeovers": Config(Budget(trims=1, drops=1, reaps=1), length=3),
    "leases of living gateways end": Config(Budget(lapses=1, drops=1, reaps=1), length=1),
    "cancel, deadline and lost replies": Config(Budget(cancels=1, deadlines=1, lost=1, reaps=1), length=1),
    "fruitless attempts": Config(Budget(reaps=5, empties=1, failures=1, releases=1), length=1, max_claims=5),
    "failover, takeover and reconnect": Config(Budget(failovers=1, reaps=1, drops=1), length=1),
    "failover and lost replies": Config(Budget(failovers=1, lost=1)),
    "two outputs": Config(Budget(reaps=1, lost=1), num_outputs=2, length=1),
    "two jobs": Config(Budget(reaps=1), num_clients=2, length=1, num_gateways=1),
    "two jobs and a lost reply": Config(Budget(lost=1), num_clients=2, length=1),
    "two clients of one job": Config(Budget(reaps=1, drops=1), num_rivals=1, length=1),
}


def explore(protocol: Protocol, *, max_states: int) -> Explored:
    """Look at every state of a protocol's configuration."""
    config = protocol.config
    explorer = Explorer(protocol.successors, lambda state: broken(state, config), tells_all_ends, max_states=max_states)
    return explorer.explore(protocol.initial())
