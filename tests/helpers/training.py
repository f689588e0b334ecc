"""Small training runs that transformers, one process and several ranks all run alike."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from accessory.config import ModelArgs
from helpers.random_models import canonical_from_hf, hf_mixtral
from helpers.sizes import TINY

ARGS = TINY.replace(load_balancing_weight=0.1)
STEPS, DOCUMENTS, LENGTH = 20, 4, 24
LR, CLIP, DECAY = 3e-3, 1.0, 0.1


def documents(step: int) -> list[tuple[list[int], list[bool]]]:
    """The (ids, learnt) of a step's documents. Lengths differ, some ids are learnt, two fit a row of LENGTH."""
    generator = torch.Generator().manual_seed(100 + step)
    out = []
    for _ in range(DOCUMENTS):
        length = int(torch.randint(6, LENGTH // 2 + 1, (1,), generator=generator))
        ids = torch.randint(3, ARGS.vocab_size, (length,), generator=generator)
        ids[0] = 1
        learn = torch.rand(length, generator=generator) < 0.6
        learn[0], learn[-1] = False, True
        out.append((ids.tolist(), learn.tolist()))
    return out


def batches(step: int, *, packed: bool = False, parts: int = 1, multiple: int = 1) -> list[Any]:
    """The step's documents in `parts` micro-batches (or batches of ranks): one document a row, two if `packed`.

    multiple: of which a row's length is one.
    """
    from accessory.data.batches import collate
    from accessory.data.dataset import Example

    examples = [Example(ids=ids, learn=learn, truncated=False, image=None) for ids, learn in documents(step)]
    rows = [examples[i : i + 2] for i in range(0, DOCUMENTS, 2)] if packed else [[e] for e in examples]
    per = len(rows) // parts
    return [collate(rows[i * per : (i + 1) * per], list(range(per)), multiple=multiple) for i in range(parts)]


def batches_of(mesh: Any, step: int, *, packed: bool = False, accum: int = 1) -> list[Any]:
    """The step's micro-batches of this rank, as the data loader makes them."""
    from accessory.ops.shared_rows import places_of

    sharers = mesh.context_size
    parts = batches(step, packed=packed, parts=accum * mesh.replicas, multiple=2 * sharers if sharers > 1 else 1)
    own = parts[mesh.replica :: mesh.replicas]
    return [b.part(places_of(b.tokens_BT.shape[1], mesh.context_rank, sharers)) if sharers > 1 else b for b in own]


def hf_losses(steps: int = STEPS) -> list[tuple[float, float, float]]:
    """(cross-entropy, balance, gradient norm) of each step of a plain loop over transformers' model."""
    model = hf_mixtral(ARGS)
    decayed = [p for n, p in model.named_parameters() if p.dim() > 1]
    rest = [p for n, p in model.named_parameters() if p.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": DECAY}, {"params": rest, "weight_decay": 0.0}], lr=LR, betas=(0.9, 0.95)
    )
    out = []
    for step in range(steps):
        docs = documents(step)
        T = max(len(ids) for ids, _ in docs)
        ids_BT = torch.zeros(len(docs), T, dtype=torch.int64)
        labels_BT = torch.full_like(ids_BT, -100)
        mask_BT = torch.zeros_like(ids_BT)
        for b, (ids, learn) in enumerate(docs):
            ids_BT[b, : len(ids)] = torch.tensor(ids)
            mask_BT[b, : len(ids)] = 1
            labels_BT[b, : len(ids)] = torch.tensor(ids).where(torch.tensor(learn), torch.tensor(-100))
        result = model(ids_BT, attention_mask=mask_BT, output_router_logits=True)
        ce = F.cross_entropy(result.logits[:, :-1].flatten(0, 1), labels_BT[:, 1:].flatten(), ignore_index=-100)
        balance = torch.stack([balance_by_definition(g, mask_BT.bool()) for g in result.router_logits]).mean()
        optimizer.zero_grad()
        (ce + ARGS.load_balancing_weight * balance).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        out.append((ce.item(), balance.item(), norm.item()))
    return out


def balance_by_definition(gate_NE: torch.Tensor, counted_BT: torch.Tensor) -> torch.Tensor:
    """E / (T·K) · Σ_e count_e · mean_t p_te over the tokens that count, computed token by token."""
    K, E = ARGS.moe.num_experts_per_tok, gate_NE.shape[1]
    p_TE = gate_NE.float().softmax(-1)[counted_BT.flatten()]
    counts = [0] * E
    for row in p_TE:
        for e in row.topk(K).indices.tolist():
            counts[e] += 1
    T = len(p_TE)
    return sum(E / (T * K) * counts[e] * p_TE[:, e].sum() / T for e in range(E))


def oracle_tensors(args: ModelArgs = ARGS) -> dict[str, torch.Tensor]:
    """The weights of the transformers model of `hf_losses`, under canonical names."""
    return {n: t.clone() for n, t in canonical_from_hf(hf_mixtral(args)).items()}


def make_decoder(
    implementation: str,
    mesh: Any = None,
    mode: str = "sdp",
    checkpointing: bool = False,
    peft: Any = None,
    tensors: dict[str, torch.Tensor] | None = None,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    args: ModelArgs = ARGS,
    quant: str | None = None,
    sees: bool = False,
    gradient_dtype: torch.dtype = torch.float32,
) -> Any:
    """The oracle's network, loaded by the project's own code and cut by `mesh`."""
    from accessory.adapt.peft import adapter_specs_for, trainable_rule
    from accessory.build.network import NetworkSpec, TrainingSpec, build
    from accessory.checkpoint.folder import Checkpoint
    from accessory.checkpoint.lazy import Constant
    from accessory.config import LlamaType
    from accessory.formats import Quant

    values = {n: Constant(t) for n, t in (tensors or oracle_tensors(args)).items()}
    checkpoint = Checkpoint(
        path="memory", layout="hf", args=args, llama_type=LlamaType(implementation), tensors=values, files=[]
    )
    args = args.replace(**(peft or {}))
    spec = NetworkSpec(
        checkpoints=[checkpoint], args=args, implementation=implementation, quant=Quant.parse(quant), image_views=sees
    )
    training = TrainingSpec(
        trainable=trainable_rule(args, bool(peft)),
        adapters=adapter_specs_for(args) if peft else {},
        data_parallel=mode,
        checkpointing=checkpointing,
        gradient_dtype=gradient_dtype,
    )
    return build(spec, mesh, device=device, dtype=dtype, training=training)


def train(
    implementation: str,
    mesh: Any = None,
    *,
    mode: str = "sdp",
    packed: bool = False,
    accum: int = 1,
    checkpointing: bool = False,
    peft: Any = None,
    steps: int = STEPS,
    balance: float = ARGS.load_balancing_weight,
    z: float = 0.0,
    global_statistics: bool = True,
    tensors: dict[str, torch.Tensor] | None = None,
    args: ModelArgs = ARGS,
    quant: str | None = None,
    gradient_dtype: torch.dtype = torch.float32,
    **optimizer: Any,
) -> list[tuple[float, float, float]]:
    """(cross-entropy, balance, gradient norm) of each step, by the project's trainer. optimizer: of `Trainer`."""
    from accessory.parallel.mesh import DeviceMesh
    from accessory.train.trainer import LossWeights, Trainer

    mesh = mesh or DeviceMesh()
    made = {"args": args, "quant": quant, "gradient_dtype": gradient_dtype}
    decoder = make_decoder(implementation, mesh, mode, checkpointing, peft, tensors, **made)
    weights = LossWeights(balance, z, global_statistics)
    trainer = Trainer(decoder, mesh, weights, weight_decay=DECAY, clip=CLIP, **optimizer)
    out = []
    for step in range(steps):
        record = trainer.step(batches_of(mesh, step, packed=packed, accum=accum), LR)
        out.append((record["loss"], record["balance"], record["grad_norm"]))
    return out


def close(got: Sequence[tuple[float, ...]], wanted: Sequence[tuple[float, ...]], tolerance: float = 1e-5) -> None:
    assert len(got) == len(wanted)
    for step, (a, b) in enumerate(zip(got, wanted, strict=True)):
        for x, y in zip(a, b, strict=True):
            assert math.isclose(x, y, rel_tol=tolerance, abs_tol=tolerance), f"step {step}: {a} instead of {b}"
