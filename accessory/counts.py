"""How numbers of parameters are written, in every command and every message."""

from __future__ import annotations


def spell_parameters(number: int) -> str:
    """Four digits and k, M or B (10⁹): 46.7 B, 720.3 M, 49.15 k, 800."""
    for size, unit in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if number >= 0.99995 * size:
            return f"{number / size:.4g} {unit}"
    return str(number)
