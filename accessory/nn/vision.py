"""Images to features: every encoder runs on every view of an image, and a cache keeps the features.

Legend: I images, P height and width of an image in pixels, V views (of all images), S height and width of a view in
pixels, T tokens, C channels, Q queries.

An image is (3, P, P) in fp32, with CLIP's normalisation (`data.transform`). One view is the whole image at each
encoder's size S. Five views are the whole image, then the quarters of the image at 2S: top left, top right, bottom
left, bottom right. Features are in the tower's dtype and need no gradients, because the encoders are frozen.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from functools import cache, partial
from hashlib import blake2b
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from accessory.errors import ConfigError, InputError
from accessory.nn.vision_encoders import build_encoder, run_encoder
from accessory.ops.graphs import Graphs, possible
from accessory.vision_config import (
    CACHE_BYTES,
    CLIP_MEAN,
    CLIP_STD,
    MOST_GRAPHS,
    VIEWS,
    VIEWS_A_GRAPH,
    VIEWS_AT_ONCE,
    EncoderArgs,
    VisionArgs,
)


class Features(NamedTuple):
    """A tower's output: `visual_VTC`, with the channels of all encoders concatenated, and the Q-Former's tokens if any.

    V = images × views, image by image; the whole image comes before its quarters.
    """

    visual_VTC: Tensor
    query_VQC: Tensor | None

    def map(self, function: Callable[[Tensor], Tensor]) -> Features:
        """Apply `function` to both tensors."""
        return Features(function(self.visual_VTC), None if self.query_VQC is None else function(self.query_VQC))

    def narrow(self, start: int, length: int) -> Features:
        """`length` views from `start` on, without a copy."""
        return self.map(lambda x_VTC: x_VTC.narrow(0, start, length))

    @property
    def nbytes(self) -> int:
        return self.visual_VTC.nbytes + (0 if self.query_VQC is None else self.query_VQC.nbytes)


class VisionTower(nn.Module):
    """The encoders of `args`, for images of `pixels` × `pixels` that are split into `views` views.

    A tower built on the meta device needs `to_empty`, then its weights (`checkpoint.vision.load_tower`). It always
    stays in evaluation mode. `runs` counts the images that the encoders ran on. `cache_bytes` limits the feature cache.
    `graphed`, which may be set: on a GPU few views are encoded by replaying a CUDA graph, whose memory stays taken.
    Raises ConfigError for configurations that cannot be built, MissingExtraError without transformers.
    """

    def __init__(self, args: VisionArgs, views: int, *, cache_bytes: int = CACHE_BYTES) -> None:
        super().__init__()
        if views not in VIEWS:
            raise ConfigError(f"vision: views: got {views!r}, but it must be one of {', '.join(map(str, VIEWS))}")
        self.args, self.views, self.pixels = args, views, args.pixels(views)
        self.encoders = nn.ModuleDict()
        for encoder in args.all:
            if hasattr(self.encoders, encoder.name):
                raise ConfigError(f"vision: name: {encoder.name!r} is taken by torch; call the encoder something else")
            self.encoders[encoder.name] = build_encoder(encoder)
        self.requires_grad_(False)
        self.train(False)
        self.feature_cache = FeatureCache(cache_bytes)
        self.graphed = False
        self._graphs: Graphs[Features] | None = None
        self.runs = 0
        self.register_load_state_dict_post_hook(lambda tower, _: tower._forget())

    def train(self, mode: bool = True) -> VisionTower:
        """Ignores `mode` and stays in evaluation mode."""
        return super().train(False)

    def _apply(self, fn: Any, recurse: bool = True) -> VisionTower:
        self._forget()  # device, dtype or weights change
        super()._apply(fn, recurse)
        return self

    def _forget(self) -> None:
        self.feature_cache.clear()
        self._graphs = None

    def to_empty(self, *, device: Any, recurse: bool = True) -> VisionTower:
        super().to_empty(device=device, recurse=recurse)
        # These buffers are not in the state dict, so loading would not fill them.
        for name, buffer in self.named_buffers():
            if name.endswith(".position_ids"):
                buffer.copy_(torch.arange(buffer.shape[-1], device=buffer.device).expand_as(buffer))
        return self

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    def encode(
        self,
        pixels_I3PP: Tensor,
        *,
        agree: Callable[[list[bool]], list[bool]] | None = None,
        run: Callable[[Tensor], Features] | None = None,
    ) -> Features:
        """The features of images. The encoders do not run for images whose pixels the feature cache already has.

        `agree` takes a list that is true for each image missing in this cache, and may add images to run. `run`
        replaces `VisionTower.run`. `parallel.images` uses both to share the work between ranks. InputError for a tensor
        of a wrong shape or dtype.
        """
        self._check(pixels_I3PP)
        if not len(pixels_I3PP):
            return self.empty()
        # The caller's autocast and inference mode must not affect cached features, because other callers use them too.
        with torch.inference_mode(False), torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            return self._encode(pixels_I3PP, agree, run or self.run)

    def _encode(
        self,
        pixels_I3PP: Tensor,
        agree: Callable[[list[bool]], list[bool]] | None,
        run: Callable[[Tensor], Features],
    ) -> Features:
        keys = [content_of(pixels_3PP) for pixels_3PP in pixels_I3PP]
        found = {key: features for key in keys if (features := self.feature_cache.get(key)) is not None}
        first = {key: i for i, key in reversed(list(enumerate(keys)))}  # the encoders run once for equal images
        different = sorted(first.values())
        missing = [keys[i] not in found for i in different]
        if agree is not None:
            missing = agree(missing)
        todo = [i for i, lacks in zip(different, missing, strict=True) if lacks]
        if todo:
            new = run(pixels_I3PP if len(todo) == len(keys) else pixels_I3PP[todo])
            for n, i in enumerate(todo):
                found[keys[i]] = new.narrow(n * self.views, self.views)
                self.feature_cache.put(keys[i], found[keys[i]])
            if len(todo) == len(keys):
                return new
        return _joined([found[key] for key in keys])

    @torch.inference_mode(False)
    @torch.no_grad()
    def run(self, pixels_I3PP: Tensor, first: int = 0, count: int | None = None) -> Features:
        """Run the encoders without the cache, on all views of the images or on `count` views from `first` on."""
        total = len(pixels_I3PP) * self.views
        last = total if count is None else first + count
        parts = [
            self._run_some(pixels_I3PP, start, min(start + VIEWS_AT_ONCE, last))
            for start in range(first, last, VIEWS_AT_ONCE)
        ]
        self.runs += -(-last // self.views) - first // self.views if last > first else 0
        if len(parts) == 1:
            return parts[0]
        return _joined(parts) if parts else self.empty()

    def empty(self, views: int = 0) -> Features:
        """Uninitialised features of `views` views."""
        args, query, like = self.args, self.args.query, next(self.parameters())
        return Features(
            like.new_empty(views, args.encoders[0].tokens, args.channels),
            None if query is None else like.new_empty(views, query.tokens, query.channels),
        )

    def _run_some(self, pixels_I3PP: Tensor, first: int, last: int) -> Features:
        images = slice(first // self.views, -(-last // self.views))
        pixels_I3PP, start = pixels_I3PP[images].float(), first - images.start * self.views
        run = partial(self._features, start=start, count=last - first)
        if not self.graphed or not possible(self.device) or last - first > VIEWS_A_GRAPH:
            return run(pixels_I3PP.to(self.device))
        if self._graphs is None:
            self._graphs = Graphs(self.device)
        key = len(pixels_I3PP), start, last - first
        if key not in self._graphs and len(self._graphs) == MOST_GRAPHS:
            return run(pixels_I3PP.to(self.device))
        return self._graphs.run(key, run, pixels_I3PP).map(torch.clone)  # the next replay writes there again

    def _features(self, pixels_I3PP: Tensor, start: int, count: int) -> Features:
        """The features of `count` views from `start` on. On a GPU nothing in it waits for the host or asks it."""
        seen: dict[int, Tensor] = {}
        tokens: list[Tensor] = []
        for encoder in self.args.all:
            if encoder.size not in seen:
                seen[encoder.size] = views_of(pixels_I3PP, encoder.size, self.views)[start : start + count]
            x_V3SS = normalised(seen[encoder.size], encoder).to(self.dtype)
            tokens.append(run_encoder(encoder.kind, self.encoders[encoder.name], x_V3SS))
        query_VQC = None if self.args.query is None else tokens.pop()
        return Features(torch.cat(tokens, dim=-1), query_VQC)

    def _check(self, pixels_I3PP: Tensor) -> None:
        wanted = (3, self.pixels, self.pixels)
        if pixels_I3PP.dim() != 4 or tuple(pixels_I3PP.shape[1:]) != wanted:
            raise InputError(
                f"images: got a tensor of shape {tuple(pixels_I3PP.shape)}, but it must be (images, "
                f"{', '.join(map(str, wanted))}): accessory.data.transform makes such"
            )
        if not pixels_I3PP.is_floating_point():
            raise InputError(f"images: got {pixels_I3PP.dtype}, but pixels must be floating-point, normalised for CLIP")


class FeatureCache:
    """Features by a digest of their image. Above `limit` bytes, the least recently used features are dropped."""

    def __init__(self, limit: int) -> None:
        self.limit, self.nbytes = limit, 0
        self._features: OrderedDict[bytes, Features] = OrderedDict()

    def __len__(self) -> int:
        return len(self._features)

    def get(self, key: bytes) -> Features | None:
        features = self._features.get(key)
        if features is not None:
            self._features.move_to_end(key)
        return features

    def put(self, key: bytes, features: Features) -> None:
        """Store a copy: `features` may be a view of a larger tensor, which would otherwise stay in memory."""
        if key in self._features:
            self.nbytes -= self._features.pop(key).nbytes
        if features.nbytes > self.limit:
            return
        self._features[key] = features.map(torch.clone)
        self.nbytes += features.nbytes
        while self.nbytes > self.limit:
            self.nbytes -= self._features.popitem(last=False)[1].nbytes

    def clear(self) -> None:
        self._features.clear()
        self.nbytes = 0


def content_of(pixels_3PP: Tensor) -> bytes:
    """A digest of an image's pixels. Equal pixels have equal digests on every device."""
    pixels = pixels_3PP.detach().to("cpu", torch.float32).contiguous()
    return blake2b(pixels.numpy().data, digest_size=16).digest()


