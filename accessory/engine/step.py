"""A step under way on the device, and from there to plain values on the host."""

from __future__ import annotations

import torch

from accessory.engine.sampler import Drawn
from accessory.engine.scheduler import StepResult
from accessory.engine.sequence import Draw
from accessory.ops.transfer import Ready, to_host


class Step:
    """A step under way on the device. `result` waits for it.

    asked: for each drawn row, and by entry for each judged prompt, how many of the likeliest tokens its request wants;
    None for no log-probabilities at all.
    """

    def __init__(
        self, drawn: Drawn | None, asked: list[int | None], scored: dict[int, tuple[Drawn, int]], device: torch.device
    ) -> None:
        self._drawn, self._asked = None if drawn is None else _to_host(drawn), asked
        self._scored = {n: (_to_host(rows), most) for n, (rows, most) in scored.items()}
        self._ready = Ready(device)

    def result(self) -> StepResult:
        self._ready.wait()
        draws = [] if self._drawn is None else _draws(self._drawn, self._asked)
        judged = {n: _draws(rows, [most] * len(rows.token_B)) for n, (rows, most) in self._scored.items()}
        return StepResult(draws, judged)


def _to_host(drawn: Drawn) -> Drawn:
    """Begin to copy rows to the host. The copies are there when the step is done."""
    columns = (drawn.token_B, drawn.logprob_B, drawn.top_ids_BK, drawn.top_logprobs_BK)
    return Drawn(*(None if column is None else to_host(column) for column in columns))  # type: ignore[arg-type]


def _draws(drawn: Drawn, asked: list[int | None]) -> list[Draw | None]:
    """Rows as plain values; None where no token was drawn."""
    tokens = drawn.token_B.tolist()
    if drawn.logprob_B is None:
        return [None if token < 0 else Draw(token) for token in tokens]
    logprobs = drawn.logprob_B.tolist()
    ids = [[]] * len(tokens) if drawn.top_ids_BK is None else drawn.top_ids_BK.tolist()
    best = [[]] * len(tokens) if drawn.top_logprobs_BK is None else drawn.top_logprobs_BK.tolist()
    out: list[Draw | None] = []
    for row, (token, most) in enumerate(zip(tokens, asked, strict=True)):
        if token < 0:
            out.append(None)
        elif most is None:
            out.append(Draw(token))
        else:
            top = dict(zip(ids[row][:most], best[row][:most], strict=True)) if most else None
            out.append(Draw(token, logprobs[row], top))
    return out
