"""What the machines that hold the GPUs must have besides: host memory and disk."""

from __future__ import annotations

from accessory.planner.encoders import parameter_count
from accessory.planner.moments import moment_bytes, offloaded_bytes
from accessory.planner.setup import Setup, Training
from accessory.planner.weights import is_trained, projection_groups, tensor_groups, trained_parameters, uncut

RANKS_OF_A_MACHINE = 8  # at most
STATES_KEPT = 2  # a recipe's default
# Host memory of a rank: Python, torch and CUDA; blocks of files on their way to the GPU; a state while it is written.
PROCESS, FILE_BLOCKS, STATE = 2_500_000_000, 300_000_000, 2_000_000_000


def host_bytes(setup: Setup) -> int:
    """Host memory of one machine while a model is loaded or a state is written, with moments that lie there.

    Cached pages of files are left out: the system takes them back.
    """
    rank = PROCESS + max(FILE_BLOCKS, STATE if isinstance(setup.task, Training) else 0) + offloaded_bytes(setup)
    return min(setup.gpus, RANKS_OF_A_MACHINE) * rank


def disk_bytes(setup: Setup, model: int | None = None) -> dict[str, int]:
    """What lies on disk, by name: the model; of a finetune its saved states and its result too.

    model: bytes of the model's files, image encoders among them; None: 16 bits a number. One state more than a run
    keeps is there while it is written. A full finetune leaves a whole model in 16 bits, another leaves the
    trained parameters alone in fp32.
    """
    total = setup.args.parameter_counts()[0]
    if setup.views:
        total += sum(map(parameter_count, setup.args.sees_with.all))
        total += sum(group.numel for group in projection_groups(setup))
    out = {"model": model if model is not None else 2 * total}
    if isinstance(setup.task, Training):
        trained = trained_parameters(setup)
        whole = uncut(setup)
        moments = sum(moment_bytes(g, setup.task) for g in tensor_groups(whole) if is_trained(g, whole))
        out["states"] = (STATES_KEPT + 1) * (4 * trained + moments)  # a weight in fp32 and its moments
        out["result"] = 2 * total if setup.task.kind == "full" else 4 * trained
    return out
