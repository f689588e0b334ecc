"""Runs one model on 1, 2, 4 or 8 GPUs, or as many processes of a CPU: an answer at once, then token by token.

    python examples/simple_inference.py path/to/converted --ranks 2

The folder may be base, sparse or any other layout, or hf://owner/name[/folder].
"""

import argparse
import random

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from accessory.model.meta import MetaModel


def main(rank: int, world_size: int, options: argparse.Namespace) -> None:
    # One rank draws for all, so the ranks agree without these seeds. The seeds make a second run draw the same.
    random.seed(0)
    torch.random.manual_seed(0)
    np.random.seed(0)

    cuda = torch.cuda.is_available()
    dist.init_process_group(
        backend="nccl" if cuda else "gloo",
        rank=rank,
        world_size=world_size,
        init_method=f"tcp://127.0.0.1:{options.port}",
    )
    if cuda:
        torch.cuda.set_device(rank)
    else:
        torch.set_num_threads(max(1, torch.get_num_threads() // world_size))

    # mp_group: the ranks that share the model.
    model = MetaModel.from_pretrained(
        options.pretrained_path,
        max_seq_len=2048,
        mp_group=dist.new_group(ranks=list(range(dist.get_world_size()))),
        dtype=getattr(torch, options.dtype),
    )

    prompt = options.prompt
    response = model.generate([prompt], images=None, max_gen_len=options.max_gen_len)[0]
    if rank == 0:  # every rank has the answer; one of them prints it
        print(response)
    # Or token by token:
    for response_in_progress in model.stream_generate(prompt, image=None, max_gen_len=options.max_gen_len):
        response = response_in_progress["text"]
        if rank == 0:
            print(response)
    dist.destroy_process_group()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Load a checkpoint on several ranks, generate, stream.")
    parser.add_argument("pretrained_path", help="a checkpoint folder, or hf://owner/name[/folder]")
    parser.add_argument("--ranks", type=int, default=max(1, torch.cuda.device_count()), help="1, 2, 4 or 8")
    parser.add_argument("--port", type=int, default=23560, help="a free port for the ranks to meet on")
    parser.add_argument("--prompt", default="The best programming language in the world is")
    parser.add_argument("--max_gen_len", type=int, default=512)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    given = parser.parse_args()
    if given.ranks == 1:
        main(0, 1, given)
    else:
        # torchrun or Slurm can start the ranks too. torch.distributed must be initialised before the model is made.
        mp.spawn(main, args=(given.ranks, given), nprocs=given.ranks)
