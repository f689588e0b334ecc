"""Forward and backward of a step's micro-batches: as they come, or as CUDA graphs, which spare the host's time.

A graph holds both passes over one shape of batch. So batches are padded to few lengths, the head computes every row and
leaves out those without a label, and what changes from step to step, such as the number of learnt tokens, is a tensor.
Gradients lie in the same memory for the whole run, and so do the 16-bit copies of trained weights that products read.
Graphs share one pool of memory, since no tensor outlives a pass.

Legend: B rows, T tokens, N = B·T, C documents.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from accessory.data.batches import IGNORED, Batch
from accessory.nn.decoder import Decoder
from accessory.nn.experts import StackedExperts
from accessory.nn.linear import Linear
from accessory.ops.attention import Documents
from accessory.ops.compute_copy import keep_copy, refresh
from accessory.ops.experts_autograd import runs_host_free
from accessory.ops.graphs import possible, record
from accessory.ops.shared_rows import SharedRows
from accessory.ops.transfer import pinned, to_device
from accessory.parallel.local_shard import is_sharded
from accessory.parallel.mesh import DeviceMesh, Ranks

if TYPE_CHECKING:
    from accessory.nn.vision import Features

LENGTHS = 256  # rows are padded to a multiple of so many tokens
MOST_GRAPHS = 32


class Inputs(NamedTuple):
    """A micro-batch as the network takes it. factors: see `Trainer.loss`."""

    tokens_BT: Tensor
    positions_BT: Tensor
    counted_BT: Tensor
    documents: Documents | SharedRows | None
    rows_N: Tensor | None  # the flattened positions whose next token is learnt; None: all, some without a label
    label_N: Tensor
    factors: Tensor
    images: Features | None = None

    def to(self, device: torch.device) -> Inputs:
        def moved(value: Any) -> Any:
            if isinstance(value, Tensor):
                return to_device(value, device)
            return value.to(device) if isinstance(value, Documents | SharedRows) else value

        return Inputs(*map(moved, self))


def inputs_of(batch: Batch, factors: Tensor, context: Ranks | None = None) -> Inputs:
    """A micro-batch on the CPU, without images. context: the ranks that share its rows, if any."""
    rows_N, label_N = learnt(batch)
    documents = documents_of(batch, context)
    return Inputs(batch.tokens_BT, batch.positions_BT, batch.counted_BT, documents, rows_N, label_N, factors)


def learnt(batch: Batch) -> tuple[Tensor, Tensor]:
    """(N,) positions in the flattened batch whose next token is learnt, and (N,) that token.

    They are found on the CPU, where the batch lies, so that nothing waits for a GPU.
    """
    labels = batch.labels_BT.flatten()
    rows_N = (labels != IGNORED).nonzero().squeeze(1)
    return rows_N, labels[rows_N]


def documents_of(batch: Batch, context: Ranks | None) -> Documents | SharedRows | None:
    """None where every row is one document and padding behind it: plain causal attention will do."""
    if context is not None:
        assert batch.whole is not None, "a rank has a part of each row"
        return SharedRows.of(batch.whole.documents_BT, context.rank, context.size)
    number_BT = batch.documents_BT
    if bool((number_BT.where(batch.counted_BT, number_BT[:, :1]) == number_BT[:, :1]).all()):
        return None
    return Documents.of(number_BT)


def of_fixed_shape(batch: Batch, factors: Tensor) -> Inputs:
    """A micro-batch on the CPU, padded so that few shapes occur: rows to a multiple of `LENGTHS`, documents to a power
    of two of boundaries, of which the last ones hold no token."""
    B, T = batch.tokens_BT.shape
    more = -T % LENGTHS
    positions_BT = torch.cat([batch.positions_BT, torch.arange(more).expand(B, more)], dim=1)
    documents = documents_of(batch, None)
    if isinstance(documents, Documents):
        # The padding behind a row is a document of its own, as the batch's own padding is.
        beyond_B1 = batch.documents_BT.amax(1, keepdim=True) + 1
        documents = Documents.of(torch.cat([batch.documents_BT, beyond_B1.expand(B, more)], dim=1))
        boundaries = 1 << (len(documents.start_N) - 1).bit_length()
        start_N = F.pad(documents.start_N, (0, boundaries - len(documents.start_N)), value=B * (T + more))
        documents = Documents(documents.number_BT, start_N, T + more)
    return Inputs(
        tokens_BT=F.pad(batch.tokens_BT, (0, more)),
        positions_BT=positions_BT,
        counted_BT=F.pad(batch.counted_BT, (0, more)),
        documents=documents,
        rows_N=None,
        label_N=F.pad(batch.labels_BT, (0, more), value=IGNORED).flatten(),
        factors=factors,
    )


class Passes:
    """Runs `backward`, which computes a micro-batch's loss and adds its gradients."""

    def __init__(self, backward: Callable[[Inputs], None]) -> None:
        self.backward = backward

    def begin(self) -> None:
        """A step begins: gradients count from zero again."""

    def run(self, batch: Batch, factors: Tensor, device: torch.device, context: Ranks | None, images: Any) -> None:
        self.backward(inputs_of(batch, factors, context).to(device)._replace(images=images))


