"""What one layer holds beside its weights: what autograd keeps of forward, and the largest moments of its passes.

The arithmetic follows `nn.decoder`, `nn.attention` and `ops.experts_autograd` line by line. The residual stream between
layers is fp32. Products are in 16 bits. Of the experts two tensors of the hidden size are kept for backward, w1 x and
w3 x. Where layers are computed again, only the inputs of each layer and of its experts are kept. The experts make the
rest for a piece of the pairs at a time.

Legend: T tokens, N = T·K (token, expert) pairs, n of them a piece, D dim, F hidden dim held here, E experts held here.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from accessory.formats import Format
from accessory.limits import TRAINED_PAIRS_AT_ONCE
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
    ranks = setup.tp if setup.implementation == "base" and isinstance(setup.task, Training) else 1
    return LayerSizes(
        tokens=tokens,
        pairs=tokens * args.moe.num_experts_per_tok // ranks,
        dim=args.dim,
        hidden=setup.expert_width,
        queries=setup.query_heads * args.head_dim,
        keys=setup.kv_heads * args.head_dim,
        experts=setup.experts,
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
    context: int = 1  # ranks that share each row
    exchanged: bool = False  # tokens go to the ranks of their experts and back
    gradient: int = 4  # of a gradient
    copy: int = 2  # of the 16-bit copy that products read, where a pass makes it
    recompute: bool = False  # whether the layer is computed again in backward
    accumulating: bool = False  # gradients of earlier micro-steps are there already; `training` counts them


def layer_training(setup: Setup, task: Training) -> LayerTraining:
    """What the setup's task trains of each layer."""
    targets = setup.args.lora_targets if setup.args.lora_rank > 0 else ()
    full, parameter = task.kind == "full", task.parameter
    # Ranks gather 16-bit weights, and make gradients as they are summed.
    gathered = setup.fsdp and setup.dp // setup.ep > 1
    return LayerTraining(
        weights=full,
        attention_lora=any(t in targets for t in ("wq", "wk", "wv", "wo")),
        experts_lora=any(t in targets for t in ("w1", "w2", "w3")),
        gate=full or "gate" in targets,
        format=setup.quant.experts,
        packing=task.packing,
        context=setup.cp,
        exchanged=setup.ep > 1,
        gradient=setup.summed_gradient if gathered else task.gradient,
        copy=0 if gathered or setup.keeps_copies else parameter.copy,
        recompute=task.checkpointing,
        accumulating=setup.keeps_gradients and not gathered,
    )


# --------------------------------------------------------------------------- what autograd keeps of forward


def layer_kept(layer: LayerSizes, training: LayerTraining) -> int:
    """Bytes that autograd keeps of a layer's forward pass until backward has passed it."""
    if training.recompute:
        return layer.tokens_fp32 + experts_kept(layer, training)
    return attention_kept(layer, training) + experts_kept(layer, training)


def attention_kept(layer: LayerSizes, training: LayerTraining) -> int:
    """The part of attention, of the two norms and of the router."""
    T, q, kv = layer.tokens, layer.queries, layer.keys
    kept = 2 * layer.tokens_fp32  # the inputs of the two norms
    if training.weights or training.attention_lora:
        kept += layer.tokens_16bit  # the input of wq, wk and wv
    kept += 2 * T * (q + kv)  # rotated queries and keys
    # The kernel for packed rows takes keys and values repeated for every query head; else the values are kept.
    kept += 2 * keys_seen(layer, training) * (2 * q if training.packing or training.context > 1 else kv)
    kept += 2 * T * q  # attention's result
    if training.gate:
        kept += layer.tokens_fp32  # the router's input
    return kept


def keys_seen(layer: LayerSizes, training: LayerTraining) -> int:
    """Keys that attention takes at once. Ranks that share rows have those of all ranks, and of half as many tokens as
    they have themselves a second time."""
    return layer.tokens if training.context == 1 else layer.tokens * training.context + layer.tokens // 2


def experts_kept(layer: LayerSizes, training: LayerTraining) -> int:
    """The part of the experts: their input, and w1 x and w3 x.

    Where tokens are exchanged, the input is that of the pairs that came, and the results that were sent back are kept
    in fp32.
    """
    if training.recompute:
        return layer.tokens_16bit
    return (3 * layer.pairs_16bit if training.exchanged else layer.tokens_16bit) + 2 * layer.hidden_16bit


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
    """The largest moment of a layer's backward pass, with what is left there of the bytes that `layer_kept` counts.

    The gradient of the residual stream, with which it begins, is not counted. A layer that is computed again computes
    attention after the backward pass of its experts, so what attention keeps is not there before.
    """
    kept = attention_kept(layer, training)
    copies = training.copy * layer.attention if training.weights else 0
    shared = 0
    if training.context > 1:  # the gradients of all ranks' keys and values: repeated in 16 bits, then summed in fp32
        shared = keys_seen(layer, training) * (4 * layer.queries + 8 * layer.keys)
    attention = 3 * layer.tokens_fp32 + 4 * layer.tokens * (layer.queries + 2 * layer.keys) + shared
    beside, copies_beside = (layer.tokens_fp32, 0) if training.recompute else (kept, copies)
    moments = [
        BackwardPeak(beside + moment.activations, moment.gradients, copies_beside + moment.copies)
        for moment in _backward_of_experts(layer, training)
    ]
    moments.append(BackwardPeak(kept + attention, 3 * _gradient_of_stack(layer, training), copies))
    return max(moments, key=lambda moment: moment.total)


