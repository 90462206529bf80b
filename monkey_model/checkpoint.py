"""Read a Monkey checkpoint directory: the visual encoder alone, or the whole model."""

from __future__ import annotations

import math
import re
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from monkey_kernels.checks import check_dtype
from monkey_model.families import family_of_keys
from monkey_model.files import (
    UNREADABLE_PICKLE,
    check_directory,
    check_pickle_allowed,
    list_problems,
    parse_json,
    read_json,
    unreadable_pickle,
)
from monkey_model.visual import VisionTransformer

if TYPE_CHECKING:
    from monkey_model.configuration_monkey import MonkeyConfig
    from monkey_model.modeling_monkey import MonkeyLMHeadModel
    from monkey_model.processing_monkey import MonkeyProcessor

PREFIX = "transformer.visual."

_LARGEST_HEADER = 100_000_000  # bytes; safetensors' own limit

_FORMATS = {
    "safetensors": ("model.safetensors.index.json", "model.safetensors"),
    "pickle": ("pytorch_model.bin.index.json", "pytorch_model.bin"),
}


def _shards(name: str, directory: Path, kind: str, prefix: str) -> list[Path]:
    """The files that hold the weights called ``prefix``...; none where there are none of a kind."""
    index_name, single = _FORMATS[kind]
    index = directory / index_name
    if (directory / single).is_file():  # as transformers prefers it
        return [directory / single]
    if not index.is_file():
        return []
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise ValueError(f"{index} must have an object 'weight_map'")
    names = {str(shard) for key, shard in weight_map.items() if key.startswith(prefix)}
    # A name is a file of this directory, never a path out of it.
    if any(Path(name).name != name for name in names):
        raise ValueError(f"{index} must name files of its own directory; got {sorted(names)}")
    shards = [directory / name for name in sorted(names)]
    missing = [str(shard) for shard in shards if not shard.is_file()]
    if missing:
        raise FileNotFoundError(f"{name} lacks shards: {list_problems(missing)}")
    return shards


def weight_files(
    name: str, directory: Path, prefix: str = "", *, allow_pickle: bool
) -> tuple[str, list[Path]]:
    """What the weights are read from: ``"safetensors"`` or ``"pickle"``, and the files.

    The one rule of this package: safetensors, or pickles for whoever asks for them.
    """
    for kind in _FORMATS:
        shards = _shards(name, directory, kind, prefix)
        if shards and kind == "pickle":
            check_pickle_allowed(name, shards[0], allow_pickle)
        if shards:
            return kind, shards
    files = ", ".join(file for files in _FORMATS.values() for file in files)
    weights = f"{prefix}*" if prefix else "weights"
    raise FileNotFoundError(f"{name} has no {weights} in any of {files}: {directory}")


def read_config(name: str, checkpoint: str | Path) -> tuple[Path, dict[str, Any]]:
    """``config.json`` and what it holds."""
    check_directory(name, checkpoint)
    path = Path(checkpoint, "config.json")
    if not path.is_file():
        raise FileNotFoundError(f"{name} has no config.json: {checkpoint}")
    config = read_json(path)
    if "transformers_weights" in config:  # could name any file, of any kind
        raise ValueError(f"{path} must not name its weights in 'transformers_weights'")
    return path, config


def _header_names(shards: Iterable[Path]) -> set[str]:
    """The names of the tensors that safetensors files hold, read from their headers.

    Raises:
        ValueError: a tensor has two values, of which safetensors and transformers take one; or a
            file is none of safetensors.
    """
    owners: dict[str, Path] = {}
    for shard in shards:
        with open(shard, "rb") as file:
            size = int.from_bytes(file.read(8), "little")
            try:
                header = parse_json(file.read(min(size, _LARGEST_HEADER)))
            except ValueError as error:
                raise ValueError(f"{shard} is no readable safetensors file: {error}") from None
        for name in header:
            if name == "__metadata__":
                continue
            if name in owners:
                raise ValueError(f"{owners[name]} and {shard.name} both hold {name}")
            owners[name] = shard
    return set(owners)


def _check_depth(
    where: str | Path, field: str, layers: Any, names: Iterable[str], blocks: str
) -> None:
    """Raise a ValueError if the config has more layers than the weights.

    Asked before the model is built, since one of a million layers takes all time and memory.

    Args:
        where: what messages call the checkpoint.
        field: of the config.
        layers: its value.
        names: of the weights.
        blocks: what the names of a layer's weights begin with, up to its number.
    """
    block = re.compile(re.escape(blocks) + r"(\d+)\.")
    held = len({found[1] for name in names if (found := block.match(name))})
    if isinstance(layers, int) and layers > held:
        raise ValueError(
            f"{where} does not fit its config: {field} must be at most {held}, as its weights "
            f"have no more {blocks}*; got {layers}"
        )


