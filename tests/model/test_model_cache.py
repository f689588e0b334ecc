"""The size and the numbers of a model's cache, as its caller chooses them."""

from __future__ import annotations

import psutil
import pytest
import torch
from helpers.rank_kills import gone
from helpers.traffic import check_empty

from accessory.engine.sampling_params import SamplingParams
from accessory.errors import InputError
from accessory.launch.memory import HOST, Room
from accessory.model.meta import MetaModel
from accessory.model.multi_gpu_wrapper import MultiGpuWrapper

PAGE = 2 * 2 * 64 * 4 * 4 * 4  # keys and values, layers, tokens, heads, head_dim, fp32
PROMPT = "The best programming language in the world is"
HOW = {"max_seq_len": 100, "dtype": torch.float32, "device": "cpu"}
SCORED = SamplingParams(prompt_logprobs=0)


def load(folder, **how):
    return MetaModel.from_pretrained(folder, **{**HOW, **how})


def pages(model):
    return model.engine().scheduler.pool.pages


def test_by_default_a_cache_has_room_for_max_batch_size_answers(speaking):
    model = load(speaking)
    assert pages(model) == model.args.max_batch_size * 2 + 1


def test_a_given_size_is_the_pools(speaking):
    model = load(speaking, cache_gb=9.5 * PAGE / 1e9)
    cache = model.runner().cache
    assert pages(model) == 9
    assert cache.k.nbytes + cache.v.nbytes == 9 * PAGE
    assert pages(load(speaking, cache_gb=900 * PAGE / 1e9)) == 900  # more than `max_batch_size` needs
    assert model.generate([PROMPT] * 12, max_gen_len=8) == load(speaking).generate([PROMPT] * 12, max_gen_len=8)
    check_empty(model.engine())


def test_what_a_small_cache_cannot_hold_is_refused_and_the_rest_answered(speaking):
    model = load(speaking, cache_gb=2 * PAGE / 1e9)
    with pytest.raises(InputError, match=r"^prompt: .* need 2 pages of 64 tokens, but the cache has 1$"):
        model.generate([PROMPT], max_gen_len=80)
    assert model.generate([PROMPT], max_gen_len=8) == load(speaking).generate([PROMPT], max_gen_len=8)


@pytest.mark.parametrize(
    ("size", "said"),
    [
        (1.9 * PAGE / 1e9, r"^cache_gb: got 3\.11\d*e-05, but a page of 64 tokens takes 1\.64e-05 GB .*give at least"),
        (50, r"^cache_gb: got 50, but this machine has 1 GB, of which the weights take .*; give less than"),
    ],
)
def test_a_size_that_cannot_be_is_refused_before_weights_are_read(speaking, monkeypatch, size, said):
    monkeypatch.setattr("accessory.model.memory.room_for", lambda *_, **__: Room(10**9, HOST))
    monkeypatch.setattr("accessory.model.meta.build", None)
    with pytest.raises(InputError, match=said):
        load(speaking, cache_gb=size)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_keys_and_values_in_fp8(speaking, dtype):
    """Every query sees rounded keys, so a prompt's division into steps changes nothing, and little is lost."""
    exact, model = load(speaking, dtype=dtype), load(speaking, dtype=dtype, cache_dtype="fp8")
    assert model.runner().cache.k.dtype == torch.float8_e4m3fn
    assert pages(model) == pages(exact)

    def logprobs(model, budget):
        model.engine().scheduler.budget = budget
        (answer,) = model.complete([PROMPT], max_gen_len=8, params=SCORED)
        return torch.tensor(answer.prompt_logprobs), answer.token_ids

    (whole_T, answer), (chunks_T, same) = (logprobs(model, budget) for budget in (512, 3))
    bound = 1e-4 if dtype == torch.float32 else 5e-2
    torch.testing.assert_close(whole_T, chunks_T, rtol=0, atol=bound)
    if dtype == torch.float32:
        assert answer == same
    difference = (whole_T - logprobs(exact, 512)[0]).abs().max()
    assert 1e-6 < difference < 0.5


def test_all_that_is_free_is_taken_beside_the_measured_step(speaking, monkeypatch):
    model = load(speaking, cache_gb="free")
    monkeypatch.setattr("accessory.model.meta.worst_step_bytes", lambda make, longest, ranks: 200 * PAGE)
    monkeypatch.setattr("accessory.engine.runner.room_for", lambda *_: Room(1000 * PAGE, "a GPU"))
    monkeypatch.setattr(MetaModel, "device", torch.device("cuda"))
    assert model._pages() == 720
    model._fp8 = True
    assert model._pages() == 720 * 16 // 8  # 4 · 4 bytes a head, or 4 + 4


def test_on_a_cpu_all_that_is_free_is_half_of_it(speaking, monkeypatch):
    monkeypatch.setattr("accessory.engine.runner.room_for", lambda *_: Room(1000 * PAGE, HOST))
    monkeypatch.setattr("accessory.model.memory.ModelMemory.step_bytes", lambda *_: 200 * PAGE)
    assert pages(load(speaking, cache_gb="free")) == 400


@pytest.mark.slow
def test_ranks_have_the_cache_that_the_driver_was_asked_for(speaking):
    """Each has half of the heads, so a page takes half of the bytes. The ranks end when nobody holds the driver."""
    wrapper = MultiGpuWrapper(speaking, gpus=2, cache_gb=10 * PAGE / 1e9, cache_dtype="fp8", **HOW)
    assert pages(wrapper) == 40
    (answer,) = wrapper.complete([PROMPT], max_gen_len=8, params=SCORED)
    ranks = [psutil.Process(rank._process.pid) for rank in wrapper._ranks._ranks]
    del wrapper
    assert gone(ranks)
    (alone,) = load(speaking, cache_dtype="fp8").complete([PROMPT], max_gen_len=8, params=SCORED)
    assert answer.prompt_logprobs == pytest.approx(alone.prompt_logprobs, abs=1e-4)
