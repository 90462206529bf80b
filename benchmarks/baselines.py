"""What we compare with, written out plainly on the weights of our modules.

- Upstream's algorithm: five sequential passes in [N, crops, E] layout, an equality check of query
  and key in every block, bmm, softmax, bmm, and queries repeated for every crop.
  tests/test_baselines.py holds it against the outputs of the stock code, so that what we compare
  with is what users run.
- The strongest library form: what torch's own parts give with all crops in one batch, adapters as
  batched products, and ``F.scaled_dot_product_attention``.
- Preprocessing by other packages, where they are installed.

A result is held to the first of these before it is timed.

Source: upstream ``monkey_model/visual.py``.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterable
from typing import Any, cast
from unittest import mock

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.workloads import DEVICE
from monkey_kernels import CLIP_MEAN, CLIP_STD
from monkey_model.encoder.crop_adapters import Lora_Adapter
from monkey_model.encoder.positions import get_abs_pos
from monkey_model.visual import VisionTransformer, VisualAttentionBlock, sliding_window

# ---- upstream ---------------------------------------------------------------------------------


def upstream_crops(image: Image.Image, interpolation: str = "bicubic") -> Tensor:
    """One decoded image to [5, 3, 448, 448]: Pillow, to tensor, normalise, cut, interpolate."""
    resized = image.convert("RGB").resize((896, 896), Image.Resampling[interpolation.upper()])
    pixels = torch.from_numpy(np.array(resized)).permute(2, 0, 1).contiguous()
    canvas = pixels.to(torch.float32).div(255)
    mean, std = torch.tensor(CLIP_MEAN).view(3, 1, 1), torch.tensor(CLIP_STD).view(3, 1, 1)
    return _cut(canvas.sub_(mean).div_(std).unsqueeze(0), interpolation)


def _cut(canvas: Tensor, interpolation: str) -> Tensor:
    """A normalised canvas [1, 3, 896, 896] to its five crops."""
    windows = sliding_window(canvas, (448, 448), 448)
    small = F.interpolate(canvas, size=(448, 448), mode=interpolation)
    return torch.cat([window for row in windows for window in row] + [small])


def _attention(attn: Any, x: Tensor, idx: int | None) -> Tensor:
    if not torch.compiler.is_compiling():  # where it would break the graph in every block
        assert torch.equal(x, x)  # upstream compares query with key: a device synchronisation
    tokens, batch, width = x.shape
    heads, head_width = attn.num_heads, width // attn.num_heads
    mixed = attn.in_proj(x)
    if idx is not None:
        mixed += attn.in_proj_lora[idx](x)
    mixed = mixed.view(tokens, batch, heads, 3 * head_width)
    q, k, v = (
        part.reshape(tokens, batch * heads, head_width).transpose(0, 1)
        for part in mixed.split(head_width, dim=-1)
    )
    probabilities = torch.bmm(q / head_width**0.5, k.transpose(-2, -1)).softmax(dim=-1)
    context = torch.bmm(probabilities, v).view(batch, heads, tokens, head_width)
    context = context.permute(2, 0, 1, 3).contiguous().view(tokens, batch, width)
    out = attn.out_proj(context)
    if idx is not None:
        out += attn.out_proj_lora[idx](context)
    return out


def upstream_block(block: VisualAttentionBlock, x: Tensor, idx: int | None) -> Tensor:
    """One block on [N, crops, E]."""
    x = x + _attention(block.attn, block.ln_1(x), idx)
    residual = x
    x = x + block.mlp(block.ln_2(x))
    if idx is not None:
        x = x + block.mlp_lora[idx](residual)
    return x


def upstream_resampler(pool: Any, x: Tensor) -> Tensor:
    """[crops, N, kv_dim] to [crops, Nq, E], through ``nn.MultiheadAttention``."""
    positions = get_abs_pos(pool.pos_embed, x.shape[1])
    x = pool.ln_kv(pool.kv_proj(x)).permute(1, 0, 2)
    query = pool.ln_q(pool.query).unsqueeze(1).repeat(1, x.shape[1], 1)
    out = pool.attn(query + pool.pos_embed.unsqueeze(1), x + positions.unsqueeze(1), x)[0]
    return out.permute(1, 0, 2)


def upstream_vit(
    encoder: VisionTransformer,
    x: Tensor,
    idx: int | None,
    block: Callable[..., Tensor] = upstream_block,
) -> Tensor:
    """Crops [N, 3, 448, 448] of one adapter to patch tokens [N, 1024, width]."""
    x = encoder.conv1(x).flatten(2).permute(0, 2, 1)
    x = encoder.ln_pre(x + get_abs_pos(encoder.positional_embedding, x.shape[1]))
    x = x.permute(1, 0, 2)
    for weights in encoder.transformer.resblocks:
        x = block(weights, x, idx)
    return x.permute(1, 0, 2)


def upstream_crop_tokens(
    encoder: VisionTransformer,
    x: Tensor,
    idx: int | None,
    *,
    block: Callable[..., Tensor] = upstream_block,
    resampler: Callable[..., Tensor] = upstream_resampler,
) -> Tensor:
    """Crops [N, 3, 448, 448] of one adapter to tokens [N, 256, output_dim].

    ``block`` and ``resampler`` are the functions of these names, or compiled forms of them.
    """
    x = resampler(encoder.attn_pool, upstream_vit(encoder, x, idx, block))
    return encoder.ln_post(x) @ encoder.proj


def upstream_tokens(encoder: VisionTransformer, crops: Tensor, **forms: Any) -> Tensor:
    """Crops [B * 5, 3, 448, 448] to [B, 1280, output_dim]: a pass for each crop position."""
    index = encoder.adapter_index()
    tokens = [
        upstream_crop_tokens(encoder, crops[position :: len(index)], adapter, **forms)
        for position, adapter in enumerate(index)
    ]
    return torch.cat(tokens, dim=1)


# ---- the strongest library form ---------------------------------------------------------------

#: ``lora_a`` [positions, r, in] and scaled ``lora_b`` [positions, out, r] of a projection.
Bank = tuple[Tensor, Tensor]


def stack_adapters(adapters: nn.ModuleList, index: list[int | None]) -> Bank:
    """The adapter of each crop position; zeros where none applies."""
    bank = [cast(Lora_Adapter, adapter) for adapter in adapters]
    down = [bank[i or 0].lora_a.weight * (i is not None) for i in index]
    up = [bank[i or 0].lora_b.weight * bank[i or 0].lora_scale for i in index]
    return torch.stack(down), torch.stack(up)


def block_banks(block: Any, index: list[int | None]) -> list[Bank]:
    """Stacked adapters of a block: attention's two projections, and the MLP's."""
    adapters = block.attn.in_proj_lora, block.attn.out_proj_lora, block.mlp_lora
    return [stack_adapters(bank, index) for bank in adapters]


def _adapted(out: Tensor, x: Tensor, bank: Bank) -> Tensor:
    return torch.baddbmm(out, torch.bmm(x, bank[0].mT), bank[1].mT)


def library_block(block: Any, banks: list[Bank], x: Tensor, tokens: int) -> Tensor:
    """One block on [positions, images * tokens, E]: each adapter is one slice of a batch."""
    attn = block.attn
    normed = block.ln_1(x)
    mixed = _adapted(attn.in_proj(normed), normed, banks[0])
    heads = mixed.view(-1, tokens, attn.num_heads, 3 * (x.shape[-1] // attn.num_heads))
    q, k, v = heads.transpose(1, 2).chunk(3, dim=-1)
    context = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape)
    x = x + _adapted(attn.out_proj(context), context, banks[1])
    return _adapted(x + block.mlp(block.ln_2(x)), x, banks[2])


def library_resampler(pool: Any, x: Tensor) -> Tensor:
    """[crops, N, kv_dim] to [crops, Nq, E]; the query is projected once and expanded."""
    x = pool.ln_kv(pool.kv_proj(x))
    keys = x + get_abs_pos(pool.pos_embed, x.shape[1])
    query = pool.ln_q(pool.query) + pool.pos_embed
    weights, biases = pool.attn.in_proj_weight.chunk(3), pool.attn.in_proj_bias.chunk(3)
    q, k, v = (
        F.linear(*arguments).unflatten(-1, (pool.num_heads, -1)).transpose(-3, -2)
        for arguments in zip((query, keys, x), weights, biases, strict=True)
    )
    out = F.scaled_dot_product_attention(q.expand(len(x), -1, -1, -1), k, v)
    return pool.attn.out_proj(out.transpose(1, 2).flatten(2))


def library_encoder(encoder: VisionTransformer, *, compiled: bool) -> Callable[[Tensor], Tensor]:
    """A function from crops [B * 5, 3, 448, 448] to tokens [B, 1280, output_dim]; inference."""
    with torch.no_grad():
        index = encoder.adapter_index()
        banks = [block_banks(block, index) for block in encoder.transformer.resblocks]
    block = torch.compile(library_block) if compiled else library_block
    resampler = torch.compile(library_resampler) if compiled else library_resampler

    def run(crops: Tensor) -> Tensor:
        x = encoder.conv1(crops).flatten(2).transpose(1, 2)
        tokens = x.shape[1]
        x = encoder.ln_pre(x + get_abs_pos(encoder.positional_embedding, tokens))
        by_position = x.unflatten(0, (-1, len(index))).transpose(0, 1)
        x = by_position.flatten(1, 2)
        for weights, bank in zip(encoder.transformer.resblocks, banks, strict=True):
            x = block(weights, bank, x, tokens)
        x = x.view(by_position.shape).transpose(0, 1).flatten(0, 1)
        out = encoder.ln_post(resampler(encoder.attn_pool, x)) @ encoder.proj
        return out.unflatten(0, (-1, len(index))).flatten(1, 2)

    return run


# ---- preprocessing by packages: [H, W, 3] uint8 to [5, 3, 448, 448] ---------------------------


def _crops_of_levels(canvas: Tensor, interpolation: str, dtype: torch.dtype) -> Tensor:
    """A canvas [1, 3, 896, 896] of values 0..255 to normalised crops."""
    mean, std = (torch.tensor(c, device=canvas.device).view(3, 1, 1) for c in (CLIP_MEAN, CLIP_STD))
    return _cut((canvas / 255 - mean) / std, interpolation).to(dtype)


def torch_crops(image: Tensor, interpolation: str, dtype: torch.dtype) -> Tensor:
    """The strongest torch form that runs on any device.

    Float all the way: torch's antialiased filter takes no uint8 on a GPU.
    """
    x = image.permute(2, 0, 1).unsqueeze(0).float()
    canvas = F.interpolate(x, (896, 896), mode=interpolation, antialias=True)
    return _crops_of_levels(canvas.round().clamp(0, 255), interpolation, dtype)


def torchvision_crops(image: Tensor, interpolation: str, dtype: torch.dtype) -> Tensor:
    from torchvision.transforms.v2 import InterpolationMode
    from torchvision.transforms.v2 import functional as tv

    mode = InterpolationMode(interpolation)
    canvas = tv.resize(image.permute(2, 0, 1)[None], [896, 896], mode, antialias=True)
    return _crops_of_levels(canvas, interpolation, dtype)


@functools.cache
def _clip_processor() -> Any:
    from transformers import CLIPImageProcessor

    size = {"height": 896, "width": 896}
    return CLIPImageProcessor(size=size, do_center_crop=False)


def transformers_crops(image: Tensor, interpolation: str, dtype: torch.dtype) -> Tensor:
    """The fast (torchvision) image processor of transformers up to the canvas."""
    resample = Image.Resampling[interpolation.upper()]
    canvas = _clip_processor()(
        image, resample=resample, device=image.device, input_data_format="channels_last",
        return_tensors="pt",
    )["pixel_values"]  # fmt: skip
    return _cut(canvas, interpolation).to(dtype)


@functools.cache
def _dali_pipeline(interpolation: str, device: str) -> Any:
    from nvidia.dali import Pipeline, fn, types

    gpu = device == "cuda"
    pipeline = Pipeline(
        batch_size=1, num_threads=torch.get_num_threads(), device_id=0 if gpu else None,
        exec_pipelined=False, exec_async=False,
    )  # fmt: skip
    mode = {"bilinear": types.INTERP_LINEAR, "bicubic": types.INTERP_CUBIC}[interpolation]
    with pipeline:
        image = fn.external_source(name="image", device="gpu" if gpu else "cpu", layout="HWC")
        pipeline.set_outputs(fn.resize(image, size=(896, 896), interp_type=mode, antialias=True))
    pipeline.build()
    return pipeline


def dali_crops(image: Tensor, interpolation: str, dtype: torch.dtype) -> Tensor:
    pipeline = _dali_pipeline(interpolation, image.device.type)
    # On a CPU as an array: of a tensor DALI asks which CUDA stream it is on.
    pipeline.feed_input("image", [image if image.is_cuda else image.numpy()])
    (out,) = pipeline.run()
    canvas = torch.from_dlpack(out[0]).permute(2, 0, 1)[None]
    return _crops_of_levels(canvas, interpolation, dtype)


def cvcuda_crops(image: Tensor, interpolation: str, dtype: torch.dtype) -> Tensor:
    import cvcuda

    mode = {"bilinear": cvcuda.Interp.LINEAR, "bicubic": cvcuda.Interp.CUBIC}[interpolation]
    with cvcuda.as_stream(torch.cuda.current_stream().cuda_stream):
        source = cvcuda.as_tensor(image, "HWC")
        out = cvcuda.hq_resize(source, (896, 896), antialias=True, interpolation=mode)
    canvas = torch.as_tensor(out.cuda(), device=image.device).permute(2, 0, 1)[None]
    return _crops_of_levels(canvas, interpolation, dtype)


@functools.cache
def _hub_kernel() -> Any:
    """Of Hugging Face's hub, where it was downloaded before: a benchmark fetches no code to run."""
    from huggingface_hub import constants
    from kernels import get_kernel

    with mock.patch.object(constants, "HF_HUB_OFFLINE", True):
        return get_kernel("Molbap/kernel_image_resize", revision="v1.0.0", trust_remote_code=True)


