"""The moments of a training step that may be its largest, and what takes the memory at each of them.

Legend: L layers, V a rank's part of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable

from accessory.limits import CROSS_ENTROPY_ROWS, LOGITS_AT_ONCE, OPTIMIZER_PIECE, PIECES_ON_THE_WAY
from accessory.planner.activations import BackwardPeak, layer_backward, layer_kept, layer_sizes, layer_training
from accessory.planner.moments import held_moments, offloads
from accessory.planner.setup import Setup, Training
from accessory.planner.weights import TensorGroup, group_bytes, is_trained, rank_share, replicas_of, tensor_groups

# On a CPU, cross-entropy holds so many tensors of fp32 logits at once, each of `CROSS_ENTROPY_ROWS` rows.
CROSS_ENTROPY_TENSORS = 3


def training_moments(setup: Setup, task: Training) -> dict[str, dict[str, int]]:
    """Bytes on one rank: for each moment, by what takes them."""
    L = setup.args.n_layers
    groups = list(tensor_groups(setup))
    trained = [g for g in groups if is_trained(g, setup)]

    def gradient_bytes(some: Iterable[TensorGroup]) -> int:
        return sum(rank_share(g, g.numel * _of_gradient(g, setup, task), setup, task) for g in some)

    lasting = {
        "weights": sum(rank_share(g, group_bytes(g, setup), setup, task) for g in groups),
        "optimiser": 0 if offloads(setup, task) else held_moments(setup, task),
    }
    gradients = gradient_bytes(trained)
    layer_gradients = (gradients - gradient_bytes(g for g in trained if not g.in_layer)) // L
    # The head's gradients are made first, at the end of forward, the embedding's last.
    head_gradients = gradient_bytes(g for g in trained if _is_head(g))
    # Between micro-steps all gradients are there.
    earlier_gradients = gradients if setup.keeps_gradients else 0
    layer_copies, head_copies = _copies(setup, task, trained)
    lasting_copies = 0
    if setup.keeps_copies:
        lasting_copies, layer_copies, head_copies = layer_copies + head_copies, 0, 0
    whole_weights = _gathered(setup, task, groups)

    layer, learning = layer_sizes(setup, setup.training_tokens), layer_training(setup, task)
    kept = layer_kept(layer, learning)
    backward = layer_backward(layer, learning)
    stream = layer.tokens_fp32  # the gradient that comes from the layer above
    # The last norm's input; the head's 16-bit input and its gradient, which forward makes.
    head = layer.tokens_fp32 + 2 * layer.tokens_16bit

    def moment(activations: int, finished: int, copies: int, layer: BackwardPeak, logits: int = 0) -> dict[str, int]:
        """`finished`: gradients that backward has left behind. `layer`: what the layer takes that it is in."""
        return {
            **lasting,
            "gradients": max(finished, earlier_gradients) + layer.gradients,
            "16-bit copies of weights": lasting_copies + copies + layer.copies,
            "whole weights, summed gradients": whole_weights,
            "activations": activations + layer.activations,
            "logits": logits,
        }

    return {
        "the end of forward": moment(
            L * kept + head,
            head_gradients + earlier_gradients,
            layer_copies + head_copies,
            BackwardPeak(),
            _logits(setup, task, sum(g.numel for g in trained if _is_head(g))),
        ),
        "backward of the last layer": moment(
            (L - 1) * kept + stream, head_gradients, layer_copies * (L - 1) // L, backward
        ),
        "backward of the first layer": moment(stream, head_gradients + (L - 1) * layer_gradients, 0, backward),
        "the optimiser's step": {
            **lasting,
            "gradients": gradients,
            "16-bit copies of weights": lasting_copies,
            "pieces that are updated": _pieces(setup, task),
        },
    }


def _of_gradient(group: TensorGroup, setup: Setup, task: Training) -> int:
    """Bytes a number of a finished gradient. One that ranks have summed stays as it came in the first micro-step."""
    if group.role == "fp32":
        return task.parameter.gradient
    summed = setup.fsdp and replicas_of(group, setup) > 1
    return setup.summed_gradient if summed and task.accum_iter == 1 else task.gradient


def _is_head(group: TensorGroup) -> bool:
    return group.name.startswith("output")


def _copies(setup: Setup, task: Training, trained: list[TensorGroup]) -> tuple[int, int]:
    """Bytes of the 16-bit copies that autograd keeps of the trained weights of all layers, and of the head.

    Where passes are CUDA graphs, they stay from step to step. A layer that is computed again in backward makes its
    copies there. Weights that are gathered arrive in 16 bits.
    """
    copied = [g for g in trained if g.role in ("product", "adapter") and not (setup.fsdp and replicas_of(g, setup) > 1)]
    head = task.parameter.copy * sum(g.numel for g in copied if _is_head(g))
    layers = task.parameter.copy * sum(g.numel for g in copied) - head
    return 0 if task.checkpointing else layers, head


def _gathered(setup: Setup, task: Training, groups: list[TensorGroup]) -> int:
    """Bytes of the whole weights that ranks have gathered, and of one layer's gradients that are summed.

    fsdp has this layer and the next one, which arrives; sdp has all layers, from forward to backward. The gradients of
    one layer are summed while the next one makes its own.
    """
    if not setup.fsdp:
        return 0
    L, cut = setup.args.n_layers, [g for g in groups if g.role != "fp32" and replicas_of(g, setup) > 1]

    def whole(g: TensorGroup) -> int:
        if is_trained(g, setup):
            return 2 * g.numel
        return g.nbytes(2) if task.data_parallel == "fsdp" else 0

    layer = sum(whole(g) for g in cut if g.in_layer) // L
    outside = sum(whole(g) for g in cut if not g.in_layer)
    trained = sum(g.numel for g in cut if g.in_layer and is_trained(g, setup))
    summed = setup.summed_gradient * trained // L if L > 1 else 0
    return outside + layer * (min(2, L) if task.data_parallel == "fsdp" else L) + summed


def _logits(setup: Setup, task: Training, trained: int) -> int:
    """The logits of some tokens in 16 bits, and what gradients of the head take beside the finished one.

    Model-parallel ranks share the vocabulary. The gradient of the logits takes their place. A CPU has some rows of them
    in fp32 as well. trained: numbers of the head that are trained. Each piece of the logits makes a gradient of these
    in 16 bits, which is widened where the weight is fp32; from the second piece on, it is added to that of the pieces
    before.
    """
    V, tokens = setup.args.vocab_size // setup.tp, setup.training_tokens
    rows = max(1, LOGITS_AT_ONCE // V)
    wide = CROSS_ENTROPY_TENSORS * 4 * min(CROSS_ENTROPY_ROWS, tokens) * V if setup.device == "cpu" else 0
    gathered = setup.fsdp
    made = 2 + 4 * (task.parameter.copy > 0 and not gathered)
    finished = 0 if gathered else task.gradient  # `training_moments` counts it among the gradients
    held = (2 if gathered else finished) if tokens > rows else 0  # the sum of earlier pieces
    return 2 * min(tokens, rows) * V + (held + made - finished) * trained + wide


def _pieces(setup: Setup, task: Training) -> int:
    """Moments that visit the GPU, and gradients that are widened to fp32, while the optimiser updates a piece."""
    moments = 2 * 4 * PIECES_ON_THE_WAY * OPTIMIZER_PIECE if offloads(setup, task) else 0
    widened = 4 * OPTIMIZER_PIECE if task.gradient_dtype == "bf16" else 0
    return moments + widened
