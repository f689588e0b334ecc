"""Convert our adapters to the adapter folders of Hugging Face's PEFT, and back.

PEFT's folder is `adapter_config.json` and `adapter_model.safetensors`. We write experts in the classic spelling, a pair
of matrices for each expert's linear. Servers read it, and PEFT converts it for the stacked experts of transformers 5.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from accessory.checkpoint.atomic import check_destination, new_folder
from accessory.checkpoint.chain import chained_args, open_chain, trained_on
from accessory.checkpoint.folder import open_checkpoint
from accessory.checkpoint.hub import resolve
from accessory.checkpoint.lazy import Lazy
from accessory.checkpoint.names import companion_of, expected_shapes, to_hf
from accessory.checkpoint.rotary import rotary_to_hf
from accessory.checkpoint.save import write_checkpoint
from accessory.checkpoint.weight_files import PEFT_CONFIG
from accessory.checkpoint.writers import Target
from accessory.config import ModelArgs
from accessory.convert.merge import Pair, pairs_of
from accessory.convert.peft_reader import PREFIX, WEIGHTS, WHOLE, kind_of, read_adapter, target_of
from accessory.errors import CheckpointError

_MODULES = {
    "wq": "q_proj",
    "wk": "k_proj",
    "wv": "v_proj",
    "wo": "o_proj",
    "w1": "w1",
    "w2": "w2",
    "w3": "w3",
    "gate": "gate",
    "output": "lm_head",
}


def export_adapter(
    src: str | Path,
    dst: str | Path,
    *,
    base: str | Path,
    overwrite: bool = False,
) -> list[str]:
    """Write the adapter in `src`, trained on `base`, as PEFT's folder `dst`; returns lines that say what is in it.

    `peft.PeftModel.from_pretrained(MixtralForCausalLM, dst)` then gives our logits. Norms, router, embeddings and
    output head that were trained whole become `modules_to_save`. The adapter's tokenizer and chat template come along.
    Raises CheckpointError for biases, which Hugging Face's Mixtral does not have, and for other weights that were
    trained whole.
    """
    check_destination(dst, overwrite, [src, base])
    whole, adapter = open_chain([base, src])
    args = chained_args([whole, adapter])
    adapters = {name: tensor for name, tensor in adapter.tensors.items() if companion_of(name)}
    saved = {name: tensor for name, tensor in adapter.tensors.items() if name not in adapters}
    if not adapter.partial:
        saved = {name: t for name, t in saved.items() if not _equal(t, whole.tensors[name])}
    pairs = pairs_of(adapters, args)
    _refuse(adapters, saved, pairs, adapter.path)
    if not pairs:
        raise CheckpointError(f"{adapter.path}: no LoRA in it, and PEFT's folder is made of LoRA")
    rank = max(pair.rank for pair in pairs.values())
    targets = _targets(pairs)
    modules = sorted({WHOLE[kind_of(name)] for name in saved})
    config = _peft_config(args, rank, targets, modules, str(base) if whole.layout == "hf" else None)
    out = _lora(pairs, targets, rank, args)
    for name, tensor in saved.items():
        # In transformers 5 the router's module is under mlp, and PEFT renames only LoRA's tensors.
        out[PREFIX + to_hf(name).replace("block_sparse_moe.", "mlp.")] = tensor.load().contiguous()
    _write_folder(Path(dst), out, config, adapter.resources, overwrite)
    text = f"LoRA of rank {rank}, scaled by {args.lora_scale:g}, beside {', '.join(targets)}"
    return [text] + ([f"trained whole: {', '.join(modules)}"] if modules else [])


def import_adapter(
    src: str | Path,
    dst: str | Path,
    *,
    base: str | Path,
    to: Target | None = None,
    shards: int | None = None,
    safetensors: bool = False,
    overwrite: bool = False,
) -> list[str]:
    """Write PEFT's folder `src`, made for `base`, as our adapter `dst`: a folder to load after `base`.

    `to`: base or sparse, by default the implementation of `base`. Returns lines that say what is in the adapter. Raises
    CheckpointError naming the key of anything that our network cannot have.
    """
    check_destination(dst, overwrite, [src, base])
    source = Path(resolve(src))
    model = open_checkpoint(base)
    tensors, args = read_adapter(source, model.args)
    for name in ("tok_embeddings.weight", "output.weight"):
        # If these have LoRA, PEFT saves their weights too, trained or not.
        if name in tensors and _equal(tensors[name], model.tensors[name]):
            del tensors[name]
    if not tensors:
        raise CheckpointError(f"{source}: holds zeros and what {model.path} has already; there is nothing to import")
    write_checkpoint(
        dst,
        tensors,
        args,
        to=to or model.llama_type.implementation,
        shards=shards or 1,
        safetensors=safetensors,
        overwrite=overwrite,
        allow_partial=True,
        progress=False,
        trained_on=trained_on([model], tensors),
    )
    out = []
    if args.lora_rank > 0:
        targets = ", ".join(args.lora_targets)
        out.append(f"LoRA of rank {args.lora_rank}, scaled by {args.lora_scale:g}, beside {targets}")
    kinds = sorted({WHOLE[kind_of(name)] for name in tensors if companion_of(name) is None})
    return out + ([f"trained whole: {', '.join(kinds)}"] if kinds else [])


def _refuse(adapters: Iterable[str], saved: Iterable[str], pairs: Mapping[str, Pair], path: Path) -> None:
    biases = [name for name in adapters if name.endswith(".bias")]
    if biases:
        raise CheckpointError(
            f"{path}: {biases[0]}: Hugging Face's Mixtral has no biases, so PEFT's folder has no place for these "
            f"{len(biases)}; train without bias_tuning"
        )
    for name in saved:
        if name in pairs:
            raise CheckpointError(
                f"{path}: {name}: was trained whole and has LoRA beside it; PEFT takes one of the two"
            )
        if kind_of(name) not in WHOLE:
            raise CheckpointError(
                f"{path}: {name}: was trained whole; besides LoRA, {', '.join(WHOLE)} can be exported"
            )


def _targets(pairs: Iterable[str]) -> list[str]:
    present = {target_of(weight) for weight in pairs}
    if present & {"w1", "w3"}:
        # PEFT fuses w1 and w3 and needs both. Without w2, it takes the fused pair for that of w2 and drops it. So all
        # three are written, the missing ones as zeros.
        present |= {"w1", "w2", "w3"}
    return [target for target in _MODULES if target in present]


def _lora(pairs: Mapping[str, Pair], targets: Sequence[str], rank: int, args: ModelArgs) -> dict[str, Tensor]:
    """The pairs under PEFT's names, padded with zeros to `rank`; weights of `targets` without a pair get zeros."""
    out = {}
    for weight, shape in expected_shapes(args).items():
        if target_of(weight) not in targets:
            continue
        whole_a, whole_b = torch.zeros(rank, shape[1]), torch.zeros(shape[0], rank)
        if weight in pairs:
            lora_b = weight.removesuffix("weight") + "lora_b.weight"
            a, b = pairs[weight].a.load(), rotary_to_hf(lora_b, pairs[weight].b, args).load()
            whole_a, whole_b = whole_a.to(a.dtype), whole_b.to(b.dtype)
            whole_a[: a.shape[0]], whole_b[:, : b.shape[1]] = a, b
        module = PREFIX + to_hf(weight).removesuffix("weight")
        out[module + "lora_A.weight"], out[module + "lora_B.weight"] = whole_a, whole_b
    return out


