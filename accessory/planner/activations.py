"""What one layer holds beside its weights: what autograd keeps of forward, and the largest moments of its passes.

The arithmetic follows `nn.decoder`, `nn.experts_base`, `nn.experts_sparse` and `ops.experts` line by line. The residual
stream between layers is fp32. Products are in 16 bits. SwiGLU keeps four tensors of the hidden size for backward: w1 x,
its SiLU, w3 x, and the product of the last two.

Legend: T tokens, N = T·K (token, expert) pairs, D dim, F hidden dim held here, E experts held here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from accessory.formats import Format
from accessory.ops.dispatch import Op, Product, choose
from accessory.planner.setup import Setup, Training


@dataclass(frozen=True)
class LayerSizes:
    """The sizes of a layer on one rank, and the bytes of the tensors that its passes make."""

    tokens: int
    pairs: int
    dim: int
    hidden: int
    queries: int  # query heads × head_dim
    keys: int  # key/value heads × head_dim
    experts: int
    expert_by_expert: bool  # base's loop while training; else all experts are computed at once

    @property
    def tokens_fp32(self) -> int:
        """(T, D)."""
        return 4 * self.tokens * self.dim

    @property
    def tokens_16bit(self) -> int:
        """(T, D)."""
        return 2 * self.tokens * self.dim

    @property
    def pairs_16bit(self) -> int:
        """(N, D)."""
        return 2 * self.pairs * self.dim

    @property
    def pairs_fp32(self) -> int:
        """(N, D)."""
        return 4 * self.pairs * self.dim

    @property
    def hidden_16bit(self) -> int:
        """(N, F)."""
        return 2 * self.pairs * self.hidden

    @property
    def stack(self) -> int:
        """Numbers of one of the three expert stacks (E, F, D)."""
        return self.experts * self.hidden * self.dim

    @property
    def attention(self) -> int:
        """Numbers of attention's four weights."""
        return 2 * self.dim * (self.queries + self.keys)


def layer_sizes(setup: Setup, tokens: int) -> LayerSizes:
    """A layer of the setup's network when one rank computes `tokens` tokens at once.

    While training, base's ranks are taken to get equal shares of the pairs. Without gradients, each sorts all pairs.
    """
    args = setup.args
    loop = setup.implementation == "base" and isinstance(setup.task, Training)
    ranks = setup.tp if loop else 1
    return LayerSizes(
        tokens=tokens,
        pairs=tokens * args.moe.num_experts_per_tok // ranks,
        dim=args.dim,
        hidden=setup.expert_width,
        queries=setup.query_heads * args.head_dim,
        keys=setup.kv_heads * args.head_dim,
        experts=setup.experts,
        expert_by_expert=loop,
    )


@dataclass(frozen=True)
class LayerTraining:
    """What of a layer is trained, and the bytes a number that this costs in its backward pass."""

    weights: bool  # all of them
    attention_lora: bool = False
    experts_lora: bool = False
    gate: bool = False  # the router
    format: Format | None = None  # of the experts' weights; None: 16 bits
    packing: bool = True  # several documents a row
    gradient: int = 4  # of a finished gradient
    making: int = 2  # what a gradient takes on top of that while it is computed
    copy: int = 2  # of the 16-bit copy that products read
    accumulating: bool = False  # gradients of earlier micro-steps are there already; `training` counts them


def layer_training(setup: Setup, task: Training) -> LayerTraining:
    """What the setup's task trains of each layer."""
    targets = setup.args.lora_targets if setup.args.lora_rank > 0 else ()
    full, parameter = task.kind == "full", task.parameter
    # FSDP2 gathers 16-bit weights and gets 16-bit gradients, which it sums in fp32 in buffers of its own.
    gathered = setup.dp > 1
    return LayerTraining(
        weights=full,
        attention_lora=any(t in targets for t in ("wq", "wk", "wv", "wo")),
        experts_lora=any(t in targets for t in ("w1", "w2", "w3")),
        gate=full or "gate" in targets,
        format=setup.quant.experts,
        packing=task.packing,
        gradient=2 if gathered else parameter.gradient,
        making=0 if gathered or parameter.weight == 2 else 2,
        copy=0 if gathered else parameter.copy,
        accumulating=task.accum_iter > 1 and not gathered,
    )


