"""A later version of the program, as it may be: its messages, records and scripts have more in them than ours.

What it may add: fields at the end of what stands in a job's body, an event's body, a reply item, a worker's figures, a
model card; fields of a job's hash and of a log entry, after the known ones; reasons; parameters of sampling, and values
of its enums, whose jobs a worker leaves to others where it does not know them. What it may not, without another schema
version: another layout of keys, run records or of field e of a log entry; kinds, states, finish reasons.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Any

import msgspec

from common import scripts
from common.generation import EventBody, JobBody, OutputDelta, SamplingParams, Usage
from common.jobs import WorkerInfo
from common.registry import ModelCard

NEW_FIELD = "zz"  # of a job's hash and a log entry
NEW_VALUE = "later"
NEW_REASON = "A_LATER_REASON"


class LaterDelta(OutputDelta, frozen=True, array_like=True):
    surprises: tuple[tuple[int, float], ...] = ((7, -0.5),)


class LaterUsage(Usage, frozen=True, array_like=True):
    reasoning_tokens: int = 3


class LaterEvent(EventBody, frozen=True, array_like=True):
    timings_ms: tuple[int, ...] = (1, 2)
    note: str | None = "more"


class LaterSampling(SamplingParams, frozen=True, kw_only=True, omit_defaults=True):
    beam_width: int = 1
    grammar: str | None = None


class LaterValue(StrEnum):
    """Of an enum in the parameters of sampling."""

    LATER = "later"


class LaterStructuredOutput(msgspec.Struct, frozen=True, array_like=True):
    kind: LaterValue = LaterValue.LATER
    text: str = "root ::= 'a'"


def with_later_value(name: str, **fields: Any) -> SamplingParams:
    """Parameters of which one has a value that is not among ours, as its encoding has it."""
    value = {"structured_output": LaterStructuredOutput(), "early_stopping": LaterValue.LATER}[name]
    return msgspec.structs.replace(SamplingParams(**fields), **{name: value})


class LaterJobBody(JobBody, frozen=True, kw_only=True):
    grammar: str = "root ::= 'a'"
    attributes: tuple[dict[str, int], ...] = ({"a": 1},)


class LaterWorkerInfo(WorkerInfo, frozen=True, kw_only=True):
    zone: str = "b"
    gpus: tuple[dict[str, str], ...] = ({"name": "x"},)


class LaterModelCard(ModelCard, frozen=True, kw_only=True):
    regions: tuple[str, ...] = ("one",)


LATER = (LaterDelta, LaterUsage, LaterEvent, LaterSampling, LaterJobBody, LaterWorkerInfo, LaterModelCard)


def _added(text: str, old: str, new: str, number: int = 1) -> str:
    assert text.count(old) == number, f"{old!r} stands {text.count(old)} times in the script"
    return text.replace(old, new)


def later_scripts() -> dict[str, scripts.Script]:
    """Overrides for a ScriptRunner: every script's text differs, and writes more than ours does."""
    texts, libraries = (dict(part) for part in scripts.sources())
    more = f"'{NEW_FIELD}', '{NEW_VALUE}'"
    jobs = libraries["jobs"]
    jobs = _added(jobs, "'k', state, 'y', reason)", f"'k', state, 'y', reason, {more})")
    jobs = _added(jobs, r"'\151' .. text(id)", r"'\152' .. text(id)")
    jobs = _added(jobs, ".. text(reason or '')) end", f".. text(reason or '') .. text('{NEW_VALUE}')) end")
    libraries["jobs"] = jobs
    commit = texts["commit"]
    commit = _added(commit, "entry_id, 'e', e)", f"entry_id, 'e', e, {more})")
    commit = _added(commit, "'k', kind, 'y', reason)", f"'k', kind, 'y', reason, {more})")
    commit = _added(commit, r"kind and '\151\217' or '\149\217'", r"'\152\217'")
    commit = _added(
        commit,
        "kind and e .. text(kind) .. text(reason) or e",
        f"e .. text(kind or '') .. text(reason or '') .. text('{NEW_VALUE}')",
    )
    texts["commit"] = commit
    texts["claim"] = _added(texts["claim"], "'k', 'T', 'y', wid)", f"'k', 'T', 'y', wid, {more})")
    texts["enqueue"] = _added(texts["enqueue"], "'ep', 0,", f"{more}, 'ep', 0,")
    return {name: scripts.assemble(name, f"{text}\n-- of a later version\n", libraries) for name, text in texts.items()}
