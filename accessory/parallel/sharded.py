"""Parameters of which each data-parallel rank keeps a part, and which are whole while their layer runs.

The method is FSDP's (arXiv 2304.11277), made for a network that is a chain of layers:

- A weight arrives in its place: each rank casts its part into a tensor of the whole weight, and the ranks gather the
  other parts around it. Nothing is copied before or after, unless the cut is along an inner dimension.
- A gradient leaves from its place, in bf16 where products run in it: as soon as the whole gradients of a parameter and
  of those before it are there, its parts are summed on their ranks while backward goes on. All ranks begin these sums
  in one order, whatever their tokens are: two gradients of one shape could otherwise be taken for each other, and
  nobody would see it.
- The next layer's weights arrive while a layer runs, forward and backward. Where they stay from forward to backward,
  all layers' are asked for at the beginning, so they arrive in one go.
- What a step needs first is asked for when the optimiser has moved it, so it arrives while the rest is moved.

A whole weight is one tensor for the whole run, whose memory comes and goes. So what autograd keeps of a layer's forward
pass is right again when the weights have come back. Between passes the network has the parts only, as `DTensor`.

Gradients are sums over ranks, not means.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from accessory.parallel.collectives import all_gather_single, reduce_scatter_single
from accessory.parallel.local_shard import local


class ShardedParameter:
    """One parameter of a module, cut along dimension `dim` over the ranks of `mesh`, which must divide its size.

    dtype: of the whole weight; gradient_dtype: in which the part's gradient adds up over backward passes. Whole
    gradients are made, and summed over ranks, in the same dtype, or in bf16 where one of the two is that. Making one
    replaces the module's parameter, filled or on the meta device, by a DTensor of this rank's part. gradient_made:
    called when backward has made the whole gradient.
    """

    def __init__(
        self, module: nn.Module, kind: str, mesh: Any, dim: int, dtype: torch.dtype, gradient_dtype: torch.dtype
    ) -> None:
        self.module, self.kind, self.mesh, self.dim = module, kind, mesh, dim
        self.group, self.rank, self.size = mesh.get_group(), mesh.get_local_rank(), mesh.size()
        self.dtype, self.gradient_dtype = dtype, gradient_dtype
        self.sent_dtype = torch.bfloat16 if torch.bfloat16 in (dtype, gradient_dtype) else gradient_dtype
        parameter = module.get_parameter(kind)
        self.shape, self.trained = parameter.shape, parameter.requires_grad
        part = parameter.detach().chunk(self.size, dim)[self.rank].clone(memory_format=torch.contiguous_format)
        self.sharded = nn.Parameter(self._distributed(part), requires_grad=self.trained)
        module.register_parameter(kind, self.sharded)
        self.unsharded: nn.Parameter | None = None
        self.gradient_made: Callable[[], None] = lambda: None
        self._gathering: _Gathering | None = None
        self._reducing: list[tuple[Any, Tensor, Tensor]] = []

    def unshard(self) -> None:
        """Begin to gather the whole weight, unless that was begun with the values of now."""
        self.sharded = self.module.get_parameter(self.kind)  # another one since the network has its memory
        part = local(self.sharded)
        if self._gathering is not None:
            if self._gathering.values == _values(self.sharded):
                return
            self._gathering.work.wait()
        if self.unsharded is None:
            empty = torch.empty(self.shape, dtype=self.dtype, device=part.device)
            self.unsharded = nn.Parameter(empty, requires_grad=self.trained)
            if self.trained:
                if self.sent_dtype != self.dtype:
                    self.unsharded.grad_dtype = self.sent_dtype
                # Python does not see through autograd's nodes: a hook that holds us would keep us for ever.
                self.unsharded.register_post_accumulate_grad_hook(partial(_gradient_made, weakref.ref(self)))
        storage = self.unsharded.untyped_storage()
        if storage.size() == 0:  # a GPU's storage would be copied even to its own size
            storage.resize_(self.unsharded.numel() * self.unsharded.element_size())
        # Writing through `data` is no change that autograd should mind: the values are those of the forward pass.
        place = self.unsharded.data
        inner = None if self._leads() else place.new_empty(self.size, *part.shape)
        flat = (place if inner is None else inner).view(self.size, -1)
        flat[self.rank].copy_(part.reshape(-1))
        work = all_gather_single(flat.view(-1), flat[self.rank], group=self.group, async_op=True)
        self._gathering = _Gathering(work, inner, _values(self.sharded))

    def wait_for_unshard(self) -> None:
        """Have the whole weight, as the module's parameter. What the device does from now on finds its values."""
        assert self.unsharded is not None
        assert self._gathering is not None
        self._gathering.work.wait()
        if self._gathering.inner is not None:
            self._by_rank(self.unsharded.data).copy_(self._gathering.inner)
        self._gathering = None
        self.module.register_parameter(self.kind, self.unsharded)

    def reshard(self) -> None:
        """Have the part again, and give the whole weight's memory back."""
        if self._gathering is not None:  # asked for, and not used
            self._gathering.work.wait()
            self._gathering = None
        self.module.register_parameter(self.kind, self.sharded)
        if self.unsharded is not None:
            self.unsharded.untyped_storage().resize_(0)

    def reduce(self) -> None:
        """Begin to sum the gradient over ranks, each its part. Zeros where this rank's pass has made none."""
        assert self.unsharded is not None
        gradient, self.unsharded.grad = self.unsharded.grad, None
        if gradient is None:
            gradient = torch.zeros(self.shape, dtype=self.sent_dtype, device=self.unsharded.device)
        by_rank = self._by_rank(gradient).contiguous()
        part = torch.empty_like(by_rank[0])
        work = reduce_scatter_single(part.view(-1), by_rank.view(-1), group=self.group, async_op=True)
        self._reducing.append((work, part, by_rank))

    def wait_for_reduce(self) -> None:
        """Wait for the sums that were begun, and add them to the part's gradient. The first one stays as it came."""
        for work, part, _ in self._reducing:
            work.wait()
            if self.sharded.grad is not None:
                part = local(self.sharded.grad).to(self.gradient_dtype).add_(part)
            self.sharded.grad = self._distributed(part)
        self._reducing.clear()

    def _by_rank(self, whole: Tensor) -> Tensor:
        """A view of the whole tensor, (ranks, shape of a part …)."""
        return whole.unflatten(self.dim, (self.size, -1)).movedim(self.dim, 0)

    def _leads(self) -> bool:
        """Whether the ranks' parts lie one behind the other in the whole tensor."""
        return self.shape[: self.dim].numel() == 1

    def _distributed(self, part: Tensor) -> DTensor:
        return DTensor.from_local(part, self.mesh, [Shard(self.dim)], run_check=False)


