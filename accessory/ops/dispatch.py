"""Which kernel runs when: one table that maps the description of a product to the function that computes it.

A `Product` holds plain values: what is multiplied, on which device, and how many rows. `find` returns the first row of
`TABLE` that fits it. Quicker kernels come first in the table. `product` describes tensors as a `Product`. The planner
asks about networks that do not exist yet, so this module imports torch only inside functions.

A new kernel is a file and a row here. A new format needs no row: it is dequantised before its products until a kernel
that reads it has a row. docs/extending.md lists the steps.

Most kernels are chosen by the number of rows, and each sums in its own order. Inside `fixing` only those run that give
a row the same bits beside any others.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from accessory import limits
from accessory.ops.machine import has_amx, has_triton

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# linear: one weight. grouped: a stack of weights, rows sorted by expert. decode: the experts' whole feed-forward, one
# (token, expert) pair at a time. A backward product gives the gradient of the input. grouped_terms: one or two grouped
# products with their parts of low rank, and their sum. grouped_weights: the gradient of a stack. adapters: the LoRA
# products of rows of which each names its own adapter. dequantize: no product, only the weight in 16 or 32 bits.
# attention: over a paged cache. rotate_and_write: queries and keys turned by their positions, keys and values into the
# cache. Both take the cache, dense or fp8, as their weight. rope: queries and keys turned alone. add_norm: the residual
# stream and its norm. route: the same, and what the router chose. gate: silu(gate) · up, with its gradients in
# gate_backward. combine: each token's sum over its experts. cross_entropy: its sum over rows of logits. adamw: the
# update of a parameter, whose numbers are its rows.
Op = Literal[
    "linear", "linear_backward", "grouped", "grouped_backward", "grouped_terms", "grouped_weights", "decode",
    "adapters", "dequantize", "attention", "rotate_and_write", "rope", "add_norm", "route", "gate", "gate_backward",
    "combine", "cross_entropy", "adamw",
]  # fmt: skip
DENSE = "dense"

# Whether a row's bits may depend on the rows beside it ("": they may). If not, all rows of a product are tokens that
# decode, or all are of prompts: each has kernels of one tile for any number of rows.
Fixed = Literal["", "decode", "prompt"]
_FIXED: tuple[Fixed, ...] = ("decode", "prompt")
_fixed: ContextVar[Fixed] = ContextVar("fixed", default="")


def fixed() -> Fixed:
    """What `fixing` says here."""
    return _fixed.get()


@contextmanager
def fixing(what: Fixed) -> Iterator[None]:
    """Choose kernels that give a row the same bits beside any others. No gradients are recorded."""
    before = _fixed.set(what)
    try:
        yield
    finally:
        _fixed.reset(before)


class Product(NamedTuple):
    """Describes a product. The defaults are those of the planner: a card of compute capability 9.0, in 16 bits."""

    op: Op
    weight: str = DENSE  # or a format of `accessory.formats`
    rows: int = 0  # rows of input; for experts, the number of (token, expert) pairs
    experts: int = 1  # weights in the stack
    in_features: int = 0
    out_features: int = 0
    device: str = "cuda"
    capability: tuple[int, int] = (9, 0)  # the card's compute capability; (0, 0) on a CPU
    dtype: str = "bfloat16"  # of the input
    grad: bool = False  # whether gradients are recorded
    fused: bool = False  # whether w1 and w3 are in one tensor
    plain: bool = True  # whether nothing stands beside the weights: no bias and no adapter
    triton: bool = True  # whether Triton can be used
    amx: bool = False  # whether this is a CPU that multiplies tiles of matrices (Intel's AMX)
    fixed: Fixed = ""  # whether a row's bits must not depend on the others


class Kernel(NamedTuple):
    """A row of the table: a function, and the products that it computes."""

    op: Op
    function: str  # "module:name" in accessory.ops
    weights: Collection[str] = ()  # "dense" or formats; empty means any quantised weight
    devices: Collection[str] = ("cpu", "cuda")
    capability: tuple[int, int] = (0, 0)  # the lowest compute capability
    dtypes: Collection[str] = ()  # none: any
    rows: tuple[int, int] | None = None  # the fewest and the most rows
    rows_an_expert: int | None = None  # the most rows an expert, on average
    experts: int | None = None  # the most experts
    multiple: int = 1  # in_features and out_features must be multiples of it
    grad: bool = True  # whether it may run where gradients are recorded
    fused: bool = False  # whether it needs w1 and w3 in one tensor
    plain: bool = False  # whether it reads the weights alone
    triton: bool = False  # whether it needs Triton
    amx: bool = False  # whether it needs AMX
    squares: bool = False  # whether it sums the squares of the gradient that it writes
    host_free: bool = True  # whether it runs without telling the host which expert got which rows; CUDA graphs need it
    fixed: Collection[str] = ("",)  # the kinds of `Fixed` for which it may run

    def fits(self, p: Product) -> bool:
        return (
            self.op == p.op
            and p.fixed in self.fixed
            and (p.weight in self.weights if self.weights else p.weight != DENSE)
            and p.device in self.devices
            and (not self.dtypes or p.dtype in self.dtypes)
            and (p.device == "cpu" or p.capability >= self.capability)
            and (self.rows is None or self.rows[0] <= p.rows <= self.rows[1])
            and (self.rows_an_expert is None or p.rows <= self.rows_an_expert * p.experts)
            and (self.experts is None or p.experts <= self.experts)
            and p.in_features % self.multiple == p.out_features % self.multiple == 0
            and (self.grad or not p.grad)
            and (p.fused or not self.fused)
            and (p.plain or not self.plain)
            and (p.triton or not self.triton)
            and (p.amx or not self.amx)
        )

    def load(self) -> Callable[..., Tensor]:
        """Import the function's module and return the function."""
        return _load(self.function)