def check_depth(where: str | Path, config: MonkeyConfig, names: Iterable[str]) -> None:
    """Raise a ValueError if a whole model's config has more layers than its weights.

    Args:
        where: what messages call the checkpoint.
        config: its config.
        names: of its weights.
    """
    names = list(names)
    for field, layers, blocks in (
        ("num_hidden_layers", config.num_hidden_layers, "transformer.h."),
        ("visual.layers", config.visual.get("layers"), PREFIX + "transformer.resblocks."),
    ):
        _check_depth(where, field, layers, names, blocks)


def read_weights(
    name: str, checkpoint: str | Path, *, prefix: str = "", allow_pickle: bool = False
) -> dict[str, Tensor]:
    """The weights of a checkpoint called ``prefix``..., by the rest of their names.

    Files are mapped into memory (but pickles of before torch 1.6): what is not used is not read.

    Args:
        name: what messages call the checkpoint.
        checkpoint: directory.
        prefix: of the names.
        allow_pickle: as in :func:`load_visual`.

    Raises:
        FileNotFoundError: no such weights, or a shard is missing.
        ValueError: pickles without ``allow_pickle``; a broken file; a tensor that is there twice.
    """
    kind, shards = weight_files(name, Path(checkpoint), prefix, allow_pickle=allow_pickle)
    if kind == "pickle":
        return _read_pickles(shards, prefix)
    _header_names(shards)
    return _read_safetensors(shards, prefix)


