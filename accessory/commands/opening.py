"""Loads the model that a command's options name, on one rank or several: `open_model`."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from accessory.errors import InputError
from accessory.launch.environment import launch_of
from accessory.launch.gpus import check_device, count_ranks
from accessory.launch.process_group import join_launched, leave_group
from accessory.model.meta import MetaModel
from accessory.model.multi_gpu_wrapper import MultiGpuWrapper
from accessory.model.options import loading_arguments
from accessory.parallel.mesh import Ranks


@contextmanager
def open_model(options: argparse.Namespace, with_visual: bool) -> Iterator[MetaModel | MultiGpuWrapper | None]:
    """Load the model that the options name: on a launcher's ranks, on `--n-gpus` ranks started here, or in this
    process. with_visual: with the image encoders."""
    loading = loading_arguments(options, with_visual=with_visual)
    asked = options.n_gpus is not None or options.gpu_ids is not None
    if launch_of() is not None:
        if asked:
            raise InputError("--n-gpus: this process is one of several that a launcher started; leave it out")
        group = join_launched()
        assert group is not None
        try:
            model = MetaModel.from_pretrained(**loading, mp_group=group)
            if Ranks.of(group).rank:
                model.follow()
                yield None
            else:
                with model.lead():
                    yield model
        finally:
            leave_group()
    elif asked and _count_ranks(options) > 1:
        where = {name: getattr(options, name) for name in ("gpu_ids", "master_addr", "master_port")}
        with MultiGpuWrapper(**loading, gpus=options.n_gpus, **where) as wrapper:
            yield wrapper
    else:
        if options.gpu_ids:
            loading["device"] = check_device(options.gpu_ids[0], "--gpu-ids")
        yield MetaModel.from_pretrained(**loading)


def _count_ranks(options: argparse.Namespace) -> int:
    cuda = torch.cuda.is_available() and options.device != "cpu"
    shown = torch.cuda.device_count() if cuda else None
    return count_ranks(options.n_gpus, options.gpu_ids, shown=shown, n_field="--n-gpus", ids_field="--gpu-ids")