_CUDA, _CPU = ("cuda",), ("cpu",)
_16_BITS, _BF16 = ("bfloat16", "float16"), ("bfloat16",)
_FP32 = ("float32",)
_ANY_ROWS = ("", *_FIXED)  # for kernels that compute each row, or each number, on its own
_AMPERE, _ADA, _HOPPER = (8, 0), (8, 9), (9, 0)
_ANY_FORMAT: tuple[str, ...] = ()
_ROW_FORMATS, _GROUP_FORMATS = ("int8", "fp8"), ("int4", "nf4", "nf4-dq")  # by what shares a scale
_TRITON_FORMATS = ("int8", "fp8", "int4", "nf4", "nf4-dq")  # the formats that ops/triton/packed.py reads

TABLE: tuple[Kernel, ...] = (
    # Where no row fits a single dense weight, `dense_products.dense_linear` calls one of torch's products.
    Kernel("linear", "triton.rows:linear", (DENSE,), _CUDA, dtypes=_16_BITS, rows=(1, limits.IN_PLACE_ROWS_DENSE),
           grad=False, triton=True),
    Kernel("linear", "triton.packed:linear", _TRITON_FORMATS, _CUDA, dtypes=_16_BITS, rows=(1, limits.IN_PLACE_ROWS),
           grad=False, triton=True),
    Kernel("linear", "triton.grouped_experts:linear", _TRITON_FORMATS, _CUDA, _AMPERE, _16_BITS,
           rows=(1, limits.FEW_ROWS), multiple=16, grad=False, triton=True),
    Kernel("linear", "triton.packed_grouped:product", _TRITON_FORMATS, _CUDA, _AMPERE, _16_BITS,
           rows=(1, limits.TILED_ROWS), triton=True),
    Kernel("linear", "fp8:fp8_linear", ("fp8",), _CUDA, _HOPPER, _BF16, multiple=16, grad=False),
    Kernel("linear", "quantized_cpu:int8_packed", ("int8",), _CPU, dtypes=_BF16, rows=(1, limits.INT8_ROWS_CPU),
           multiple=32),
    Kernel("linear", "quantized_cpu:rows_scaled_after", _ROW_FORMATS, _CPU, dtypes=_BF16),
    Kernel("linear", "quantized_cpu:groups_scaled_after", _GROUP_FORMATS, _CPU, dtypes=_BF16,
           rows=(1, limits.GROUP_SUM_ROWS_CPU), amx=True),
    Kernel("linear", "quantized_cpu:scaled_before", (*_ROW_FORMATS, *_GROUP_FORMATS), _CPU, dtypes=(*_BF16, *_FP32)),
    Kernel("linear", "quantized_products:dequantized_linear", _ANY_FORMAT),
    Kernel("linear_backward", "quantized_products:dequantized_linear_backward", _ANY_FORMAT),

    Kernel("grouped", "triton.grouped:product", (DENSE,), _CUDA, _AMPERE, _16_BITS, rows=(0, limits.GROUPED_ROWS),
           grad=False, triton=True),
    Kernel("grouped", "triton.grouped_tma:product", (DENSE,), _CUDA, _HOPPER, _16_BITS, multiple=8, grad=False,
           triton=True),
    Kernel("grouped", "dense_products:grouped_mm", (DENSE,), _CUDA, _AMPERE, _BF16, multiple=8),
    Kernel("grouped", "triton.grouped:product", (DENSE,), _CUDA, _AMPERE, _16_BITS, grad=False, triton=True),
    Kernel("grouped", "triton.grouped:product", (DENSE,), _CUDA, _AMPERE, _FP32,
           rows_an_expert=limits.GROUPED_ROWS_AN_EXPERT_FP32, grad=False, triton=True),
    Kernel("grouped", "dense_products:grouped_loop", (DENSE,), host_free=False),
    Kernel("grouped", "fp8:fp8_grouped_linear", ("fp8",), _CUDA, _HOPPER, _BF16, multiple=16, grad=False),
    Kernel("grouped", "triton.packed_grouped:product", _TRITON_FORMATS, _CUDA, _AMPERE, _16_BITS,
           rows_an_expert=limits.TILED_ROWS_AN_EXPERT, triton=True),
    # Dequantised, they are the dense products above: grouped_mm, Triton's, and the loop.
    Kernel("grouped", "quantized_products:dequantized_grouped", _ANY_FORMAT, _CUDA, _AMPERE, _BF16, multiple=8),
    Kernel("grouped", "quantized_products:dequantized_grouped", _ANY_FORMAT, _CUDA, _AMPERE, _16_BITS, grad=False,
           triton=True),
    Kernel("grouped", "quantized_products:dequantized_grouped", _ANY_FORMAT, _CUDA, _AMPERE, _FP32,
           rows_an_expert=limits.GROUPED_ROWS_AN_EXPERT_FP32, grad=False, triton=True),
    Kernel("grouped", "quantized_products:dequantized_grouped", _ANY_FORMAT, _CUDA, host_free=False),
    Kernel("grouped", "quantized_products:expert_by_expert", _ANY_FORMAT, _CPU, host_free=False),
    Kernel("grouped_backward", "triton.packed_grouped:gradient", _TRITON_FORMATS, _CUDA, _AMPERE, _16_BITS,
           rows_an_expert=limits.TILED_ROWS_AN_EXPERT, triton=True),
    Kernel("grouped_backward", "quantized_products:dequantized_grouped_backward", _ANY_FORMAT, _CUDA, _AMPERE, _BF16,
           multiple=8),
    Kernel("grouped_backward", "quantized_products:dequantized_grouped_backward", _ANY_FORMAT, _CUDA, host_free=False),
    Kernel("grouped_backward", "quantized_products:expert_by_expert_backward", _ANY_FORMAT, _CPU, host_free=False),
    Kernel("grouped_backward", "triton.grouped_tma:gradient", (DENSE,), _CUDA, _HOPPER, _16_BITS, multiple=8,
           triton=True),
    Kernel("grouped_backward", "dense_products:grouped_mm_backward", (DENSE,), _CUDA, _AMPERE, _BF16, multiple=8),
    Kernel("grouped_backward", "dense_products:grouped_loop_backward", (DENSE,), host_free=False),
    Kernel("grouped_terms", "triton.grouped_tma:sum_of_terms", (DENSE,), _CUDA, _HOPPER, _16_BITS, multiple=8,
           grad=False, triton=True),
    Kernel("grouped_weights", "triton.grouped_tma:weight_gradient", (DENSE,), _CUDA, _HOPPER, _16_BITS, multiple=8,
           grad=False, triton=True, squares=True),
    Kernel("grouped_weights", "dense_products:grouped_mm_weights", (DENSE,), _CUDA, _AMPERE, _BF16, multiple=8),
    Kernel("grouped_weights", "dense_products:grouped_loop_weights", (DENSE,), host_free=False),

    Kernel("decode", "triton.grouped_experts:experts_in_tiles", (DENSE,), _CUDA, _AMPERE, _16_BITS,
           rows=(limits.IN_PLACE_PAIRS + 1, limits.TILED_PAIRS), multiple=16, grad=False, plain=True, triton=True),
    Kernel("decode", "triton.grouped_experts:experts_in_tiles", _ROW_FORMATS, _CUDA, _AMPERE, _16_BITS,
           rows=(1, limits.TILED_PAIRS), multiple=16, grad=False, plain=True, triton=True),
    Kernel("decode", "triton.grouped_experts:experts_in_tiles", _GROUP_FORMATS, _CUDA, _AMPERE, _16_BITS,
           rows=(1, limits.TILED_PAIRS_4_BITS), multiple=16, grad=False, plain=True, triton=True),
    Kernel("decode", "triton.decode_experts:decode_experts", (DENSE,), _CUDA, dtypes=_16_BITS,
           rows=(0, limits.DECODE_PAIRS_GPU), grad=False, triton=True),
    Kernel("decode", "triton.packed:decode_experts", _TRITON_FORMATS, _CUDA, dtypes=_16_BITS,
           rows=(0, limits.DECODE_PAIRS_GPU_QUANTIZED), grad=False, triton=True),
    Kernel("decode", "experts:decode_experts_fused", (DENSE, *_ROW_FORMATS, *_GROUP_FORMATS), _CPU,
           rows=(0, limits.DECODE_PAIRS_CPU), grad=False, fused=True, host_free=False),

    Kernel("adapters", "triton.low_rank:add_row_by_row", (DENSE,), _CUDA, dtypes=(*_16_BITS, *_FP32),
           rows=(0, limits.ADAPTER_ROWS), grad=False, triton=True),
    Kernel("adapters", "triton.low_rank:add_grouped", (DENSE,), _CUDA, _AMPERE, (*_16_BITS, *_FP32), grad=False,
           triton=True),
    Kernel("adapters", "linear:adapters_in_turn", (DENSE,), host_free=False),

    Kernel("dequantize", "triton.packed:dequantize", _TRITON_FORMATS, _CUDA, triton=True, fixed=_ANY_ROWS),
    Kernel("dequantize", "quantized:dequantize", _ANY_FORMAT, fixed=_ANY_ROWS),

    Kernel("attention", "triton.paged_attention:attention", (DENSE,), _CUDA, grad=False, triton=True),
    Kernel("attention", "triton.paged_attention:attention", ("fp8",), _CUDA, _ADA, grad=False, triton=True),
    Kernel("attention", "paged_attention:sequence_by_sequence", (DENSE, "fp8"), grad=False, host_free=False),
    Kernel("rotate_and_write", "triton.paged_attention:rotate_and_write", (DENSE,), _CUDA, grad=False, triton=True,
           fixed=_ANY_ROWS),
    Kernel("rotate_and_write", "triton.paged_attention:rotate_and_write", ("fp8",), _CUDA, _ADA, grad=False,
           triton=True, fixed=_ANY_ROWS),
    Kernel("rotate_and_write", "paged_attention:rotate_and_copy", (DENSE, "fp8"), grad=False, fixed=_ANY_ROWS),

    # Elsewhere torch's operations do these, one after the other.
    Kernel("add_norm", "triton.add_norm:add_rms_norm", (DENSE,), _CUDA, grad=False, triton=True, fixed=_ANY_ROWS),
    Kernel("add_norm", "norm_autograd:add_rms_norm", (DENSE,), _CUDA, dtypes=_FP32, triton=True),
    Kernel("route", "triton.add_norm:add_norm_route", (DENSE,), _CUDA, experts=limits.ROUTED_EXPERTS, grad=False,
           triton=True, fixed=_ANY_ROWS),
    Kernel("gate", "triton.prompt_experts:gate", (DENSE,), _CUDA, grad=False, triton=True, fixed=_ANY_ROWS),
    Kernel("gate_backward", "triton.prompt_experts:gate_backward", (DENSE,), _CUDA, grad=False, triton=True),
    Kernel("combine", "triton.prompt_experts:combine", (DENSE,), _CUDA, grad=False, triton=True, fixed=_ANY_ROWS),

    Kernel("rope", "triton.rope:turn", (DENSE,), _CUDA, triton=True),
    Kernel("cross_entropy", "triton.cross_entropy:cross_entropy", (DENSE,), _CUDA, triton=True),
    Kernel("adamw", "triton.adamw:update", (DENSE,), _CUDA, dtypes=_FP32, rows=limits.ADAMW_NUMBERS, triton=True),

    # For rows whose bits must not depend on the others: no limit here is one of rows.
    Kernel("linear", "triton.fixed:decoding_linear_in_tiles", (DENSE, *_TRITON_FORMATS), _CUDA, _AMPERE, _16_BITS,
           multiple=16, grad=False, triton=True, fixed=("decode",)),
    Kernel("linear", "triton.fixed:decoding_linear", (DENSE, *_TRITON_FORMATS), _CUDA, _AMPERE, _16_BITS, grad=False,
           triton=True, fixed=("decode",)),
    Kernel("linear", "triton.fixed:prompt_linear", (DENSE, *_TRITON_FORMATS), _CUDA, _AMPERE, _16_BITS, grad=False,
           triton=True, fixed=("prompt",)),
    Kernel("linear", "triton.fixed:decoding_linear", (DENSE,), _CUDA, _AMPERE, _FP32, grad=False, triton=True,
           fixed=("decode",)),
    Kernel("linear", "triton.fixed:prompt_linear", (DENSE,), _CUDA, _AMPERE, _FP32, grad=False, triton=True,
           fixed=("prompt",)),
    Kernel("linear", "quantized_products:dequantized_linear", _ANY_FORMAT, _CUDA, _AMPERE, grad=False, triton=True,
           fixed=_FIXED),
    Kernel("linear", "fixed_cpu:linear", (DENSE, *_ROW_FORMATS, *_GROUP_FORMATS), _CPU, grad=False, fixed=_FIXED),
    Kernel("grouped", "triton.fixed:decoding_grouped", (DENSE, *_TRITON_FORMATS), _CUDA, _AMPERE, _16_BITS, grad=False,
           triton=True, fixed=("decode",)),
    Kernel("grouped", "triton.fixed:prompt_grouped", (DENSE, *_TRITON_FORMATS), _CUDA, _AMPERE, _16_BITS, grad=False,
           triton=True, fixed=("prompt",)),
    Kernel("grouped", "triton.fixed:decoding_grouped", (DENSE,), _CUDA, _AMPERE, _FP32, grad=False, triton=True,
           fixed=("decode",)),
    Kernel("grouped", "triton.fixed:prompt_grouped", (DENSE,), _CUDA, _AMPERE, _FP32, grad=False, triton=True,
           fixed=("prompt",)),
    Kernel("grouped", "quantized_products:dequantized_grouped", _ANY_FORMAT, _CUDA, _AMPERE, grad=False, triton=True,
           fixed=_FIXED),
    Kernel("grouped", "dense_products:grouped_loop", (DENSE,), _CPU, grad=False, host_free=False, fixed=_FIXED),
    Kernel("grouped", "quantized_products:expert_by_expert", _ANY_FORMAT, _CPU, grad=False, host_free=False,
           fixed=_FIXED),
    Kernel("decode", "triton.fixed:decoding_experts", (DENSE, *_TRITON_FORMATS), _CUDA, _AMPERE, _16_BITS, multiple=16,
           grad=False, plain=True, triton=True, fixed=("decode",)),
    Kernel("adapters", "triton.low_rank:add_row_by_row", (DENSE,), _CUDA, dtypes=(*_16_BITS, *_FP32), grad=False,
           triton=True, fixed=_FIXED),
    Kernel("adapters", "linear:adapters_in_turn", (DENSE,), _CPU, grad=False, host_free=False, fixed=_FIXED),
    Kernel("attention", "triton.paged_attention:fixed_attention", (DENSE,), _CUDA, _AMPERE, grad=False, triton=True,
           fixed=_FIXED),
    Kernel("attention", "triton.paged_attention:fixed_attention", ("fp8",), _CUDA, _ADA, grad=False, triton=True,
           fixed=_FIXED),
    Kernel("attention", "paged_attention:query_by_query", (DENSE, "fp8"), _CPU, grad=False, host_free=False,
           fixed=_FIXED),
)  # fmt: skip