# --------------------------------------------------------------------------- what autograd keeps of forward


def layer_kept(layer: LayerSizes, training: LayerTraining) -> int:
    """Bytes that autograd keeps of a layer's forward pass until backward has passed it."""
    return attention_kept(layer, training) + experts_kept(layer, training)


def attention_kept(layer: LayerSizes, training: LayerTraining) -> int:
    """The part of attention, of the two norms and of the router."""
    T, q, kv = layer.tokens, layer.queries, layer.keys
    kept = 2 * layer.tokens_fp32  # the inputs of the two norms
    if training.weights or training.attention_lora:
        kept += layer.tokens_16bit  # the input of wq, wk and wv
    kept += 2 * T * (q + kv)  # rotated queries and keys
    # The kernel for packed rows takes keys and values repeated for every query head; else the values are kept.
    kept += 2 * T * (2 * q if training.packing else kv)
    kept += 2 * T * q  # attention's result
    if training.gate:
        kept += layer.tokens_fp32  # the router's input
    return kept


def experts_kept(layer: LayerSizes, training: LayerTraining) -> int:
    """The part of the experts."""
    linears = training.weights or training.experts_lora
    # The rows that w1 and w3 multiply; SwiGLU's tensors, of which w2's input is kept only where w2 learns.
    kept = (layer.pairs_16bit if linears else 0) + (4 if linears else 3) * layer.hidden_16bit
    # The experts' results in fp32: in base both the product with the router's weight and `index_add` keep them.
    return kept + layer.pairs_fp32 * (2 if layer.expert_by_expert else 1)


# --------------------------------------------------------------------------- backward


@dataclass(frozen=True)
class BackwardPeak:
    """The bytes of one layer at the largest moment of its backward pass."""

    activations: int = 0
    gradients: int = 0
    copies: int = 0  # the 16-bit copies of trained weights that backward has still to read

    @property
    def total(self) -> int:
        return self.activations + self.gradients + self.copies


def layer_backward(layer: LayerSizes, training: LayerTraining) -> BackwardPeak:
    """The largest moment of a layer's backward pass, which begins with all that `layer_kept` counts."""
    kept = attention_kept(layer, training) + layer.tokens_fp32  # and the gradient of the residual stream
    copies = training.copy * layer.attention if training.weights else 0
    experts = _backward_of_a_loop(layer, training) if layer.expert_by_expert else _backward_of_stacks(layer, training)
    attention = BackwardPeak(3 * layer.tokens_fp32 + 4 * layer.tokens * (layer.queries + 2 * layer.keys))
    moments = (
        BackwardPeak(kept + moment.activations, moment.gradients, copies + moment.copies)
        for moment in (*experts, attention)
    )
    return max(moments, key=lambda moment: moment.total)


def _backward_of_stacks(layer: LayerSizes, training: LayerTraining) -> list[BackwardPeak]:
    """Sparse: what is there while backward passes each operation of the experts, from the last to the first."""
    NF, ND, stack = layer.hidden_16bit, layer.pairs_16bit, layer.stack
    x = ND if training.weights or training.experts_lora else 0
    done = 0 if training.accumulating or not training.weights else training.gradient * stack
    making = (training.gradient + training.making) * stack if training.weights else 0
    copy = training.copy * stack if training.weights else 0
    dequantized = 2 * stack if _backward_product(layer, training.format) == "dequantized" else 0
    lora = NF if training.experts_lora else 0
    return [
        BackwardPeak(x + 4 * NF + 6 * ND, 0, 3 * copy),  # the weighted sum
        BackwardPeak(x + 5 * NF + ND + dequantized, making, 3 * copy),  # w2
        BackwardPeak(x + 6 * NF, done, 2 * copy),  # SwiGLU
        BackwardPeak(x + 3 * NF + ND + lora + dequantized, done + making, 2 * copy),  # w3
        BackwardPeak(x + NF + 2 * ND + lora + dequantized, 2 * done + making, copy),  # w1
    ]


