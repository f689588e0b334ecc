"""A finetuning run from its configuration to the finished folder: `finetune`.

A run's folder holds `config.yaml` (what was asked for), `metrics.jsonl`, `states/` (to resume from), and at the end
`final/` (a checkpoint like any other) and `report.html`.
"""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch

from accessory.data.batches import Batch
from accessory.errors import InputError
from accessory.parallel.fsdp import DeviceMesh
from accessory.parallel.mesh import from_environment
from accessory.train.config import FinetuneConfig
from accessory.train.export import export
from accessory.train.metrics import MetricsLog
from accessory.train.nonfinite_trace import trace_nonfinite_items
from accessory.train.optim import learning_rate, updates_made
from accessory.train.prepare import FINAL, Run, prepare
from accessory.train.progress import Progress, RouterWatch
from accessory.train.report import write_report
from accessory.train.source import COMPUTE, counts
from accessory.train.state import complete_states, save_state
from accessory.train.trainer import NotFiniteError

log = logging.getLogger(__name__)

# Ranks wait for the first one to tokenise or to write a checkpoint of a hundred gigabytes.
PATIENCE = timedelta(hours=2)


def finetune(config: FinetuneConfig) -> Path:
    """Run (or resume) a finetune on all ranks that a launcher started; returns the finished checkpoint's folder.

    Raises AccessoryError, one line, for everything that can be wrong with configuration, data, model or folders,
    before the first step. A loss that is not finite ends the run with the items of its batch named and the last good
    state saved. SIGTERM and Ctrl-C save a state and end the run; it is resumed with `resume: auto`.
    """
    device_type = config.device or ("cuda" if torch.cuda.is_available() else "cpu")
    mesh = DeviceMesh.of(from_environment(PATIENCE), config.model_parallel_size, device_type.split(":")[0])
    torch.manual_seed(config.seed)
    if config.precision == "tf32":
        torch.backends.cuda.matmul.allow_tf32 = True
    run = prepare(config, mesh, torch.device(device_type))
    with ExitStack() as stack:
        stack.enter_context(_stopping(run.stop))
        return _train(run, stack)


# --------------------------------------------------------------------------- the loop


def _train(run: Run, stack: ExitStack) -> Path:
    config, mesh, schedule = run.config, run.mesh, run.schedule
    begin = run.resumed.step if run.resumed else 0
    metrics = watch = progress = None
    if mesh.first:
        _announce(run)
        metrics = stack.enter_context(
            MetricsLog(run.folder, config.loggers, resumed_at=begin if run.resumed else None, config=config.to_dict())
        )
        progress = stack.enter_context(Progress(schedule.steps, done=begin))
        watch = RouterWatch(run.source.args.moe.num_experts_per_tok)

    def write(record: dict[str, Any]) -> None:
        if metrics is not None and progress is not None and watch is not None:
            metrics.write(record)
            progress.update(record)
            for warning in watch.check(record) if record["kind"] == "train" else ():
                progress.note(warning)

    saved = begin if run.resumed else None
    if not begin:
        _evaluate(run, 0, write)
    for index, batches in run.feed.steps(begin):
        step = index + 1
        lr = learning_rate(
            schedule.epoch_at(index + 0.5),
            lr=config.lr,
            min_lr=config.min_lr,
            warmup_epochs=config.warmup_epochs,
            epochs=config.epochs,
        )
        record = _one_step(run, step, batches, lr, saved)
        run.tokens += record["tokens"]
        samples = step * run.feed.split.rows
        write(
            {
                "kind": "train",
                "step": step,
                "epoch": schedule.epoch_at(step),
                "samples": samples,
                **record,
                "tokens": run.tokens,
            }
        )
        last = step == schedule.steps
        if last or (config.eval_interval and step % config.eval_interval == 0):
            _evaluate(run, step, write)
        stopping = bool(mesh.sum_over_all(torch.tensor(float(run.stop.is_set()), device=run.trainer.device)) > 0)
        if last or stopping or _save_is_due(run, step):
            _save(run, step)
            saved = step
        if stopping and not last:
            raise InputError(f"stopped by a signal after step {step}; its state is saved, go on with resume=auto")
    final = _finish(run)
    return final


