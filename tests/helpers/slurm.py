"""A Slurm cluster of two nodes on this machine: Debian's packages slurm-wlm and munge, with a folder of their own.

Each node has eight "GPUs", which are empty files: Slurm only counts them.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "srun", "scancel")
HOSTS = Path("/etc/hosts")
CONFIG = """
ClusterName=accessory
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
MpiDefault=none
ReturnToService=2
SwitchType=switch/none
KillWait=30
FirstJobId={first_job}
GresTypes=gpu
NodeName={nodes[0]} NodeAddr=127.0.0.1 Port={ports[0]} CPUs=16 Gres=gpu:8
NodeName={nodes[1]} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=16 Gres=gpu:8
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> str | None:
    """What keeps a cluster from being started here; None if nothing does."""
    lacking = [name for name in PROGRAMS if shutil.which(name) is None]
    if lacking:
        return f"Slurm is missing ({', '.join(lacking)}): apt-get install slurm-wlm munge"
    return "Slurm's nodes need root" if os.geteuid() != 0 else None


class Cluster:
    """nodes: their names. `srun` and `start` run a command in the cluster."""

    def __init__(self, folder: Path, nodes: Sequence[str]) -> None:
        self.nodes = nodes
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "TORCHELASTIC_", "MASTER_"))}
        self.environment = {**kept, "SLURM_CONF": f"{folder}/slurm.conf", "OMP_NUM_THREADS": "1"}
        self.environment["CUDA_VISIBLE_DEVICES"] = ""  # the GPUs are none

    def start(self, *words: object, cwd: Path, **variables: str) -> subprocess.Popen[str]:
        """`srun` with these words: its options, then a command."""
        return subprocess.Popen(
            ["srun", *map(str, words)], cwd=cwd, env={**self.environment, **variables}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    def srun(self, *words: object, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
        process = self.start(*words, cwd=cwd, **variables)
        try:
            out, err = process.communicate(timeout=150)
        except subprocess.TimeoutExpired:
            self.cancel()
            out, err = process.communicate(timeout=60)
            raise AssertionError(f"srun did not end\n{out}\n{err}") from None
        return subprocess.CompletedProcess(words, process.returncode, out, err)

    def cancel(self) -> None:
        """End all that runs, as a person does."""
        subprocess.run(["scancel", "--user", "root"], env=self.environment, check=True, timeout=30)

    def _tell(self, *words: str) -> str:
        done = subprocess.run(words, env=self.environment, capture_output=True, text=True, check=False, timeout=30)
        return done.stdout

    def wait_for_nodes(self) -> None:
        until = time.monotonic() + 30
        while self._tell("sinfo", "--noheader", "--format=%T").split() != ["idle"]:
            assert time.monotonic() < until, self._tell("sinfo", "--list-reasons")
            time.sleep(0.2)


@contextlib.contextmanager
def cluster(folder: Path) -> Iterator[Cluster]:
    """Two nodes and a controller, until the block ends. The nodes' names are in /etc/hosts meanwhile."""
    nodes = [f"accessory-{os.getpid()}-{number}" for number in (1, 2)]
    found = Cluster(folder, nodes)
    _write(folder, nodes)
    started: list[subprocess.Popen[bytes]] = []

    def begin(*words: str) -> None:
        log = (folder / f"{words[0]}.{len(started)}.out").open("wb")
        started.append(subprocess.Popen(words, env=found.environment, stdout=log, stderr=log))

    with _named(nodes):
        try:
            key, to = folder / "munge" / "key", folder / "munge"
            begin(
                "munged", "--foreground", "--force", f"--key-file={key}", f"--socket={folder}/munge.socket",
                f"--pid-file={folder}/munged.pid", f"--log-file={to}/log", f"--seed-file={to}/seed",
            )  # fmt: skip
            until = time.monotonic() + 20
            while not (folder / "munge.socket").exists():
                assert time.monotonic() < until, (folder / "munged.0.out").read_text()
                time.sleep(0.05)
            begin("slurmctld", "-D")
            for node in nodes:
                begin("slurmd", "-D", "-N", node)
            found.wait_for_nodes()
            yield found
            found.cancel()
        finally:
            for process in reversed(started):
                process.terminate()
            for process in started:
                process.wait(30)


def _write(folder: Path, nodes: Sequence[str]) -> None:
    for name in ("munge", "state", "spool"):
        (folder / name).mkdir(mode=0o700)
    (folder / "munge" / "key").write_bytes(os.urandom(1024))
    (folder / "munge" / "key").chmod(0o400)
    for number in range(8):
        (folder / f"gpu{number}").touch()
    (folder / "gres.conf").write_text(
        f"AutoDetect=off\nNodeName={nodes[0]},{nodes[1]} Name=gpu File={folder}/gpu[0-7]\n"
    )
    controller, *ports = _free_ports(3)
    (folder / "slurm.conf").write_text(
        CONFIG.format(
            host=socket.gethostname().partition(".")[0], folder=folder, nodes=nodes, controller=controller, ports=ports,
            first_job=random.randrange(100, 900),  # the ranks meet on a port of 29500 and this number
        )
    )  # fmt: skip


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


@contextlib.contextmanager
def _named(nodes: Sequence[str]) -> Iterator[None]:
    line = f"127.0.0.1 {' '.join(nodes)}\n"
    with HOSTS.open("a") as file:
        file.write(line)
    try:
        yield
    finally:
        HOSTS.write_text(HOSTS.read_text().replace(line, ""))
