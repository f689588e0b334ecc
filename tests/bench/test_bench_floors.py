"""Floors against numbers counted by hand, and against the tensors of a network."""

from __future__ import annotations

import pytest
import torch

from accessory.bench import floors
from accessory.bench.job import noise
from accessory.build.network import NetworkSpec, build
from accessory.config import PRESETS
from accessory.formats import Quant

TINY, REAL = PRESETS["tiny"], PRESETS["8x7b"]


def stored(quant: Quant | None) -> dict[str, int]:
    """Bytes of each tensor of a network, in fp32 where it is not quantised."""
    decoder = build(
        NetworkSpec(checkpoints=[noise(TINY)], args=TINY, implementation="sparse", quant=quant), dtype=torch.float32
    )
    return {name: t.nbytes for name, t in [*decoder.named_parameters(), *decoder.named_buffers()]}


@pytest.mark.parametrize("format", ["none", "int8", "fp8"])
def test_a_step_reads_all_tensors_but_the_embedding_and_experts_that_nobody_chose(format):
    quant = Quant.parse(format)
    found = stored(quant)
    experts = sum(size for name, size in found.items() if ".experts." in name)
    beside = sum(found.values()) - found["tok_embeddings.weight"] - experts
    # Each expert more brings a row of the router with it; the floor does not read it where nobody chose the expert.
    router = 4 * TINY.n_layers * TINY.dim
    E = TINY.moe.num_experts
    assert floors.weight_bytes(TINY, quant, E, 4) == beside + experts
    assert floors.weight_bytes(TINY, quant, 1, 4) == beside + experts / E - (E - 1) * router


def test_experts_met():
    assert floors.experts_met(REAL, 1) == pytest.approx(2)
    assert floors.experts_met(REAL, 2) == pytest.approx(2 + 2 * 6 / 8)
    assert floors.experts_met(REAL, 1000) == pytest.approx(8)


def test_a_token_of_8x7b_reads_what_is_published_of_its_active_parameters():
    read = floors.decode_bytes(REAL, None, 1, 0) / 2
    assert read == pytest.approx(12.88e9 - REAL.vocab_size * REAL.dim, rel=0.002)  # 12.88 B, less the embedding
    assert floors.decode_bytes(REAL, None, 1, 1000) - 2 * read == 2 * 2 * 32 * 8 * 128 * 1000


def test_ranks_share_the_bytes_and_in_base_the_busiest_counts():
    whole = floors.decode_bytes(REAL, None, 1, 128)
    assert floors.decode_bytes(REAL, None, 1, 128, ranks=2) == pytest.approx(whole / 2)
    # Of two experts, both lie on one rank with probability 2 · (4/8 · 3/7) = 3/7: it reads 1 + 3/7 on average.
    assert floors.busiest_share(REAL, 1, 2) == pytest.approx(1 + 3 / 7, rel=0.05)
    assert floors.decode_bytes(REAL, None, 1, 128, ranks=2, base=True) > whole / 2
    assert floors.busiest_share(REAL, 1000, 2) == 4


def test_operations_of_a_layer_and_of_a_prompt():
    assert floors.layer_operations(REAL, 3) == 3 * 2 * 3 * 2 * 4096 * 14336
    one = REAL.replace(n_layers=1)
    attention = 4 * 4096 * 32 * 128 * 10 * 10 // 2  # not causal, of ten tokens: 4 · T² · H · d, of which half
    products = 2 * 10 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 8 * 4096 + 6 * 4096 * 14336)
    head = 2 * 32000 * 4096
    assert floors.prompt_operations(one, 1, 10, every_logit=False) == products + head + attention / 4096
    assert floors.prompt_operations(one, 2, 10, every_logit=True) == 2 * (products + 10 * head + attention / 4096)


@pytest.mark.parametrize(("format", "bytes_"), [("none", 2), ("int8", 1), ("int4", 0.5)])
def test_a_layer_of_8x7b_reads_its_experts(format, bytes_):
    numbers = 3 * 4096 * 14336
    assert floors.layer_bytes(REAL, format, 8) == pytest.approx(8 * numbers * bytes_, rel=0.06)  # and scales
    assert floors.layer_bytes(REAL, format, 2) * 4 == pytest.approx(floors.layer_bytes(REAL, format, 8))
