"""The base class of both implementations: three stacked weights, and decoding of a few tokens pair by pair.

Legend: T tokens, D dim, F this rank's part of the hidden dim, K experts a token, E this rank's experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from accessory.nn.fused import FusedWeights
from accessory.nn.linear import PackedWeight, product_of
from accessory.ops.experts import decode_experts, decode_kernel, runs_host_free
from accessory.ops.experts_autograd import trained_experts
from accessory.ops.linear import AdapterRows, LinearAdapter, Weight
from accessory.ops.linear_autograd import SumOverRanks


class StackedExperts(nn.Module):
    """w1 and w3 (E, F, D), w2 (E, D, F), each a stack of linear weights (out, in). `first`: number of the first expert.

    `forward(x_TD, weight_TK, expert_TK)` returns this rank's part of Σ_k weight · expert(x), (T, D) fp32.

    Finetuning adds adapters as stacks: `w1_bias` (E, out), `w1_lora_a` (E, r, in), `w1_lora_b` (E, out, r), and the
    same for w2 and w3. `bias_factor` 0 leaves w2's bias out of this rank's part, because another rank adds it.
    Generation may have several adapters in their place (`set_adapters`), of which each token names one.
    """

    w1: Any  # nn.Parameter or PackedWeight
    w2: Any
    w3: Any

    def __init__(self, dim: int, hidden_dim: int, experts: int, first: int = 0) -> None:
        super().__init__()
        self.first = first
        self.w1 = nn.Parameter(torch.empty(experts, hidden_dim, dim))
        self.w2 = nn.Parameter(torch.empty(experts, dim, hidden_dim))
        self.w3 = nn.Parameter(torch.empty(experts, hidden_dim, dim))
        for kind in ("w1", "w2", "w3"):
            for part in ("bias", "lora_a", "lora_b"):
                self.register_parameter(f"{kind}_{part}", None)
        self.adapters: dict[str, Weight] = {}  # several beside the stack of a kind; their weight is this stack
        self.lora_scale, self.bias_factor = 1.0, 1.0
        self.fused = FusedWeights(dim=1)
        self._fused_of: tuple[Weight, Weight, Weight] | None = None  # all weights, where nothing stands beside `fused`
        self.compute_dtype: torch.dtype | None = None  # None: the weights' dtype
        self.recompute = False  # activation checkpointing: keep only the input
        self.sum_over_ranks: SumOverRanks | None = None  # of gradients, where each has a part of all experts

    @property
    def products_in(self) -> torch.dtype:
        """The compute dtype."""
        return self.compute_dtype or self.w1.dtype

    @property
    def held(self) -> int | None:
        """The first of this rank's experts; None: it has parts of all of them."""
        raise NotImplementedError

    def add_bias(self, kind: str) -> None:
        self._add_parameter(kind, "bias", getattr(self, kind).shape[:2])

    def add_lora(self, kind: str, rank: int, scale: float) -> None:
        E, O, I = getattr(self, kind).shape  # noqa: E741
        self._add_parameter(kind, "lora_a", (E, rank, I))
        self._add_parameter(kind, "lora_b", (E, O, rank))
        self.lora_scale = scale

    def _add_parameter(self, kind: str, what: str, shape: tuple[int, ...]) -> None:
        weight, self._fused_of = getattr(self, kind), None
        dtype = torch.float32 if isinstance(weight, PackedWeight) else weight.dtype
        self.register_parameter(f"{kind}_{what}", nn.Parameter(torch.empty(shape, dtype=dtype, device=weight.device)))

    def set_adapters(self, kind: str, adapters: Sequence[LinearAdapter | None]) -> None:
        """Stand several adapters beside the stack `kind`, in place of those before; None: one without a part here.

        They stay where they are when the module is moved or cast.
        """
        self.adapters.pop(kind, None)
        beside = self.weights(kind).with_adapters(adapters)
        if beside.several:
            self.adapters[kind] = beside

    def weights(self, kind: str) -> Weight:
        """The stack `kind` ("w1", "w2", "w3") with its bias and its LoRA adapters."""
        bias, lora_a, lora_b = (getattr(self, f"{kind}_{part}") for part in ("bias", "lora_a", "lora_b"))
        if bias is not None and kind == "w2" and self.bias_factor != 1.0:
            bias = bias * self.bias_factor
        weight = product_of(getattr(self, kind))
        if kind in self.adapters:
            return self.adapters[kind]._replace(weight=weight, bias=bias)
        return Weight(weight, bias, lora_a, lora_b, self.lora_scale)

    def all_weights(self, adapted: bool = True) -> tuple[Weight, Weight, Weight]:
        """w1, w2 and w3. adapted: with their several adapters, if they have them."""
        w1, w2, w3 = self.weights("w1"), self.weights("w2"), self.weights("w3")
        return (w1, w2, w3) if adapted else (w1.without_adapters(), w2.without_adapters(), w3.without_adapters())

    def fuse(self) -> None:
        # A GPU's kernels read both stacks at once as they lie, and to fuse them takes as much memory again.
        weights = self.all_weights(adapted=False)
        if self.w1.device.type == "cpu" and all(w.plain for w in weights):
            self.fused.refresh([self.w1, self.w3])
            self._fused_of = None if self.fused.tensor is None else weights

    def forward(
        self, x_TD: Tensor, weight_TK: Tensor, expert_TK: Tensor, adapters: AdapterRows | None = None
    ) -> Tensor:
        """adapters: the adapter of each token, where there are several; None: no token takes one."""
        x_TD = x_TD.to(self.products_in)
        weights = self._fused_of if adapters is None and not torch.is_grad_enabled() else None
        w1, w2, w3 = self.all_weights(adapters is not None) if weights is None else weights
        if torch.is_grad_enabled() and adapters is None:
            held, recompute, sum_over_ranks = self.held, self.recompute, self.sum_over_ranks
            return trained_experts(x_TD, w1, w2, w3, weight_TK, expert_TK, held, recompute, sum_over_ranks)
        w13 = self.fused.tensor if weights is not None else None
        kernel = decode_kernel(x_TD, (w1, w2, w3), expert_TK.numel(), fused=w13 is not None)
        if kernel is not None:
            return decode_experts(
                kernel, x_TD, w1, w2, w3, weight_TK, expert_TK, first=self.first, w13_EGD=w13, adapters=adapters
            )
        return self.grouped(x_TD, weight_TK, expert_TK, adapters)

    def host_free(self, x_TD: Tensor, expert_TK: Tensor, adapted: bool) -> bool:
        """Whether a GPU runs this without the host learning the routing. A CUDA graph needs that.

        adapted: whether tokens take one of several adapters.
        """
        return x_TD.is_cuda and runs_host_free(x_TD, *self.all_weights(adapted), expert_TK.numel())

    def grouped(self, x_TD: Tensor, weight_TK: Tensor, expert_TK: Tensor, adapters: AdapterRows | None) -> Tensor:
        """Each implementation's computation for prompts and batches. Returns the same as `forward`."""
        raise NotImplementedError
