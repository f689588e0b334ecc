"""A report's words: the line under its title, and the tiles of figures."""

from __future__ import annotations

import math

import numpy as np

from accessory.train.progress import duration, short
from accessory.train.report.history import History
from accessory.train.report.layer_bins import Floats


def subtitle(history: History) -> str:
    """Which steps there are, of what network, and how many went wrong."""
    first, last = int(history.step[0]), int(history.step[-1])
    text = f"Step {first:,}" if first == last else f"Steps {first:,} to {last:,}"
    if history.end is not None:
        text += f" · {history.end.shape[0]} layers of {history.end.shape[1] - 3} experts"
    bad = len(history.failed)
    return text + (
        f" · {bad} steps without a finite loss" if bad > 1 else " · 1 step without a finite loss" if bad else ""
    )


def tiles(history: History) -> list[tuple[str, str, str]]:
    """(name, value, more) of each tile."""
    get = history.values.get
    samples = _join((get("epoch"), "{:.2f} epochs"), (get("samples"), "{:,.0f} samples"))
    found = [("Steps", f"{history.step[-1]:,.0f}", samples)]
    loss = history.values["loss"]
    shown = np.flatnonzero(np.isfinite(loss))
    if len(shown):
        best = shown[loss[shown].argmin()]
        more = f"lowest {loss[best]:.4f} at step {history.step[best]:,.0f}"
        found.append(("Training loss", _from_to(loss[shown]), more))
    held = history.evals[np.isfinite(history.evals[:, 1])]
    if len(held):
        best = held[:, 1].argmin()
        change = held[-1, 1] / held[0, 1] - 1 if held[0, 1] else 0.0
        more = f"lowest {held[best, 1]:.4f} at step {held[best, 0]:,.0f}" + (
            f", {change:+.1%} in all" if change else ""
        )
        found.append(("Held-out loss", _from_to(held[:, 1]), more.replace("-", "−", 1) if change < 0 else more))
    seconds = float(np.nansum(history.values["step_s"]))
    found.append(("Time in steps", duration(seconds), f"{_median(history.values['step_s']):.3g} s a step"))
    speed = f"{short(_median(history.values['tokens_per_s']))} tokens/s, the median"
    found.append(("Tokens", short(history.values["tokens"][-1]), speed))
    memory = history.values["memory_gb"]
    if np.isfinite(memory).any():
        found.append(("Peak memory", f"{np.nanmax(memory):.1f} GB", "of the first rank's device"))
    return found


def _join(*parts: tuple[Floats | None, str]) -> str:
    return ", ".join(text.format(v[-1]) for v, text in parts if v is not None and np.isfinite(v[-1]))


def _from_to(values: Floats) -> str:
    return f"{values[0]:.3f}" if len(values) == 1 else f"{values[0]:.3f} → {values[-1]:.3f}"


def _median(values: Floats) -> float:
    shown = values[np.isfinite(values)]
    return float(np.median(shown)) if len(shown) else math.nan
