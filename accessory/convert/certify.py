"""The merge certificate: show on random tokens that the merged network computes the same as the unmerged one.

The proof is in fp32, where merging changes nothing but the order of sums. What rounding to the written dtype does to
the logits is reported and decides nothing: a network may magnify rounding by any factor. That the weights are rounded
rightly is checked number by number, in `sums`.

The networks run in fp32, layer by layer, with one layer of one network in memory. So a machine can certify a model that
does not fit its memory. All networks use the experts that the first one chooses. Otherwise the last bit could decide
between two experts, which would look like a mistake. We count how often a network would choose other experts.

Legend: B sequences, T tokens, D dim, E experts, K experts a token, V vocabulary, N = B·T.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from accessory.adapt.peft import adapter_specs_of, add_adapters
from accessory.checkpoint.lazy import Computed, Lazy
from accessory.config import Implementation, ModelArgs
from accessory.errors import CheckpointError
from accessory.nn.decoder import Decoder, Layer
from accessory.ops.rope import rope_frequencies, rotations
from accessory.parallel.local_shard import local_tensors
from accessory.progress import progress_bar

SEQUENCES, TOKENS = 2, 64
_SHAKEN = "shaken"
# fp32 keeps 7 digits, and summing in another order changes a few units of the last one. How much the logits change then
# depends on the network, so it is measured: the first network runs once more with noise on the result of every layer.
EXACT_BOUND = 1e-5
_SHAKE, _SHAKES = 2.0**-22, 8.0  # size of the noise, relative; how many times its effect still counts as rounding
_ROUNDED = "base, rounded"


@dataclass(frozen=True)
class Difference:
    """How the logits of two networks differ on the same tokens.

    `largest` and `mean` are over tokens, of ‖difference‖ / ‖logits‖. `kl` is the Kullback-Leibler divergence of the
    next-token distributions, in nats.
    """

    largest: float
    mean: float
    kl: float  # mean
    turned: int  # (token, layer) decisions in which the other network would choose other experts
    closeness: float  # the largest difference of router probabilities in such a decision

    @classmethod
    def between(cls, reference_NV: Tensor, other_NV: Tensor, turned: int = 0, closeness: float = 0.0) -> Difference:
        a, b = reference_NV.double(), other_NV.double()
        relative_N = (a - b).norm(dim=-1) / a.norm(dim=-1)
        log_p, log_q = a.log_softmax(-1), b.log_softmax(-1)
        kl = float((log_p.exp() * (log_p - log_q)).sum(-1).mean())
        return cls(float(relative_N.max()), float(relative_N.mean()), kl, turned, closeness)


@dataclass(frozen=True)
class Certificate:
    """The result of `certify`: how each network differs from the one with unmerged adapters.

    exact: merged, not rounded. stored: merged, as written. adapter: the base, without the adapters. shaken: the
    unmerged network with noise in the last bits of fp32. rounded: how the base differs from itself when its weights are
    rounded like the written ones.
    """

    tokens: int
    layers: int
    dtype: torch.dtype
    exact: Difference
    stored: Difference
    adapter: Difference | None = None
    shaken: Difference | None = None
    rounded: Difference | None = None

    @property
    def exact_bound(self) -> float:
        return max(EXACT_BOUND, _SHAKES * self.shaken.largest) if self.shaken else EXACT_BOUND

    def check(self) -> None:
        """Raise CheckpointError if, in fp32, merged and unmerged logits differ by more than the order of sums does."""
        if not self.exact.largest <= self.exact_bound:  # so that NaN fails
            raise CheckpointError(
                f"merged and unmerged logits differ: merged, in fp32, by {self.exact.largest:.2g} of the logits, of "
                f"which rounding explains {self.exact_bound:.2g}; nothing was written"
            )

    def to_dict(self) -> dict[str, Any]:
        """As plain values for JSON."""
        differences = ("exact", "stored", "rounded", "adapter")
        told = {name: getattr(self, name) for name in differences}
        return {
            "tokens": self.tokens,
            "dtype": _short(self.dtype),
            "bound": self.exact_bound,
            **{name: None if difference is None else asdict(difference) for name, difference in told.items()},
            "decisions": self.tokens * self.layers,
        }

    def lines(self) -> list[str]:
        kind = _short(self.dtype)
        out = [
            f"certificate: {self.tokens} random tokens, logits beside the weights against logits merged",
            f"  before rounding: {_told(self.exact)} (bound {self.exact_bound:.1e})",
            f"  rounded to {kind}: {_told(self.stored)}",
        ]
        if self.rounded is not None:
            out.append(f"  rounding the base to {kind} in the same way: {_told(self.rounded)}")
        if self.stored.turned:
            out.append(
                f"  rounding would turn {self.stored.turned} of {self.tokens * self.layers} routing decisions, all of "
                f"them on differences of at most {self.stored.closeness:.1e} in probability"
            )
        if self.adapter is not None:
            out.append(f"  the adapter itself changes the logits by: {_told(self.adapter)}")
            if self.stored.mean > self.adapter.mean:
                out.append(
                    f"  warning: rounding to {kind} changes them more than the adapter does; --dtype fp32 keeps it"
                )
        return out


def certify(
    networks: Mapping[str, Mapping[str, Lazy]],
    args: ModelArgs,
    implementation: Implementation,
    *,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    progress: bool = True,
) -> Certificate:
    """Compare `networks`: "adapters", the reference, with "exact" (merged, not rounded) and "stored" (in `dtype`).

    Each maps canonical names to whole tensors, including LoRA adapters and biases. With "base", the effects of the
    adapters and of rounding the base are measured too. This function only measures; `Certificate.check` raises.
    """
    generator = torch.Generator().manual_seed(0)
    tokens_BT = torch.randint(args.vocab_size, (SEQUENCES, TOKENS), generator=generator)
    if "base" in networks and any(tensor.dtype.itemsize < 4 for tensor in networks["stored"].values()):
        networks = {**networks, _ROUNDED: _rounded_likewise(networks["base"], networks["stored"])}
    run = _Run(networks, args, implementation, tokens_BT, torch.device(device))
    logits = run.logits(progress)
    differences = {
        name: Difference.between(
            logits["base" if name == _ROUNDED else "adapters"], logits[name], run.turned[name], run.closeness[name]
        )
        for name in logits
    }
    return Certificate(
        tokens=tokens_BT.numel(),
        layers=args.n_layers,
        dtype=dtype,
        exact=differences["exact"],
        stored=differences["stored"],
        adapter=differences.get("base"),
        shaken=differences[_SHAKEN],
        rounded=differences.get(_ROUNDED),
    )


def _rounded_likewise(base: Mapping[str, Lazy], stored: Mapping[str, Lazy]) -> dict[str, Lazy]:
    """The base's weights, each rounded to the dtype in which its merged one is stored.

    A base that has this dtype already would not change. So its weights are multiplied by √2, rounded, and divided by
    √2: they then get the errors that rounding causes in a network like this one.
    """

    def made(weight: Lazy, dtype: torch.dtype) -> Tensor:
        factor = math.sqrt(2) if weight.dtype.itemsize < 4 else 1.0
        return (weight.load().float() * factor).to(dtype).float().div_(factor)

    return {
        name: Computed(weight.shape, torch.float32, partial(made, weight, stored[name].dtype))
        if name in stored and stored[name].dtype.itemsize < 4
        else weight
        for name, weight in base.items()
    }


class _Run:
    """Runs several networks over the same tokens, layer by layer; all use the routing of the first one."""

    def __init__(
        self,
        networks: Mapping[str, Mapping[str, Lazy]],
        args: ModelArgs,
        implementation: Implementation,
        tokens_BT: Tensor,
        device: torch.device,
    ) -> None:
        self.networks, self.args, self.implementation = networks, args, implementation
        self.tokens_BT, self.device = tokens_BT, device
        self.turned = dict.fromkeys((*networks, _SHAKEN), 0)
        self.closeness = dict.fromkeys((*networks, _SHAKEN), 0.0)

    @torch.no_grad()
    def logits(self, progress: bool) -> dict[str, Tensor]:
        """The fp32 logits (N, V) of each network, and of the first one with noise."""
        args, (B, T) = self.args, self.tokens_BT.shape
        frequencies = rope_frequencies(args.head_dim, args.rope_theta, args.rope_scaling, args.max_seq_len)
        rotation_BT1c = rotations(torch.arange(T).expand(B, T), *frequencies).to(self.device)
        stream = {name: self._embedded(tensors) for name, tensors in self.networks.items()}
        first = next(iter(stream))
        generator = torch.Generator().manual_seed(0)
        stream[_SHAKEN] = self._shaken(stream[first], generator)
        steps = progress_bar(args.n_layers * len(self.networks), "certifying", progress, unit=" layers")
        with steps:
            for i in range(args.n_layers):
                chosen_NK: Tensor | None = None
                for name, tensors in self.networks.items():
                    layer = self._layer(tensors, i)
                    stream[name], chosen_NK = self._step(name, layer, stream[name], rotation_BT1c, chosen_NK)
                    if name == first:
                        shaken_BTD, _ = self._step(_SHAKEN, layer, stream[_SHAKEN], rotation_BT1c, chosen_NK)
                        stream[_SHAKEN] = self._shaken(shaken_BTD, generator)
                    del layer  # free it before the next one is made
                    steps.update()
        return {
            name: self._head(self.networks[first if name == _SHAKEN else name], x_BTD) for name, x_BTD in stream.items()
        }

    def _shaken(self, x_BTD: Tensor, generator: torch.Generator) -> Tensor:
        noise_BTD = torch.randn(x_BTD.shape, generator=generator).to(self.device)
        return x_BTD * (1 + _SHAKE * noise_BTD)

    def _embedded(self, tensors: Mapping[str, Lazy]) -> Tensor:
        return tensors["tok_embeddings.weight"].load()[self.tokens_BT].float().to(self.device)

    def _filled(self, tensors: Mapping[str, Lazy], i: int, part: str) -> Decoder:
        """A decoder of one layer with the values of layer `i`. Only the modules under `part` are in memory."""
        own = {n.replace(f"layers.{i}.", "layers.0.", 1): t for n, t in tensors.items() if n.startswith(f"layers.{i}.")}
        own |= {n: t for n, t in tensors.items() if not n.startswith("layers.")}
        with torch.device("meta"):
            decoder = Decoder(self.args.replace(n_layers=1), self.implementation)
            add_adapters(decoder, adapter_specs_of({n: t.shape for n, t in own.items()}), self.args.lora_scale)
            decoder.cast(torch.float32)
        decoder.get_submodule(part).to_empty(device=self.device)
        for shard in local_tensors(decoder):
            name, place = shard.name, shard.tensor
            if name.startswith(part + "."):
                own[name].copy_to(place)
        return decoder.eval()

    def _layer(self, tensors: Mapping[str, Lazy], i: int) -> Layer:
        layer = self._filled(tensors, i, "layers.0").layers[0]
        assert isinstance(layer, Layer)
        return layer

    def _step(
        self, name: str, layer: Layer, x_BTD: Tensor, rotation_BT1c: Tensor, chosen_NK: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        x_BTD = x_BTD + layer.attention(layer.attention_norm(x_BTD), rotation_BT1c, None, None)
        x_ND = layer.ffn_norm(x_BTD).flatten(0, 1)
        p_NE = F.softmax(layer.feed_forward.gate(x_ND), dim=-1, dtype=torch.float32)
        own_NK = p_NE.topk(self.args.moe.num_experts_per_tok).indices
        if chosen_NK is None:
            chosen_NK = own_NK
        self._count_turned(name, p_NE, own_NK, chosen_NK)
        weight_NK = p_NE.gather(-1, chosen_NK)
        weight_NK = weight_NK / weight_NK.sum(-1, keepdim=True)
        y_ND = layer.feed_forward.experts(x_ND, weight_NK, chosen_NK)
        return x_BTD + y_ND.view_as(x_BTD), chosen_NK

    def _count_turned(self, name: str, p_NE: Tensor, own_NK: Tensor, chosen_NK: Tensor) -> None:
        turned_N = (own_NK.sort(-1).values != chosen_NK.sort(-1).values).any(-1)
        if turned_N.any():
            gap_N = p_NE.gather(-1, own_NK).sum(-1) - p_NE.gather(-1, chosen_NK).sum(-1)
            self.turned[name] += int(turned_N.sum())
            self.closeness[name] = max(self.closeness[name], float(gap_N[turned_N].max()))

    def _head(self, tensors: Mapping[str, Lazy], x_BTD: Tensor) -> Tensor:
        norm = self._filled(tensors, 0, "norm").norm
        output = self._filled(tensors, 0, "output").output
        return output(norm(x_BTD)).flatten(0, 1).float().cpu()


def _told(d: Difference) -> str:
    return f"at most {d.largest:.1e}, {d.mean:.1e} in the mean, divergence {d.kl:.1e} nats"


def _short(dtype: torch.dtype) -> str:
    return {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}.get(dtype, str(dtype))