def _peft_config(
    args: ModelArgs, rank: int, targets: Iterable[str], modules: list[str], base: str | None
) -> dict[str, Any]:
    alpha = rank if args.lora_alpha is None else args.lora_alpha
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha,
        "lora_dropout": 0.0,
        "target_modules": [_MODULES[target] for target in targets],
        "modules_to_save": modules or None,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "use_dora": False,
        "use_rslora": False,
        "rank_pattern": {},
        "alpha_pattern": {},
    }


def _write_folder(
    dst: Path, tensors: dict[str, Tensor], config: Mapping[str, Any], resources: Sequence[Path], overwrite: bool
) -> None:
    from safetensors.torch import save_file

    with new_folder(dst, overwrite=overwrite) as folder:
        try:
            save_file(tensors, folder / WEIGHTS[0], metadata={"format": "pt"})
            (folder / PEFT_CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
            for resource in resources:
                shutil.copyfile(resource, folder / resource.name)
            for path in (folder / WEIGHTS[0], folder / PEFT_CONFIG, *(folder / r.name for r in resources)):
                with open(path, "rb") as handle:
                    os.fsync(handle.fileno())
        except OSError as error:
            raise CheckpointError(f"{dst}: cannot be written ({error.strerror})") from error


def _equal(one: Lazy, other: Lazy) -> bool:
    return one.shape == other.shape and torch.equal(one.load().float(), other.load().float())
