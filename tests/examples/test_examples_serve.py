"""examples/serve against a server in this process, and deploy/ against the server's own names."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
import urllib.request
from pathlib import Path

import pytest
import torch
from helpers.command_line import write_hf

from accessory.cli import _parser

pytest.importorskip("fastapi", reason="the server's packages are not installed")
from helpers.live_server import serving

from accessory.server.gate import OPEN_TO_ALL

ROOT = Path(__file__).parents[2]
EXAMPLES, DEPLOY = ROOT / "examples" / "serve", ROOT / "deploy"
KEY = "secret-1"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = write_hf(tmp_path_factory.mktemp("serve") / "hf")
    with serving(folder, key=KEY, dtype=torch.float32, max_seq_len=256) as found:
        yield found


def run(*words: str) -> str:
    environment = {**os.environ, "ACCESSORY_API_KEY": KEY}
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, env=environment, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_package_openai(server):
    pytest.importorskip("openai")
    out = run(sys.executable, str(EXAMPLES / "ask_openai.py"), server[0] + "/v1")
    at_once = re.search(r"^At once: (.*?)^Piece by piece: (.*?)^As JSON: (.*)", out, re.DOTALL | re.MULTILINE)
    assert at_once[1] == at_once[2]  # greedy
    assert at_once[3].startswith(("{'city': ", "not ready after 60 tokens"))


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_curl(server):
    lines = [line for line in run("sh", str(EXAMPLES / "ask_curl.sh"), server[0]).splitlines() if line]
    health, models, chat, *events = lines
    assert json.loads(health) == {"status": "ok"}
    assert json.loads(models)["data"][0]["id"] == "tiny"
    assert json.loads(chat)["object"] == "chat.completion"
    assert events[-1] == "data: [DONE]"
    assert all(json.loads(event.removeprefix("data: "))["object"] == "text_completion" for event in events[:-1])


@pytest.mark.skipif(importlib.util.find_spec("langchain_openai") is None, reason="langchain-openai is not installed")
def test_langchain(server):
    out = run(sys.executable, str(EXAMPLES / "ask_langchain.py"), "tiny", server[0] + "/v1")
    assert out.startswith("At once: ")
    assert "Piece by piece: " in out


# --------------------------------------------------------------------------- deploy


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile's instructions, each with its words, which may stand on several lines."""
    lines = [line for line in (DEPLOY / "Dockerfile").read_text().splitlines() if not line.startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [tuple(line.split(maxsplit=1)) for line in joined.splitlines() if line.strip()]


def test_the_dockerfile_has_instructions_only_that_docker_knows_and_begins_with_from():
    known = {"FROM", "RUN", "WORKDIR", "COPY", "USER", "EXPOSE", "STOPSIGNAL", "HEALTHCHECK", "ENTRYPOINT", "CMD"}
    names = [name for name, _ in instructions()]
    assert names[0] == "FROM"
    assert set(names) <= known
    assert all(names.count(name) == 1 for name in ("USER", "HEALTHCHECK", "ENTRYPOINT", "CMD"))


def test_the_container_is_no_root_and_asks_after_its_health():
    found = dict(instructions())
    assert found["USER"] not in ("root", "0")
    names = [name for name, _ in instructions()]
    assert names.index("USER") > max(n for n, name in enumerate(names) if name == "RUN")
    assert f":8000{OPEN_TO_ALL}" in found["HEALTHCHECK"]
    program = json.loads(found["HEALTHCHECK"].partition("CMD")[2])
    compile(program[2], "HEALTHCHECK", "exec")


def test_the_containers_command_can_be_read_and_its_extras_exist():
    found = dict(instructions())
    words = json.loads(found["ENTRYPOINT"]) + json.loads(found["CMD"])
    assert words[0] == "accessory"
    options = _parser().parse_args(words[1:])
    assert (options.host, str(options.port)) == ("0.0.0.0", found["EXPOSE"])
    installed = next(line for name, line in instructions() if name == "RUN" and "pip install" in line)
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(re.search(r"\.\[(.*?)\]", installed)[1].split(",")) <= set(extras)
    copied = [line.split()[:-1] for name, line in instructions() if name == "COPY"]
    assert all((ROOT / path).exists() for paths in copied for path in paths)


def test_hadolint_takes_the_container():
    beside = Path(sys.executable).parent / "hadolint"  # where pip puts it
    program = str(beside) if beside.exists() else shutil.which("hadolint")
    if program is None:
        pytest.skip("hadolint is missing: make test-serve installs it")
    done = subprocess.run(
        [program, str(DEPLOY / "Dockerfile")], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout) == (0, "")


def unit() -> dict[str, str]:
    lines = (DEPLOY / "accessory.service").read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if line and line[0] not in "#[")


def test_the_units_command_can_be_read_and_systemd_waits_longer_than_the_server():
    options = _parser().parse_args(shlex.split(unit()["ExecStart"])[1:])
    assert float(unit()["TimeoutStopSec"]) > options.shutdown_timeout
    assert unit()["User"] != "root"
    assert options.api_key_file == "%d/" + unit()["LoadCredential"].partition(":")[0]


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed")
def test_systemd_takes_the_unit(tmp_path):
    text = (DEPLOY / "accessory.service").read_text()
    program = unit()["ExecStart"].split()[0]
    (tmp_path / "accessory.service").write_text(text.replace(program, "/bin/true"))  # systemd wants it to exist
    command = ["systemd-analyze", "verify", str(tmp_path / "accessory.service")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_dashboard_names_only_what_the_server_tells(server):
    headers = {"Authorization": f"Bearer {KEY}"}
    metrics = urllib.request.urlopen(urllib.request.Request(server[0] + "/metrics", headers=headers)).read().decode()
    told = set()
    for name, kind in re.findall(r"^# TYPE (\S+) (\S+)$", metrics, re.MULTILINE):
        told |= {f"{name}_bucket", f"{name}_sum", f"{name}_count"} if kind == "histogram" else {name}
    dashboard = json.loads((DEPLOY / "grafana.json").read_text())
    shown = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    named = {name for expr in shown for name in re.findall(r"accessory:\w+", expr)}
    assert len(named) >= 10
    assert named <= told, sorted(named - told)