def _gradient_made(parameter: weakref.ref[ShardedParameter], _whole: Tensor) -> None:
    found = parameter()
    if found is not None:
        found.gradient_made()


class _Gathering(NamedTuple):
    work: Any
    inner: Tensor | None  # the parts, where they do not lie one behind the other in the whole weight
    values: tuple[int, ...]  # of the part when it was sent


def _values(parameter: Tensor) -> tuple[int, ...]:
    """What changes when a sharded parameter or its part is written, or another takes its place."""
    part = local(parameter)
    return parameter._version, part._version, part.data_ptr()


class ShardedLayer:
    """The parameters of one module that come and go together."""

    def __init__(self, module: nn.Module, parameters: Sequence[ShardedParameter]) -> None:
        self.module, self.parameters = module, parameters
        self.gathering = self.unsharded = False
        self._trained = [p for p in reversed(parameters) if p.trained]  # as backward passes them
        self._reduced = 0  # of these, in this backward pass
        for parameter in self._trained:
            parameter.gradient_made = self._reduce_made

    def unshard(self) -> None:
        """Begin to gather the weights."""
        if not self.gathering:
            self.gathering = True
            for parameter in self.parameters:
                parameter.unshard()

    def wait_for_unshard(self) -> None:
        if not self.unsharded:
            self.unshard()
            self.unsharded = True
            for parameter in self.parameters:
                parameter.wait_for_unshard()

    def reshard(self) -> None:
        if self.gathering:
            self.gathering = self.unsharded = False
            for parameter in self.parameters:
                parameter.reshard()

    def _reduce_made(self) -> None:
        """Begin the sums whose turn it is."""
        while self._reduced < len(self._trained):
            whole = self._trained[self._reduced].unsharded
            if whole is None or whole.grad is None:
                return
            self._trained[self._reduced].reduce()
            self._reduced += 1

    def reduce_all(self) -> None:
        """Begin the sums that were not begun in this backward pass: no other gradient will come."""
        for parameter in self._trained[self._reduced :]:
            parameter.reduce()
        self._reduced = len(self._trained)

    def wait_for_reduce(self) -> None:
        for parameter in self.parameters:
            parameter.wait_for_reduce()

    def begin_backward(self) -> None:
        """Gradients count anew."""
        self._reduced = 0