def _backward_of_a_loop(layer: LayerSizes, training: LayerTraining) -> list[BackwardPeak]:
    """Base: what is there while backward passes the first expert, and the last one."""
    NF, E, stack = layer.hidden_16bit, layer.experts, layer.stack
    copy = training.copy * 3 * stack if training.weights else 0
    kept = experts_kept(layer, training)
    dequantized = 2 * stack // E if _backward_product(layer, training.format) == "dequantized" else 0
    # Each expert leaves gradients of its own. At the end those of a stack are put together, one stack after another.
    parts = 3 * training.gradient * stack if training.weights and not training.accumulating else 0
    together = training.gradient * stack if training.weights else 0
    return [
        BackwardPeak(kept + 3 * NF // E + 2 * layer.tokens_16bit + dequantized, parts // E, copy),
        BackwardPeak((kept + 2 * NF) // E + 2 * layer.tokens_16bit, parts + together, copy // E),
    ]


# --------------------------------------------------------------------------- prompts


def prompt_peak(layer: LayerSizes, format: Format | None) -> int:
    """The largest moment of a layer's forward pass without gradients.

    format: of the experts' weights; None: 16 bits.
    """
    T, q, kv = layer.tokens, layer.queries, layer.keys
    # The stream before and after attention, the norm's result in fp32 and in 16 bits.
    norms = 3 * layer.tokens_fp32 + layer.tokens_16bit
    # The rotary embedding makes four tensors of queries and keys together: two in 16 bits and two in fp32.
    attention = 2 * layer.tokens_fp32 + layer.tokens_16bit + 2 * T * (q + 2 * kv) + 12 * T * (q + kv)
    return max(attention, norms + _prompt_of_stacks(layer, format))


def _prompt_of_stacks(layer: LayerSizes, format: Format | None) -> int:
    """The rows sorted by expert, and what is there at the experts' largest moment."""
    NF, ND = layer.hidden_16bit, layer.pairs_16bit
    product = _forward_product(layer, format)
    moments = [3 * NF, NF + 5 * ND]  # SwiGLU, the weighted sum
    if product == "dequantized":
        moments.append(2 * NF + 2 * layer.stack)  # w3
    if product == "rounded":
        moments.append(NF + 4 * NF)  # w2's input, and twice the same in fp32
    return ND + max(moments)


# --------------------------------------------------------------------------- which products run

# What a product with the experts' weights makes beside its result. plain: nothing, as with dense weights and with
# quantised ones that are dequantised tile by tile. dequantized: first a 16-bit copy of the weights. rounded: first its
# input in fp8.
ProductKind = Literal["plain", "dequantized", "rounded"]


def _forward_product(layer: LayerSizes, format: Format | None) -> ProductKind:
    return _product_kind("linear" if layer.expert_by_expert else "grouped", layer, format)


def _backward_product(layer: LayerSizes, format: Format | None) -> ProductKind:
    return _product_kind("linear_backward" if layer.expert_by_expert else "grouped_backward", layer, format)


def _product_kind(op: Op, layer: LayerSizes, format: Format | None) -> ProductKind:
    if format is None:
        return "plain"
    rows, experts = layer.pairs, layer.experts
    if layer.expert_by_expert:  # the experts are taken to get equal shares
        rows, experts = max(1, -(-rows // experts)), 1
    function = choose(Product(op, format, rows, experts, layer.dim, layer.hidden)).function
    if function.startswith("fp8:"):
        return "rounded"
    return "dequantized" if function.startswith("quantized_products:dequantized") else "plain"