def _read_safetensors(shards: Iterable[Path], prefix: str) -> dict[str, Tensor]:
    state = {}
    for shard in shards:
        try:
            with safe_open(shard, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118 (no mapping: it has no __iter__)
                    if key.startswith(prefix):
                        state[key.removeprefix(prefix)] = file.get_tensor(key)
        except SafetensorError as error:
            raise ValueError(f"{shard} is no readable safetensors file: {error}") from None
    return state


def _read_pickles(shards: Iterable[Path], prefix: str) -> dict[str, Tensor]:
    state = {}
    for shard in shards:
        try:
            # Files of before torch 1.6 are no zip archives and cannot be mapped.
            mmap = zipfile.is_zipfile(shard)
            content = torch.load(shard, map_location="cpu", mmap=mmap, weights_only=True)
        except UNREADABLE_PICKLE:
            raise unreadable_pickle(shard) from None
        if not isinstance(content, dict):
            raise ValueError(f"{shard} must hold a state dict; got {type(content).__name__}")
        for key, tensor in content.items():
            if isinstance(key, str) and key.startswith(prefix):
                state[key.removeprefix(prefix)] = tensor
    return state


def check_state(
    expected: Mapping[str, Tensor],
    state: Mapping[str, Any],
    where: str | Path,
    *,
    prefix: str = "",
    part: str = "model",
) -> None:
    """Whether a checkpoint has the tensors that a part of the model has, each of its shape.

    Args:
        expected: the part's state dict, on any device.
        state: what the checkpoint holds, by the same names.
        where: what messages call it.
        prefix: of the names, in messages.
        part: in messages.

    Raises:
        ValueError: it lacks some, has others, or some are of another shape or no floats.
    """
    problems = [f"missing {prefix}{key}" for key in expected if key not in state]
    unexpected = [f"{prefix}{key}" for key in state if key not in expected]
    problems += [f"unexpected {key}" for key in unexpected]
    for key, tensor in state.items():
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            kind = getattr(tensor, "dtype", type(tensor).__name__)
            problems.append(f"{prefix}{key} must be a tensor of floats, got {kind}")
        elif key in expected and tensor.shape != expected[key].shape:
            shapes = f"{list(expected[key].shape)}, got {list(tensor.shape)}"
            problems.append(f"{prefix}{key} must be {shapes}")
    if problems:
        raise ValueError(
            f"{where} does not fit the {part} of its config{family_of_keys(unexpected)}: "
            f"{list_problems(problems)}"
        )


def check_finite(where: str | Path, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Raise a ValueError, which calls their home ``where``, if tensors hold NaN or infinity.

    One pass over each tensor, without a copy of it: 20 GB take a core two seconds.
    """
    bad = [f"{name} ({tensor.dtype})" for name, tensor in tensors if not _is_finite(tensor)]
    if bad:
        raise ValueError(f"{where} holds NaN or infinity in {list_problems(bad, 5, ', ')}")


def _is_finite(tensor: Tensor) -> bool:
    # Under ZeRO-3 a tensor is empty here; offloaded, it has no values; quantised, integers.
    if not tensor.is_floating_point() or tensor.numel() == 0 or tensor.is_meta:
        return True
    if tensor.itemsize == 1:  # float8, which has little arithmetic
        tensor = tensor.float()
    # NaN passes through to both bounds.
    return all(math.isfinite(bound) for bound in torch.stack(tensor.aminmax()).tolist())


@contextmanager
def _read_by_transformers(what: str) -> Iterator[None]:
    """A file that transformers, tokenizers or Jinja cannot digest is a ValueError that names it.

    They check little of what they read, and raise whatever comes of it, such as a KeyError. Errors
    of the system, of memory and of torch are no matter of a file and pass.
    """
    try:
        yield
    except (OSError, ValueError, RuntimeError, MemoryError, ImportError):
        raise
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(f"{what} has a damaged file: {reason}") from error


def load_processor(checkpoint: str | Path, name: str = "checkpoint") -> MonkeyProcessor:
    """Tokenizer and image processor of a checkpoint, and its chat template tried once.

    Args:
        checkpoint: directory.
        name: what messages call it.

    Raises:
        OSError: a file is missing.
        ValueError: one is damaged.
    """
    from monkey_model.processing_monkey import MonkeyProcessor

    check_directory(name, checkpoint)
    with _read_by_transformers(f"{name} {checkpoint}"):
        processor = MonkeyProcessor.from_pretrained(checkpoint)
        if processor.tokenizer.chat_template is not None:
            greeting = [{"role": "user", "content": [{"type": "text", "text": "Hello"}]}]
            processor.tokenizer.apply_chat_template(greeting, tokenize=False)
    return processor


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
        interpolation: outranks the config's, as do fit and grid; see
            :class:`monkey_model.crop_settings.CropSettings`.

    Raises:
        FileNotFoundError: no such directory, no config, no weights, or a shard is missing.
        TypeError: ``dtype`` is no floating-point dtype.
        ValueError: pickles without ``allow_pickle``; a broken file; a tensor that is there twice,
            or holds NaN or infinity; a checkpoint of another family; keys or shapes that are not
            the encoder's. Each is named.
    """
    check_dtype("dtype", dtype, (torch.float32, torch.float16, torch.bfloat16, torch.float64))
    directory = Path(checkpoint)
    config_path, content = read_config("checkpoint", checkpoint)
    config = content.get("visual")
    if not isinstance(config, dict):
        raise ValueError(f"{config_path} must have an object 'visual'")
    state = read_weights("checkpoint", directory, prefix=PREFIX, allow_pickle=allow_pickle)
    if "layers" in config:
        _check_depth(directory, "visual.layers", config["layers"], state, "transformer.resblocks.")

    try:
        with torch.device("meta"):
            encoder = VisionTransformer.from_config(
                config, interpolation=interpolation, fit=fit, grid=grid
            )
    except (TypeError, ValueError) as error:
        raise ValueError(f"{config_path} 'visual' does not describe an encoder: {error}") from None
    check_state(encoder.state_dict(), state, directory, prefix=PREFIX, part="encoder")
    state = {key: tensor.to(device, dtype) for key, tensor in state.items()}
    check_finite(directory, ((PREFIX + key, tensor) for key, tensor in state.items()))
    encoder.load_state_dict(state, assign=True)
    return encoder.eval()


def load_model(
    checkpoint: str | Path,
    name: str = "checkpoint",
    *,
    without_adapters: bool = False,
    allow_pickle: bool = False,
    **settings: Any,
) -> MonkeyLMHeadModel:
    """The whole model of a checkpoint, with every weight from it.

    Where some are missing, transformers' own loading warns, and makes new ones.

    Args:
        checkpoint: directory.
        name: what messages call it.
        without_adapters: whether the per-crop adapters may be missing, and start anew.
        allow_pickle: as in :func:`load_visual`.
        settings: of ``from_pretrained``.

    Raises:
        OSError: no such directory, no ``config.json``, or no weights.
        ValueError: pickles without ``allow_pickle``; weights that are missing, too many, there
            twice, of another shape, NaN or infinite; a damaged file; a checkpoint of another
            family, or an adapter in place of a model.
    """
    # Encoding alone needs no language model.
    from monkey_model.configuration_monkey import MonkeyConfig
    from monkey_model.modeling_monkey import MonkeyLMHeadModel

    read_config(name, checkpoint)
    # transformers would load both, an adapter's pickle too.
    if Path(checkpoint, "adapter_config.json").exists():
        raise ValueError(f"{name} must be a whole model without an adapter beside it: {checkpoint}")
    kind, shards = weight_files(name, Path(checkpoint), allow_pickle=allow_pickle)
    with _read_by_transformers(f"{name} {checkpoint}"):
        config = MonkeyConfig.from_pretrained(checkpoint)
        if kind == "safetensors":
            check_depth(checkpoint, config, _header_names(shards))
        model, info = MonkeyLMHeadModel.from_pretrained(
            checkpoint, output_loading_info=True, use_safetensors=kind == "safetensors", **settings
        )
    missing = sorted(
        key for key in info["missing_keys"] if not (without_adapters and "_lora." in key)
    )
    if missing:
        raise ValueError(
            f"{name} {checkpoint} lacks {len(missing)} weights of the model: "
            f"{list_problems(missing, 5, ', ')}"
        )
    check_finite(checkpoint, ((key, p.detach()) for key, p in model.named_parameters()))
    return model
