"""What a layer's passes hold beside weights: what autograd keeps of forward, the largest moment of backward, prompts.

Follows `nn.decoder`, `nn.experts_*` and `ops.grouped` line by line: the stream between layers is fp32, products are in
16 bits, and SwiGLU leaves four tensors of the hidden size for backward (w1 x, its SiLU, w3 x, their product).

Legend: T tokens, N = T·K (token, expert) pairs, D dim, F hidden dim held here, E experts held here.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Bytes:
    activations: int = 0
    gradients: int = 0
    copies: int = 0

    @property
    def total(self) -> int:
        return self.activations + self.gradients + self.copies


NOTHING = Bytes()


@dataclass(frozen=True)
class Layer:
    """A layer's sizes on one rank, and from them the bytes of the tensors that its passes make."""

    tokens: int
    pairs: int
    dim: int
    hidden: int
    queries: int  # heads × head_dim
    keys: int
    experts: int
    one_by_one: bool  # base: expert after expert

    @property
    def stream(self) -> int:
        """(T, D) fp32."""
        return 4 * self.tokens * self.dim

    @property
    def model(self) -> int:
        """(T, D) in 16 bits."""
        return 2 * self.tokens * self.dim

    @property
    def rows(self) -> int:
        """(N, D) in 16 bits; twice of it in fp32."""
        return 2 * self.pairs * self.dim

    @property
    def wide(self) -> int:
        """(N, F) in 16 bits."""
        return 2 * self.pairs * self.hidden

    @property
    def stack(self) -> int:
        """Numbers of one of the three weights of all experts."""
        return self.experts * self.hidden * self.dim

    @property
    def attention(self) -> int:
        """Numbers of attention's four weights."""
        return 2 * self.dim * (self.queries + self.keys)


@dataclass(frozen=True)
class Learning:
    """What of a layer is trained, and what its gradients cost: bytes a number once made, and besides while made."""

    weights: bool
    attention_lora: bool = False
    experts_lora: bool = False
    gate: bool = False
    packed: bool = False  # quantised experts
    packing: bool = True  # several documents a row
    gradient: int = 4
    made: int = 2
    copy: int = 2
    accumulating: bool = False  # gradients of earlier micro-steps are there, and counted elsewhere


def attention_kept(layer: Layer, learning: Learning) -> int:
    """The layer's input, attention's input, queries, keys, values, outcome, the sum behind it, the router's input."""
    T, q, kv = layer.tokens, layer.queries, layer.keys
    linears = learning.weights or learning.attention_lora
    kept = 2 * layer.stream + (layer.model if linears else 0) + 2 * T * (q + kv)
    # The kernel for packed rows is given keys and values repeated for every query head.
    kept += 2 * T * (2 * q if learning.packing else kv)
    kept += 2 * T * q + (layer.stream if learning.gate else 0)
    return kept


def experts_kept(layer: Layer, learning: Learning) -> int:
    """Rows sorted by expert, four tensors of SwiGLU, and fp32 outcomes: once in sparse, in base twice (a product and
    `index_add` keep one each)."""
    linears = learning.weights or learning.experts_lora
    outcomes = 2 * layer.rows * (2 if layer.one_by_one else 1)
    return (layer.rows if linears else 0) + (4 if linears else 3) * layer.wide + outcomes


def layer_kept(layer: Layer, learning: Learning) -> int:
    return attention_kept(layer, learning) + experts_kept(layer, learning)


def layer_backward(layer: Layer, learning: Learning) -> Bytes:
    """The largest moment of one layer's backward pass, whose forward results are all there at its beginning: this
    layer's activations, gradients, and copies of weights."""
    fixed = attention_kept(layer, learning) + layer.stream  # and the gradient of the stream
    copies = learning.copy * layer.attention if learning.weights else 0
    experts = _one_by_one(layer, learning) if layer.one_by_one else _all_at_once(layer, learning)
    attention = Bytes(3 * layer.stream + 4 * layer.tokens * (layer.queries + 2 * layer.keys))
    moments = [
        Bytes(fixed + m.activations, m.gradients, copies + m.copies)
        for m in (*experts, attention)
    ]  # fmt: skip
    return max(moments, key=lambda m: m.total)


def _all_at_once(layer: Layer, learning: Learning) -> list[Bytes]:
    """Sparse: backward through the sum over experts, w2, SwiGLU, w3 and w1, each with what is there at that time."""
    wide, rows, stack = layer.wide, layer.rows, layer.stack
    x = rows if learning.weights or learning.experts_lora else 0
    trained = learning.weights
    done = 0 if learning.accumulating or not trained else learning.gradient * stack
    making = (learning.gradient + learning.made) * stack if trained else 0
    copy = learning.copy * stack if trained else 0
    unpacked = 2 * stack if learning.packed else 0
    lora = wide if learning.experts_lora else 0
    return [
        Bytes(x + 4 * wide + 6 * rows, 0, 3 * copy),
        Bytes(x + 5 * wide + rows + unpacked, making, 3 * copy),
        Bytes(x + 6 * wide, done, 2 * copy),
        Bytes(x + 3 * wide + rows + lora + unpacked, done + making, 2 * copy),
        Bytes(x + wide + 2 * rows + lora + unpacked, 2 * done + making, copy),
    ]


def _one_by_one(layer: Layer, learning: Learning) -> list[Bytes]:
    """Base: at the first expert everything kept is there; at the last, all gradients in parts, and one put together."""
    wide, E, stack = layer.wide, layer.experts, layer.stack
    trained = learning.weights
    copy = learning.copy * 3 * stack if trained else 0
    kept = experts_kept(layer, learning)
    unpacked = 2 * stack // E if learning.packed else 0
    parts = 3 * learning.gradient * stack if trained and not learning.accumulating else 0
    together = learning.gradient * stack if trained else 0
    return [
        Bytes(kept + 3 * wide // E + 2 * layer.model + unpacked, parts // E, copy),
        Bytes((kept + 2 * wide) // E + 2 * layer.model, parts + together, copy // E),
    ]


def prompt_passes(layer: Layer, packed: bool) -> int:
    """The largest moment of a forward pass without gradients. A quantised stack is unpacked for its product."""
    T, q, kv = layer.tokens, layer.queries, layer.keys
    attention = 2 * layer.stream + layer.model + 2 * T * (q + 2 * kv) + 12 * T * (q + kv)
    # The stream before and behind attention, its norm in fp32 and 16 bits.
    around = 3 * layer.stream + layer.model
    if layer.one_by_one:
        share, weight = layer.experts, 2 * layer.hidden * layer.dim if packed else 0
        wide, rows = layer.wide // share, layer.rows // share
        experts = around + 2 * layer.stream + max(3 * wide + rows, 2 * wide + rows + weight, wide + 6 * rows)
    else:
        wide, rows, weight = layer.wide, layer.rows, 2 * layer.stack if packed else 0
        experts = around + rows + max(3 * wide, 2 * wide + weight, wide + 5 * rows)
    return max(attention, experts)
