"""The process of one rank of a `MultiGpuWrapper`: `python -m accessory.model.rank_worker`.

It reads its `Place` from standard input and loads the model together with the other ranks. Then it answers calls until
its connection or its standard input ends. Both end when the driver dies.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

from accessory.launch.ending import leave
from accessory.launch.rank_processes import Place, call_back
from accessory.launch.speaking import set_up_logging


def main() -> None:
    place, connection = call_back()
    set_up_logging(place.rank)
    try:
        serve(connection, place)
    except (EOFError, ConnectionError):
        pass  # the driver is gone, or has closed the connection
    finally:
        leave(0)


def serve(connection: Connection, place: Place) -> None:
    options = connection.recv()
    model: Any = None

    def load() -> int:
        nonlocal model
        model = _load(place, options)
        return model.image_words

    if not _answer(connection, load):
        return
    said, steps = time.monotonic(), 0

    def step(*_: Any) -> None:
        """Tell the driver that the ranks are still working: a call may take longer than it waits for silent ranks."""
        nonlocal said
        if (now := time.monotonic()) - said > 0.1:
            connection.send(("step", steps))
            said = now

    def count(n: int) -> None:
        nonlocal steps
        steps = n

    def cancelled() -> bool:
        step()
        return connection.poll()  # any message of the driver during a call means that the call should end

    if place.rank == 0:
        model.llma.register_forward_pre_hook(step)
    while True:
        method, arguments = connection.recv()
        if method == "cancel":
            continue  # the call that it cancels had already ended
        if place.rank == 0 and method in ("generate", "stream_generate"):
            arguments["cancelled"] = cancelled
            steps = 0
            if method == "generate":
                arguments["on_step"] = count
        _answer(connection, partial(_do, connection, model, method, arguments, place.rank))


def _load(place: Place, options: dict[str, Any]) -> Any:
    import torch

    from accessory.launch.process_group import join_store
    from accessory.model.meta import MetaModel

    cuda = torch.cuda.is_available() and str(options.get("device") or "cuda") != "cpu"
    if not cuda:
        torch.set_num_threads(place.threads)
    group = join_store(place.host, place.port, place.rank, place.size, cuda=cuda)
    return MetaModel.from_pretrained(**options, mp_group=group)


def _do(connection: Connection, model: Any, method: str, arguments: dict[str, Any], rank: int) -> Any:
    """Run a method of the model. Every rank computes, but only the first one sends the result."""
    from accessory.model.messages import arguments_received, to_plain

    result = getattr(model, method)(**arguments_received(arguments))
    if method != "stream_generate":
        return to_plain(result) if rank == 0 else None
    for item in result:
        if rank == 0:
            connection.send(("item", item))
    return None


def _answer(connection: Connection, work: Callable[[], Any]) -> bool:
    """Do the work and send the outcome: ("done", result), ("refused", a user's error) or ("failed", text, trace).

    Returns whether it succeeded.
    """
    from accessory.errors import AccessoryError

    try:
        connection.send(("done", work()))
        return True
    except (AccessoryError, NotImplementedError) as error:
        connection.send(("refused", error))
    except (EOFError, ConnectionError):
        raise
    except Exception as error:
        text = str(error).splitlines()[0] if str(error) else ""
        connection.send(("failed", f"{type(error).__name__}: {text}", traceback.format_exc()))
    return False


if __name__ == "__main__":
    main()
