"""On a GPU: a cache that takes all that is free beside the largest step, and caches in fp8."""

import pytest
import torch
from helpers.random_models import canonical_from_hf, decoder_from_canonical, hf_mixtral, write_speaking
from helpers.sizes import CUTTABLE, SPEAKING

from accessory.engine.runner import CACHE_OF_GPU, Runner
from accessory.engine.sampling_params import SamplingParams
from accessory.engine.sequence import Sequence
from accessory.engine.worst_step import worst_steps
from accessory.launch.memory import room_for
from accessory.model.meta import MetaModel

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.fixture
def small_card():
    """Let this process take 4 GB of the card, so that a pool of all that is free is soon filled."""
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(min(1.0, (torch.cuda.memory_reserved() + 4e9) / total))
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.mark.parametrize("cache_dtype", [None, "fp8"])
def test_a_pool_of_all_that_is_free_leaves_room_for_the_worst_step(tmp_path, cache_dtype, small_card, monkeypatch):
    if cache_dtype and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("kernels for fp8 need a newer card")
    write_speaking(tmp_path, SPEAKING.replace(dim=128, hidden_dim=224, n_heads=8, n_kv_heads=2, head_dim=16))
    rooms = []

    def small_room(device, group=None, **how):
        room = room_for(device, group, **how)
        left = 4e9 - (torch.cuda.memory_allocated() - held)
        rooms.append(min(room.nbytes, int(left)))
        return type(room)(rooms[-1], room.where)

    held = torch.cuda.memory_allocated()
    monkeypatch.setattr("accessory.engine.runner.room_for", small_room)
    how = {"device": "cuda", "max_seq_len": 512, "cache_dtype": cache_dtype, "cache_gb": "free"}
    model = MetaModel.from_pretrained(tmp_path, **how)
    expected = model.generate(["The best"], max_gen_len=8)  # makes the pool
    runner = model.engine().executor.runner
    layers = runner.cache._layers
    scales = [t for layer in layers for t in (layer.k_scale_PSG, layer.v_scale_PSG) if t is not None]
    pool = runner.cache.k.nbytes + runner.cache.v.nbytes + sum(t.nbytes for t in scales)
    assert 0.3 * rooms[-1] < pool <= CACHE_OF_GPU * rooms[-1]
    for _ in range(2):
        for plan in worst_steps(runner.about, 512):
            runner.run(plan).result()
    model.engine().scheduler.pool.forget()  # the worst steps wrote to pages that had content
    assert model.generate(["The best"], max_gen_len=8) == expected


@pytest.mark.parametrize("graphs", [True, False])
def test_keys_and_values_in_fp8_stay_near(graphs):
    """The same prompt, judged and continued, against a cache in 16 bits; decoding with graphs and without."""
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("kernels for fp8 need a newer card")
    from accessory.engine.engine import Engine
    from accessory.engine.executor import LocalExecutor

    args = CUTTABLE.replace(max_seq_len=512)
    tensors = canonical_from_hf(hf_mixtral(args, std=0.02))
    decoder = decoder_from_canonical(args, "sparse", tensors, torch.bfloat16).requires_grad_(False).cuda()
    found = []
    for fp8 in (False, True):
        runner = Runner(decoder, pages=20, max_seq_len=512, vocab_size=args.vocab_size, fp8=fp8)
        if not graphs:
            runner._graphs.enabled = False
        engine = Engine.of(LocalExecutor(runner), runner.about)
        engine.scheduler.budget = 50
        ids = torch.randint(0, args.vocab_size, (200,), generator=torch.Generator().manual_seed(0)).tolist()
        request = engine.add(Sequence(ids, SamplingParams(prompt_logprobs=0, logprobs=0), max_tokens=20))
        while engine.step():
            pass
        assert request.error is None
        assert len(request.drawn) == 20
        found.append(torch.tensor([draw.logprob for draw in request.prompt_logprobs]))
    assert (found[0] - found[1]).abs().median() < 0.05
