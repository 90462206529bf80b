"""The options that load a model to ask, for the commands that have them."""

from __future__ import annotations

import logging
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from monkey_model.commands.console import DType, default_dtype, usable_device

if TYPE_CHECKING:
    from monkey_model.serving.answer import Answerer


class DeviceMap(str, Enum):
    auto = "auto"
    balanced = "balanced"
    sequential = "sequential"


class Quantization(str, Enum):
    four = "4bit"
    eight = "8bit"


DeviceMapOption = Annotated[
    DeviceMap | None,
    typer.Option(help="Spread the model over all GPUs, and what is left over the CPU."),
]
QuantizationOption = Annotated[
    Quantization | None, typer.Option(help="Weights in 4 or 8 bits, by bitsandbytes.")
]


def check_one_place(device: str | None, device_map: DeviceMap | None) -> None:
    """A usage error where both are given."""
    if device is not None and device_map is not None:
        raise typer.BadParameter("give --device, for one, or --device-map, for all GPUs")


def check_output_folder(out: Path) -> None:
    """Raise a ValueError if --out, a folder, is something else."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out must be a folder; got the file {out}")


def load_answerer(
    checkpoint: Path,
    device: str | None,
    device_map: DeviceMap | None,
    quantization: Quantization | None,
    dtype: DType | None,
    **settings: Any,
) -> Answerer:
    """The checkpoint's model as the options want it; ``settings`` are those of from_pretrained."""
    from monkey_model.serving.answer import Answerer

    target = usable_device(device)
    if device_map is not None and target.type == "cpu":
        raise ValueError(
            f"--device-map {device_map.value} spreads a model over GPUs; torch finds none here"
        )
    # It says that 8-bit products round their inputs, of each product anew.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    return Answerer.from_pretrained(
        checkpoint,
        device=target,
        dtype=default_dtype(dtype, target),
        device_map=None if device_map is None else device_map.value,
        quantization=None if quantization is None else quantization.value,
        **settings,
    )
