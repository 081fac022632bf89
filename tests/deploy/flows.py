"""Which flows network policies let through, as Kubernetes reads them: what any of those that select a pod allows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from tests.deploy.charts import NAMESPACE, Rendered


@dataclass(frozen=True, slots=True, order=True)
class Flow:
    """What may reach a pod (ingress) or be reached by it (egress)."""

    direction: str
    peer: str
    port: int


def policies_of(rendered: Rendered, labels: Mapping[str, str]) -> list[dict[str, Any]]:
    """Those that select a pod."""
    return [
        policy
        for policy in rendered.all("NetworkPolicy")
        if policy["spec"]["podSelector"].get("matchLabels", {}).items() <= labels.items()
    ]


def flows(rendered: Rendered, labels: Mapping[str, str]) -> set[Flow]:
    """All flows of a pod. It is isolated only if a policy for that direction selects it, which is asserted."""
    chosen = policies_of(rendered, labels)
    types = {kind for policy in chosen for kind in policy["spec"]["policyTypes"]}
    assert types == {"Ingress", "Egress"}
    return {flow for policy in chosen for flow in _flows(rendered, policy["spec"])}


def _flows(rendered: Rendered, spec: Mapping[str, Any]) -> Iterator[Flow]:
    for direction, side in (("ingress", "from"), ("egress", "to")):
        for rule in spec.get(direction) or ():
            peers = [_name(rendered, peer) for peer in rule.get(side) or ()] or ["anywhere"]
            for port in rule["ports"]:
                yield from (Flow(direction, peer, port["port"]) for peer in peers)


def _name(rendered: Rendered, peer: Mapping[str, Any]) -> str:
    """A peer in a word: a component of ours, a namespace, a network."""
    if "ipBlock" in peer:
        return str(peer["ipBlock"]["cidr"])
    if "namespaceSelector" in peer:
        labels = peer["namespaceSelector"].get("matchLabels") or {}
        return str(labels.get("kubernetes.io/metadata.name", "any namespace"))
    labels = peer["podSelector"]["matchLabels"]
    component = str(labels["app.kubernetes.io/component"])
    pods = [template["metadata"]["labels"] for _, template in rendered.pods()]
    if not any(labels.items() <= pod.items() for pod in pods):
        return f"absent {component}"
    return f"{component} in {NAMESPACE}"
