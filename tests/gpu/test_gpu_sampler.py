"""On a GPU: the CPU's draws, without waiting for the device, and how long a call takes."""

import time

import numpy as np
import pytest
import torch

from accessory.engine.draw import best
from accessory.engine.sampler import Sampler
from accessory.engine.sampling_params import SamplingParams

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
V = 32000
KINDS = [
    {"temperature": 0.0},
    {"temperature": 0.0, "logprobs": 3},
    {"temperature": 1.0, "top_p": 1.0},
    {"temperature": 0.7, "top_p": 1.0, "min_p": 0.02},
    {"temperature": 0.7, "top_p": 0.9},
    {"temperature": 1.5, "top_p": 1.0, "top_k": 50, "logprobs": 0},
    {"temperature": 1.0, "top_k": 1100, "min_p": 0.01},
    {"temperature": 1.0, "repetition_penalty": 1.3, "frequency_penalty": 0.4, "top_p": 1.0},
    {"temperature": 0.0, "presence_penalty": 1.0, "logit_bias": {4: 2.0, 31999: -5.0}},
    {"temperature": 2.0, "min_tokens": 9, "top_k": 1024, "logprobs": 7},
]
SETTINGS = {
    "greedy": {},
    "temperature": {"temperature": 1.0, "top_p": 1.0},
    "top-k 50": {"temperature": 1.0, "top_p": 1.0, "top_k": 50},
    "top-k 50, top-p": {"temperature": 1.0, "top_p": 0.95, "top_k": 50},
    "top-p": {"temperature": 1.0, "top_p": 0.95},
    "greedy, penalties": {"repetition_penalty": 1.1, "presence_penalty": 0.5},
    "greedy, 5 log-probabilities": {"logprobs": 5},
}


def mixed_sampler(device, rows, kinds=KINDS):
    sampler = Sampler(rows, V, device)
    for slot in range(rows):
        params = SamplingParams(seed=2**35 + slot, **kinds[slot % len(kinds)])
        sampler.start(slot, params, [3, 5, 31999, 5], [1, 5, slot], stop_ids=[2, 40000])
    return sampler


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_draws_are_the_cpus_and_nothing_waits_for_the_device(dtype):
    """800 draws of all kinds in mixed batches, with a mask in every seventh row, and NaN in one."""
    rows, steps = 160, 5
    logits_steps = (torch.randn(steps, rows, V + 64) * 3).to(dtype)
    logits_steps[0, 7, 5], logits_steps[1, 11] = float("nan"), float("-inf")
    logits_steps[2, :, :V] = logits_steps[2, :, :V].clamp(max=4)  # many equal logits at the top
    allowed = torch.rand(rows, V) < 0.5
    masks = {row: np.packbits(allowed[row].numpy()) if row % 2 else allowed[row] for row in range(0, rows, 7)}
    on_cpu, on_gpu = mixed_sampler("cpu", rows), mixed_sampler("cuda", rows)
    gpu_logits_steps = logits_steps.cuda()
    torch.cuda.synchronize()
    for step in range(steps):
        positions = [3 + step] * rows
        expected = on_cpu(logits_steps[step], range(rows), positions, masks)
        torch.cuda.set_sync_debug_mode("error")
        try:
            got = on_gpu(gpu_logits_steps[step], range(rows), positions, masks)
            on_gpu.start(0, SamplingParams(presence_penalty=1.0), [1, 2], [3])  # nor does a start
        finally:
            torch.cuda.set_sync_debug_mode("default")
        on_cpu.start(0, SamplingParams(presence_penalty=1.0), [1, 2], [3])
        assert got.token_B.device.type == "cuda"
        assert got.token_B.tolist() == expected.token_B.tolist()
        finite = expected.token_B >= 0
        torch.testing.assert_close(got.logprob_B.cpu()[finite], expected.logprob_B[finite])
        torch.testing.assert_close(got.top_logprobs_BK.cpu()[finite], expected.top_logprobs_BK[finite])


def test_a_row_draws_the_same_alone_as_in_a_batch():
    rows = 40
    logits = torch.randn(rows, V + 1, device="cuda") * 2  # an odd width: rows begin at different alignments
    together = mixed_sampler("cuda", rows)(logits, range(rows), [3] * rows)
    sampler = mixed_sampler("cuda", rows)
    for row in range(rows):
        assert sampler(logits[row : row + 1].clone(), [row], [3]).token_B.item() == together.token_B[row].item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [1, 3, 256])
def test_of_equal_logits_the_lowest_id_is_first(dtype, rows):
    logits = torch.randn(rows, V, device="cuda").clamp(max=1.5).to(dtype)
    logits[0, 9:] = 0.0
    logits[0, :9] = -0.0
    sampler = mixed_sampler("cuda", rows, [{}])
    first = [row.index(max(row)) for row in logits.tolist()]
    assert sampler(logits, range(rows), [0] * rows).token_B.tolist() == first
    _, ids = best(logits.float(), 1024)
    assert torch.equal(ids, (logits.float() + 0.0).sort(dim=-1, descending=True, stable=True).indices[:, :1024])


def test_time_and_memory_of_a_call(capsys):
    """Prints the device's time, the host's time, which a running step can hide, and the peak of memory."""
    lines = []
    for rows in (1, 64, 256):
        logits = torch.randn(rows, V, device="cuda", dtype=torch.bfloat16) * 3
        for name, options in SETTINGS.items():
            sampler = mixed_sampler("cuda", rows, [options])
            arguments = logits, list(range(rows)), [3] * rows
            for _ in range(3):
                sampler(*arguments)
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before, calls = torch.cuda.memory_allocated(), 20
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            started = time.perf_counter()
            begin.record()
            for _ in range(calls):
                sampler(*arguments)
            end.record()
            host = (time.perf_counter() - started) / calls * 1e3
            torch.cuda.synchronize()
            device, peak = begin.elapsed_time(end) / calls, torch.cuda.max_memory_allocated() - before
            lines.append(f"{rows:4} rows  {name:28} {device:7.3f} ms  host {host:6.3f} ms  {peak / 2**20:6.0f} MiB")
    with capsys.disabled():
        print("\n" + "\n".join(lines))
