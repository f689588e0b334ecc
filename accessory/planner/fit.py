"""Whether a setup fits the memory that a rank may take: refused before it is loaded, explained if memory runs out.

What certainly does not fit is an error: the weights and the cache, or the weights, gradients and moments of training,
are exact. The rest of an estimate is not, so there it is a warning.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import Any

from accessory.errors import AccessoryError, ConfigError, InputError, MemoryFullError, is_out_of_memory, one_line
from accessory.formats import Quant
from accessory.launch.memory import Room, gigabytes, room_for
from accessory.planner.cache import bytes_a_page, cache_bytes, pages_in
from accessory.planner.cards import Card
from accessory.planner.host import STATE
from accessory.planner.moments import offloaded_bytes
from accessory.planner.peak import HOLES, OUTSIDE, Estimate, estimate
from accessory.planner.search import RESERVE, TRIED_FORMATS, TRIED_TP, smallest
from accessory.planner.setup import Inference, Setup, Training
from accessory.planner.training import training_moments
from accessory.planner.weights import weight_bytes

log = logging.getLogger(__name__)

# A setup is refused where it certainly takes more than this part of the room: the system's numbers change meanwhile.
MARGIN = 1.05
_PROPOSALS = 3

Candidates = Callable[[int], tuple[str, Setup]]


def certain_bytes(setup: Setup) -> dict[str, int]:
    """What a rank holds at one moment for certain, by what takes it: a lower bound of its peak."""
    task = setup.task
    if isinstance(task, Training):
        # At the end of a step all of them are there.
        terms = training_moments(setup, task)["the optimiser's step"]
        return {name: terms[name] for name in ("weights", "optimiser", "gradients")}
    return {"weights": weight_bytes(setup), "key/value cache": cache_bytes(setup)}


def check_fit(setup: Setup, room: Room | None, *, likely: Setup | None = None) -> None:
    """InputError where the setup certainly takes more than the room; a warning where `likely` probably does.

    likely: by default the setup itself. The message says what was asked for, what there is, and what would fit. Does
    nothing where the room is unknown.
    """
    if room is None:
        return
    terms = certain_bytes(setup)
    if sum(terms.values()) > MARGIN * room.nbytes:
        raise InputError(f"memory: {_asked(setup, terms)}, {_there_is(setup, room)}; {what_fits(setup, room)}")
    likely = likely or setup
    if room.on_gpu and (estimated := estimate(likely)).allocated > room.nbytes:
        asked = _asked(likely, _inside(estimated), "takes about")
        log.warning("memory: %s, %s; %s", asked, _there_is(setup, room), what_fits(likely, room))


def check_host(setup: Setup, room: Room | None) -> None:
    """InputError where the moments that lie in host memory certainly take more than a rank's part of it."""
    held = offloaded_bytes(setup)
    if room is not None and held + STATE > room.nbytes:
        raise InputError(
            f"offload: the moments take {gigabytes(held)} of host memory{_each_rank(setup)}, with {gigabytes(STATE)} "
            f"more to write a state, and {room}{_each(setup)}; give fewer ranks a machine, optimizer adamw_8bit, or "
            "offload none"
        )


def check_cache(setup: Setup, cache_gb: float, room: Room | None) -> None:
    """InputError where a cache of so many GB on each rank has no page, or certainly does not fit beside the weights."""
    page, weights = bytes_a_page(setup), weight_bytes(setup)
    wanted = page * pages_in(cache_gb, page)
    if room is not None and weights + wanted > MARGIN * room.nbytes:
        raise InputError(
            f"cache_gb: got {cache_gb:g}, but {room}{_each(setup)}, of which the weights take {gigabytes(weights)}; "
            f"give less than {gigabytes(max(0, room.nbytes - weights))}, or leave it out"
        )


