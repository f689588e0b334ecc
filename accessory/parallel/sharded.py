"""Parameters of which each data-parallel rank keeps a part, and which are whole while their layer runs.

The method is FSDP's (arXiv 2304.11277), made for a network that is a chain of layers:

- A weight arrives in its place: each rank casts its part into a tensor of the whole weight, and the ranks gather the
  other parts around it. Nothing is copied before or after, unless the cut is along an inner dimension.
- A gradient leaves from its place: as soon as the whole gradient of a parameter is there, its parts are summed on their
  ranks while backward goes on.
- The next layer's weights arrive while a layer runs, forward and backward. Where they stay from forward to backward,
  all layers' are asked for at the beginning, so they arrive in one go.

A whole weight is one tensor for the whole run, whose memory comes and goes. So what autograd keeps of a layer's forward
pass is right again when the weights have come back. Between passes the network has the parts only, as `DTensor`.

Gradients are sums over ranks, not means.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from accessory.parallel.collectives import all_gather_single, reduce_scatter_single
from accessory.parallel.local_shard import local


class ShardedParameter:
    """One parameter of a module, cut along dimension `dim` over the ranks of `mesh`, which must divide its size.

    dtype: of the whole weight; gradient_dtype: in which gradients are made and summed. Making one replaces the module's
    parameter, filled or on the meta device, by a DTensor of this rank's part.
    """

    def __init__(
        self, module: nn.Module, kind: str, mesh: Any, dim: int, dtype: torch.dtype, gradient_dtype: torch.dtype
    ) -> None:
        self.module, self.kind, self.mesh, self.dim = module, kind, mesh, dim
        self.group, self.rank, self.size = mesh.get_group(), mesh.get_local_rank(), mesh.size()
        self.dtype, self.gradient_dtype = dtype, gradient_dtype
        parameter = module.get_parameter(kind)
        self.shape, self.trained = parameter.shape, parameter.requires_grad
        part = parameter.detach().chunk(self.size, dim)[self.rank].clone(memory_format=torch.contiguous_format)
        self.cut = nn.Parameter(self._distributed(part), requires_grad=self.trained)
        module.register_parameter(kind, self.cut)
        self.whole: nn.Parameter | None = None
        self._arriving: tuple[Any, Tensor | None] | None = None
        self._leaving: list[tuple[Any, Tensor, Tensor]] = []

    def gather(self) -> None:
        """Begin to fill the whole weight."""
        self.cut = self.module.get_parameter(self.kind)  # another one since the network has its memory
        part = local(self.cut)
        if self.whole is None:
            empty = torch.empty(self.shape, dtype=self.dtype, device=part.device)
            self.whole = nn.Parameter(empty, requires_grad=self.trained)
            if self.trained:
                if self.gradient_dtype != self.dtype:
                    self.whole.grad_dtype = self.gradient_dtype
                self.whole.register_post_accumulate_grad_hook(self._reduce)
        storage = self.whole.untyped_storage()
        if storage.size() == 0:  # a GPU's storage would be copied even to its own size
            storage.resize_(self.whole.numel() * self.whole.element_size())
        # Writing through `data` is no change that autograd should mind: the values are those of the forward pass.
        place = self.whole.data
        inner = None if self._leads() else place.new_empty(self.size, *part.shape)
        flat = (place if inner is None else inner).view(self.size, -1)
        flat[self.rank].copy_(part.reshape(-1))
        work = all_gather_single(flat.view(-1), flat[self.rank], group=self.group, async_op=True)
        self._arriving = (work, inner)

    def enter(self) -> None:
        """Have the whole weight, as the module's parameter. What the device does from now on finds its values."""
        assert self.whole is not None
        assert self._arriving is not None
        work, inner = self._arriving
        work.wait()
        if inner is not None:
            self._by_rank(self.whole.data).copy_(inner)
        self._arriving = None
        self.module.register_parameter(self.kind, self.whole)

    def leave(self) -> None:
        """Have the part again, and give the whole weight's memory back."""
        if self._arriving is not None:  # asked for, and not used
            self._arriving[0].wait()
            self._arriving = None
        self.module.register_parameter(self.kind, self.cut)
        if self.whole is not None:
            self.whole.untyped_storage().resize_(0)

    def finish(self) -> None:
        """Wait for the sums of gradients that were begun, and add them to the part's gradient."""
        for work, part, _ in self._leaving:
            work.wait()
            if self.cut.grad is None:
                self.cut.grad = self._distributed(part)
            else:
                local(self.cut.grad).add_(part)
        self._leaving.clear()

    def _reduce(self, whole: Tensor) -> None:
        """Begin to sum a gradient over ranks, each its part."""
        assert whole.grad is not None
        gradient, whole.grad = whole.grad, None
        by_rank = self._by_rank(gradient).contiguous()
        part = torch.empty_like(by_rank[0])
        work = reduce_scatter_single(part.view(-1), by_rank.view(-1), group=self.group, async_op=True)
        self._leaving.append((work, part, by_rank))

    def _by_rank(self, whole: Tensor) -> Tensor:
        """A view of the whole tensor, (ranks, shape of a part …)."""
        return whole.unflatten(self.dim, (self.size, -1)).movedim(self.dim, 0)

    def _leads(self) -> bool:
        """Whether the ranks' parts lie one behind the other in the whole tensor."""
        return self.shape[: self.dim].numel() == 1

    def _distributed(self, part: Tensor) -> DTensor:
        return DTensor.from_local(part, self.mesh, [Shard(self.dim)], run_check=False)


