"""Choose int4 and int8 weights by GPTQ on a text: a linear's numbers suit the inputs that the text sends into it.

Layers are calibrated in order. The inputs of a layer come through all earlier layers, already quantised, and routers
choose experts from these inputs. An expert is calibrated on its own tokens, weighted by the router's weights. The
tokens of each expert are counted. An expert without tokens cannot be calibrated; that is an error unless it is allowed.

Memory holds the weights of linears that share an input, in fp32, the text's activations, and the results of one layer.

Legend: B sequences, T tokens, D dim, N = B·T, n tokens of an expert, K experts a token, I in features.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from accessory.checkpoint.lazy import Lazy
from accessory.checkpoint.names import companion_of
from accessory.config import ModelArgs
from accessory.errors import CheckpointError, ConfigError, listed
from accessory.formats import Quant
from accessory.ops.attention import attention
from accessory.ops.gptq import gptq
from accessory.ops.norm import rms_norm
from accessory.ops.quantized import Packed, dequantize, quantize
from accessory.ops.rope import apply_rope, rope_frequencies, rotations
from accessory.ops.routing import route
from accessory.progress import progress_bar

CALIBRATED = ("int4", "int8")  # formats that are calibrated on a text
FEW_TOKENS = 128  # experts with fewer are reported: numbers chosen for so few may not suit others
_AT_ONCE = 2**13  # tokens in one product
_NAMED = 8  # how many experts one line names


@dataclass(frozen=True)
class Reached:
    """How many of the text's tokens each expert got, [layer][expert]."""

    tokens: int
    counts: list[list[int]]

    def below(self, bound: int) -> list[tuple[int, int, int]]:
        """(layer, expert, tokens) of each expert with fewer than `bound` tokens."""
        return [(i, e, n) for i, layer in enumerate(self.counts) for e, n in enumerate(layer) if n < bound]

    def to_dict(self) -> dict[str, Any]:
        return {"tokens": self.tokens, "tokens_of_experts": self.counts}

    def lines(self) -> list[str]:
        every = sorted((n, i, e) for i, layer in enumerate(self.counts) for e, n in enumerate(layer))
        (least, i, e), (most, j, f) = every[0], every[-1]
        lines = [
            f"calibrated on {self.tokens} tokens, of which an expert got {least} (layers.{i}, expert {e}) to {most} "
            f"(layers.{j}, expert {f})"
        ]
        few, none = [found for found in self.below(FEW_TOKENS) if found[2]], self.below(1)
        if few:
            named = [f"layers.{i} expert {e} ({n})" for i, e, n in few]
            lines.append(
                f"fewer than {FEW_TOKENS} tokens: {listed(named, _NAMED)}; a longer text would serve them better"
            )
        if none:
            named = [f"layers.{i} expert {e}" for i, e, _ in none]
            lines.append(f"not reached, quantised without calibration: {listed(named, _NAMED)}")
        return lines


