"""The decoder: token ids in, and what was seen of images; logits and the routers' statistics out.

Legend: B batch, T tokens, S keys, D dim, V vocabulary, c = head_dim/2.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from accessory.config import Implementation, ModelArgs
from accessory.nn.attention import Attention
from accessory.nn.cache import ContiguousCache
from accessory.nn.experts import StackedExperts
from accessory.nn.linear import Linear, RMSNorm
from accessory.nn.moe import MoE
from accessory.nn.multimodal import ImageTokens, place
from accessory.ops.attention import Documents, has_varlen
from accessory.ops.rope import rope_frequencies, rotations
from accessory.ops.routing import RouterStatistics

if TYPE_CHECKING:
    from accessory.nn.vision import Features


class DecoderOutput(NamedTuple):
    logits: Tensor  # (B, T, V), or (B, V), (N, V) where `last_B`, `rows_N` picked positions; in the network's dtype
    router: list[RouterStatistics]  # one a layer; empty unless asked for


class Embedding(nn.Module):
    def __init__(self, vocab_size: int, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, dim))

    def forward(self, tokens: Tensor) -> Tensor:
        return F.embedding(tokens, self.weight)


class Layer(nn.Module):
    def __init__(self, args: ModelArgs, implementation: Implementation, index: int) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(args.dim, args.norm_eps)
        self.attention = Attention(args, index)
        self.ffn_norm = RMSNorm(args.dim, args.norm_eps)
        self.feed_forward = MoE(args, implementation)
        self.recompute = False  # keep only the input for the backward pass, and run forward again there

    def forward(self, *inputs: Any) -> tuple[Tensor, RouterStatistics | None]:
        if self.recompute and torch.is_grad_enabled():
            # The second run's statistics go nowhere, so nothing is counted twice; no random numbers are drawn.
            return checkpoint(self._forward, *inputs, use_reentrant=False, preserve_rng_state=False)
        return self._forward(*inputs)

    def _forward(
        self,
        x_BTD: Tensor,
        rotation_BT1c: Tensor,
        mask_BTS: Tensor | Documents | None,
        cache: ContiguousCache | None,
        counted_T: Tensor | None,
        statistics: bool,
    ) -> tuple[Tensor, RouterStatistics | None]:
        x_BTD = x_BTD + self.attention(self.attention_norm(x_BTD), rotation_BT1c, mask_BTS, cache)
        y_TD, stats = self.feed_forward(self.ffn_norm(x_BTD).flatten(0, 1), counted_T, statistics)
        return x_BTD + y_TD.view_as(x_BTD), stats


class Decoder(ImageTokens):
    """Mixtral's network in either implementation; the state dict's names and shapes are the same for both.

    Made without values: `checkpoint.load` or `init_weights` fills it. `sees`: with what images need, see
    `nn.multimodal`; their encoders are a network of their own (`nn.vision`).
    """

    def __init__(self, args: ModelArgs, implementation: Implementation, *, sees: bool = False) -> None:
        super().__init__()
        self.args, self.implementation = args, implementation
        self.tok_embeddings = Embedding(args.vocab_size, args.dim)
        self.layers = nn.ModuleList(Layer(args, implementation, i) for i in range(args.n_layers))
        self.norm = RMSNorm(args.dim, args.norm_eps)
        self.output = Linear(args.dim, args.vocab_size)
        if sees:
            self.add_images(args.sees_with, args.dim)
        self.compute_dtype: torch.dtype | None = None  # None: the weights' own
        # Of parameters cut over ranks, the whole shape and where this rank's part begins; who cuts, notes it here.
        self.local_shards: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {}
        # A plain attribute and not a buffer: the frequencies follow from args, and a cast network must not round them.
        with torch.device("cpu"):
            self._freq_c, self._rope_factor = rope_frequencies(
                args.head_dim, args.rope_theta, args.rope_scaling, args.max_seq_len
            )

    @property
    def kv_heads(self) -> int:
        """Key/value heads held here; fewer than `args.n_kv_heads` on a rank that holds a slice."""
        first = next(m for m in self.modules() if isinstance(m, Attention))
        return first.wk.weight.shape[0] // self.args.head_dim

    @property
    def products_in(self) -> torch.dtype:
        """The dtype that products, and with them keys and values, are computed in."""
        return self.compute_dtype or self.output.weight.dtype

    def cast(self, dtype: torch.dtype) -> Decoder:
        """The products in `dtype`; norms and routers stay, or become, fp32, which costs nothing and rounds nothing."""
        self.to(dtype)
        for name, module in self.named_modules():
            if isinstance(module, RMSNorm | nn.LayerNorm) or name.endswith(".gate"):
                module.float()
        return self

    def compute_in(self, dtype: torch.dtype) -> Decoder:
        """Run the products in `dtype` whatever the weights are kept in, as training with fp32 parameters wants it."""
        for module in self.modules():
            if isinstance(module, Attention | StackedExperts | Decoder):
                module.compute_dtype = dtype
        return self

    def fuse(self) -> Decoder:
        """Lay weights that decoding on a CPU reads together side by side; needed again after any was replaced."""
        for module in self.modules():
            if isinstance(module, Attention | StackedExperts):
                module.fuse()
        return self

    def forward(
        self,
        tokens_BT: Tensor,
        positions_BT: Tensor | None = None,
        *,
        cache: ContiguousCache | None = None,
        documents_BT: Tensor | Documents | None = None,
        counted_BT: Tensor | None = None,
        statistics: bool = False,
        last_B: Tensor | None = None,
        rows_N: Tensor | None = None,
        images: Features | None = None,
    ) -> DecoderOutput:
        """Run `tokens_BT` (int64).

        positions_BT: each token's place in its sequence (default 0 … T-1). With `cache`, `cache.begin` must have
        announced the same positions. documents_BT: without a cache, tokens see only earlier tokens of equal document
        number (packed batches, or padding given a number of its own); documents lie in one piece each. counted_BT
        (bool): tokens that enter the router statistics, which are gathered when `statistics`. last_B: return logits of
        just this index of each row, (B, V); rows_N: of just these places of the flattened batch, (N, V). images: what
        the encoders gave of the images whose places bear `IMAGE_ID`, in the order of the flattened batch; as many.
        """
        if positions_BT is None:
            positions_BT = torch.arange(tokens_BT.shape[1], device=tokens_BT.device).expand_as(tokens_BT)
        if self._freq_c.device != tokens_BT.device:
            self._freq_c = self._freq_c.to(tokens_BT.device)
        rotation_BT1c = rotations(positions_BT, self._freq_c, self._rope_factor)
        mask_BTS = cache.mask_BTS if cache is not None else _document_mask(documents_BT, self.compute_dtype)
        counted_T = None if counted_BT is None else counted_BT.flatten()

        # The residual stream is kept in fp32: some networks carry activations of tens of thousands in it, beside which
        # 16 bits would round away what the layers add.
        x_BTD = self.tok_embeddings(tokens_BT.clamp_min(0) if self.sees else tokens_BT).float()
        # In training, projections take part in every step, with an empty product where there is no image: their
        # gradient is then zero and not None, which collectives rely on.
        if self.sees and (images is not None or torch.is_grad_enabled()):
            x_BTD = place(x_BTD, tokens_BT, self.image_embeddings(images, self.products_in))
        router = []
        for layer in self.layers:
            x_BTD, stats = layer(x_BTD, rotation_BT1c, mask_BTS, cache, counted_T, statistics)
            if stats is not None:
                router.append(stats)
        x = x_BTD if last_B is None else x_BTD[torch.arange(len(last_B), device=last_B.device), last_B]
        x = x if rows_N is None else x.flatten(0, 1)[rows_N]
        return DecoderOutput(self.output(self.norm(x).to(self.products_in)), router)


def _document_mask(documents: Tensor | Documents | None, dtype: torch.dtype | None) -> Tensor | Documents | None:
    """What attention takes: the documents themselves where a kernel knows them, else a mask (B, T, T)."""
    if documents is None:
        return None
    if isinstance(documents, Documents):
        if has_varlen(documents.number_BT.device, dtype):
            return documents
        documents = documents.number_BT
    T = documents.shape[1]
    causal_TT = torch.ones(T, T, dtype=torch.bool, device=documents.device).tril()
    return causal_TT & (documents[:, :, None] == documents[:, None, :])


@torch.no_grad()
def init_weights(decoder: Decoder, seed: int = 0, std: float = 0.02) -> None:
    """Random weights (normal, norms one) drawn on the parameters' own device; for tests and measurements."""
    device = next(decoder.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    for name, p in decoder.named_parameters():
        if name.endswith(("norm.weight", "_proj.1.weight")):
            p.fill_(1.0)
        else:
            p.normal_(0.0, std, generator=generator)
