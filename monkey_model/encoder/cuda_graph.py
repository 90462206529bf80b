"""The encoder for a fixed number of images, recorded once as a CUDA graph and replayed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from monkey_kernels.checks import check_positive_int

if TYPE_CHECKING:
    from monkey_model.visual import VisionTransformer


class GraphedEncoder:
    """``encoder.encode_crops`` in one launch: crops of ``images`` images to their visual tokens.

    For inference. A graph reads the parameters where they lie: make it again after moving, casting
    or training the encoder. Compile the encoder first to replay compiled blocks.

    Args:
        encoder: in eval mode, on a CUDA or ROCm device.
        images: in every call.
        adapter_index: as in ``encode_images``.

    Raises:
        ValueError: the encoder is on another device or in training mode, or images is not positive.

    Source: torch.cuda.CUDAGraph.
    """

    def __init__(
        self,
        encoder: VisionTransformer,
        images: int,
        adapter_index: Sequence[int | None] | None = None,
    ) -> None:
        device = encoder.transformer.get_cast_device()
        check_positive_int("images", images)
        if device.type != "cuda":
            raise ValueError(f"encoder must be on a CUDA or ROCm device; got {device}")
        if encoder.training:
            raise ValueError("encoder must be in eval mode; got training mode")
        index = encoder.adapter_index(adapter_index) * images
        side, dtype = encoder.crop_settings.crop_size, encoder.transformer.get_cast_dtype()
        self._crops = torch.zeros(len(index), 3, side, side, device=device, dtype=dtype)
        selection = encoder._select(index, len(index))
        with torch.no_grad(), torch.cuda.device(device):
            warm_up = torch.cuda.Stream()
            warm_up.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(warm_up):  # compiles, tunes and fills caches
                for _ in range(3):
                    encoder._tokens(self._crops, selection)
            torch.cuda.current_stream().wait_stream(warm_up)
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):
                self._tokens = encoder._tokens(self._crops, selection)
        # What the graph reads has to stay where it is, the caches' contents too.
        caches = encoder._positions, encoder.attn_pool._positions, encoder.attn_pool._folded
        self._alive = encoder, selection, [cache._held for cache in caches]

    def __call__(self, crops: Tensor) -> Tensor:
        """[images * crops_per_image, 3, crop_size, crop_size] to [..., n_queries, output_dim].

        Raises:
            ValueError: another shape.
        """
        if crops.shape != self._crops.shape:
            raise ValueError(
                f"crops must be {list(self._crops.shape)}, as recorded; got {list(crops.shape)}"
            )
        self._crops.copy_(crops)
        self._graph.replay()
        return self._tokens.clone()
