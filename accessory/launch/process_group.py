"""Joins ranks in a torch process group, for ranks of a launcher and for ranks that a driver starts."""

from __future__ import annotations

import socket
from datetime import timedelta

import torch
import torch.distributed as dist

from accessory.errors import ConfigError, InputError, RankError
from accessory.launch.environment import launch_of
from accessory.launch.meeting import meet
from accessory.launch.memory import check_gpu
from accessory.launch.threads import cores
from accessory.ops import graphs


def join_launched(timeout: timedelta = timedelta(minutes=10)) -> dist.ProcessGroup | None:
    """Join the other ranks if a launcher started several (NCCL where there are GPUs, else gloo); None if it did not.

    Sets this process's GPU before it makes the group. timeout: of the group's operations. ConfigError where the
    launcher's variables are invalid, or name more ranks than this machine has GPUs; RankError where the ranks do not
    find each other, or the GPU cannot be used.
    """
    if dist.is_initialized():
        return dist.group.WORLD if dist.get_world_size() > 1 else None
    launch = launch_of()
    if launch is None:
        return None
    cuda = torch.cuda.is_available()
    if cuda:
        if launch.local_rank >= torch.cuda.device_count():
            raise ConfigError(
                f"LOCAL_RANK: got {launch.local_rank}, but this machine shows {torch.cuda.device_count()} GPUs; "
                "start one rank a GPU"
            )
        try:
            check_gpu(f"cuda:{launch.local_rank}")
        except ConfigError as error:
            raise RankError(f"rank {launch.rank} of {launch.size}: {error}") from error
        torch.cuda.set_device(launch.local_rank)
    else:
        torch.set_num_threads(max(1, cores() // launch.size))
    dist.init_process_group(
        "nccl" if cuda else "gloo", store=meet(launch), rank=launch.rank, world_size=launch.size, timeout=timeout
    )
    return dist.group.WORLD


def join_store(host: str, port: int, rank: int, size: int, *, cuda: bool) -> dist.ProcessGroup:
    """Join the other ranks through the store of `host_store`. With CUDA, this process must see only its own GPU."""
    if cuda:
        check_gpu("cuda")
    store = dist.TCPStore(host, port, is_master=False)
    dist.init_process_group("nccl" if cuda else "gloo", store=store, rank=rank, world_size=size)
    return dist.new_group(list(range(size)))


def host_store(host: str, port: int) -> dist.TCPStore:
    """Start the store through which the ranks meet. It listens on `host` only.

    port: 0 for a free one. InputError where the address or the port cannot be used.
    """
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, kind)
    except OSError as error:
        raise InputError(f"master_addr: got {host!r}, which names no address ({error.strerror})") from error
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen()
    except OSError as error:
        listening.close()
        if error.errno == 98 or "in use" in str(error):
            raise InputError(
                f"master_port: {port} on {host} is in use; give another one, or leave it out for a free one"
            ) from error
        raise InputError(
            f"master_addr, master_port: cannot listen on {host} port {port} ({error.strerror}); "
            "leave them out, or give an address and a free port of this machine"
        ) from error
    # torch itself would listen on every interface, and anyone who can reach a store may write to it.
    number = listening.getsockname()[1]
    return dist.TCPStore(host, number, is_master=True, wait_for_workers=False, master_listen_fd=listening.detach())


def leave_group() -> None:
    """Leave all process groups, if there are any: the last thing that a rank does with them and with its graphs."""
    if dist.is_initialized():
        graphs.free_all()
        dist.destroy_process_group()