class GraphedPasses(Passes):
    """The same as CUDA graphs. The first micro-batch of a shape runs as it is, which also compiles its kernels."""

    def __init__(
        self, backward: Callable[[Inputs], None], decoder: Decoder, named: Sequence[tuple[str, nn.Parameter]]
    ) -> None:
        super().__init__(backward)
        self.named = named
        self.written = _written_whole(decoder)
        self.copied = _keep_copies(decoder)
        self.gradients: list[Tensor] = []
        self.first = True
        self._seen: Counter[Any] = Counter()
        self._made: dict[Any, tuple[Callable[[], None], Inputs]] = {}
        self._side: torch.cuda.Stream | None = None
        self._pool: Any = None

    def begin(self) -> None:
        if not self.gradients:
            # grad_dtype: what the parameter asks for, where it is not its own dtype
            self.gradients = [torch.zeros_like(p, dtype=p.grad_dtype or p.dtype) for _, p in self.named]
        for (_, p), gradient in zip(self.named, self.gradients, strict=True):
            p.grad = gradient
        self.first = True

    def run(self, batch: Batch, factors: Tensor, device: torch.device, context: Ranks | None, images: Any) -> None:
        refresh(self.copied)  # a replay does not ask whether they are current
        inputs = of_fixed_shape(batch, factors)
        boundaries = len(inputs.documents.start_N) if isinstance(inputs.documents, Documents) else 0
        key = (tuple(inputs.tokens_BT.shape), boundaries, self.first)
        self._seen[key] += 1
        if key not in self._made and (self._seen[key] == 1 or len(self._made) >= MOST_GRAPHS):
            self._both(inputs.to(device), self.first)
        else:
            if key not in self._made:
                self._made[key] = self._record(inputs.to(device), self.first, device)
            replay, held = self._made[key]
            _copy(inputs, held)
            replay()
        self.first = False

    def _both(self, inputs: Inputs, first: bool) -> None:
        if first:
            for name, p in self.named:
                p.gradient_is_stale = name in self.written  # type: ignore[attr-defined]
            trained = zip(self.named, self.gradients, strict=True)
            others = [gradient for (name, _), gradient in trained if name not in self.written]
            if others:
                torch._foreach_zero_(others)
        self.backward(inputs)
        for _, p in self.named:
            assert not getattr(p, "gradient_is_stale", False), "every pass writes the gradients of all experts"

    def _record(self, inputs: Inputs, first: bool, device: torch.device) -> tuple[Callable[[], None], Inputs]:
        with torch.cuda.device(device):
            if self._side is None:
                self._side, self._pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()
            replay, _ = record(lambda: self._both(inputs, first), self._side, warm=lambda: None, pool=self._pool)
        return replay, inputs


def can_be_graphs(decoder: Decoder, mesh: DeviceMesh, *, images: bool) -> bool:
    """Whether passes of this network can be recorded: no rank waits for another but in a sum, and nothing waits for the
    host. Parameters that are sharded come and go around the passes, images come in any number."""
    device = next(decoder.parameters()).device
    if not possible(device) or mesh.context is not None or mesh.experts is not None or images:
        return False
    if any(is_sharded(p) for p in decoder.parameters()):
        return False
    experts = [module for module in decoder.modules() if isinstance(module, StackedExperts)]
    return all(e.held is None and runs_host_free(e.products_in, device, e.all_weights(False)) for e in experts)


def _written_whole(decoder: Decoder) -> set[str]:
    """The parameters whose gradients a pass writes without reading them: those of the experts' products."""
    return {
        f"{name}.{kind}"
        for name, module in decoder.named_modules()
        if isinstance(module, StackedExperts)
        for kind, _ in module.named_parameters(recurse=False)
        if not kind.endswith("_bias")
    }


def _keep_copies(decoder: Decoder) -> list[nn.Parameter]:
    """Give each trained fp32 parameter of a product in 16 bits a copy that stays, which the optimiser can write.

    At the end of a forward pass all copies are there anyway, beside all gradients; so a step's peak stays what it is.
    Layers that are computed again have the copies of one layer at a time, and get none that stay.
    """
    if any(layer.recompute for layer in decoder.layers):
        return []
    copied = [
        p
        for name, module in decoder.named_modules()
        if isinstance(module, Linear | StackedExperts) and ".gate" not in name  # the router's products are in fp32
        for p in module.parameters(recurse=False)
        if p.requires_grad and p.dtype != decoder.products_in
    ]
    for p in copied:
        keep_copy(p, decoder.products_in)
    return copied


def _copy(inputs: Inputs, held: Inputs) -> None:
    """Fill the tensors that a graph reads. Nothing waits for the copies."""
    for new, old in zip(_tensors(inputs), _tensors(held), strict=True):
        old.copy_(pinned(new, old.device), non_blocking=True)


def _tensors(inputs: Inputs) -> list[Tensor]:
    documents = inputs.documents[:2] if isinstance(inputs.documents, Documents) else ()
    return [value for value in (*inputs, *documents) if isinstance(value, Tensor)]
