"""What `--json` of a command prints: one JSON object on stdout."""

from __future__ import annotations

import json
import math
from typing import Any


def print_json(told: dict[str, Any]) -> None:
    """Print plain values. A number that is NaN or infinite becomes null, since JSON has none."""
    print(json.dumps(_finite(told), indent=1, allow_nan=False))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
