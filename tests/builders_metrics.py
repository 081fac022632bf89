"""Reading metrics in tests: of a registry, or of a process's address."""

from __future__ import annotations

import asyncio
import urllib.error
import urllib.request

from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families


def value(registry: CollectorRegistry, name: str, **labels: str) -> float:
    """Return a sample, 0 if there is none."""
    return registry.get_sample_value(name, labels) or 0.0


async def fetch(address: str, path: str = "/metrics") -> tuple[int, str]:
    """Return status and text that a process's monitor answers."""

    def ask() -> tuple[int, str]:
        try:
            with urllib.request.urlopen(f"http://{address}{path}", timeout=10) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    return await asyncio.to_thread(ask)


async def scrape(*addresses: str) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """Return the samples of processes, by name and labels; equal ones added up."""
    found: dict[tuple[str, frozenset[tuple[str, str]]], float] = {}
    for address in addresses:
        status, text = await fetch(address)
        assert status == 200, text
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                key = (sample.name, frozenset(sample.labels.items()))
                found[key] = found.get(key, 0.0) + sample.value
    return found


def total(samples: dict[tuple[str, frozenset[tuple[str, str]]], float], name: str, **labels: str) -> float:
    """Return the sum of a metric's samples that have these labels among theirs."""
    wanted = frozenset(labels.items())
    return sum(number for (found, given), number in samples.items() if found == name and wanted <= given)