@contextmanager
def explained(describe: Callable[[], str]) -> Iterator[None]:
    """Raise MemoryFullError with `describe()` in its message where memory runs out inside."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error) or isinstance(error, AccessoryError):
            raise
        raise MemoryFullError(f"{one_line(error).rstrip('. ')}; {describe()}") from error


def explained_on(device: Any, asked: str, less: str) -> AbstractContextManager[None]:
    """`explained` for work that the planner does not know: what was asked for, and what would need less."""

    def describe() -> str:
        room = room_for(device, with_own=True)
        return f"{asked}; {less}" if room is None else f"{asked}, and {room}; {less}"

    return explained(describe)


def explain(setup: Setup, room: Room | None) -> str:
    """What a setup asks for and what would fit, for a message about memory that has run out."""
    asked = _asked(setup, _inside(estimate(setup)), "takes about")
    return asked if room is None else f"{asked}, {_there_is(setup, room)}; {what_fits(setup, room)}"


def _inside(estimate: Estimate) -> dict[str, int]:
    """An estimate's terms without those that a room leaves out, as they are there before it is measured."""
    return {name: n for name, n in estimate.terms.items() if name not in (OUTSIDE, HOLES)}


def _asked(setup: Setup, terms: dict[str, int], takes: str = "takes at least") -> str:
    task = setup.task
    if isinstance(task, Training):
        rank = f"lora_rank {setup.args.lora_rank}, " if setup.args.lora_rank > 0 else ""
        what = f"{task.kind} finetuning ({rank}batch_size {task.batch_size}, max_words {task.max_words})"
    else:
        what = f"a model with {task.batch} × {task.context:,} tokens (batch × context)"
    if setup.gpus > 1:
        what += f" on {setup.gpus} ranks"
    each, total = " each" if setup.gpus > 1 else "", sum(terms.values())
    large = sorted(((n, name) for name, n in terms.items() if n >= 0.02 * total), reverse=True)
    parts = ", ".join(f"{name} {gigabytes(n)}" for n, name in large)
    return f"{what} {takes} {gigabytes(total)}{each} ({parts})"


def _there_is(setup: Setup, room: Room) -> str:
    return f"and {room}{_each(setup)}"


def _each_rank(setup: Setup) -> str:
    return " on each rank" if setup.gpus > 1 else ""


def _each(setup: Setup) -> str:
    return " for each" if setup.gpus > 1 else ""


def what_fits(setup: Setup, room: Room) -> str:
    """The single changes after which the setup fits the room, at most three, in words; else its smallest other form.

    So too where the only such change is more GPUs, and several changes together take fewer.
    """
    changes = list(islice((change for change in _changes(setup, room) if fits(change[1], room)), _PROPOSALS))
    found = [text for text, _ in changes]
    if room.on_gpu and all(changed.gpus > setup.gpus for _, changed in changes):
        others = smallest(setup, Card(room.where, room.nbytes), 1)
        fewer = (other.setup for other in others if all(other.setup.gpus < changed.gpus for _, changed in changes))
        found = [_in_words(other) for other in fewer] or found
    if found:
        return f"{'; or '.join(found)} would fit"
    return "no single change is enough: `accessory plan` says which GPUs it takes"


def _in_words(setup: Setup) -> str:
    context = f" × {setup.cp} context-parallel" if setup.cp > 1 else ""
    words = [f"{setup.gpus} such GPUs ({setup.tp} model-parallel{context} × {setup.dp // setup.cp} data-parallel)"]
    words += [f"expert_parallel_size {setup.ep}"] if setup.ep > 1 else []
    if setup.quantized:
        words.append(f"quant {setup.quant.experts}")
    if isinstance(setup.task, Training):
        words += ["checkpointing"] * setup.task.checkpointing
        words.append(f"data_parallel {setup.task.data_parallel}")
        words += [f"{key} {value}" for key, value in setup.task.savings.items()]
    return ", ".join(words)


def fits(setup: Setup, room: Room) -> bool:
    """Whether the estimate of the setup fits, with a reserve."""
    try:
        found = estimate(setup)
    except ConfigError:  # the network cannot be quantised so
        return False
    holes = found.terms[HOLES] if room.on_gpu else 0
    return found.allocated + holes <= (1 - RESERVE) * room.nbytes


