"""The process of one rank of a `MultiGpuWrapper`: `python -m accessory.model.rank_worker`.

It reads its `Place` from standard input and loads the model together with the other ranks. Then it runs the steps that
the driver asks for, until its connection or its standard input ends. Both end when the driver dies.
"""

from __future__ import annotations

from multiprocessing.connection import Connection
from typing import Any

from accessory.launch.ending import leave
from accessory.launch.rank_processes import Place, call_back
from accessory.launch.speaking import set_up_logging


def main() -> None:
    place, connection = call_back()
    set_up_logging(place.rank)
    try:
        work(connection, place)
    except (EOFError, ConnectionError):
        pass  # the driver is gone, or has closed the connection
    finally:
        leave(0)


def work(connection: Connection, place: Place) -> None:
    options = connection.recv()
    from accessory.engine.rank_executor import DONE, failure_of, serve

    try:
        runner = _load(place, options)
    except Exception as error:
        connection.send(failure_of(error))
        return
    connection.send((DONE, runner.about))
    serve(connection, runner, first=place.rank == 0)


def _load(place: Place, options: dict[str, Any]) -> Any:
    import torch

    from accessory.launch.process_group import join_store
    from accessory.model.meta import MetaModel

    cuda = torch.cuda.is_available() and options.get("device") != "cpu"
    if not cuda:
        torch.set_num_threads(place.threads)
    group = join_store(place.host, place.port, place.rank, place.size, cuda=cuda)
    pages = options.pop("pages", None)
    return MetaModel.from_pretrained(**options, mp_group=group).runner(pages)


if __name__ == "__main__":
    main()