@lru_cache(maxsize=4096)
def find(product: Product) -> Kernel | None:
    """The kernel for a product, or None where no row fits. For "decode", None means: use grouped products instead."""
    return next((kernel for kernel in TABLE if kernel.fits(product)), None)


def choose(product: Product) -> Kernel:
    """`find` for operations that need a kernel. Raises LookupError with the product where no row fits."""
    kernel = find(product)
    if kernel is None:
        raise LookupError(f"no kernel for {product}")
    return kernel


def host_free(decode: Product | None, grouped: Iterable[Product]) -> bool:
    """Whether a layer's experts run without the host learning which tokens they got. A CUDA graph needs that.

    decode: the "decode" product; None: there is none. grouped: all grouped products, which run where no kernel computes
    `decode`.
    """
    kernel = None if decode is None else find(decode)
    return kernel.host_free if kernel is not None else all(choose(p).host_free for p in grouped)


def product(
    op: Op, x: Tensor, weight: Any, rows: int, *, fused: bool = False, plain: bool = True, grad: bool | None = None
) -> Product:
    """Describes the product of x (…, I) and `weight`, a tensor or `Packed`: (O, I) or a stack (E, O, I).

    rows: rows of x; for experts, the number of (token, expert) pairs. grad: whether gradients are recorded, by default
    `torch.is_grad_enabled()`.
    """
    import torch

    *stack, out_features, in_features = weight.shape
    device = x.device
    return Product(
        op,
        getattr(weight, "format", DENSE),
        rows,
        stack[0] if stack else 1,
        in_features,
        out_features,
        device.type,
        _capability(device),
        _name(x.dtype),
        torch.is_grad_enabled() if grad is None else grad,
        fused,
        plain,
        has_triton(),
        device.type == "cpu" and has_amx(),
        fixed(),
    )