# --------------------------------------------------------------------------- what may be changed


def _changes(setup: Setup, room: Room) -> Iterator[tuple[str, Setup]]:
    """(what to change, the changed setup), the smallest changes first. Not all of them fit."""
    if isinstance(setup.task, Training):
        yield from _changes_of_training(setup, setup.task, room)
    else:
        yield from _largest(partial(_with_batch, setup), setup.task.batch - 1, room)
        yield from _largest(partial(_with_context, setup), (setup.task.context - 1) // 64, room)
    may_quantize = isinstance(setup.task, Inference) or setup.task.kind != "full"
    if may_quantize and not setup.quantized:
        quantized = ((f"quant {f}", replace(setup, quant=Quant.parse(f) or Quant())) for f in TRIED_FORMATS if f)
        yield from _first_that_fits(quantized, room)
    if room.on_gpu:  # ranks that share one machine's CPU share its memory too
        yield from _first_that_fits(_with_more_gpus(setup), room)
    if isinstance(setup.task, Inference) and setup.task.cache_dtype is None:
        yield from _first_that_fits([("cache_dtype fp8", _with(setup, cache_dtype="fp8"))], room)


def _changes_of_training(setup: Setup, task: Training, room: Room) -> Iterator[tuple[str, Setup]]:
    rank = setup.args.lora_rank
    yield from _first_that_fits(
        (_with_lora(setup, 1 << n) for n in range(max(0, rank - 1).bit_length() - 1, -1, -1)), room
    )
    yield from _largest(lambda n: (f"batch_size {n}", _with(setup, batch_size=n)), task.batch_size - 1, room)
    if not task.checkpointing:
        yield "checkpointing", _with(setup, checkpointing=True)
    if setup.dp > 1 and task.data_parallel == "sdp":
        yield "data_parallel fsdp", _with(setup, data_parallel="fsdp")
    if room.on_gpu:
        savings = [("gradient_dtype", "bf16")]
        if (task.optimizer, task.offload) == ("adamw", "none"):  # a run has one of the two at most
            savings += [("optimizer", "adamw_8bit"), ("offload", "optimizer")]
        changed = ((f"{field} {value}", _with(setup, **{field: value})) for field, value in savings)
        yield from _first_that_fits(changed, room)
    if task.kind == "full":
        yield "LoRA (lora_rank 16)", replace(_with_lora(setup, 16)[1], task=replace(task, kind="lora"))


def _with(setup: Setup, **changes: object) -> Setup:
    return replace(setup, task=replace(setup.task, **changes))  # type: ignore[arg-type]


def _with_batch(setup: Setup, n: int) -> tuple[str, Setup]:
    return f"{n} at once", _with(setup, batch=n)


def _with_context(setup: Setup, n: int) -> tuple[str, Setup]:
    return f"{64 * n:,} tokens of prompt and answer", _with(setup, context=64 * n, prompt=None)


def _with_lora(setup: Setup, rank: int) -> tuple[str, Setup]:
    return f"lora_rank {rank}", replace(setup, args=setup.args.replace(lora_rank=rank))


def _with_more_gpus(setup: Setup) -> Iterator[tuple[str, Setup]]:
    for tp in TRIED_TP:
        if tp > setup.tp:
            try:
                more = replace(setup, tp=tp)
            except ConfigError:  # the network cannot be cut so
                continue
            yield f"{more.gpus} GPUs ({tp} model-parallel)", more


def _first_that_fits(candidates: Iterable[tuple[str, Setup]], room: Room) -> Iterator[tuple[str, Setup]]:
    yield from islice((c for c in candidates if fits(c[1], room)), 1)


def _largest(candidate: Candidates, high: int, room: Room) -> Iterator[tuple[str, Setup]]:
    """The candidate with the largest number from 1 to `high` that fits, if there is one."""
    low = 0
    while low < high:
        middle = (low + high + 1) // 2
        if fits(candidate(middle)[1], room):
            low = middle
        else:
            high = middle - 1
    if low:
        yield candidate(low)
