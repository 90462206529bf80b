"""Read a Monkey checkpoint directory: the visual encoder alone, or the whole model."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from monkey_kernels.checks import check_dtype
from monkey_model.files import check_directory, list_problems, read_json
from monkey_model.visual import VisionTransformer

if TYPE_CHECKING:
    from monkey_model.modeling_monkey import MonkeyLMHeadModel

PREFIX = "transformer.visual."

_FORMATS = {
    "safetensors": ("model.safetensors.index.json", "model.safetensors"),
    "pickle": ("pytorch_model.bin.index.json", "pytorch_model.bin"),
}


def _shards(directory: Path, kind: str) -> list[Path]:
    """The files that hold the encoder's weights; empty where there are none of this kind."""
    index_name, single = _FORMATS[kind]
    index = directory / index_name
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise ValueError(f"{index} must have an object 'weight_map'")
        names = {str(shard) for key, shard in weight_map.items() if key.startswith(PREFIX)}
        # A name is a file of this directory, never a path out of it.
        if any(Path(name).name != name for name in names):
            raise ValueError(f"{index} must name files of its own directory; got {sorted(names)}")
        shards = [directory / name for name in sorted(names)]
    else:
        shards = [directory / single] if (directory / single).is_file() else []
    missing = [str(shard) for shard in shards if not shard.is_file()]
    if missing:
        raise FileNotFoundError(f"checkpoint shards are missing: {', '.join(missing)}")
    return shards


def _read_safetensors(shards: Iterable[Path]) -> dict[str, Tensor]:
    state = {}
    for shard in shards:
        try:
            with safe_open(shard, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118 (no mapping: it has no __iter__)
                    if key.startswith(PREFIX):
                        state[key.removeprefix(PREFIX)] = file.get_tensor(key)
        except SafetensorError as error:
            raise ValueError(f"{shard} is no readable safetensors file: {error}") from None
    return state


def _read_pickles(shards: Iterable[Path]) -> dict[str, Tensor]:
    state = {}
    for shard in shards:
        try:
            # Files of before torch 1.6 are no zip archives and cannot be mapped.
            mmap = zipfile.is_zipfile(shard)
            content = torch.load(shard, map_location="cpu", mmap=mmap, weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError):
            # Not torch's own message, which says how to load the file unsafely.
            raise ValueError(
                f"{shard} is no readable weights file: it is damaged, or holds something else than "
                "tensors, which is not loaded"
            ) from None
        if not isinstance(content, dict):
            raise ValueError(f"{shard} must hold a state dict; got {type(content).__name__}")
        for key, tensor in content.items():
            if isinstance(key, str) and key.startswith(PREFIX):
                state[key.removeprefix(PREFIX)] = tensor
    return state


def _check_state(encoder: VisionTransformer, state: dict[str, Tensor], where: Path) -> None:
    expected = encoder.state_dict()
    problems = [f"missing {PREFIX}{key}" for key in expected if key not in state]
    problems += [f"unexpected {PREFIX}{key}" for key in state if key not in expected]
    for key, tensor in state.items():
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            kind = getattr(tensor, "dtype", type(tensor).__name__)
            problems.append(f"{PREFIX}{key} must be a tensor of floats, got {kind}")
        elif key in expected and tensor.shape != expected[key].shape:
            shapes = f"{list(expected[key].shape)}, got {list(tensor.shape)}"
            problems.append(f"{PREFIX}{key} must be {shapes}")
    if problems:
        raise ValueError(
            f"{where} does not fit the encoder of its config: {list_problems(problems)}"
        )


def load_visual(
    checkpoint: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    allow_pickle: bool = False,
    interpolation: str | None = None,
    fit: str | None = None,
    grid: tuple[int, int] | None = None,
) -> VisionTransformer:
    """The visual encoder of a checkpoint, in eval mode.

    Reads ``config.json`` (its ``visual`` object) and the ``transformer.visual.*`` tensors, from
    ``model.safetensors`` or the shards of its index; nothing else of the model is loaded.

    Args:
        checkpoint: directory.
        dtype: to cast the weights to.
        device: to put them on.
        allow_pickle: whether ``pytorch_model*.bin`` may be read where there are no safetensors
            files. Read with ``torch.load(weights_only=True)``; still, only from a source you trust.
        interpolation: outranks the config's. Where neither says, it is ``"bicubic"``, as the
            published checkpoints were trained.
        fit: outranks the config's.
        grid: outranks the config's.

    Raises:
        FileNotFoundError: no such directory, no config, no weights, or a shard is missing.
        TypeError: ``dtype`` is no floating-point dtype.
        ValueError: pickles without ``allow_pickle``, a broken file, or keys or shapes that are not
            the encoder's; each is named.
    """
    check_dtype("dtype", dtype, (torch.float32, torch.float16, torch.bfloat16, torch.float64))
    directory = Path(checkpoint)
    if not directory.is_dir():
        raise FileNotFoundError(f"checkpoint must be a directory; got {directory}")
    config_path = directory / "config.json"
    if not config_path.is_file():
        raise FileNotFoundError(f"checkpoint has no config.json: {directory}")
    config = read_json(config_path).get("visual")
    if not isinstance(config, dict):
        raise ValueError(f"{config_path} must have an object 'visual'")

    shards = _shards(directory, "safetensors")
    pickles = [] if shards else _shards(directory, "pickle")
    if pickles and not allow_pickle:
        raise ValueError(
            f"checkpoint {directory} holds only pickles ({pickles[0].name}), which can run code; "
            "pass allow_pickle=True (--allow-pickle) to read them"
        )
    if not shards and not pickles:
        names = ", ".join(name for names in _FORMATS.values() for name in names)
        raise FileNotFoundError(f"checkpoint has no {PREFIX}* in any of {names}: {directory}")
    state = _read_safetensors(shards) if shards else _read_pickles(pickles)

    try:
        with torch.device("meta"):
            encoder = VisionTransformer.from_config(
                config, interpolation=interpolation, fit=fit, grid=grid
            )
    except (TypeError, ValueError) as error:
        raise ValueError(f"{config_path} 'visual' does not describe an encoder: {error}") from None
    _check_state(encoder, state, directory)
    encoder.load_state_dict({k: v.to(device, dtype) for k, v in state.items()}, assign=True)
    return encoder.eval()


def load_model(
    checkpoint: str | Path,
    name: str = "checkpoint",
    *,
    without_adapters: bool = False,
    **settings: Any,
) -> MonkeyLMHeadModel:
    """The whole model of a checkpoint, with every weight from it.

    Where some are missing, transformers' own loading warns, and makes new ones.

    Args:
        checkpoint: directory.
        name: what messages call it.
        without_adapters: whether the per-crop adapters may be missing, and start anew.
        settings: of ``from_pretrained``.

    Raises:
        OSError: no such directory, no ``config.json``, or no weights.
        ValueError: weights that are missing, of another shape, or in a damaged file.
    """
    from monkey_model.modeling_monkey import MonkeyLMHeadModel  # encoding alone needs no LLM

    check_directory(name, checkpoint)
    if not Path(checkpoint, "config.json").is_file():
        raise FileNotFoundError(f"{name} has no config.json: {checkpoint}")
    model, info = MonkeyLMHeadModel.from_pretrained(
        checkpoint, output_loading_info=True, **settings
    )
    missing = sorted(
        key for key in info["missing_keys"] if not (without_adapters and "_lora." in key)
    )
    if missing:
        raise ValueError(
            f"{name} {checkpoint} lacks {len(missing)} weights of the model: "
            f"{list_problems(missing, 5, ', ')}"
        )
    return model