class ShardedLayer:
    """The parameters of one module that come and go together."""

    def __init__(self, module: nn.Module, parameters: Sequence[ShardedParameter]) -> None:
        self.module, self.parameters = module, parameters
        self.asked = self.entered = False

    def ask(self) -> None:
        """Begin to gather."""
        if not self.asked:
            self.asked = True
            for parameter in self.parameters:
                parameter.gather()

    def enter(self) -> None:
        if not self.entered:
            self.ask()
            self.entered = True
            for parameter in self.parameters:
                parameter.enter()

    def leave(self) -> None:
        if self.asked:
            self.asked = self.entered = False
            for parameter in self.parameters:
                parameter.leave()

    def finish(self) -> None:
        for parameter in self.parameters:
            parameter.finish()


class ShardedChain:
    """A network whose layers run one after the other, with what it has outside them. Its hooks do everything.

    stays: the weights stay whole from forward to backward. Else a layer has them while it runs, and the last layer
    until its backward pass, which comes next. Weights outside the layers stay in any case. Without gradients nothing
    outlasts a layer's forward pass.
    """

    def __init__(self, outside: ShardedLayer, layers: Sequence[ShardedLayer], stays: bool) -> None:
        self.outside, self.layers, self.stays = outside, layers, stays
        self._in_backward = False
        outside.module.register_forward_pre_hook(self._begins)
        outside.module.register_forward_hook(self._ends)
        for i, layer in enumerate(layers):
            layer.module.register_forward_pre_hook(self._before(i))
            layer.module.register_forward_hook(self._after(i))

    def _begins(self, _module: nn.Module, _inputs: Any) -> None:
        self._leave_all()  # a forward pass that no backward pass followed
        for layer in (self.outside, *(self.layers if self.stays else self.layers[:1])):
            layer.ask()
        self.outside.enter()

    def _ends(self, _module: nn.Module, _inputs: Any, output: Any) -> None:
        if torch.is_grad_enabled():
            _call_before_backward(output, self._backward_begins)
        else:
            self._leave_all()

    def _before(self, i: int) -> Callable[..., Any]:
        def before(_module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
            self._run(i, i + 1)
            x, *rest = inputs
            if torch.is_grad_enabled() and x.requires_grad:
                x = _AfterBackward.apply(x, lambda: self._backward_passed(i))
            return x, *rest

        return before

    def _after(self, i: int) -> Callable[..., Any]:
        def after(_module: nn.Module, _inputs: Any, output: Any) -> None:
            if not torch.is_grad_enabled():
                self.layers[i].leave()
                return
            if not self.stays and i < len(self.layers) - 1:
                self.layers[i].leave()
            _call_before_backward(output, lambda: self._backward_reaches(i))

        return after

    def _run(self, i: int, then: int) -> None:
        """Have layer i, and ask for the one that runs after it, if there is one."""
        self.layers[i].ask()
        if 0 <= then < len(self.layers):
            self.layers[then].ask()
        self.layers[i].enter()

    def _backward_begins(self) -> None:
        if not self._in_backward:
            self._in_backward = True
            torch.autograd.Variable._execution_engine.queue_callback(self._backward_ends)

    def _backward_reaches(self, i: int) -> None:
        self._backward_begins()
        self._run(i, i - 1)

    def _backward_passed(self, i: int) -> None:
        """Layer i has its gradients. Those of the layers behind it have had its time to be summed."""
        for layer in (self.outside, *self.layers[i + 1 :]):
            layer.finish()
        self.layers[i].leave()

    def _backward_ends(self) -> None:
        self._in_backward = False
        for layer in (self.outside, *self.layers):
            layer.finish()
        self._leave_all()

    def _leave_all(self) -> None:
        for layer in (self.outside, *self.layers):
            layer.leave()


class _AfterBackward(torch.autograd.Function):
    """The input of a layer. Calls `then` when the layer's backward pass has made its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, then: Callable[[], None]) -> Tensor:
        ctx.then = then
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        ctx.then()
        return grads[0], None


def _call_before_backward(output: Any, function: Callable[[], None]) -> None:
    """Call `function` whenever backward is about to pass through a tensor of `output`."""
    for tensor in _tensors(output):
        if tensor.requires_grad:
            tensor.register_hook(lambda _gradient: function())


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for part in value:
            yield from _tensors(part)