def _one_step(run: Run, step: int, batches: list[Batch], lr: float, saved: int | None) -> dict[str, Any]:
    try:
        return run.trainer.step(batches, lr)
    except NotFiniteError as error:
        if saved != step - 1:
            _save(run, step - 1)
        found = trace_nonfinite_items(run.trainer, batches, partial(run.feed.alone, step - 1))
        told = "in" if found else "somewhere in"
        items = found or sorted({item for row in run.schedule.rows(step - 1) for item in row})
        shown = ", ".join(map(run.data.where, items[:8])) + (f" and {len(items) - 8} more" if len(items) > 8 else "")
        raise InputError(
            f"step {step}: {error}, {told} {shown}; the state of step {step - 1} is saved and still good"
        ) from error


def _evaluate(run: Run, step: int, write: Any) -> None:
    if run.held_out:
        loss, tokens = run.trainer.evaluate(run.held_out)
        write({"kind": "eval", "step": step, "loss": loss, "tokens": tokens})


def _save_is_due(run: Run, step: int) -> bool:
    every = run.config.save_iteration_interval
    if every and step % every == 0:
        return True
    epochs = run.config.save_interval
    return bool(epochs) and run.schedule.ends_epoch(step) and (run.schedule.place(step - 1)[0] + 1) % epochs == 0


def _save(run: Run, step: int) -> Path:
    values = {
        **run.identity,
        "rows": run.feed.split.rows,
        "tokens": run.tokens,
        "updates": updates_made(run.trainer.optimizer),
        "loss_scale": [run.trainer.loss_scale.value, run.trainer.loss_scale.good],
        "implementation": run.source.kind.implementation,
        "config": run.config.to_dict(),
    }
    return save_state(run.trainer, run.states, step, values, run.config.keep)


def _finish(run: Run) -> Path:
    """The finished folder and the report, written by the first process while the others wait."""
    config, source = run.config, run.source

    def written() -> Path:
        only = config.only_save_trainable
        return export(
            complete_states(run.states)[-1],
            run.folder / FINAL,
            source.checkpoints,
            source.args,
            source.kind.implementation,
            only_trained=only,
            dtype=None if only else COMPUTE[config.precision],
            shards=config.model_parallel_size,
            image_views=source.views,
            tokenizer=Path(config.tokenizer_path) if config.tokenizer_path else None,
        )

    final = run.mesh.from_first(written)
    if run.mesh.first:
        report = write_report(run.folder, title=run.folder.name, config=config.to_dict())
        log.info("%s", report)
        behind = f", to be loaded behind {source.checkpoints[0].path}" if config.only_save_trainable else ""
        print(f"{final}: the finetuned model{behind}\n{report}: what happened")
    return final


def _announce(run: Run) -> None:
    trained, total = counts(run.trainer.decoder)
    split, mesh = run.feed.split, run.mesh
    print(
        f"{run.source.kind}: {trained / 1e6:,.1f} of {total / 1e6:,.1f} million parameters are trained\n"
        f"{len(run.data):,} items, {int(run.data.lengths.sum()):,} tokens; {run.schedule.steps:,} steps "
        f"of {split.rows} rows = {split.batch_size} a micro-step × {split.accum_iter} × {mesh.data_size} data-parallel"
        f" ({mesh.model_size} model-parallel)"
    )
    if run.resumed:
        print(f"going on from {run.resumed.folder}")


@contextmanager
def _stopping(stop: threading.Event) -> Iterator[None]:
    """SIGTERM (Slurm's preemption) and the first Ctrl-C ask for an end after the step; the second one does not ask."""

    def ask(number: int, _frame: Any) -> None:
        if stop.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        stop.set()

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
