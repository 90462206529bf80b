"""Monkey's visual encoder under upstream's names: images in, 256 visual tokens per crop out.

An image becomes R*C local crops and a global one; each crop goes through the ViT and the
resampler, local crop i with its own LoRA adapters i, the global one with none. State dicts are
upstream's, key for key.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from monkey_kernels import extract_crops
from monkey_kernels.checks import check_divides, check_int, check_positive_int, check_tensor
from monkey_model.crop_settings import LARGEST_SIZE, CropSettings
from monkey_model.encoder.crop_adapters import (
    AdapterSelection,
    Lora_Adapter,
    check_adapter_index,
    default_adapter_index,
    repeats,
    select_adapters,
)
from monkey_model.encoder.cuda_graph import GraphedEncoder
from monkey_model.encoder.parameter_cache import ParameterCache
from monkey_model.encoder.positions import get_2d_sincos_pos_embed, get_abs_pos, resized_positions
from monkey_model.encoder.quantization import quantize_blocks
from monkey_model.encoder.resampler import Resampler
from monkey_model.encoder.vit import (
    TransformerBlock,
    VisualAttention,
    VisualAttentionBlock,
    embed_patches,
)
from monkey_model.encoder.windows import reconstruct_matrix, sliding_window
from monkey_model.families import check_is_monkey
from monkey_model.inputs.images import ImageSource, load_crops

__all__ = [
    "Lora_Adapter",
    "Resampler",
    "TransformerBlock",
    "VisionTransformer",
    "VisualAttention",
    "VisualAttentionBlock",
    "get_2d_sincos_pos_embed",
    "get_abs_pos",
    "reconstruct_matrix",
    "sliding_window",
]


def _swap(x: Tensor, rows: int) -> Tensor:
    """[rows * columns, ...] with rows and columns exchanged: [columns * rows, ...]."""
    return x.unflatten(0, (rows, -1)).transpose(0, 1).flatten(0, 1)


def _checked_sizes(images: Any) -> list[tuple[int, int]]:
    """Sizes of photos, as :meth:`VisionTransformer.cuda_graph` takes them."""
    expected = "images must be a number, or a pair (height, width) for each"
    if not isinstance(images, Sequence) or isinstance(images, str) or not images:
        raise TypeError(f"{expected}; got {images!r}")
    for number, size in enumerate(images):
        if not isinstance(size, (tuple, list)) or len(size) != 2:
            raise TypeError(f"{expected}; got {size!r}")
        check_positive_int(f"height of images[{number}]", size[0])
        check_positive_int(f"width of images[{number}]", size[1])
    return [(height, width) for height, width in images]


class VisionTransformer(nn.Module):
    """Monkey's visual encoder: ViT, resampler, ``ln_post`` and ``proj``.

    Args:
        image_size: side of the canvas in pixels, or (height, width), where no grid is given.
        patch_size: side of a patch in pixels.
        width: of the ViT.
        layers: blocks of the ViT.
        heads: of the ViT; divides width.
        mlp_ratio: hidden width of the MLPs over width.
        n_queries: of :class:`monkey_model.crop_settings.CropSettings`, as are crop_size, grid,
            interpolation and fit.
        output_dim: width of a visual token, a multiple of 128 (the resampler's head width).
        lora_repeat_num: adapters of each projection; 0 for none.
        crop_size: a multiple of patch_size.
        grid: by default as many local crops as image_size holds. It outranks image_size.
        kwargs: ignored, as upstream ignores the keys of a config that it does not know.

    Attributes:
        crop_settings: how images become crops.

    Raises:
        TypeError: an argument of another type.
        ValueError: a size that does not divide as said above, or what CropSettings refuses.

    Source: upstream ``monkey_model/visual.py``; Li et al., Monkey (CVPR 2024).
    """

    def __init__(
        self,
        image_size: int | Sequence[int],
        patch_size: int,
        width: int,
        layers: int,
        heads: int,
        mlp_ratio: float,
        n_queries: int = CropSettings.n_queries,
        output_dim: int = 512,
        lora_repeat_num: int = 4,
        *,
        crop_size: int = CropSettings.crop_size,
        grid: tuple[int, int] | None = None,
        interpolation: str = CropSettings.interpolation,
        fit: str = CropSettings.fit,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        self.crop_settings = CropSettings.from_config({
            "image_size": image_size,
            "crop_size": crop_size,
            "grid": grid,
            "interpolation": interpolation,
            "fit": fit,
            "n_queries": n_queries,
        })  # fmt: skip
        for name, size in (
            ("patch_size", patch_size),
            ("width", width),
            ("layers", layers),
            ("heads", heads),
            ("output_dim", output_dim),
        ):
            check_int(name, size, least=1, most=LARGEST_SIZE)
        check_int("lora_repeat_num", lora_repeat_num, least=0, most=LARGEST_SIZE)
        if not isinstance(mlp_ratio, (int, float)):
            raise TypeError(f"mlp_ratio must be a number; got {type(mlp_ratio).__name__}")
        if not (math.isfinite(mlp_ratio) and 1 <= width * mlp_ratio <= LARGEST_SIZE):
            raise ValueError(
                f"mlp_ratio must give the MLP a width of 1 to {LARGEST_SIZE}; got {mlp_ratio}"
            )
        check_divides("heads", heads, "width", width)
        if crop_size % patch_size:
            raise ValueError(
                f"crop_size must be a multiple of patch_size, {patch_size}; got {crop_size}"
            )
        if output_dim % 128:
            raise ValueError(f"output_dim must be a multiple of 128; got {output_dim}")
        # Upstream's attributes.
        self.image_size = height, width_px = self.crop_settings.canvas_size
        self.patch_size = (patch_size, patch_size)
        self.grid_size = (height // patch_size, width_px // patch_size)
        self.output_dim = output_dim
        self.lora_repeat_num = lora_repeat_num
        self._positions: ParameterCache[Tensor] = ParameterCache()

        norm_layer = partial(nn.LayerNorm, eps=1e-6)
        self.conv1 = nn.Conv2d(3, width, kernel_size=patch_size, stride=patch_size, bias=False)
        self.positional_embedding = nn.Parameter(width**-0.5 * torch.randn(256, width))
        self.ln_pre = norm_layer(width)
        self.transformer = TransformerBlock(
            width, layers, heads, mlp_ratio, norm_layer=norm_layer, lora_repeat_num=lora_repeat_num
        )
        self.attn_pool = Resampler(
            grid_size=math.isqrt(n_queries),
            embed_dim=output_dim,
            num_heads=output_dim // 128,
            kv_dim=width,
            norm_layer=norm_layer,
        )
        self.ln_post = norm_layer(output_dim)
        self.proj = nn.Parameter(output_dim**-0.5 * torch.randn(output_dim, output_dim))

    @classmethod
    def from_config(cls, visual: Mapping[str, Any], **overrides: Any) -> VisionTransformer:
        """The encoder that ``visual`` of a checkpoint's config describes, with new weights.

        Args:
            visual: the constructor's arguments; keys that it does not know are ignored.
            overrides: outrank ``visual``; None says nothing.

        Raises:
            TypeError, ValueError: the constructor's; or ``visual`` is of another family.
        """
        check_is_monkey(visual)
        given = {name: value for name, value in overrides.items() if value is not None}
        return cls(**{**visual, **given})

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None
    ) -> None:
        """See :meth:`TransformerBlock.gradient_checkpointing_enable`."""
        self.transformer.gradient_checkpointing_enable(gradient_checkpointing_kwargs)

    def gradient_checkpointing_disable(self) -> None:
        """Keep what backward needs, as without :meth:`gradient_checkpointing_enable`."""
        self.transformer.gradient_checkpointing = False

    def recompute(self, enabled: bool = True) -> VisionTransformer:
        """See :meth:`TransformerBlock.recompute`."""
        self.transformer.recompute(enabled)
        return self

    def compile(self, **kwargs: Any) -> None:
        """See :meth:`TransformerBlock.compile`; the rest of the encoder stays eager."""
        self.transformer.compile(**kwargs)

    def quantize(self, kind: str) -> VisionTransformer:
        """Hold and multiply the ViT's projections in 8 bits, for inference; in place.

        The four large weights of each block, 97 % of the ViT's, take a byte per value and a scale
        per row; inputs are quantised row by row in each call. Adapters, LayerNorms, patch
        embedding and resampler stay as they are. docs/encoding.md has the error.

        Load, cast and move the encoder first. ``state_dict`` keeps upstream's keys, with torchao's
        tensors for these weights: ``torch.save`` takes them, safetensors does not, and they load
        into an encoder that was quantised alike. So save a checkpoint before.

        Args:
            kind: ``"fp8"`` (e4m3; the ViT in bfloat16 on an NVIDIA GPU of compute capability 8.9
                or later, or an AMD MI300) or ``"int8"`` (any dtype; the CPU too). On a GPU,
                :meth:`compile` afterwards: it fuses the quantising of the inputs, which eager
                torch does in several kernels.

        Returns:
            The encoder itself.

        Raises:
            ImportError: torchao is not installed (the extra ``quantize``).
            TypeError: a weight of another dtype.
            ValueError: another kind; the encoder is in training mode; a projection is wrapped by an
                adapter, quantised already, or offloaded; or the device cannot compute in ``kind``.
        """
        quantize_blocks(self.transformer.resblocks, kind)
        return self

    def cuda_graph(
        self,
        images: int | Sequence[tuple[int, int]],
        adapter_index: Sequence[int | None] | None = None,
    ) -> GraphedEncoder:
        """:meth:`encode_crops`, or photos to tokens, for fixed sizes as one CUDA graph; inference.

        Make it again after moving, casting or training the encoder, and :meth:`compile` first to
        replay compiled blocks.

        Args:
            images: their number in every call, which then takes crops as :meth:`encode_crops`; or
                the (height, width) of each, and then a call takes a list of uint8 photos
                [height, width, 3], and gives [images, crops_per_image * n_queries, output_dim].
            adapter_index: as in :meth:`encode_images`.

        Raises:
            TypeError: images is neither an int nor pairs of ints.
            ValueError: the encoder is not on a CUDA or ROCm device, or in training mode; images or
                a size is not positive; or the errors of :meth:`encode_images`.
        """
        sizes = None if isinstance(images, int) else _checked_sizes(images)
        if isinstance(images, int):
            check_positive_int("images", images)
        number = images if isinstance(images, int) else len(images)
        device, dtype = self._device(), self.transformer.get_cast_dtype()
        settings, side = self.crop_settings, self.crop_settings.crop_size
        with torch.inference_mode(False), torch.no_grad():
            encoding = self._encoding(self.adapter_index(adapter_index) * number)
            if sizes is None:
                shape = (number * settings.crops_per_image, 3, side, side)
                crops = torch.zeros(shape, dtype=dtype, device=device)
                return GraphedEncoder(self, encoding, "crops", [crops])

            def encode(*photos: Tensor) -> Tensor:
                tokens = encoding(extract_crops(list(photos), dtype=dtype, **settings.cutting))
                return tokens.view(-1, settings.image_span, tokens.shape[2])

            photos = [torch.zeros((*s, 3), dtype=torch.uint8, device=device) for s in sizes]
            return GraphedEncoder(self, encode, "images", photos)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._positions.drop()  # weights made under inference_mode count no versions
        super()._load_from_state_dict(*args, **kwargs)

    def forward(self, x: Tensor, idx: int | Sequence[int | None] | None = None) -> Tensor:
        """Visual tokens of a batch of crops.

        Args:
            x: crops [N, 3, H, W], normalised; cast to the encoder's dtype and device.
            idx: the adapter for all of them, or one entry per crop, None where no adapter applies.

        Returns:
            [N, n_queries, output_dim].

        Raises:
            TypeError: x is no tensor, or idx is neither an int nor a sequence of ints and None.
            ValueError: another shape, or an adapter that does not exist.
        """
        patch = self.patch_size[0]
        check_tensor("x", x, 4, "[N, 3, H, W]")
        if x.shape[1] != 3 or x.shape[2] != x.shape[3] or x.shape[2] % patch or x.shape[2] == 0:
            raise ValueError(
                f"x must be [N, 3, H, W] with H = W a multiple of {patch}; got {list(x.shape)}"
            )
        per_crop = isinstance(idx, Sequence) and not isinstance(idx, str)
        adapters = self.lora_repeat_num
        index = check_adapter_index("idx", idx if per_crop else [idx] * len(x), adapters, len(x))
        return self._encoding(index)(x)

    def _encoding(self, index: Sequence[int | None]) -> Callable[[Tensor], Tensor]:
        """What encodes crops whose adapters are ``index``, a checked entry per crop."""
        # A compiled block takes every index by one graph, and training its measured form; but an
        # adapter that no crop uses gets no gradient, which an optimizer would decay it for.
        compiled, training = self.transformer.blocks_compiled, torch.is_grad_enabled()
        one_hot = compiled or (training and len(set(index)) > 1)
        images = 1 if compiled or training else repeats(index)
        crops = len(index) // images
        index = [index[crop] for crop in range(crops) for _ in range(images)]
        adapters, device = self.lora_repeat_num, self._device()
        selection = select_adapters(index, adapters, device, one_hot=one_hot)
        return partial(self._tokens, selection=selection, images=images)

    def _tokens(self, x: Tensor, selection: AdapterSelection, images: int) -> Tensor:
        """Visual tokens of crops; of several images by crop position, so that adapters get runs."""
        x = x.to(self._device(), self.transformer.get_cast_dtype())
        if images > 1:
            x = _swap(x, images)
        x = embed_patches(self.conv1, x)
        x = self.ln_pre(
            x + resized_positions(self._positions, self.positional_embedding, x.shape[1])
        )
        x = self.transformer(x.transpose(0, 1), idx=selection).transpose(0, 1)
        tokens = self.ln_post(self.attn_pool(x)) @ self.proj
        return tokens if images == 1 else _swap(tokens, len(tokens) // images)

    def _device(self) -> torch.device:
        """Where the encoder computes.

        Weights that accelerate offloads are on the meta device between calls; its hook knows more.
        """
        device, hook = self.proj.device, getattr(self, "_hf_hook", None)
        return torch.device(hook.execution_device) if device.type == "meta" and hook else device

    def extract_crops(
        self,
        images: Sequence[ImageSource],
        *,
        allow_urls: bool = False,
        fast_decode: bool = False,
        device: torch.device | None = None,
    ) -> Tensor:
        """Decode images and cut them into crops [B * crops_per_image, 3, crop_size, crop_size].

        On ``device``, by default the encoder's, float32. The other arguments are those of
        :meth:`encode_images`.
        """
        return load_crops(
            images,
            device=self._device() if device is None else device,
            allow_urls=allow_urls,
            fast_decode=self.crop_settings.canvas_size if fast_decode else None,
            **self.crop_settings.cutting,
        )

    def encode(
        self, image_paths: Sequence[ImageSource], *, allow_urls: bool = False
    ) -> tuple[list[list[Tensor]], Tensor]:
        """Upstream's preprocessing: local crops by row and column, and the global crops.

        Args:
            image_paths: paths (upstream), or anything else that :meth:`encode_images` takes.
            allow_urls: whether http(s) locations may be fetched (upstream: always).

        Returns:
            ``windows[row][column]`` and ``images_448``, each [B, 3, crop_size, crop_size] float32.
        """
        rows, columns = self.crop_settings.grid
        crops = self.extract_crops(image_paths, allow_urls=allow_urls)
        crops = crops.unflatten(0, (-1, self.crop_settings.crops_per_image))
        windows = [[crops[:, r * columns + c] for c in range(columns)] for r in range(rows)]
        return windows, crops[:, -1]

    def encode_images(
        self,
        images: Sequence[ImageSource],
        *,
        adapter_index: Sequence[int | None] | None = None,
        crop_chunk: int | None = None,
        allow_urls: bool = False,
        fast_decode: bool = False,
    ) -> Tensor:
        """Visual tokens of whole images, all crops in one pass.

        Args:
            images: paths, PIL images, encoded bytes, numpy arrays and tensors, mixed as you like;
                see :func:`monkey_model.inputs.images.load_image`.
            adapter_index: the adapter of each of the crops_per_image crops; by default local crop
                i uses adapter i and the global crop none.
            crop_chunk: crops in one pass of the ViT. By default all on a GPU, one on the CPU, where
                a larger batch only falls out of the cache.
            allow_urls: whether http(s) locations may be fetched.
            fast_decode: whether a JPEG much larger than the canvas may be decoded at 1/2, 1/4 or
                1/8 of its size (never below the canvas): faster, and not the same pixels.

        Returns:
            [B, crops_per_image * n_queries, output_dim]: tokens in crop order.

        Raises:
            ValueError: more local crops than adapters, an adapter that does not exist, or an
                image that cannot be read.
        """
        index = self.adapter_index(adapter_index)
        crops = self.extract_crops(images, allow_urls=allow_urls, fast_decode=fast_decode)
        tokens = self.encode_crops(crops, adapter_index=index, crop_chunk=crop_chunk)
        return tokens.view(-1, self.crop_settings.image_span, tokens.shape[2])

    def encode_crops(
        self,
        crops: Tensor,
        *,
        adapter_index: Sequence[int | None] | None = None,
        crop_chunk: int | None = None,
    ) -> Tensor:
        """Visual tokens of crops that :func:`monkey_kernels.extract_crops` cut.

        Args:
            crops: [B * crops_per_image, 3, crop_size, crop_size], normalised, in crop order.
            adapter_index: as in :meth:`encode_images`.
            crop_chunk: as in :meth:`encode_images`.

        Returns:
            [B * crops_per_image, n_queries, output_dim].

        Raises:
            ValueError: not a whole number of images, or the errors of :meth:`encode_images`.
        """
        index = self.adapter_index(adapter_index)
        check_tensor("crops", crops, 4, "[B * crops_per_image, 3, H, W]")
        per_image = self.crop_settings.crops_per_image
        if len(crops) == 0 or len(crops) % per_image:
            raise ValueError(
                f"crops must be a multiple of {per_image} crops (crops per image); got {len(crops)}"
            )
        index = index * (len(crops) // per_image)
        if crop_chunk is None:
            crop_chunk = 1 if self._device().type == "cpu" else len(crops)
        check_positive_int("crop_chunk", crop_chunk)
        starts = range(0, len(crops), crop_chunk)
        tokens = [self(crops[i : i + crop_chunk], index[i : i + crop_chunk]) for i in starts]
        return tokens[0] if len(tokens) == 1 else torch.cat(tokens)

    def adapter_index(self, index: Sequence[int | None] | None = None) -> list[int | None]:
        """The adapter of each crop of an image, checked."""
        if index is None:
            return default_adapter_index(self.crop_settings.grid, self.lora_repeat_num)
        crops = self.crop_settings.crops_per_image
        return check_adapter_index("adapter_index", index, self.lora_repeat_num, crops)
