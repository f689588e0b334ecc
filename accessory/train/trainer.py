"""One step of training: micro-batches in, parameters moved, a record of what happened out.

loss = Σ cross-entropy / learnt tokens + w · balance + z_w · z, over all micro-batches and data-parallel ranks of the
step. Cross-entropy is one mean over all learnt tokens, however they are spread. The balance loss is not linear in the
batch: every micro-batch on every rank has its own, and the step's is their mean, weighted by the tokens that count.
With global statistics a micro-step has one balance loss, that of its tokens on all data-parallel ranks.
Model-parallel ranks see the same tokens. Ranks that share rows are data-parallel ranks, each with a part of the tokens.
Together they have one balance loss a micro-batch.

Legend: E experts, L layers, M micro-batches, N learnt tokens.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from accessory.data.batches import IGNORED, Batch
from accessory.nn.decoder import Decoder, DecoderOutput
from accessory.ops.routing import RouterStatistics, balance_loss
from accessory.ops.transfer import Ready, to_device, to_host
from accessory.parallel.fsdp import finish_gradients, squared_norm
from accessory.parallel.local_shard import local_parameters
from accessory.parallel.mesh import DeviceMesh, Ranks, sum_over
from accessory.planner.setup import Offload, OptimizerKind
from accessory.train.optim import LossScale, make_optimizer
from accessory.train.passes import GraphedPasses, Inputs, Passes, can_be_graphs, inputs_of

if TYPE_CHECKING:
    from accessory.nn.vision import Features, VisionTower


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

    Attributes: `named`, the (name, parameter) pairs that are trained; `tower`, the image encoders, or None. graphs:
    replay the passes as CUDA graphs, where the network and the ranks let it. `stopping`: whether a rank wanted to end,
    when the last step had been begun.
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
        graphs: bool = False,
    ) -> None:
        self.decoder, self.mesh, self.weights, self.clip, self.tower = decoder, mesh, weights, clip, tower
        self.named = [(name, p) for name, p in decoder.named_parameters() if p.requires_grad]
        wholes = {shard.name: shard.whole for shard in local_parameters(decoder)}
        self.optimizer = make_optimizer(self.named, weight_decay, kind=optimizer, offload=offload, wholes=wholes)
        if decoder.parameter_moved is not None:
            self.optimizer.moved = decoder.parameter_moved
        self.device = next(decoder.parameters()).device
        self.loss_scale = LossScale.for_dtype(decoder.compute_dtype or torch.float32)
        self.stopping = False
        self.sums = Sums(decoder.args.n_layers, decoder.args.moe.num_experts, self.device)
        graphs = graphs and can_be_graphs(decoder, mesh, images=tower is not None)
        self.passes = GraphedPasses(self._backward, decoder, self.named) if graphs else Passes(self._backward)

    def step(self, batches: Sequence[Batch], lr: float, stop: Callable[[], bool] = lambda: False) -> dict[str, Any]:
        """Make one step of `batches`, this rank's micro-batches; returns a record with keys that `train.metrics` names.

        Raises NotFiniteError, on all ranks alike, and then no parameter has been touched. The device knows by itself
        whether it may touch them, so the host reads the numbers while the parameters are being moved. stop: whether
        this rank wants to end; after the step all ranks have the same answer in `stopping`.
        """
        began = time.perf_counter()
        totals = self._all_passes(batches)
        squares = squared_norm(self.decoder, self.mesh)
        sums = self.sums.over_ranks(self.mesh)
        stops = self.mesh.sum_over_all(torch.full((), float(stop()), device=self.device))
        told = Told(totals, sums, squares, stops)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step(self._scale(sums, squares))
        self.optimizer.zero_grad()
        memory = self._memory()
        numbers = told.wait()
        record = self.sums.record(numbers)
        self.stopping = numbers.stops > 0
        norm = math.sqrt(numbers.squares) / self.loss_scale.value
        finite = math.isfinite(record["loss"]) and math.isfinite(norm)
        if not finite:
            self.optimizer.updates -= 1  # nothing has moved
        if not math.isfinite(record["loss"]):
            raise NotFiniteError(f"the loss is {record['loss']}")
        if not finite and not self.loss_scale.dynamic:
            raise NotFiniteError(f"the gradient is {norm}")
        self.loss_scale.update(finite)
        step_s = time.perf_counter() - began
        return record | {
            "lr": lr,
            "grad_norm": norm,
            "tokens_per_s": record["tokens"] / step_s,
            "step_s": step_s,
            "memory_gb": memory,
        }

    def forward_backward(self, batches: Sequence[Batch]) -> dict[str, Any]:
        """Compute the step's gradients, complete on every rank; returns the part of the record about the loss."""
        totals = self._all_passes(batches)
        nothing = torch.zeros((), device=self.device)
        return self.sums.record(Told(totals, self.sums.over_ranks(self.mesh), nothing, nothing).wait())

    def _all_passes(self, batches: Sequence[Batch]) -> Totals:
        """The gradients of all micro-batches, and in `sums` what the record will tell."""
        if not self.decoder.training:  # to tell every module takes as long as to launch a dozen kernels
            self.decoder.train()
        totals = self._totals(batches)
        self.sums.clear()
        self.passes.begin()
        factors = self._factors(totals)
        for batch, factors_5 in zip(batches, factors.unbind(), strict=True):
            self.passes.run(batch, factors_5, self.device, self.mesh.context, self._features(batch))
        finish_gradients(self.decoder, self.mesh)
        return totals

    def _scale(self, sums: Tensor, squares: Tensor) -> Tensor:
        """What the optimiser multiplies gradients by, () fp64 on the device: clipped, and without the loss scale. NaN
        where the loss or a gradient is not finite."""
        norm = squares.double().sqrt() / self.loss_scale.value
        clipped = torch.ones_like(norm)
        if self.clip > 0:
            clipped = torch.where(norm > self.clip, self.clip / (norm + 1e-6), clipped)
        finite = norm.isfinite() & sums[0].isfinite()
        return (clipped / self.loss_scale.value).masked_fill(~finite, math.nan)

    def _backward(self, inputs: Inputs) -> None:
        """Add a micro-batch's gradients."""
        self.loss(inputs).mul(inputs.factors[4]).backward()

    @torch.no_grad()
    def evaluate(self, batches: Sequence[Batch]) -> tuple[float, int]:
        """(mean cross-entropy, learnt tokens) over the batches of all data-parallel ranks."""
        self.decoder.eval()
        sums = torch.zeros(2, dtype=torch.float64, device=self.device)
        for batch in batches:
            inputs = self.inputs(batch)
            out = self.forward(inputs, statistics=False)
            assert out.loss is not None
            sums += torch.stack([out.loss, sums.new_tensor(len(inputs.label_N))])
        self.mesh.sum_over_data(sums)
        return float(sums[0] / sums[1].clamp_min(1)), int(sums[1])

    def inputs(self, batch: Batch, factors: Tensor | None = None) -> Inputs:
        """A micro-batch on the device, with its images. factors: see `loss`, which needs them."""
        factors = torch.ones(5) if factors is None else factors
        inputs = inputs_of(batch, factors, self.mesh.context).to(self.device)
        return inputs._replace(images=self._features(batch))

    def forward(self, inputs: Inputs, statistics: bool, logits: bool = False) -> DecoderOutput:
        """The decoder's output for a micro-batch: the loss over its learnt rows, or their logits (N, vocabulary)."""
        return self.decoder(
            inputs.tokens_BT,
            inputs.positions_BT,
            documents_BT=inputs.documents,
            counted_BT=inputs.counted_BT,
            statistics=statistics,
            rows_N=inputs.rows_N,
            label_N=None if logits else inputs.label_N,
            images=inputs.images,
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
        sums, counted_M = (torch.tensor(numbers, dtype=torch.float64) for numbers in ([learnt, *own], counted))
        if self.mesh.data is None:
            return Totals(sums[0], counted_M, sums[1:])
        # On their device, where ranks can sum them and no host waits for the sums.
        sums, counted_M = (to_device(numbers, self.device) for numbers in (sums, counted_M))
        sums = self.mesh.sum_over_data(sums)
        return Totals(sums[0], counted_M, sums[1:])

    def _factors(self, totals: Totals) -> Tensor:
        """What `loss` needs of a step, for each of its micro-batches: (micro-batches, 5) fp32, where the totals are."""
        together = self._together()
        learnt, all_counted = totals.learnt.clamp_min(1), totals.all_counted.clamp_min(1)
        share_M = (totals.counted_on_all_M if self.weights.global_statistics else totals.counted_M) / all_counted
        logged_M = share_M / (1 if together is None else together.size)
        scale = torch.full_like(learnt, self.loss_scale.value)
        learnt_M, all_counted_M, scale_M = (number.expand_as(share_M) for number in (learnt, all_counted, scale))
        return torch.stack([learnt_M, share_M, all_counted_M, logged_M, scale_M], dim=1).float()

    def _together(self) -> Ranks | None:
        """The ranks whose tokens have one balance loss. Each has its value; its gradient is this rank's part."""
        return self.mesh.data if self.weights.global_statistics else self.mesh.context

    def loss(self, inputs: Inputs) -> Tensor:
        """This rank's part of the step's loss: cross-entropy, balance and z-loss, each with its weight.

        `inputs.factors`: the step's learnt tokens; this micro-batch's share of the step's counted tokens; these tokens;
        the share that the record takes; what the loss is multiplied by. They are a tensor, so that a CUDA graph can
        hold the loss. `sums` takes in what the record will tell.
        """
        learnt, share, all_counted, logged, _ = inputs.factors.unbind()
        out = self.forward(inputs, statistics=True)
        assert out.loss is not None
        ce, statistics, together = out.loss, out.router, self._together()
        if together is not None:
            statistics = [_over_ranks(s, together) for s in out.router]
        balance = balance_loss(statistics)
        z = torch.stack([s.z for s in out.router]).mean() / all_counted
        per_layer = torch.stack([balance_loss([s]).detach() for s in statistics])
        self.sums.add(ce.detach(), z.detach(), out.router, per_layer * logged)
        loss = ce / learnt + self.weights.balance * share * balance
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
    """Tokens of a step, fp64: on the CPU, or on the device where other data-parallel ranks add theirs."""

    learnt: Tensor  # () on all data-parallel ranks
    counted_M: Tensor  # of each micro-batch here, and on the ranks that share its rows
    counted_on_all_M: Tensor  # of each micro-step on all data-parallel ranks

    @property
    def all_counted(self) -> Tensor:
        """() of the whole step, on all data-parallel ranks."""
        return self.counted_on_all_M.sum()


class Numbers(NamedTuple):
    """What the device tells the host of a step, over all ranks that have a part in it."""

    sums: Tensor  # as `Sums.over_ranks` returned them
    learnt: float  # tokens, as in `Totals`
    all_counted: float
    squares: float  # of all gradients
    stops: float  # how many ranks want to end


class Told:
    """A step's numbers on their way to the host."""

    def __init__(self, totals: Totals, sums: Tensor, squares: Tensor, stops: Tensor) -> None:
        tokens = to_device(torch.stack([totals.learnt, totals.all_counted]), sums.device)
        self._copy = to_host(torch.cat([sums, tokens, torch.stack([squares.double(), stops.double()])]))
        self._ready = Ready(sums.device)

    def wait(self) -> Numbers:
        self._ready.wait()
        return Numbers(self._copy[:-4], *self._copy[-4:].tolist())


class Sums:
    """The sums that a step's record is made of: over micro-batches, on the device, and over ranks once, at the end."""

    def __init__(self, layers: int, experts: int, device: torch.device) -> None:
        self.scalars = torch.zeros(2, dtype=torch.float64, device=device)  # cross-entropy, z
        self.layers = torch.zeros(layers, experts + 2, dtype=torch.float64, device=device)  # counts, entropy, balance

    def clear(self) -> None:
        """A step begins."""
        self.scalars.zero_(), self.layers.zero_()

    def add(self, ce: Tensor, z: Tensor, router: Sequence[RouterStatistics], balance_L: Tensor) -> None:
        self.scalars += torch.stack([ce, z])
        counts_LE, entropy_L = (torch.stack([getattr(s, key) for s in router]) for key in ("count_E", "entropy"))
        self.layers += torch.cat([counts_LE, entropy_L[:, None], balance_L[:, None]], dim=1).detach()

    def over_ranks(self, mesh: DeviceMesh) -> Tensor:
        """All of them over all data-parallel ranks, fp64, on the device: cross-entropy first."""
        return mesh.sum_over_data(torch.cat([self.scalars, self.layers.flatten()]))

    def record(self, numbers: Numbers) -> dict[str, Any]:
        """The part of the record about the loss."""
        ce, z = numbers.sums[:2].tolist()
        rows = numbers.sums[2:].view(self.layers.shape)
        share_LE = rows[:, :-2] / rows[:, :-2].sum(1, keepdim=True).clamp_min(1.0)
        entropy_L, balance_L = rows[:, -2] / max(numbers.all_counted, 1.0), rows[:, -1]
        return {
            "loss": ce / max(numbers.learnt, 1.0),
            "balance": float(balance_L.mean()),
            "z": z,
            "tokens": int(numbers.all_counted),
            "layers": {
                "balance": balance_L.tolist(),
                "entropy": entropy_L.tolist(),
                "largest": share_LE.max(1).values.tolist(),
                "share": share_LE.tolist(),
            },
        }


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
