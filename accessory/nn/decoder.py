"""The decoder: takes token ids and image features, and gives logits and router statistics.

Legend: B batch, T tokens, S keys, D dim, V vocabulary, c = head_dim/2.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from accessory.config import Implementation, ModelArgs
from accessory.nn.attention import Attention
from accessory.nn.cache import PagedCache
from accessory.nn.experts import StackedExperts
from accessory.nn.linear import Linear, RMSNorm
from accessory.nn.moe import MoE
from accessory.nn.multimodal import ImageTokens, place
from accessory.ops.attention import Documents, Mask, has_varlen
from accessory.ops.cross_entropy import VocabularyPart, head_cross_entropy_sum
from accessory.ops.linear import AdapterRows
from accessory.ops.rope import rope_frequencies, rotations
from accessory.ops.routing import RouterStatistics
from accessory.ops.shared_rows import SharedRows

if TYPE_CHECKING:
    from accessory.nn.vision import Features


class DecoderOutput(NamedTuple):
    logits: Tensor  # (B, T, V), or (N, V) with `rows_N`; in the compute dtype; empty with `label_N`
    router: list[RouterStatistics]  # one a layer; empty without `statistics`
    loss: Tensor | None = None  # () fp32, the sum of cross-entropy with `label_N`


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
        self.recompute = False  # activation checkpointing: see `checkpoint_activations`

    def checkpoint_activations(self, wanted: bool) -> None:
        """Whether to keep only the layer's and the experts' inputs, and to compute the rest again in backward.

        The experts see to themselves, because backward needs no product with w2 and no sum over ranks again.
        """
        self.recompute = wanted
        self.feed_forward.checkpoint_activations(wanted)

    def forward(self, *inputs: Any) -> tuple[Tensor, Tensor | None, RouterStatistics | None]:
        """(x, y, statistics) after this layer. The residual stream is x + y, where y waits for the next norm to add it.

        While gradients are recorded, y is None: then a layer's input is one tensor, and recomputing keeps no other.
        """
        if self.recompute and torch.is_grad_enabled():
            # The second run's statistics are not used, so nothing is counted twice. The layer draws no random numbers.
            routed = checkpoint(self._until_experts, *inputs, use_reentrant=False, preserve_rng_state=False)
        else:
            routed = self._until_experts(*inputs)
        x_BTD, h_TD, weight_TK, expert_TK, adapters, stats = routed
        y_BTD = self.feed_forward.output(h_TD, weight_TK, expert_TK, adapters).view_as(x_BTD)
        return (x_BTD + y_BTD, None, stats) if torch.is_grad_enabled() else (x_BTD, y_BTD, stats)

    def _until_experts(
        self,
        x_BTD: Tensor,
        y_BTD: Tensor | None,
        rotation_BT1c: Tensor,
        mask_BTS: Mask,
        cache: PagedCache | None,
        counted_T: Tensor | None,
        statistics: bool,
        adapters: AdapterRows | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, AdapterRows | None, RouterStatistics | None]:
        """The residual stream, what the experts take, and the router's statistics."""
        x_BTD, h_BTD = self.attention_norm.after(x_BTD, y_BTD, self.attention.products_in, adapters)
        y_BTD = self.attention(h_BTD, rotation_BT1c, mask_BTS, cache, adapters)
        x_TD, h_TD, weight_TK, expert_TK, stats = self.feed_forward.route(
            x_BTD.flatten(0, 1), y_BTD.flatten(0, 1), self.ffn_norm, counted_T, statistics, adapters
        )
        return x_TD.view_as(x_BTD), h_TD, weight_TK, expert_TK, adapters, stats


