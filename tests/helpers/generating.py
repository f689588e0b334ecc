"""An engine over a decoder alone, for tests that need no tokenizer."""

from __future__ import annotations

from collections.abc import Sequence as Many

import torch

from accessory.engine.engine import Engine
from accessory.engine.executor import LocalExecutor
from accessory.engine.runner import Runner
from accessory.engine.sampling_params import SamplingParams
from accessory.engine.sequence import Sequence
from accessory.limits import GRAPH_MOST_TOKENS
from accessory.nn.decoder import Decoder


def engine_over(decoder: Decoder, *, graphs: bool = True, pages: int = 200, max_seq_len: int = 512) -> Engine:
    """graphs: on a GPU, whether steps are replayed as CUDA graphs. They must then be possible."""
    runner = Runner(decoder, pages=pages, max_seq_len=max_seq_len, vocab_size=decoder.args.vocab_size)
    if not graphs:
        runner._graphs.enabled = False
    elif runner.device.type == "cuda":
        most = 512 if decoder.products_in == torch.float32 else GRAPH_MOST_TOKENS  # in fp32, more tokens need the host
        assert all(runner._graphs.fits(s.all_tokens, False) for s in runner._graphs.sizes if s.all_tokens <= most)
    return Engine.of(LocalExecutor(runner), runner.about)


def answers(engine: Engine, prompts: Many[Many[int]], n: int, params: SamplingParams | None = None) -> list[list[int]]:
    """The ids that follow each prompt, of requests that begin together."""
    requests = [engine.add(Sequence(list(ids), params or SamplingParams(), max_tokens=n)) for ids in prompts]
    while engine.step():
        pass
    return [request.ids[request.prompt_length :] for request in requests]