def over_pages(op: Op, device: torch.device, dtype: torch.dtype, fp8: bool) -> Product:
    """Describes what is done with a paged cache. fp8: whether its numbers are fp8."""
    weight = "fp8" if fp8 else DENSE
    capability = _capability(device)
    return Product(
        op, weight, device=device.type, capability=capability, dtype=_name(dtype), triton=has_triton(), fixed=fixed()
    )


def over_tokens(op: Op, x: Tensor, experts: int = 1) -> Product:
    """Describes what is done with each token of the residual stream x, before `experts` experts."""
    import torch

    return _over_tokens(op, x.device, x.dtype, experts, torch.is_grad_enabled(), has_triton(), fixed())


@lru_cache
def _over_tokens(
    op: Op, device: torch.device, dtype: torch.dtype, experts: int, grad: bool, triton: bool, fixed: Fixed
) -> Product:
    return Product(
        op, experts=experts, device=device.type, capability=_capability(device), dtype=_name(dtype), grad=grad,
        triton=triton, fixed=fixed,
    )  # fmt: skip


def over_numbers(op: Op, x: Tensor) -> Product:
    """Describes what is done with each number of x on its own."""
    return over_tokens(op, x)._replace(rows=x.numel())


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    import torch

    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)


@cache
def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@cache
def _load(function: str) -> Callable[..., Tensor]:
    module, _, name = function.partition(":")
    return getattr(importlib.import_module(f"accessory.ops.{module}"), name)
