"""Work on many pictures on a Ray cluster, by Ray Data: read, prepare on CPUs, run a model, write.

Every item has an id. Ray Data writes the ids of finished files down, in two phases with the files
themselves, so that a killed actor, worker or driver loses no item and doubles none: the same call
goes on where the last one stopped. What raises here for an item would come back for ever, so a bad
item is to become a row with an error.

The folder of the results must be one that every machine of the cluster sees.
"""

from __future__ import annotations

import json
import math
import re
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from monkey_model.files import atomic, need_extra

_ITEMS_PER_TASK = 64  # of a process that prepares
_REACH_SECONDS = 10.0


def connect(address: str) -> Any:
    """Ray's module, connected.

    Args:
        address: ``"local"`` for a cluster of this machine that ends with the process, ``"auto"``
            for the one that runs here, ``HOST:PORT`` or ``ray://HOST:PORT``.

    Raises:
        ImportError: Ray is not installed.
        ValueError: another address, or nobody there.
    """
    ray = need_extra("ray", "ray", "--ray")
    need_extra("ray.data", "ray", "--ray")
    place = re.fullmatch(r"(?:ray://)?(.+):(\d+)", address)
    if place is None and address not in ("local", "auto"):
        raise ValueError(
            f"--ray must be local, auto, HOST:PORT or ray://HOST:PORT; got {address!r}"
        )
    if ray.is_initialized():
        return ray
    try:
        if place is not None:  # Ray itself tries for minutes, and then ends the process
            socket.create_connection((place[1], int(place[2])), _REACH_SECONDS).close()
        ray.init(address=address, log_to_driver=False, logging_level="ERROR")
    except (OSError, OverflowError, SystemExit) as error:  # a ConnectionError among them
        reason = " ".join(str(error).split())
        raise ValueError(f"no Ray cluster can be reached at --ray {address}: {reason}") from None
    return ray


def cluster_device(address: str, name: str | None) -> Any:
    """The device of the models: a GPU each if the cluster has any, or what ``name`` says.

    Args:
        address: of :func:`connect`, whose errors come out.
        name: ``cpu`` or ``cuda``, or None.

    Raises:
        ValueError: another device: which GPU an actor gets is Ray's to say.
    """
    import torch

    if name not in (None, "cpu", "cuda"):
        raise ValueError(f"--device must be cpu or cuda with --ray; got {name}")
    gpus = connect(address).cluster_resources().get("GPU", 0)
    return torch.device(name or ("cuda" if gpus else "cpu"))


def model_actors(ray: Any, asked: int | None, on_gpus: bool) -> int:
    """How many actors are to hold a model.

    Args:
        ray: of :func:`connect`.
        asked: None for all GPUs of the cluster, or one on CPUs.
        on_gpus: whether each takes a GPU, or the CPUs do the work.

    Raises:
        ValueError: more than the cluster has GPUs, or CPUs.
    """
    kind, others = ("GPU", 0) if on_gpus else ("CPU", 1)  # which prepares, and writes
    there = int(ray.cluster_resources().get(kind, 0)) - others
    count = asked or (max(there, 1) if on_gpus else 1)
    if count > there:
        beside = f" beside {others} for other work" if others else ""
        raise ValueError(f"{count} models need a {kind} each; the Ray cluster has {there}{beside}")
    return count


@contextmanager
def _checkpoints(ray: Any, folder: Path) -> Iterator[None]:
    from ray.data.checkpoint import CheckpointConfig

    context = ray.data.DataContext.get_current()
    before = context.checkpoint_config, context.enable_progress_bars
    context.checkpoint_config = CheckpointConfig(
        id_column="id", checkpoint_path=str(folder), delete_checkpoint_on_success=False
    )
    context.enable_progress_bars = sys.stderr.isatty()
    try:
        yield
    finally:
        context.checkpoint_config, context.enable_progress_bars = before


def run_on_ray(
    ray: Any,
    items: Sequence[tuple[str, Any]],
    prepare: Callable[[Any], Any],
    model: type,
    arguments: Sequence[Any],
    write: Callable[[Any], None],
    *,
    state: Path,
    actors: int,
    on_gpus: bool,
    batch_size: int = 1,
) -> None:
    """Prepare items on CPUs, run a model on them, and write what comes out.

    Args:
        ray: of :func:`connect`.
        items: ids, and what JSON can say about each.
        prepare: gets a table of ``id`` and ``item`` (JSON), returns one with ``id``.
        model: a class whose instances get such a table and return another; made once per actor.
        arguments: of the class.
        write: starts the run by writing the dataset that it gets to files.
        state: folder for the list of items and the ids that are done.
        actors: that hold a model.
        on_gpus: whether each has a GPU of its own.
        batch_size: items in one call of the model.

    Raises:
        OSError: the folder cannot be written.
        RuntimeError: the model, or Ray, fails.
    """
    import pyarrow
    import pyarrow.parquet

    cpus = int(ray.cluster_resources().get("CPU", 1))
    size = max(min(_ITEMS_PER_TASK, math.ceil(len(items) / (4 * cpus))), 1)
    columns = {"id": [id for id, _ in items], "item": [json.dumps(item) for _, item in items]}
    schema = pyarrow.schema([("id", pyarrow.string()), ("item", pyarrow.string())])
    listed = state / "items.parquet"
    with atomic(listed, shared=False) as name:
        pyarrow.parquet.write_table(pyarrow.table(columns, schema=schema), name)
    with _checkpoints(ray, state / "done"):
        dataset = ray.data.read_parquet(str(listed))
        dataset = dataset.repartition(target_num_rows_per_block=size)
        dataset = dataset.map_batches(
            prepare,
            batch_format="pyarrow",
            batch_size=1,  # a prepared picture may have 100 MB
            num_cpus=1,
            ray_remote_args_fn=dict,  # adds nothing, and keeps it apart from the model's process
        )
        dataset = dataset.map_batches(
            model,
            fn_constructor_args=tuple(arguments),
            batch_format="pyarrow",
            batch_size=batch_size,
            compute=ray.data.ActorPoolStrategy(size=actors),
            **({"num_gpus": 1} if on_gpus else {"num_cpus": 1}),
        )
        try:
            write(dataset)
        except ray.exceptions.RayError as error:
            raise RuntimeError(f"Ray: {error}") from error
