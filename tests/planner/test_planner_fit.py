"""What is refused because it cannot fit, against networks and caches of torch, and what is proposed instead."""

import pytest
import torch
from helpers.plans import BIG, BOTH, CUTTABLE, finetuning, running

from accessory.adapt.quant import quantize_skeleton
from accessory.errors import InputError, MemoryFullError
from accessory.formats import FORMATS
from accessory.launch.memory import HOST, Room
from accessory.nn.cache import PagedCache
from accessory.nn.decoder import Decoder
from accessory.planner.fit import (
    certain_bytes,
    check_cache,
    check_fit,
    explain,
    explained,
    explained_on,
    fits,
    what_fits,
)
from accessory.planner.peak import estimate

LORA = BIG.replace(lora_rank=100_000)
GPU = Room(int(79.1 * 2**30), "NVIDIA H100 80GB HBM3")


def host(gigabytes):
    return Room(int(gigabytes * 1e9), HOST)


def on_cpu(setup, dense_bytes):
    return type(setup)(**{**vars(setup), "device": "cpu", "dense_bytes": dense_bytes})


@pytest.mark.parametrize("quant", [None, *FORMATS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("implementation", BOTH)
def test_what_is_certain_are_the_bytes_of_torch(implementation, dtype, quant):
    setup = on_cpu(running(CUTTABLE, quant, implementation=implementation, batch=3, context=100), dtype.itemsize)
    with torch.device("meta"):
        decoder = Decoder(CUTTABLE, implementation)
    decoder.cast(dtype).compute_in(dtype)
    if quant is not None:
        quantize_skeleton(decoder, setup.quant)
    cache = PagedCache(CUTTABLE, 3 * 2 + 1, "meta", dtype)
    held = [*decoder.parameters(), *decoder.buffers()]
    assert certain_bytes(setup) == {
        "weights": sum(tensor.nbytes for tensor in held),
        "key/value cache": cache.k.nbytes + cache.v.nbytes,
    }


def test_training_takes_a_weight_a_gradient_and_two_moments_for_certain():
    full = finetuning(CUTTABLE, kind="full")
    total = CUTTABLE.parameter_counts()[0]
    assert certain_bytes(full) == {"weights": 4 * total, "gradients": 4 * total, "optimiser": 8 * total}


@pytest.mark.parametrize(
    ("setup", "room", "words"),
    [
        (running(context=2), host(32), ["1 × 2 tokens", "93.4 GB", "weights 93.4 GB", "this machine has 32 GB"]),
        (running(context=2), GPU, ["H100", "84.9 GB; quant int8", "2 GPUs (2 model-parallel) would fit"]),
        (running(context=10**7, quant="nf4"), GPU, ["key/value cache 1,311 GB", "tokens of prompt and answer"]),
        (running(batch=10**4, quant="nf4"), GPU, ["10000 × 4,096", "at once"]),
        (finetuning(LORA, kind="lora"), host(800), ["lora_rank 100000", "batch_size 4", "optimiser", "lora_rank 2048"]),
        (
            finetuning(kind="full", dp=7),
            GPU,
            [
                "full finetuning",
                "on 7 ranks",
                "GB for each",
                "16 such GPUs (1 model-parallel × 16 data-parallel), checkpointing, data_parallel fsdp would fit",
            ],
        ),
        (running(context=2048, batch=100, quant="int4"), host(45), ["at once", "cache_dtype fp8 would fit"]),
        (running(context=2), host(1), ["no single change is enough: `accessory plan`"]),
    ],
)
def test_what_cannot_fit_is_refused_and_something_else_proposed(setup, room, words):
    with pytest.raises(InputError) as error:
        check_fit(setup, room)
    assert "\n" not in str(error.value)
    assert [word for word in words if word not in str(error.value)] == [], str(error.value)


def test_a_given_cache_must_fit_beside_the_weights():
    check_cache(running(quant="int4"), 55, GPU)
    check_cache(running(), 10**6, None)
    said = r"^cache_gb: got 80, but .*H100.* has 84\.9 GB, of which the weights take 24\.8 GB; give less than 60\.1 GB"
    with pytest.raises(InputError, match=said):
        check_cache(running(quant="int4"), 80, GPU)


@pytest.mark.parametrize("setup", [running(CUTTABLE), finetuning(CUTTABLE), running(CUTTABLE, "int4", tp=2)])
def test_what_just_fits_is_not_refused(setup, caplog):
    needed = sum(certain_bytes(setup).values())
    check_fit(setup, Room(needed, HOST))
    check_fit(setup, Room(int(needed / 1.049), HOST))
    assert not caplog.messages
    check_fit(setup, None)
    with pytest.raises(InputError):
        check_fit(setup, Room(int(needed / 1.051), HOST))


def test_what_probably_does_not_fit_a_gpu_is_a_warning(caplog):
    setup = running(quant="int8", batch=16, context=4096)
    allocated, certain = estimate(setup).allocated, sum(certain_bytes(setup).values())
    check_fit(setup, Room(allocated, "GPU"))
    assert not caplog.messages
    check_fit(setup, Room((allocated + certain) // 2, "GPU"))
    (said,) = caplog.messages
    assert "memory: a model with 16 × 4,096 tokens" in said
    assert "at once" in said


def test_the_largest_numbers_that_fit_are_proposed():
    setup = running(batch=64, context=32768, quant="nf4")
    said = what_fits(setup, GPU)
    batch = int(said.split(" at once")[0])
    assert fits(running(batch=batch, context=32768, quant="nf4"), GPU)
    assert not fits(running(batch=batch + 1, context=32768, quant="nf4"), GPU)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 69.24 GiB. GPU 0 has a total capacity of …\nmore"
        ),
        RuntimeError(
            "[enforce fail at alloc.cpp] DefaultCPUAllocator: can't allocate memory: you tried to allocate 7 b"
        ),
    ],
)
def test_memory_that_runs_out_is_explained(error):
    setup = running(batch=64, context=32768, quant="nf4")
    with pytest.raises(MemoryFullError) as told, explained(lambda: explain(setup, GPU)):
        raise error
    said = str(told.value)
    assert "69.24 GiB more were asked for" in said or "7 b more were asked for" in said
    assert "64 × 32,768 tokens" in said
    assert "H100" in said
    assert "would fit" in said
    assert "capacity" not in said
    assert "\n" not in said


def test_work_that_the_planner_does_not_know_is_explained_too():
    words = r"^memory ran out: .*; quantising x, and this machine has .* GB; less$"
    with pytest.raises(MemoryFullError, match=words), explained_on("cpu", "quantising x", "less"):
        raise MemoryError


@pytest.mark.parametrize("error", [RuntimeError("shape"), InputError("x"), MemoryFullError("told already")])
def test_other_errors_stay_as_they_are(error):
    with pytest.raises(type(error)) as told, explained(lambda: "never said"):
        raise error
    assert told.value is error
