"""Runs the commands whose outputs the pages show, and writes what they print below them.

python docs/outputs.py            rewrites blocks that are no longer what comes out
python docs/outputs.py --check    exits with 1 if there are any, and says which
python docs/outputs.py --long     also runs what takes minutes: `accessory demo --finetune`, and what reads its files

A comment right before a block of a page says what the block is:

<!-- output of: accessory info PATH -->    what this command prints
<!-- output of the block above -->         what the nearest block of bash or Python above it prints
<!-- long output of: … -->                 the same, run with --long only; also "long output of the block above"
<!-- server -->                            a command that serves on port 8000 until the page ends; its log is server.log
<!-- file: NAME -->                        a file of this name, for the commands below
<!-- not run: REASON -->                   an output that cannot come out again, and why, or a text that is no output

Each ```text block needs one of them. All commands run one after another in one empty folder, in which `accessory demo`
leaves demo-model. A server takes any free port. Times, rates, ports and ids may differ, as may what … stands for.
"""

from __future__ import annotations

import argparse
import difflib
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent  # on pages it is .venv/bin
PAGES = ("README.md", "docs/tutorial.md", "docs/quantization.md", "docs/finetuning.md", "docs/serving.md")
BLOCK = re.compile(
    r"(?:^<!-- (?P<kind>(?:long )?output of|server|file|not run)(?:: (?P<what>[^\n]*?)| the block above)? -->\n\n?)?"
    r"^```(?P<language>\w*)\n(?P<body>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
PROGRAMS = {"bash": ("bash", "-e", "-o", "pipefail", "-c"), "python": ("python", "-c")}
SERVED = "127.0.0.1:8000"  # what pages call a server's address
COLOURS = re.compile(r"\x1b\[[0-9;]*m")
# What differs from run to run: durations, rates, ports, ids, moments, what rounding leaves, where the command lies.
VARIES = (
    (re.compile(r"\b(\d+ min )?[\d.,]+ (s|ms|tokens/s)\b"), r"# \2"),
    (re.compile(r"about \d+ (seconds|minutes) for ([\d,]+ tokens) at [\d,]+ a second"), r"about # for \2"),
    (re.compile(r"127\.0\.0\.1:\d+"), "127.0.0.1:#"),
    (re.compile(r"\b(chatcmpl|cmpl|req)-\w+"), r"\1-#"),
    (re.compile(r'"created":\d+'), '"created":#'),
    (re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3}"), "#"),
    (re.compile(r"\b\d(\.\d)?e-\d\d\b"), "#"),
    (re.compile(r"( +[\d.]+){5}$", re.MULTILINE), " #"),  # a row of percentiles of `accessory bench`
    (re.compile(r"[\d.]+ requests/s; tokens/s: [\d.,]+ in (\(.*\)), [\d.,]+ out"), r"# requests/s; # in \1, # out"),
    (re.compile(r"\S*bin/accessory"), "accessory"),
)


def main(words: list[str] | None = None, root: Path = ROOT, kept: Path | None = None) -> int:
    """kept: the empty folder to run in, which stays; by default one that does not."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing")
    parser.add_argument("--long", action="store_true", help="also run the commands that take minutes")
    options = parser.parse_args(words)
    wrong = 0
    with nullcontext(kept) if kept else tempfile.TemporaryDirectory() as folder:
        for name in PAGES:
            page = root / name
            text = page.read_text()
            new = _renewed(text, name, Path(folder), options.long)
            wrong += new != text
            if not options.check and new != text:
                page.write_text(new)
    return int(options.check and wrong > 0)


def _renewed(text: str, name: str, folder: Path, long: bool) -> str:
    """A page's text with what its commands print now. Prints where that is something else."""
    parts, end, above, address = [], 0, ("bash", "false"), SERVED
    with ExitStack() as servers:
        for found in BLOCK.finditer(text):
            kind, what, language, body = found.group("kind", "what", "language", "body")
            if language in PROGRAMS:
                above = (language, body)
            if kind == "file":
                (folder / what).parent.mkdir(parents=True, exist_ok=True)
                (folder / what).write_text(body)
            elif kind == "server":
                address = servers.enter_context(_server(body, folder))
            elif kind == "output of" or (kind == "long output of" and long):
                language, command = ("bash", what) if what else above
                printed = output_of(command.replace(SERVED, address), folder, language).replace(address, SERVED)
                if not alike(body, printed):
                    lines = difflib.unified_diff(
                        body.splitlines(), printed.splitlines(), "shown", "printed", lineterm=""
                    )
                    print(f"{name}: {command}", *lines, sep="\n")
                    parts += [text[end : found.start("body")], printed]
                    end = found.end("body")
    return "".join([*parts, text[end:]])


def output_of(command: str, folder: Path, language: str = "bash") -> str:
    """What a command prints. RuntimeError where it fails."""
    done = subprocess.run(
        [*PROGRAMS[language], command], cwd=folder, env=_environment(), capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{command}: {done.stderr or done.stdout}")
    lines = COLOURS.sub("", done.stdout).replace(str(BIN), ".venv/bin").splitlines()
    return "".join(f"{line.rstrip()}\n" for line in lines)


@contextmanager
def _server(command: str, folder: Path) -> Iterator[str]:
    """The address of a server that this command starts. RuntimeError where it does not answer, or not end in order."""
    log = folder / "server.log"
    words = ["bash", "-c", f"exec {command.strip()} --port 0"]
    with (
        log.open("w") as stderr,
        subprocess.Popen(
            words, cwd=folder, env=_environment(), stdout=subprocess.PIPE, stderr=stderr, text=True
        ) as server,
    ):
        try:
            assert server.stdout is not None
            found = re.search(r"127\.0\.0\.1:\d+", server.stdout.readline())
            if found is not None:
                yield found[0]
        finally:
            server.send_signal(signal.SIGTERM)
    if found is None or server.returncode:
        raise RuntimeError(f"{command}: status {server.returncode}: {log.read_text()}")


def _environment() -> dict[str, str]:
    return {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT), "COLUMNS": "120"}


def alike(shown: str, printed: str) -> bool:
    """Whether a block shows what was printed, but for what varies."""
    for pattern, instead in VARIES:
        shown, printed = pattern.sub(instead, shown), pattern.sub(instead, printed)
    pattern = re.escape(shown.strip()).replace(re.escape("…"), ".*")
    return re.fullmatch(pattern, printed.strip(), re.DOTALL) is not None


if __name__ == "__main__":
    sys.exit(main())
