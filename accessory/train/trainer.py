"""One step of training: micro-batches in, parameters moved, a record of what happened out.

loss = Σ cross-entropy / learnt tokens + w · balance + z_w · z, over all micro-batches and data-parallel ranks of the
step. Cross-entropy is one mean over all learnt tokens, however they are spread. The balance loss is not linear in the
batch: every micro-batch on every rank has its own, and the step's is their mean, weighted by the tokens that count.
With global statistics a micro-step has one balance loss, that of its tokens on all data-parallel ranks.
Model-parallel ranks see the same tokens. Ranks that share rows are data-parallel ranks, each with a part of the tokens.
Together they have one balance loss a micro-batch.

Legend: E experts, L layers, N learnt tokens.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from accessory.data.batches import Batch
from accessory.nn.decoder import Decoder
from accessory.ops.attention import Documents
from accessory.ops.routing import RouterStatistics, balance_loss
from accessory.ops.shared_rows import SharedRows
from accessory.parallel.fsdp import finish_gradients, squared_norm
from accessory.parallel.local_shard import local_parameters
from accessory.parallel.mesh import DeviceMesh, Ranks, sum_over
from accessory.planner.setup import Offload, OptimizerKind
from accessory.train.optim import LossScale, make_optimizer

if TYPE_CHECKING:
    from accessory.nn.vision import Features, VisionTower

IGNORED = -100


class NotFiniteError(Exception):
    """Loss or gradient is NaN or infinite; the parameters have not been touched since the step before."""


@dataclass(frozen=True)
class LossWeights:
    """What the parts of the loss are multiplied by."""

    balance: float
    z: float = 0.0
    global_statistics: bool = False


class Trainer:
    """A decoder, cut and sharded over the ranks of `mesh`, and its optimiser.

    Every rank calls the methods. Data-parallel ranks bring different batches, model-parallel ranks the same ones, and
    ranks that share rows their parts of the same one.

    Attributes: `named`, the (name, parameter) pairs that are trained; `tower`, the image encoders, or None.
    """

    def __init__(
        self,
        decoder: Decoder,
        mesh: DeviceMesh,
        weights: LossWeights,
        *,
        weight_decay: float = 0.0,
        clip: float = 0.0,
        tower: VisionTower | None = None,
        optimizer: OptimizerKind = "adamw",
        offload: Offload = "none",
    ) -> None:
        self.decoder, self.mesh, self.weights, self.clip, self.tower = decoder, mesh, weights, clip, tower
        self.named = [(name, p) for name, p in decoder.named_parameters() if p.requires_grad]
        wholes = {shard.name: shard.whole for shard in local_parameters(decoder)}
        self.optimizer = make_optimizer(self.named, weight_decay, kind=optimizer, offload=offload, wholes=wholes)
        self.device = next(decoder.parameters()).device
        self.loss_scale = LossScale.for_dtype(decoder.compute_dtype or torch.float32)

    def step(self, batches: Sequence[Batch], lr: float) -> dict[str, Any]:
        """Make one step of `batches`, this rank's micro-batches; returns a record with keys that `train.metrics` names.

        Raises NotFiniteError, on all ranks alike, before any parameter is touched.
        """
        began = time.perf_counter()
        record = self.forward_backward(batches)
        norm = math.sqrt(float(squared_norm(self.decoder, self.mesh))) / self.loss_scale.value
        finite = math.isfinite(norm)
        if not math.isfinite(record["loss"]) or (not finite and not self.loss_scale.dynamic):
            self.optimizer.zero_grad()
            what = "gradient" if math.isfinite(record["loss"]) else "loss"
            raise NotFiniteError(f"the {what} is {norm if what == 'gradient' else record['loss']}")
        if finite:
            clipped = self.clip / (norm + 1e-6) if 0 < self.clip < norm else 1.0
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            self.optimizer.step(clipped / self.loss_scale.value)
        self.loss_scale.update(finite)
        self.optimizer.zero_grad()
        step_s = time.perf_counter() - began
        return record | {
            "lr": lr,
            "grad_norm": norm,
            "tokens_per_s": record["tokens"] / step_s,
            "step_s": step_s,
            "memory_gb": self._memory(),
        }

    def forward_backward(self, batches: Sequence[Batch]) -> dict[str, Any]:
        """Compute the step's gradients, complete on every rank; returns the part of the record about the loss."""
        self.decoder.train()
        totals = self._totals(batches)
        sums = Sums(self.decoder.args.n_layers, self.decoder.args.moe.num_experts, self.device)
        for batch, counted in zip(batches, totals.counted, strict=True):
            loss = self.loss(batch, totals, counted, sums)
            # FSDP2 averages over data-parallel ranks; the loss is a sum over them.
            (loss * (self.mesh.data_size * self.loss_scale.value)).backward()
        finish_gradients(self.decoder, self.mesh)
        return sums.record(self.mesh, totals)

    @torch.no_grad()
    def evaluate(self, batches: Sequence[Batch]) -> tuple[float, int]:
        """(mean cross-entropy, learnt tokens) over the batches of all data-parallel ranks."""
        self.decoder.eval()
        sums = torch.zeros(2, dtype=torch.float64, device=self.device)
        for batch in batches:
            rows_N, label_N = _learnt(batch)
            out = self.forward(batch, rows_N, label_N, statistics=False)
            sums += torch.stack([out.loss, sums.new_tensor(len(rows_N))])
        self.mesh.sum_over_data(sums)
        return float(sums[0] / sums[1].clamp_min(1)), int(sums[1])

    def forward(self, batch: Batch, rows_N: Tensor, label_N: Tensor | None, statistics: bool) -> Any:
        """The decoder's output for a batch: the loss over the flattened positions `rows_N` with the labels there, or,
        without labels, their logits (N, vocabulary)."""
        return self.decoder(
            batch.tokens_BT.to(self.device, non_blocking=True),
            batch.positions_BT.to(self.device, non_blocking=True),
            documents_BT=_documents(batch, self.mesh.context, self.device),
            counted_BT=batch.counted_BT.to(self.device, non_blocking=True),
            statistics=statistics,
            rows_N=rows_N.to(self.device, non_blocking=True),
            label_N=None if label_N is None else label_N.to(self.device, non_blocking=True),
            images=self._features(batch),
        )

    def _features(self, batch: Batch) -> Features | None:
        """The encoders' features of a batch's images. Model-parallel ranks have the same images and share the work."""
        if self.tower is None or batch.pixels_I3PP is None:
            return None
        from accessory.parallel.images import encode_shared

        return encode_shared(self.tower, batch.pixels_I3PP, self.mesh.model)

    def _totals(self, batches: Sequence[Batch]) -> Totals:
        """Learnt tokens of the step, and counted tokens of each micro-step, on all data-parallel ranks."""
        own = [float(batch.counted_BT.sum()) for batch in batches]
        counted = [float((batch.whole or batch).counted_BT.sum()) for batch in batches]
        learnt = float(sum(int((batch.labels_BT != IGNORED).sum()) for batch in batches))
        numbers = torch.tensor([learnt, *own], dtype=torch.float64)
        summed = self.mesh.sum_over_data(numbers.to(self.device)).tolist()
        return Totals(learnt=summed[0], counted=counted, all_counted=sum(summed[1:]), counted_on_all=summed[1:])

    def loss(self, batch: Batch, totals: Totals, counted: float, sums: Sums) -> Tensor:
        """This rank's part of the step's loss: cross-entropy, balance and z-loss, each with its weight.

        counted: the tokens of the batch that the router statistics count, on all ranks that share its rows. sums: take
        in what the record will tell.
        """
        rows_N, label_N = _learnt(batch)
        out = self.forward(batch, rows_N, label_N, statistics=True)
        ce, statistics, logged = out.loss, out.router, 1.0
        together = self.mesh.data if self.weights.global_statistics else self.mesh.context
        if together is not None:
            # Every rank has the balance loss of all their tokens; its gradient is this rank's part.
            statistics = [_over_ranks(s, together) for s in out.router]
            logged = 1.0 / together.size
        if self.weights.global_statistics:
            counted = totals.counted_on_all[sums.parts]
        share = counted / max(totals.all_counted, 1.0)
        balance = balance_loss(statistics)
        z = torch.stack([s.z for s in out.router]).mean() / max(totals.all_counted, 1.0)
        per_layer = torch.stack([balance_loss([s]).detach() for s in statistics])
        sums.add(ce.detach(), z.detach(), out.router, per_layer * (share * logged))
        loss = ce / max(totals.learnt, 1.0) + self.weights.balance * share * balance
        return loss + self.weights.z * z if self.weights.z else loss

    def _memory(self) -> float:
        """Peak so far in GB: of the GPU's allocator, else of the process."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 1e9
        import resource
        import sys

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak / 1e9 if sys.platform == "darwin" else peak * 1024 / 1e9


@dataclass(frozen=True)
class Totals:
    """Tokens of a step, over all data-parallel ranks where it does not say otherwise."""

    learnt: float
    counted: list[float]  # of each micro-batch here, and on the ranks that share its rows
    all_counted: float
    counted_on_all: list[float]  # of each micro-step on all data-parallel ranks


class Sums:
    """The sums that a step's record is made of: over micro-batches on the device, and over ranks once, at the end."""

    def __init__(self, layers: int, experts: int, device: torch.device) -> None:
        self.scalars = torch.zeros(2, dtype=torch.float64, device=device)  # cross-entropy, z
        self.layers = torch.zeros(layers, experts + 2, dtype=torch.float64, device=device)  # counts, entropy, balance
        self.parts = 0

    def add(self, ce: Tensor, z: Tensor, router: Sequence[RouterStatistics], balance_L: Tensor) -> None:
        self.parts += 1
        self.scalars += torch.stack([ce, z])
        counts_LE, entropy_L = (torch.stack([getattr(s, key) for s in router]) for key in ("count_E", "entropy"))
        self.layers += torch.cat([counts_LE, entropy_L[:, None], balance_L[:, None]], dim=1).detach()

    def record(self, mesh: DeviceMesh, totals: Totals) -> dict[str, Any]:
        numbers = mesh.sum_over_data(torch.cat([self.scalars, self.layers.flatten()])).cpu()
        ce, z = numbers[:2].tolist()
        rows = numbers[2:].view(self.layers.shape)
        share_LE = rows[:, :-2] / rows[:, :-2].sum(1, keepdim=True).clamp_min(1.0)
        entropy_L, balance_L = rows[:, -2] / max(totals.all_counted, 1.0), rows[:, -1]
        return {
            "loss": ce / max(totals.learnt, 1.0),
            "balance": float(balance_L.mean()),
            "z": z,
            "tokens": int(totals.all_counted),
            "layers": {
                "balance": balance_L.tolist(),
                "entropy": entropy_L.tolist(),
                "largest": share_LE.max(1).values.tolist(),
                "share": share_LE.tolist(),
            },
        }


