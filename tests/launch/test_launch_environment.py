"""How the variables of torchrun and Slurm are read, and which values are refused."""

from __future__ import annotations

import pytest

from accessory.errors import ConfigError
from accessory.launch.environment import first_host, launch_of, launched_rank, set_meeting_point

VARIABLES = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "SLURM_PROCID", "SLURM_STEP_ID")


@pytest.fixture(autouse=True)
def _started_alone(monkeypatch):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, None),
        ({"WORLD_SIZE": "1", "RANK": "0"}, None),
        (
            {"WORLD_SIZE": "8", "RANK": "5", "LOCAL_RANK": "1", "MASTER_ADDR": "n1", "MASTER_PORT": "7"},
            (5, 8, 1, "n1", 7),
        ),
        (
            {
                "SLURM_PROCID": "9",
                "SLURM_STEP_ID": "0",
                "SLURM_STEP_NUM_TASKS": "16",
                "SLURM_LOCALID": "1",
                "SLURM_STEP_NODELIST": "gpu[03-05]",
                "SLURM_JOB_ID": "12345",
            },
            (9, 16, 1, "gpu03", 29845),
        ),
        # Inside an allocation but not started by srun: one process of its own.
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}, None),
    ],
)
def test_launchers_variables(environment, expected):
    launch = launch_of(environment)
    found = None if launch is None else (launch.rank, launch.size, launch.local_rank, launch.address, launch.port)
    assert found == expected


@pytest.mark.parametrize("bad", [{"WORLD_SIZE": "x", "RANK": "0"}, {"WORLD_SIZE": "2", "RANK": "2"}])
def test_nonsense_names_the_variable(bad):
    with pytest.raises(ConfigError, match="WORLD_SIZE"):
        launch_of(bad)


@pytest.mark.parametrize(
    ("nodes", "host"),
    [("gpu[03-05,9],cpu1", "gpu03"), ("a1,a2", "a1"), ("node7", "node7"), ("n-a[1,2]", "n-a1"), ("", "127.0.0.1")],
)
def test_the_first_host_of_a_node_list(nodes, host):
    assert first_host(nodes) == host


@pytest.mark.parametrize(
    ("environment", "rank"),
    [
        ({}, 0),
        ({"WORLD_SIZE": "8", "RANK": "5"}, 5),
        ({"SLURM_PROCID": "3", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "4"}, 3),
        ({"WORLD_SIZE": "1", "RANK": "0"}, 0),
        # These count as rank 0, because only rank 0 prints and some process must report the wrong variables.
        ({"WORLD_SIZE": "2", "RANK": "2"}, 0),
        ({"WORLD_SIZE": "2", "RANK": "x"}, 0),
    ],
)
def test_the_rank_of_a_process_that_only_wants_to_know_whether_it_may_speak(environment, rank):
    assert launched_rank(environment) == rank


def test_the_environment_of_this_process_is_read_when_it_is_asked_for(monkeypatch):
    assert launch_of() is None
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "3")
    launch = launch_of()
    assert launch is not None
    assert (launch.rank, launch.size, launch.local_rank, launched_rank()) == (3, 4, 3, 3)


def test_a_meeting_point_is_said_unless_the_launcher_said_it(monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "there")
    monkeypatch.setenv("MASTER_PORT", "1")  # so that monkeypatch restores it after the test
    monkeypatch.delenv("MASTER_PORT")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    set_meeting_point("here", 1234)
    launch = launch_of()
    assert launch is not None
    assert (launch.address, launch.port) == ("there", 1234)
    set_meeting_point(None, None)
    assert launch_of() == launch
