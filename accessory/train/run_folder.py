"""The folder of a run: what lies where, whether a run may use it, and what a run clears away before it writes.

It holds `config.yaml` (what was asked for), `metrics.jsonl`, `states/` (to resume from), and at the end `final/` (a
checkpoint like any other) and `report.html`.
"""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

from accessory.errors import ConfigError
from accessory.train.config import AUTO, FinetuneConfig
from accessory.train.metrics import METRICS_FILE, write_whole
from accessory.train.report.write import CONFIG_FILE, REPORT_FILE, write_report
from accessory.train.resume import Start, find_start
from accessory.train.state import STATES, clean_states, complete_states

FINAL = "final"


class RunFolder:
    """The folder `path`. One process alone calls the methods, and gives the others what they return."""

    def __init__(self, path: Path) -> None:
        self.path, self.states, self.final = path, path / STATES, path / FINAL

    def find_start(self, config: FinetuneConfig, *, write: bool = True) -> Start:
        """Find where the run begins; the folder stays as it is, or missing. write: try whether it can be written.

        Raises ConfigError where the folder cannot be written or holds another run, CheckpointError where the state to
        resume from is damaged or no state.
        """
        self._check_writable()
        if write:
            self._probe()
        start = find_start(config.resume, self.states)
        holds_run = (self.path / METRICS_FILE).exists() and not config.overwrite
        if holds_run and config.resume is None:
            raise ConfigError(
                f"output_dir: {self.path} holds a run already; set resume=auto to go on with it, overwrite=true to "
                "begin anew, or another folder"
            )
        if holds_run and config.resume != AUTO and not start.in_place:
            raise ConfigError(
                f"output_dir: {self.path} holds another run than resume = {config.resume}; give another folder"
            )
        return start

    def claim(self, config: FinetuneConfig, start: Start) -> None:
        """Clear away what this run will write itself, and write `config.yaml`."""
        self.path.mkdir(parents=True, exist_ok=True)
        leftovers = [self.final.with_name(f"{FINAL}.partial")]
        if start.in_place:
            clean_states(self.states, later_than=start.step)
        else:
            leftovers += [self.states, self.final, self.final.with_name(f"{FINAL}.old")]
            (self.path / REPORT_FILE).unlink(missing_ok=True)
        for path in leftovers:
            if path.exists():
                shutil.rmtree(path)
        with write_whole(self.path / CONFIG_FILE) as file:
            file.write(config.as_yaml().encode())

    def newest_state(self) -> Path:
        return complete_states(self.states)[-1]

    def write_report(self, config: FinetuneConfig) -> Path:
        return write_report(self.path, title=self.path.name, config=config.to_dict())

    def _check_writable(self) -> None:
        """ConfigError where permissions forbid to write; nothing is written."""
        there = next(path for path in (self.path, *self.path.absolute().parents) if os.path.lexists(path))
        if not there.is_dir():
            raise ConfigError(f"output_dir: {self.path} cannot be written ({there}: {os.strerror(errno.ENOTDIR)})")
        if not os.access(there, os.W_OK | os.X_OK):
            raise ConfigError(f"output_dir: {self.path} cannot be written ({there}: {os.strerror(errno.EACCES)})")

    def _probe(self) -> None:
        """Make the folder and write into it, which no check can promise to work (quotas, full disks). Nothing stays."""
        new = [path for path in (self.path, *self.path.absolute().parents) if not path.exists()]
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            probe = self.path / ".probe"
            probe.touch()
            probe.unlink(missing_ok=True)
            for path in new:
                path.rmdir()
        except OSError as error:
            raise ConfigError(f"output_dir: {self.path} cannot be written ({error.strerror})") from error