def hub_crops(image: Tensor, interpolation: str, dtype: torch.dtype) -> Tensor:
    """transformers' fused resize and normalise, up to the canvas."""
    canvas = _hub_kernel().resize_normalize(
        [image.permute(2, 0, 1)], size=896, image_mean=CLIP_MEAN, image_std=CLIP_STD,
        rescale_factor=1 / 255, resample=interpolation, antialias=True,
    )  # fmt: skip
    return _cut(canvas, interpolation).to(dtype)


def flash_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """[B, N, heads, head width] to the same."""
    from flash_attn import flash_attn_func

    return flash_attn_func(q, k, v)


def cudnn_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """[B, heads, N, head width] to the same, by cuDNN or not at all."""
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return F.scaled_dot_product_attention(q, k, v)


def torchao_float8(encoder: VisionTransformer) -> None:
    """Weights and inputs of the frozen products in float8, in place: half of bfloat16's time."""
    from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, quantize_

    def frozen(module: nn.Module, name: str) -> bool:
        return isinstance(module, nn.Linear) and "lora" not in name

    quantize_(encoder.transformer, Float8DynamicActivationFloat8WeightConfig(), filter_fn=frozen)


# What a provider of this name needs: a module, and whether that needs a GPU.
_NEEDS = {
    "torchvision": ("torchvision", False),
    "transformers": ("torchvision", False),
    "DALI": ("nvidia.dali", False),
    "CV-CUDA": ("cvcuda", True),
    "HF kernels": ("kernels", True),
    "flash-attn": ("flash_attn", True),
    "cuDNN": ("torch.backends.cudnn", True),
    "library, torchao float8, compiled": ("torchao", True),
}


