"""A run of `accessory bench` on this machine: the card's rates, the peers, then ours."""

from __future__ import annotations

from collections.abc import Callable

from accessory.bench import peer_gpt_fast, peer_transformers
from accessory.bench.allreduce import allreduce
from accessory.bench.decode import decode
from accessory.bench.job import Job
from accessory.bench.layer import grouped_mm, layer
from accessory.bench.prefill import prefill
from accessory.bench.training import train
from accessory.config import Implementation

OF_FORMATS: dict[str, Callable[[Job, Implementation, str], None]] = {
    "decode": decode, "prefill": prefill, "layer": layer, "train": train
}  # fmt: skip
# Peers run first, and nothing of them stays: neither they nor ours have the memory of both.
PEERS: dict[str, Callable[[Job, str], None]] = {
    "transformers": peer_transformers.measure,
    "gpt-fast": peer_gpt_fast.measure,
    "grouped_mm": lambda job, what: grouped_mm(job),
}


def measure(job: Job, what: str) -> None:
    """Fill the job's figures. Every rank calls it."""
    for peer in job.peers:
        job.begin(peer)
        PEERS[peer](job, what)
    if what == "allreduce":
        job.begin("sums over ranks")
        allreduce(job)
        return
    for implementation in job.implementations:
        for format in job.formats:
            job.begin(job.who(implementation, format))
            OF_FORMATS[what](job, implementation, format)
