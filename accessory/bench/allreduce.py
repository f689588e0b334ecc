"""`accessory bench --what allreduce`: sums over ranks, ours against the backend's own (NCCL; on a CPU gloo)."""

from __future__ import annotations

from functools import partial

import torch
import torch.distributed as dist

from accessory.bench.card import seconds_in_turn
from accessory.bench.figures import OURS, Figure
from accessory.bench.job import Job
from accessory.parallel.collectives import reduce_from_ranks

SIZES = tuple(2**n for n in range(13, 25))  # bytes: 8 kB … 16 MB
CALLS_GPU, CALLS_CPU = 32, 4


def allreduce(job: Job) -> None:
    """Every rank calls it. Numbers are fp32, in which all our sums over ranks are."""
    assert job.ranks is not None
    cuda = job.device.type == "cuda"
    for size in SIZES:
        part_N = torch.ones(size // 4, device=job.device)
        ways = {
            "NCCL" if cuda else "gloo": partial(dist.all_reduce, part_N, group=job.ranks.group),
            OURS: partial(reduce_from_ranks, part_N, job.ranks),
        }
        for who, way in ways.items():
            with torch.inference_mode():
                way()  # makes the buffers that the ranks share
                dist.barrier(group=job.ranks.group)
                seconds = seconds_in_turn([way], job.device, CALLS_GPU if cuda else CALLS_CPU)
            part_N.fill_(1.0)  # NCCL sums in place
            job.add(Figure(who=who, what=what_of(size), seconds=seconds, peer=who != OURS))


def what_of(size: int) -> str:
    return f"sum over ranks, {size // 1024} kB" if size < 2**20 else f"sum over ranks, {size // 2**20} MB"
