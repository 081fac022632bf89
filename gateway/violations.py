"""What is wrong with a request, field by field."""

from __future__ import annotations

from dataclasses import dataclass, field

from common.errors import FieldViolation, InvalidRequest


@dataclass(slots=True)
class Violations:
    """Collects bad fields, so that a caller hears of all of them in one answer."""

    found: list[FieldViolation] = field(default_factory=list)

    def add(self, path: str, description: str, reason: str = "FIELD_OUT_OF_RANGE") -> None:
        self.found.append(FieldViolation(path, description, reason))

    def raise_if_any(self) -> None:
        """Raise InvalidRequest with the first one's reason. The text names fields and limits, never what was sent."""
        if self.found:
            first = self.found[0]
            raise InvalidRequest(
                f"{first.field}: {first.description}", reason=first.reason, violations=tuple(self.found)
            )
