"""What the commands print, and the device that they run on."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from monkey_model.inputs.fetch import shown

if TYPE_CHECKING:
    import torch

out_console = Console()
err_console = Console(stderr=True)


class DType(str, Enum):
    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"


DeviceOption = Annotated[
    str | None, typer.Option(help="Such as cpu or cuda:1. Default: cuda if there is one.")
]
DTypeOption = Annotated[
    DType | None, typer.Option(help="Default: float32 on the CPU, else bfloat16.")
]
ShardOption = Annotated[
    str | None, typer.Option(help="I/N: do the I-th (from 0) of N shares, one per process.")
]
PickleOption = Annotated[
    bool,
    typer.Option("--allow-pickle", help="Read *.bin weights, from a source you trust."),
]


def say(console: Console, message: str, end: str = "\n") -> None:
    """Print ``message`` as it is."""
    # File names may hold what Rich takes for markup or emoji.
    console.print(message, markup=False, emoji=False, highlight=False, soft_wrap=True, end=end)


def report(message: str) -> None:
    """Print ``message`` as an error."""
    err_console.print(Text("Error: ", "bold red"), end="")
    say(err_console, shown(message))


#: What a user, or the machine, can cause. Of training, a RuntimeError is worth its traceback.
WRONG_INPUT = (OSError, TypeError, ValueError, ImportError)


@contextmanager
def one_error(
    errors: tuple[type[Exception], ...] = (*WRONG_INPUT, RuntimeError),
) -> Iterator[None]:
    """These errors end the command with one line, and exit code 2.

    Args:
        errors: by default also the RuntimeErrors of memory, or of a backend that cannot run.
    """
    try:
        yield
    except typer.Exit:  # a RuntimeError, too
        raise
    except errors as error:
        report(str(error))
        raise typer.Exit(2) from None


def progress_bar(doing: str, *, disable: bool = False, unit: str | None = None) -> Progress:
    """A bar that says how many are done and how long the others take.

    Args:
        doing: before the bar.
        disable: show nothing.
        unit: what is counted, to show how many a second, and the task's field ``waited``: the share
            of the time that the device waited.
    """
    columns: list[ProgressColumn] = [TextColumn(doing), BarColumn(), MofNCompleteColumn()]
    if unit is not None:
        columns += [_Rate(unit), TextColumn("device waited {task.fields[waited]:.0%}")]
    return Progress(*columns, TimeRemainingColumn(), console=err_console, disable=disable)


class _Rate(ProgressColumn):
    def __init__(self, unit: str) -> None:
        super().__init__()
        self._unit = unit

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:.1f} {self._unit}/s")


def usable_device(name: str | None) -> torch.device:
    """The device called ``name``, or the default one, checked by a first allocation."""
    import torch

    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as failure:
        reason = str(failure).splitlines()[0]
        raise ValueError(f"--device {name} cannot be used: {reason}") from None
    return device


def default_dtype(dtype: DType | None, device: torch.device) -> torch.dtype:
    """``dtype`` as torch's; where it is None, float32 on the CPU and bfloat16 elsewhere."""
    import torch

    if dtype is None:
        dtype = DType.float32 if device.type == "cpu" else DType.bfloat16
    return getattr(torch, dtype.value)


def parse_pair(option: str, text: str, between: str, example: str) -> tuple[int, int]:
    """Two whole numbers, the second above 0."""
    first, found, second = text.lower().partition(between)
    numbers = first.isdecimal() and second.isdecimal() and text.isascii()
    if not (found and numbers and int(second)):
        raise typer.BadParameter(f"{option} must be {example}; got {text!r}")
    return int(first), int(second)


def parse_shard(text: str) -> tuple[int, int]:
    """``"0/4"`` as (0, 4): counted from 0, as Slurm and Kubernetes number their processes."""
    example = "I/N with I below N, such as 0/4"
    part, parts = parse_pair("--shard", text, "/", example)
    if part >= parts:
        raise typer.BadParameter(f"--shard must be {example}; got {text!r}")
    return part, parts


def check_free(host: str, port: int) -> None:
    """Raise a ValueError if an address is in use, or none of this machine's.

    Asked before a model is loaded: servers find out late.
    """
    try:
        (family, kind, protocol, _, address), *_ = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        with socket.socket(family, kind, protocol) as server:
            server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            server.bind(address)
    except OSError as error:
        raise ValueError(
            f"--host and --port must be free on this machine; got {host} and {port}: "
            f"{error.strerror}"
        ) from None