def _learnt(batch: Batch) -> tuple[Tensor, Tensor]:
    """(N,) positions in the flattened batch whose next token is learnt, and (N,) that token.

    They are found on the CPU, where the batch lies, so that nothing waits for a GPU.
    """
    labels = batch.labels_BT.flatten()
    rows_N = (labels != IGNORED).nonzero().squeeze(1)
    return rows_N, labels[rows_N]


def _documents(batch: Batch, context: Ranks | None, device: torch.device) -> Documents | SharedRows | None:
    """None where every row is one document and padding behind it: plain causal attention will do.

    context: the ranks that share the rows, if any.
    """
    if context is not None:
        assert batch.whole is not None, "a rank has a part of each row"
        return SharedRows.of(batch.whole.documents_BT, context.rank, context.size).to(device)
    number_BT = batch.documents_BT
    counted = batch.counted_BT
    if bool((number_BT.where(counted, number_BT[:, :1]) == number_BT[:, :1]).all()):
        return None
    return Documents.of(number_BT).to(device)


class _SumOverRanks(torch.autograd.Function):
    """The sum over ranks. The gradient of the sum is passed on to each rank's own term."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: Ranks) -> Tensor:
        return sum_over(x.clone(), ranks)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


def _over_ranks(s: RouterStatistics, ranks: Ranks) -> RouterStatistics:
    plain = sum_over(torch.cat([s.tokens[None], s.count_E]), ranks)
    return s._replace(tokens=plain[0], count_E=plain[1:], probability_E=_SumOverRanks.apply(s.probability_E, ranks))
