"""The options of `accessory plan`. Only the standard library is imported here, so that `accessory --help` answers at
once."""

from __future__ import annotations

import argparse

from accessory.model.options import add_cache_dtype, add_json_option, add_option, add_quant_options


def add_plan_arguments(plan: argparse.ArgumentParser) -> None:
    plan.add_argument("path", metavar="PATH", help="a checkpoint, its config.json, or 8x7b, 8x22b, tiny")
    plan.add_argument("--card", metavar="NAME", help="H200, H100, A100-80, 4090, … (default: those that are here)")
    plan.add_argument("--memory", type=float, metavar="GB", help="of a card that has no name here")
    plan.add_argument("--gpus", type=int, metavar="N", help="cards there are (default: as the ranks below need)")
    plan.add_argument("--tp", type=int, metavar="N", help="ranks that hold the model together (1; to run it, --gpus)")
    plan.add_argument("--implementation", choices=("base", "sparse"), help="default: PATH's, else sparse")
    add_quant_options(plan, "nf4, nf4-dq, int4, int8, fp8 (PATH's)")
    add_option(plan, "image_views", type=int, choices=(0, 1, 5), help="of images among the text (PATH's)")
    add_cache_dtype(plan, "those of the weights")
    plan.add_argument("--batch", type=int, metavar="B", help="to run it: sequences at once (1)")
    plan.add_argument("--context", type=int, metavar="T", help="tokens of prompt and answer (4096)")
    plan.add_argument("--prompt", type=int, metavar="P", help="tokens of the prompt (default: all but one)")
    plan.add_argument("--finetune", choices=("full", "lora", "qlora", "mm_stage1"), help="a training step")
    add_option(plan, "lora_rank", type=int, metavar="R", help="of LoRA (default: PATH's, else 16)")
    add_option(plan, "batch_size", type=int, metavar="B", help="rows a GPU sees at once (4)")
    add_option(plan, "max_words", type=int, metavar="T", help="tokens of a row (4096)")
    add_option(plan, "accum_iter", type=int, metavar="N", help="micro-steps a step (1)")
    plan.add_argument("--dp", type=int, metavar="N", help="data-parallel ranks (--gpus divided by --tp)")
    plan.add_argument("--cp", type=int, metavar="N", help="ranks that share each row, in each data-parallel one (1)")
    plan.add_argument(
        "--ep", type=int, metavar="N", help="of the data-parallel ranks, those that share the experts (1)"
    )
    add_option(plan, "data_parallel", choices=("sdp", "fsdp"), help="what they share out (sdp)")
    plan.add_argument("--checkpointing", action=argparse.BooleanOptionalAction, help="compute layers again in backward")
    add_option(plan, "optimizer", choices=("adamw", "adamw_8bit"), help="moments in fp32 (adamw), or in 8 bits")
    add_option(plan, "offload", choices=("none", "optimizer"), help="AdamW's moments in host memory (none)")
    add_option(plan, "gradient_dtype", choices=("fp32", "bf16"), help="of all gradients but small ones (fp32)")
    add_json_option(plan, "print one JSON object, in bytes")