def views_of(pixels_I3PP: Tensor, size: int, views: int) -> Tensor:
    """The views (I·views, 3, size, size): each whole image, then, with five views, its quarters at twice the size."""
    whole_I3SS = resized(pixels_I3PP, size)
    if views == 1:
        return whole_I3SS
    double = resized(pixels_I3PP, 2 * size)
    rows = double[:, :, :size], double[:, :, size:]
    quarters = [half[..., side] for half in rows for side in (slice(None, size), slice(size, None))]
    return torch.stack([whole_I3SS, *quarters], dim=1).flatten(0, 1)


def resized(pixels_I3PP: Tensor, size: int) -> Tensor:
    """Images at (size, size), bicubic and without antialiasing, as in the training of the ensemble's networks."""
    if pixels_I3PP.shape[-1] == size:
        return pixels_I3PP
    return F.interpolate(pixels_I3PP, size=(size, size), mode="bicubic", align_corners=False)


def normalised(pixels_V3SS: Tensor, encoder: EncoderArgs) -> Tensor:
    """Replace CLIP's normalisation by the encoder's own."""
    mean, std = encoder.normalisation
    if (mean, std) == (CLIP_MEAN, CLIP_STD):
        return pixels_V3SS
    clip_mean, clip_std, own_mean, own_std = (
        _colours(v, pixels_V3SS.dtype, pixels_V3SS.device) for v in (CLIP_MEAN, CLIP_STD, mean, std)
    )
    return (pixels_V3SS * clip_std + clip_mean - own_mean) / own_std


@cache
def _colours(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Numbers of red, green and blue (3, 1, 1). They are kept, because a copy from the host would wait for the card."""
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=dtype, device=device).view(3, 1, 1)


def _joined(parts: list[Features]) -> Features:
    """Concatenate features along the views, as a copy."""
    queries = [part.query_VQC for part in parts if part.query_VQC is not None]
    return Features(torch.cat([part.visual_VTC for part in parts]), torch.cat(queries) if queries else None)
