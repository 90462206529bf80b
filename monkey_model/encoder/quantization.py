"""The ViT's projections in 8 bits, by torchao, for inference."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from monkey_kernels.checks import check_choice, check_dtype

KINDS = ("fp8", "int8")
DTYPES = {
    "fp8": (torch.bfloat16,),  # what the GPU's products with a scale per row write
    "int8": (torch.bfloat16, torch.float16, torch.float32),
}
#: The products of a block, the large ones and the frozen ones: adapters are not among them.
PROJECTIONS = ("attn.in_proj", "attn.out_proj", "mlp.c_fc", "mlp.c_proj")
_FP8_CAPABILITY = (8, 9)
_FP8_AMD = ("gfx942", "gfx950")
_MULTIPLE = 16  # of a product's sides, on a GPU


def quantize_blocks(blocks: nn.ModuleList, kind: str) -> None:
    """See :meth:`monkey_model.visual.VisionTransformer.quantize`. An error changes nothing."""
    check_choice("kind", kind, KINDS)
    if blocks.training:
        raise ValueError("the encoder must be in eval mode to be quantised; got training mode")
    projections = {
        f"transformer.resblocks.{number}.{name}": block.get_submodule(name)
        for number, block in enumerate(blocks)
        for name in PROJECTIONS
    }
    for name, projection in projections.items():
        _check_projection(name, projection, kind)
    try:
        import torchao.quantization as torchao
    except ImportError as error:
        raise ImportError(
            f'quantize({kind!r}) needs torchao: pip install "monkey-vision[quantize]"'
        ) from error
    config: Any
    if kind == "fp8":
        config = torchao.Float8DynamicActivationFloat8WeightConfig(granularity=torchao.PerRow())
    else:
        config = torchao.Int8DynamicActivationInt8WeightConfig()
    chosen = set(projections.values())
    torchao.quantize_(blocks, config, filter_fn=lambda module, _: module in chosen)


def _check_projection(name: str, projection: nn.Module, kind: str) -> None:
    if type(projection) is not nn.Linear:
        raise ValueError(
            f"{name} must be a plain nn.Linear to be quantised; got "
            f"{type(projection).__module__}.{type(projection).__name__}: take adapters off "
            "(merge_and_unload, or unload) first"
        )
    weight = projection.weight
    if is_traceable_wrapper_subclass(weight):
        raise ValueError(
            f"{name} must have a plain weight to be quantised; got {type(weight).__name__}: it is "
            "quantised or sharded already"
        )
    check_dtype(f"the dtype of {name}, to be quantised to {kind},", weight.dtype, DTYPES[kind])
    if (reason := _why_not(kind, weight.device)) is not None:
        raise ValueError(reason)
    if weight.is_cuda and any(size % _MULTIPLE for size in weight.shape):
        raise ValueError(
            f"{name} must have sides that are multiples of {_MULTIPLE} to be quantised on a GPU; "
            f"got {list(weight.shape)}"
        )


def _why_not(kind: str, device: torch.device) -> str | None:
    """Why a device cannot compute in ``kind``; None where it can."""
    if device.type not in ("cpu", "cuda"):
        where = "it is offloaded" if device.type == "meta" else "that is not supported"
        return f"the ViT must be on a CPU or a GPU to be quantised; got {device}: {where}"
    if kind == "int8":
        return None
    if device.type == "cpu":
        return "kind 'fp8' needs a GPU that multiplies fp8; got the CPU, which takes 'int8' alone"
    if torch.version.hip is not None:
        name = torch.cuda.get_device_properties(device).gcnArchName
        can = name.startswith(_FP8_AMD)
    else:
        capability = torch.cuda.get_device_capability(device)
        name, can = (
            f"compute capability {capability[0]}.{capability[1]}",
            capability >= _FP8_CAPABILITY,
        )
    if can:
        return None
    return (
        "kind 'fp8' needs a GPU that multiplies fp8: compute capability 8.9 or later, or AMD's "
        f"{' or '.join(_FP8_AMD)}; got {name}, which takes 'int8'"
    )