def why_missing(provider: str) -> str | None:
    """Why a provider cannot run here; None where it can."""
    if provider not in _NEEDS:
        return None
    module, needs_gpu = _NEEDS[provider]
    if needs_gpu and DEVICE.type != "cuda":
        return f"{module} needs a GPU"
    try:
        importlib.import_module(module)
        if provider == "HF kernels":
            _hub_kernel()
    except ModuleNotFoundError:
        return f"{module} is not installed"
    except Exception as error:  # a build for another torch raises anything
        return f"{module} cannot be imported: {type(error).__name__}: {error}"
    return None


# ---- the same result, or no time --------------------------------------------------------------

_TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 3e-2}


def relative_l2(out: Tensor, expected: Tensor) -> float:
    return ((out.double() - expected.double()).norm() / expected.double().norm()).item()


def assert_same(
    outs: Iterable[Tensor],
    expected: Iterable[Tensor],
    info: dict[str, Any],
    exact: Callable[[], Iterable[Tensor]] | None = None,
) -> None:
    """The relative L2 difference of all values goes into ``info``, and is held to the dtype's.

    With ``exact``, which computes the same in float32, results of a half precision are held to it
    instead: ours may be twice as far off as the baseline, and one rounding. Gradients need this,
    for which no fixed bound suits every size.
    """

    def flat(tensors: Iterable[Tensor]) -> Tensor:
        return torch.cat([x.detach().flatten() for x in tensors])

    out, right = flat(outs), flat(expected)
    error = relative_l2(out, right)
    info["relative L2 against upstream"] = error
    if exact is None or out.dtype == torch.float32:
        limit = _TOLERANCE[out.dtype]
        assert error <= limit, f"relative L2 {error:.1e} is above {limit:.1e}"
        return
    truth = flat(exact())
    error, baseline = relative_l2(out, truth), relative_l2(right, truth)
    info["relative L2 against float32"] = error
    limit = 2 * baseline + torch.finfo(out.dtype).eps
    assert error <= limit, f"relative L2 {error:.1e} against float32 is above {limit:.1e}"


def note_difference(outs: Tensor, expected: Tensor, info: dict[str, Any]) -> None:
    """For another arithmetic, such as float8: how far off it is stands beside its time."""
    info["relative L2 against upstream"] = error = relative_l2(outs, expected)
    assert error < 0.2, f"relative L2 {error:.1e}: that is no rounding"