class ShardedChain:
    """A network whose layers run one after the other, with what it has outside them. Its hooks do everything.

    reshard_after_forward: a layer has its whole weights while it runs, and the last layer until its backward pass,
    which comes next. Else all stay whole from forward to backward. Weights outside the layers stay in any case. Without
    gradients nothing outlasts a layer's forward pass.

    An optimiser that calls `moved` with each parameter it has moved has the weights of the next forward pass arrive
    while it moves others: those outside the layers, and those of the first layer, or of all that will stay whole.
    """

    def __init__(self, outside: ShardedLayer, layers: Sequence[ShardedLayer], reshard_after_forward: bool) -> None:
        self.outside, self.layers, self.reshard_after_forward = outside, layers, reshard_after_forward
        self._in_backward = False
        self._first = (outside, *(layers[:1] if reshard_after_forward else layers))
        self._soon: dict[nn.Parameter, ShardedParameter] = {}  # those of `_first`, by what the optimiser has
        outside.module.register_forward_pre_hook(self._forward_begins)
        outside.module.register_forward_hook(self._forward_ends)
        for i, layer in enumerate(layers):
            layer.module.register_forward_pre_hook(self._before(i))
            layer.module.register_forward_hook(self._after(i))

    def _forward_begins(self, _module: nn.Module, _inputs: Any) -> None:
        self._in_backward = False  # an error may have ended the pass before
        self._reshard_all()  # a forward pass that no backward pass followed
        for layer in self._first:
            layer.unshard()
        self.outside.wait_for_unshard()

    def moved(self, parameter: nn.Parameter) -> None:
        """The optimiser has moved a parameter. All ranks move theirs in one order."""
        if not self._soon:
            every = (p for layer in self._first for p in layer.parameters if p.trained)
            self._soon = {p.module.get_parameter(p.kind): p for p in every}
        if parameter in self._soon:
            self._soon[parameter].reshard()
            self._soon[parameter].unshard()

    def _forward_ends(self, _module: nn.Module, _inputs: Any, output: Any) -> None:
        if torch.is_grad_enabled():
            _call_before_backward(output, self._backward_begins)
        else:
            self._reshard_all()

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
            backward = torch.is_grad_enabled()
            if not backward or (self.reshard_after_forward and i < len(self.layers) - 1):
                self.layers[i].reshard()
            if backward:
                _call_before_backward(output, lambda: self._backward_reaches(i))

        return after

    def _run(self, i: int, then: int) -> None:
        """Have layer i, and begin to gather the one that runs after it, if there is one."""
        self.layers[i].unshard()
        if 0 <= then < len(self.layers):
            self.layers[then].unshard()
        self.layers[i].wait_for_unshard()

    def _backward_begins(self) -> None:
        if not self._in_backward:
            self._in_backward = True
            for layer in (self.outside, *self.layers):
                layer.begin_backward()
            torch.autograd.Variable._execution_engine.queue_callback(self._backward_ends)

    def _backward_reaches(self, i: int) -> None:
        self._backward_begins()
        self._run(i, i - 1)

    def _backward_passed(self, i: int) -> None:
        """Layer i has its gradients. Those of the layers behind it have had its time to be summed."""
        self.layers[i].reduce_all()
        for layer in (self.outside, *self.layers[i + 1 :]):
            layer.wait_for_reduce()
        self.layers[i].reshard()

    def _backward_ends(self) -> None:
        self._in_backward = False
        every = (self.outside, *self.layers)
        for layer in every:
            layer.reduce_all()
        for layer in every:
            layer.wait_for_reduce()
        self._reshard_all()

    def _reshard_all(self) -> None:
        for layer in (self.outside, *self.layers):
            layer.reshard()


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
