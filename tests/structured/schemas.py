"""JSON schemas to hold outputs to: drawn by a seed, and some of kinds that everybody has."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

Schema = dict[str, Any]

_KNOWN: Final = Path(__file__).with_name("known.json")
_NAMES: Final = (
    *("id", "name", "title", "kind", "status", "count", "price", "total", "tags", "notes", "email", "city", "country"),
    *("owner", "items", "size", "color", "created", "größe", "名前", "with space", 'quote"d', "slash\\ed", "😀"),
)
_WORDS: Final = ("red", "green", "blue", "yes", "no", "maybe", "über", "日本", "a b", 'say "hi"', "back\\slash", "1")
_PATTERNS: Final = (
    r"^[A-Z]{3}-\d{4}$",
    r"^(foo|bar)[0-9]{0,3}$",
    r"^[a-z]+(_[a-z]+){0,2}$",
    r"^\+?[1-9]\d{6,14}$",
    r"^#[0-9a-f]{6}$",
    r"^[^aeiou]{1,8}$",
)
_FORMATS: Final = ("date", "time", "date-time", "uuid", "ipv4", "ipv6", "email", "hostname", "duration")


@dataclass(frozen=True, slots=True)
class NamedSchema:
    """A schema. Bounded: whatever the model does, an output ends, within `max_tokens`."""

    name: str
    schema: Schema
    is_bounded: bool

    @property
    def text(self) -> str:
        return json.dumps(self.schema, ensure_ascii=False)


def known_schemas() -> list[NamedSchema]:
    """Those of the data file."""
    found = json.loads(_KNOWN.read_text(encoding="utf-8"))
    return [NamedSchema(name, entry["schema"], entry["bounded"]) for name, entry in found.items()]


def drawn_schemas(seed: int, count: int) -> list[NamedSchema]:
    """Schemas drawn by a seed, three of four of them bounded."""
    return [_draw(random.Random(f"{seed}:{i}"), f"drawn-{seed}-{i}", is_bounded=i % 4 != 3) for i in range(count)]


def _draw(rng: random.Random, name: str, *, is_bounded: bool) -> NamedSchema:
    builder = _Builder(rng, is_bounded)
    schema = builder.object(3) if rng.random() < 0.8 else builder.any(3)
    if builder.definitions:
        schema = {**schema, "$defs": builder.definitions}
    if rng.random() < 0.3:
        schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": name, **schema}
    return NamedSchema(name, schema, is_bounded)


@dataclass
class _Builder:
    """Draws schemas of limited depth; what an unbounded one may leave away, it sometimes does."""

    rng: random.Random
    is_bounded: bool
    definitions: dict[str, Schema] = field(default_factory=dict)

    def any(self, depth: int) -> Schema:
        simple: list[Callable[[], Schema]] = [
            self.string,
            self.integer,
            self.number,
            self.enum,
            self.const,
            self.nothing,
            self.pattern,
            self.formatted,
        ]
        nested: list[Callable[[], Schema]] = [
            lambda: self.object(depth - 1),
            lambda: self.array(depth - 1),
            lambda: self.tuple(depth - 1),
            lambda: self.any_of(depth - 1),
            lambda: self.one_of(),
            lambda: self.all_of(),
            lambda: self.reference(depth - 1),
            lambda: self.several_types(),
        ]
        return self.rng.choice(simple if depth <= 0 or self.rng.random() < 0.5 else nested)()

    def _leaves_open(self) -> bool:
        return not self.is_bounded and self.rng.random() < 0.4

    def string(self) -> Schema:
        schema: Schema = {"type": "string"}
        if self.rng.random() < 0.4:
            schema["minLength"] = self.rng.randint(0, 5)
        if not self._leaves_open():
            schema["maxLength"] = schema.get("minLength", 0) + self.rng.randint(0, 12)
        return schema

    def pattern(self) -> Schema:
        schema: Schema = {"type": "string", "pattern": self.rng.choice(_PATTERNS)}
        return {**schema, "maxLength": 20} if self.is_bounded else schema

    def formatted(self) -> Schema:
        schema: Schema = {"type": "string", "format": self.rng.choice(_FORMATS)}
        return {**schema, "maxLength": 60} if self.is_bounded else schema

    def integer(self) -> Schema:
        schema: Schema = {"type": "integer"}
        low = self.rng.choice((-1000, -5, 0, 1, 18, 10_000))
        if not self._leaves_open():
            schema |= {self.rng.choice(("minimum", "exclusiveMinimum")): low}
            schema |= {self.rng.choice(("maximum", "exclusiveMaximum")): low + self.rng.randint(2, 5000)}
        if self.rng.random() < 0.2:
            schema["multipleOf"] = self.rng.choice((2, 5))
            if "minimum" in schema or "exclusiveMinimum" in schema:
                return {"type": "integer", "minimum": 0, "maximum": 1000, "multipleOf": schema["multipleOf"]}
        return schema

    def number(self) -> Schema:
        if self._leaves_open():
            return {"type": "number"}
        low = self.rng.choice((-90.5, 0, 0.25, 3))
        span = self.rng.choice((0.5, 10, 1234.75))
        kinds = ("minimum", "exclusiveMinimum") if span > 1 else ("minimum",)  # of a narrow range it is refused
        return {
            "type": "number",
            self.rng.choice(kinds): low,
            self.rng.choice(("maximum", "exclusiveMaximum") if span > 1 else ("maximum",)): low + span,
        }

    def enum(self) -> Schema:
        values: list[Any] = [*_WORDS, 1, -2.5, None, True, [1, "x"], {"k": "v", "l": [False]}]
        return {"enum": self.rng.sample(values, self.rng.randint(1, 6))}

    def const(self) -> Schema:
        return {"const": self.rng.choice([*_WORDS, 0, 3.25, None, False, {"version": 2, "of": ["a"]}])}

    def nothing(self) -> Schema:
        return {"type": self.rng.choice(("boolean", "null"))}

    def several_types(self) -> Schema:
        return {"type": ["integer", "null", "boolean"], "minimum": 0, "maximum": 99}

    def object(self, depth: int) -> Schema:
        names = self.rng.sample(_NAMES, self.rng.randint(0 if depth < 2 else 1, 5))
        schema: Schema = {"type": "object", "properties": {name: self.any(depth) for name in names}}
        schema["required"] = [name for name in names if self.rng.random() < 0.7]
        if self._leaves_open():
            if self.rng.random() < 0.5:
                schema["additionalProperties"] = self.any(0)
        else:
            schema["additionalProperties"] = False
        if self.rng.random() < 0.3:
            schema["description"] = "What it is"
        return schema

    def array(self, depth: int) -> Schema:
        schema: Schema = {"type": "array", "items": self.any(depth)}
        if self.rng.random() < 0.4:
            schema["minItems"] = self.rng.randint(0, 2)
        if not self._leaves_open():
            schema["maxItems"] = schema.get("minItems", 0) + self.rng.randint(0, 3)
        return schema

    def tuple(self, depth: int) -> Schema:
        items = [self.any(depth) for _ in range(self.rng.randint(1, 3))]
        return {"type": "array", "prefixItems": items, "items": False, "minItems": self.rng.randint(0, len(items))}

    def any_of(self, depth: int) -> Schema:
        return {"anyOf": [self.any(depth) for _ in range(self.rng.randint(2, 3))]}

    def one_of(self) -> Schema:
        """Told apart by a constant, as unions with a discriminator are."""
        kinds = self.rng.sample(("cat", "dog", "bird"), 2)
        branches = [
            {
                "type": "object",
                "properties": {"type": {"const": kind}, "value": self.any(0)},
                "required": ["type", "value"],
                "additionalProperties": False,
            }
            for kind in kinds
        ]
        return {"oneOf": branches}

    def all_of(self) -> Schema:
        return {"allOf": [{"type": "integer", "minimum": 3}, {"maximum": self.rng.randint(5, 300)}]}

    def reference(self, depth: int) -> Schema:
        if self.definitions and self.rng.random() < 0.4:
            return {"$ref": f"#/$defs/{self.rng.choice(list(self.definitions))}"}
        name = f"part{len(self.definitions)}"
        if self.rng.random() < 0.3 and not self.is_bounded:  # a list that refers to itself
            self.definitions[name] = {
                "type": "object",
                "properties": {
                    "value": {"type": "integer", "minimum": 0, "maximum": 9},
                    "next": {"anyOf": [{"type": "null"}, {"$ref": f"#/$defs/{name}"}]},
                },
                "required": ["value", "next"],
                "additionalProperties": False,
            }
        else:
            self.definitions[name] = {}  # its number is taken
            self.definitions[name] = self.any(min(depth, 1))
        return {"$ref": f"#/$defs/{name}"}
