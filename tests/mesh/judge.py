"""What must hold of a run through the mesh. Pure."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from tests.mesh.callers import Result

_CREDENTIAL: Final = re.compile(r"mesh\.[0-9a-f]{16}")


@dataclass(frozen=True, slots=True)
class Stored:
    """What the server holds in the end."""

    usage: Mapping[str, int]  # `<kind>:<credential>:<tenant>` -> count, over all hours and shards
    num_jobs: int  # generations, each of which is kept

    def total(self, kind: str) -> int:
        return sum(count for name, count in self.usage.items() if name.startswith(f"{kind}:"))


@dataclass(slots=True)
class Verdict:
    """Laws that were broken, with an example or a count of each; and what happened."""

    violations: dict[str, str] = field(default_factory=dict)
    num_right: int = 0
    num_resumes: int = 0
    num_resumes_elsewhere: int = 0
    by_kind: Counter[str] = field(default_factory=Counter)


def judge(results: Sequence[Result], stored: Stored, tenant: str, *, least_elsewhere: int) -> Verdict:
    """Hold a run to the law: every call right, each generation executed and metered once, for the right tenant."""
    verdict = Verdict()
    broken = verdict.violations
    for result in results:
        verdict.by_kind[result.task.kind] += 1
        verdict.num_right += result.is_right
        verdict.num_resumes += len(result.resumed_by)
        verdict.num_resumes_elsewhere += sum(before != after for before, after in result.resumed_by)
    wrong = [result for result in results if not result.is_right]
    if wrong:
        what = wrong[0].error or "other tokens than the model's"
        broken["every call ends well"] = f"{len(wrong)} of {len(results)} did not, such as {wrong[0].task.key}: {what}"
    ids = Counter(result.generation_id for result in results if result.generation_id)
    if any(count > 1 for count in ids.values()) or len(ids) != len(results):
        broken["each key has its own generation"] = f"{len(ids)} generations were answered to {len(results)} keys"
    if stored.num_jobs != len(results):
        broken["each generation is executed once"] = f"{stored.num_jobs} generations for {len(results)} keys"
    metered = stored.total("generations")
    if metered != len(results):
        broken["each generation is metered once"] = f"{metered} metered for {len(results)} keys"
    expected = sum(len(result.task.expected) for result in results)
    if stored.total("completion_tokens") != expected:
        broken["each token is metered once"] = f"{stored.total('completion_tokens')} metered of {expected}"
    owners = {tuple(name.split(":")[1:]) for name in stored.usage}
    strangers = [owner for owner in owners if owner[-1:] != (tenant,) or not _CREDENTIAL.fullmatch(owner[0])]
    if strangers:
        broken["only the certificate's tenant is charged"] = f"{':'.join(sorted(strangers)[0])} was charged"
    if verdict.num_resumes_elsewhere < least_elsewhere:
        broken["streams resume on the other gateway"] = (
            f"{verdict.num_resumes_elsewhere} did, {least_elsewhere} at least were to be seen"
        )
    return verdict