def _gradient_of_stack(layer: LayerSizes, training: LayerTraining) -> int:
    """Bytes of the gradient of one of the three stacks that backward adds to what is there already."""
    return 0 if training.accumulating or not training.weights else training.gradient * layer.stack


def _backward_of_experts(layer: LayerSizes, training: LayerTraining) -> list[BackwardPeak]:
    """What is there while backward passes the experts' operations, from the last to the first.

    Of dense weights, a product and its adapter's part are one tensor. Of quantised ones, each part is a tensor until it
    is added, and so are the two gradients of the common input of w1 and w3.
    """
    NF, ND, quantized = layer.hidden_16bit, layer.pairs_16bit, training.format is not None
    done = _gradient_of_stack(layer, training)
    copy = training.copy * layer.stack if training.weights else 0
    dequantized = 2 * layer.stack if _backward_product(layer, training.format) == "dequantized" else 0
    low = quantized and training.experts_lora
    # Where tokens are exchanged, the exchange is computed again as well, and with it all that autograd keeps of it.
    again = training.recompute and not training.exchanged
    kept = dy = dx = layer.tokens_16bit
    if training.exchanged:  # also the gradients of results that were sent back, and of inputs that came
        kept, dy, dx = (3 + 2) * ND + layer.tokens_16bit * training.recompute, ND, ND
    both = ND + max(dequantized, low * ND) if quantized else 0
    # The input's gradient of all pairs, of all tokens in fp32 and in 16 bits. Beside the last, the input of all pairs:
    # the gradient of w3, and that of w1, before which the gradient of w3 x is given back.
    of_weights = [
        BackwardPeak(kept + dx + 2 * NF + ND + 2 * dx, done),
        BackwardPeak(kept + dx + 2 * NF + ND, 2 * done),
        BackwardPeak(kept + dx + NF + ND, 3 * done),
    ]
    if layer.pairs <= TRAINED_PAIRS_AT_ONCE:
        if not again:
            return [
                BackwardPeak(kept + 3 * NF + ND + max(dequantized, low * NF), 0, 3 * copy),  # w2
                BackwardPeak(kept + 3 * NF + ND, done, 2 * copy),  # SwiGLU, and the gradient of w2
                BackwardPeak(kept + 2 * NF + ND + both, done, 2 * copy),  # the input
                *of_weights,
            ]
        held = dequantized  # w3 stays dequantised from where it is computed again to its own backward
        return [
            BackwardPeak(kept + NF + ND + max(dequantized, low * NF), 0, 3 * copy),  # w2
            BackwardPeak(kept + 2 * NF + 2 * ND + held + max(dequantized, low * NF), 0, 2 * copy),  # w1 x
            BackwardPeak(kept + 3 * NF + 2 * ND + (held or low * NF), done, 2 * copy),  # w3 x, SwiGLU, w2's gradient
            BackwardPeak(kept + 2 * NF + ND + held + both, done, 2 * copy),  # the input
            *of_weights,
        ]
    part = replace(layer, pairs=TRAINED_PAIRS_AT_ONCE)
    nF, nD = part.hidden_16bit, part.pairs_16bit
    copies = 2 * (dequantized > 0) or copy > 0
    if again and 2 * (layer.pairs - part.pairs) > copies * layer.experts * layer.dim:
        # Only the input's gradient is whole. The stacks that are dequantised are so for all pieces.
        whole = kept + dy + ND + 3 * dequantized
        low = low and not dequantized
        return [
            BackwardPeak(whole + 3 * nF + 2 * nD + low * nF, 3 * done, 3 * copy),  # w3 x, SwiGLU
            BackwardPeak(whole + 2 * nF + nD + quantized * (1 + low) * nD, 3 * done, 3 * copy),  # the input
        ]
    results = ND if again else dy  # where computed again, forward is larger: it has the results of all rows
    return [
        BackwardPeak(kept + 2 * NF + ND + (dequantized or low * NF), 0, 3 * copy),  # w3 x
        BackwardPeak(kept + 2 * NF + results + nF + nD + (dequantized or low * nF), done, 3 * copy),  # w2, SwiGLU
        BackwardPeak(kept + 2 * NF + ND + both, done, 2 * copy),  # the input
        *of_weights,
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
    return _product_kind("grouped", layer, format)


def _backward_product(layer: LayerSizes, format: Format | None) -> ProductKind:
    return _product_kind("grouped_backward", layer, format)


def _product_kind(op: Op, layer: LayerSizes, format: Format | None) -> ProductKind:
    if format is None:
        return "plain"
    function = choose(Product(op, format, layer.pairs, layer.experts, layer.dim, layer.hidden)).function
    if function.startswith("fp8:"):
        return "rounded"
    return "dequantized" if function.startswith("quantized_products:dequantized") else "plain"