class Decoder(ImageTokens):
    """Mixtral's network. Both implementations have a state dict with the same names and shapes.

    The weights are not initialised: `checkpoint.load` or `init_weights` fills them. `sees` adds the parameters that
    images need (`nn.multimodal`). The image encoders are a separate network (`nn.vision`).
    """

    def __init__(self, args: ModelArgs, implementation: Implementation, *, sees: bool = False) -> None:
        super().__init__()
        self.args, self.implementation = args, implementation
        self.tok_embeddings = Embedding(args.vocab_size, args.dim)
        self.layers = nn.ModuleList(Layer(args, implementation, i) for i in range(args.n_layers))
        self.norm = RMSNorm(args.dim, args.norm_eps)
        self.output = Linear(args.dim, args.vocab_size)
        # Where ranks share the vocabulary: which tokens' logits `output` makes here, and what makes (…, V) of all
        # ranks' logits. The loss needs no gathered logits.
        self.vocabulary = VocabularyPart(0, args.vocab_size)
        self.gather_logits: Callable[[Tensor], Tensor] | None = None
        # Where parameters are sharded: told of each one that an optimiser has moved.
        self.parameter_moved: Callable[[nn.Parameter], None] | None = None
        if sees:
            self.add_images(args.sees_with, args.dim)
        self.compute_dtype: torch.dtype | None = None  # None: the weights' dtype
        self.adapters = 0  # how many stand beside the weights, of which each token takes one or none
        # For each parameter: the whole shape, and the offsets of this rank's part. `parallelize` fills it.
        self.local_shards: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {}
        # A plain attribute instead of a buffer: args determine the frequencies, and a cast must not round them.
        with torch.device("cpu"):
            self._freq_c, self._rope_factor = rope_frequencies(
                args.head_dim, args.rope_theta, args.rope_scaling, args.max_seq_len
            )

    @property
    def kv_heads(self) -> int:
        """The key/value heads of this rank: fewer than `args.n_kv_heads` where a rank has a slice."""
        first = next(m for m in self.modules() if isinstance(m, Attention))
        return first.wk.weight.shape[0] // self.args.head_dim

    @property
    def products_in(self) -> torch.dtype:
        """The compute dtype: products, keys and values are in it."""
        return self.compute_dtype or self.output.weight.dtype

    def cast(self, dtype: torch.dtype) -> Decoder:
        """Cast the weights to `dtype`. Norms and routers become fp32: they are small, and fp32 does not round them."""
        self.to(dtype)
        for name, module in self.named_modules():
            if isinstance(module, RMSNorm | nn.LayerNorm) or name.endswith(".gate"):
                module.float()
        return self

    def compute_in(self, dtype: torch.dtype) -> Decoder:
        """Run the products in `dtype` and keep the weights' dtype. Training needs that: its weights are fp32."""
        for module in self.modules():
            if isinstance(module, Attention | StackedExperts | Decoder):
                module.compute_dtype = dtype
        return self

    def fuse(self) -> Decoder:
        """Fuse the weights that decoding on a CPU reads together. Call it again after a weight was replaced."""
        for module in self.modules():
            if isinstance(module, Attention | StackedExperts):
                module.fuse()
        return self

    def forward(
        self,
        tokens_BT: Tensor,
        positions_BT: Tensor | None = None,
        *,
        cache: PagedCache | None = None,
        documents_BT: Mask = None,
        counted_BT: Tensor | None = None,
        statistics: bool = False,
        rows_N: Tensor | None = None,
        label_N: Tensor | None = None,
        images: Features | Tensor | None = None,
        adapters: AdapterRows | None = None,
    ) -> DecoderOutput:
        """Run `tokens_BT` (int64).

        positions_BT: each token's position in its sequence (default 0 … T-1). cache: `cache.begin` must have been
        called with the batch of the same tokens, which are then one row, (1, N). documents_BT: without a cache, a token
        sees only the earlier tokens with its document number (for packed batches, or for padding with its own number);
        each document is contiguous. `SharedRows` where ranks share rows. statistics: collect router statistics.
        counted_BT (bool): the tokens that enter them. rows_N: return the logits of these rows of the flattened batch
        only, (N, V). label_N: the tokens that follow at these rows, or at all, negative where none is learnt: return
        the sum of their cross-entropy instead of logits. images: the encoders' features, or their image tokens. These
        replace the positions with `IMAGE_ID`, in the order of the flattened batch; there must be as many as such
        positions. adapters: which of several adapters each token of the flattened batch takes; None: no token takes
        one.
        """
        if positions_BT is None:
            positions_BT = torch.arange(tokens_BT.shape[1], device=tokens_BT.device).expand_as(tokens_BT)
        if self._freq_c.device != tokens_BT.device:
            self._freq_c = self._freq_c.to(tokens_BT.device)
        rotation_BT1c = rotations(positions_BT, self._freq_c, self._rope_factor)
        mask_BTS = _document_mask(documents_BT, self.compute_dtype)
        counted_T = None if counted_BT is None else counted_BT.flatten()

        # The residual stream is fp32. Some networks have activations of tens of thousands in it, and with 16 bits the
        # small numbers that layers add to those would be rounded away.
        x_BTD = self.tok_embeddings(tokens_BT.clamp_min(0) if self.sees else tokens_BT).float()
        # In training, the image projections run in every step, with an empty product where there is no image. Their
        # gradient is then zero instead of None, and collectives rely on that.
        if self.sees and (images is not None or torch.is_grad_enabled()):
            seen_ND = images if isinstance(images, Tensor) else self.image_embeddings(images, self.products_in)
            x_BTD = place(x_BTD, tokens_BT, seen_ND)
        router = []
        y_BTD: Tensor | None = None
        for layer in self.layers:
            x_BTD, y_BTD, stats = layer(x_BTD, y_BTD, rotation_BT1c, mask_BTS, cache, counted_T, statistics, adapters)
            if stats is not None:
                router.append(stats)
        x, y = x_BTD, y_BTD
        if rows_N is not None:
            x, y = x.flatten(0, 1)[rows_N], None if y is None else y.flatten(0, 1)[rows_N]
            adapters = None if adapters is None else adapters[rows_N]
        _, h = self.norm.after(x, y, self.products_in, adapters)
        if label_N is None:
            logits = self.output(h, adapters)
            return DecoderOutput(logits if self.gather_logits is None else self.gather_logits(logits), router)
        trained = [p for p in self.output.parameters() if p.requires_grad]
        loss = head_cross_entropy_sum(h.reshape(-1, h.shape[-1]), label_N, self.output, trained, self.vocabulary)
        return DecoderOutput(h.new_empty(0), router, loss)


def _document_mask(documents: Mask, dtype: torch.dtype | None) -> Mask:
    """The mask for attention: the documents themselves where a kernel takes them, else a bool mask (B, T, S)."""
    if documents is None:
        return None
    if isinstance(documents, SharedRows):
        return documents if has_varlen(documents.key_M.device, dtype) else documents.mask()
    if isinstance(documents, Documents):
        if has_varlen(documents.number_BT.device, dtype):
            return documents
        documents = documents.number_BT
    T = documents.shape[1]
    causal_TT = torch.ones(T, T, dtype=torch.bool, device=documents.device).tril()
    return causal_TT & (documents[:, :, None] == documents[:, None, :])


@torch.no_grad()
def init_weights(decoder: Decoder, seed: int = 0, std: float = 0.02) -> None:
    """Fill the network with random weights, drawn on the parameters' device. For tests and measurements.

    Norms become 1, all other weights normal with standard deviation `std`.
    """
    device = next(decoder.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    for name, p in decoder.named_parameters():
        if name.endswith(("norm.weight", "_proj.1.weight")):
            p.fill_(1.0)
        else:
            p.normal_(0.0, std, generator=generator)