class Calibration:
    """Run the network over `tokens_BT` (int64) and choose the numbers of its int4 and int8 weights.

    `tensors` are canonical and whole. Parts for which `quant` has another format, or none, run in that format, or
    dense. ConfigError if no part is int4 or int8, and if there are biases or LoRA adapters. `weights` raises
    ConfigError for an expert that no token reached, unless `allow_unreached`: it is then quantised without
    calibration, with a search for int4's scales.
    """

    def __init__(
        self,
        tensors: Mapping[str, Lazy],
        args: ModelArgs,
        quant: Quant,
        tokens_BT: Tensor,
        *,
        device: torch.device | str = "cpu",
        allow_unreached: bool = False,
    ) -> None:
        if not set(CALIBRATED) & set(quant.to_dict().values()):
            raise ConfigError(
                "calibrate: chooses the numbers of int4 and int8 weights, and quant has none; give --quant int4"
            )
        adapter = next((name for name in tensors if companion_of(name)), None)
        if adapter is not None:
            raise ConfigError(f"calibrate: {adapter} stands beside a weight; merge adapters into the weights first")
        self.tensors, self.args, self.quant = tensors, args, quant
        self.tokens_BT, self.device = tokens_BT, torch.device(device)
        self.allow_unreached = allow_unreached
        self.counts: list[list[int]] = []  # of the layers done so far
        self._done: dict[str, Packed] = {}

    @property
    def reached(self) -> Reached:
        return Reached(self.tokens_BT.numel(), self.counts)

    @torch.no_grad()
    def weights(self, progress: bool = True) -> Iterator[tuple[str, Packed]]:
        """Yield the int4 and int8 weights with their canonical names, on the CPU, in the order of the layers."""
        args, (B, T) = self.args, self.tokens_BT.shape
        frequencies = rope_frequencies(args.head_dim, args.rope_theta, args.rope_scaling, args.max_seq_len)
        rotation_1T1c = rotations(torch.arange(T)[None], *frequencies).to(self.device)
        embedding = self.tensors["tok_embeddings.weight"].load()
        x_BTD = embedding[self.tokens_BT].float().to(self.device)
        self.counts.clear()
        with progress_bar(args.n_layers, "calibrating", progress, unit=" layers") as steps:
            for i in range(args.n_layers):
                self._attend(i, x_BTD, rotation_1T1c)
                self._feed_forward(i, x_BTD.view(B * T, -1))
                if not bool(torch.isfinite(x_BTD).all()):
                    raise CheckpointError(f"layers.{i}: what comes out of it is not finite; accessory verify says more")
                yield from self._taken()
                steps.update()
        if self._calibrates("output.weight"):
            inputs = _Inputs(args.dim, self.device)
            for x_nD in x_BTD.view(B * T, -1).split(_AT_ONCE):
                inputs.add(self._normed("norm", x_nD))
            self._settled(["output.weight"], inputs)
            yield from self._taken()

    def _taken(self) -> Iterator[tuple[str, Packed]]:
        done, self._done = self._done, {}
        yield from done.items()

    def _attend(self, i: int, x_BTD: Tensor, rotation_1T1c: Tensor) -> None:
        """Quantise the linears of a layer's attention, then add its output to `x_BTD` in place."""
        names = {kind: f"layers.{i}.attention.{kind}.weight" for kind in ("wq", "wk", "wv", "wo")}
        rows = max(1, _AT_ONCE // x_BTD.shape[1])
        inputs = _Inputs(self.args.dim, self.device) if self._calibrates(names["wq"]) else None
        if inputs is not None:
            for part_BTD in x_BTD.split(rows):
                inputs.add(self._normed(f"layers.{i}.attention_norm", part_BTD).flatten(0, 1))
        projections = self._settled([names[kind] for kind in ("wq", "wk", "wv")], inputs)

        def attended(part_BTD: Tensor) -> Tensor:
            normed_BTD = self._normed(f"layers.{i}.attention_norm", part_BTD)
            q, k, v = (F.linear(normed_BTD, w).unflatten(-1, (-1, self.args.head_dim)) for w in projections)
            return attention(*apply_rope(q, k, rotation_1T1c), v, None).flatten(-2)

        inputs = None
        if self._calibrates(names["wo"]):
            inputs = _Inputs(self.args.n_heads * self.args.head_dim, self.device)
            for part_BTD in x_BTD.split(rows):
                inputs.add(attended(part_BTD).flatten(0, 1))
        (wo,) = self._settled([names["wo"]], inputs)
        for part_BTD in x_BTD.split(rows):
            part_BTD.add_(F.linear(attended(part_BTD), wo))

    def _feed_forward(self, i: int, x_ND: Tensor) -> None:
        """Quantise a layer's experts one by one, and add each one's output to `x_ND` in place."""
        gate = self._weight(f"layers.{i}.feed_forward.gate.weight")
        normed_ND = torch.cat([self._normed(f"layers.{i}.ffn_norm", part_nD) for part_nD in x_ND.split(_AT_ONCE)])
        weight_NK, expert_NK, _ = route(F.linear(normed_ND, gate), self.args.moe.num_experts_per_tok)
        self.counts.append(torch.bincount(expert_NK.flatten(), minlength=self.args.moe.num_experts).tolist())
        self._refuse_unreached(i)
        for e in range(self.args.moe.num_experts):
            token_n, k_n = torch.nonzero(expert_NK == e, as_tuple=True)
            self._expert(f"layers.{i}.feed_forward.experts.{e}.", x_ND, normed_ND, token_n, weight_NK[token_n, k_n])

    def _expert(self, name: str, x_ND: Tensor, normed_ND: Tensor, token_n: Tensor, weight_n: Tensor) -> None:
        calibrates = self._calibrates(name + "w1.weight")
        parts = list(zip(token_n.split(_AT_ONCE), weight_n[:, None].split(_AT_ONCE), strict=True))
        inputs = _Inputs(self.args.dim, self.device) if calibrates else None
        for token_m, weight_m1 in parts if inputs else ():
            inputs.add(normed_ND[token_m] * weight_m1)  # type: ignore[union-attr]
        w1, w3 = self._settled([name + "w1.weight", name + "w3.weight"], inputs)

        def hidden(token_m: Tensor) -> Tensor:
            normed_mD = normed_ND[token_m]
            return F.silu(F.linear(normed_mD, w1)).mul_(F.linear(normed_mD, w3))

        inputs = _Inputs(self.args.hidden_dim, self.device) if calibrates else None
        for token_m, weight_m1 in parts if inputs else ():
            inputs.add(hidden(token_m).mul_(weight_m1))  # type: ignore[union-attr]
        (w2,) = self._settled([name + "w2.weight"], inputs)
        for token_m, weight_m1 in parts:
            x_ND.index_add_(0, token_m, F.linear(hidden(token_m), w2).mul_(weight_m1))

    def _refuse_unreached(self, i: int) -> None:
        missed = [e for e, n in enumerate(self.counts[i]) if n == 0]
        if missed and self.quant.experts in CALIBRATED and not self.allow_unreached:
            raise ConfigError(
                f"calibrate: no token of {self.tokens_BT.numel()} reached layers.{i}'s expert "
                f"{listed(map(str, missed), _NAMED)}; give more of the text (--calibrate-tokens), another one, or "
                "--allow-unreached to do without for these"
            )

    def _calibrates(self, name: str) -> bool:
        return self.quant.format_of(name) in CALIBRATED

    def _settled(self, names: Sequence[str], inputs: _Inputs | None) -> list[Tensor]:
        """Quantise the weights of linears that share an input; return the dequantised values in fp32."""
        weights = [self._weight(name) for name in names]
        format = self.quant.format_of(names[0])
        if format is None:
            return weights
        if inputs is None:
            return [dequantize(quantize(weight, format)) for weight in weights]
        packed, start = gptq(torch.cat(weights), format, inputs.sum_II, inputs.count), 0
        parts = []
        for name, weight in zip(names, weights, strict=True):
            parts.append(packed.narrow(0, start, len(weight)))
            self._done[name] = parts[-1].map(lambda t: t.cpu().clone())
            start += len(weight)
        return [dequantize(part) for part in parts]

    def _weight(self, name: str) -> Tensor:
        return self.tensors[name].load().to(self.device).float()

    def _normed(self, name: str, x: Tensor) -> Tensor:
        return rms_norm(x, self._weight(name + ".weight"), self.args.norm_eps)


class _Inputs:
    """Sums over a linear's inputs x: Σ x xᵀ (I, I), and their number."""

    def __init__(self, features: int, device: torch.device) -> None:
        self.sum_II = torch.zeros(features, features, device=device)
        self.count = 0

    def add(self, x_NI: Tensor) -> None:
        self.sum_II.addmm_(x_NI.t(), x_NI)
        self.count += len(x_NI)
