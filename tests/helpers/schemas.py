"""Random JSON schemas whose answers have a bounded length."""

from __future__ import annotations

import random
from typing import Any


def random_schema(r: random.Random, depth: int = 2) -> dict[str, Any]:
    """Objects, arrays, strings, numbers and choices, nested at most `depth` deep."""
    leaves = ("string", "pattern", "integer", "boolean", "null", "enum", "const")
    kind = r.choice((*leaves, "object", "object", "array", "anyOf") if depth else leaves)
    if kind == "object":
        names = r.sample(["a", "b-c", "größe", "d e", 'q"', "x1"], r.randint(1, 3))
        required = [name for name in names if r.random() < 0.7]
        properties = {name: random_schema(r, depth - 1) for name in names}
        return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}
    if kind == "array":
        least = r.randint(0, 2)
        return {
            "type": "array",
            "items": random_schema(r, depth - 1),
            "minItems": least,
            "maxItems": least + r.randint(0, 2),
        }
    if kind == "anyOf":
        return {"anyOf": [random_schema(r, depth - 1) for _ in range(2)]}
    if kind == "string":
        least = r.randint(0, 3)
        return {"type": "string", "minLength": least, "maxLength": least + r.randint(0, 5)}
    if kind == "pattern":
        return {"type": "string", "pattern": r.choice(("^[a-f]{2,4}$", "^(yes|no)[0-9]?$", "^\\d{3}-\\d{2}$"))}
    if kind == "integer":
        least = r.randint(-1000, 1000)
        return {"type": "integer", "minimum": least, "maximum": least + r.randint(0, 5000)}
    if kind == "enum":
        return {"enum": r.sample(["red", 3, None, True, "größer", 'a"b', -1.5], 3)}
    if kind == "const":
        return {"const": r.choice(["fixed", 7, False])}
    return {"type": kind}
