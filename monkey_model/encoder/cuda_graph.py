"""The encoder's pass over a fixed number of crops, recorded once as a CUDA graph and replayed."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from monkey_model.encoder.parameter_cache import held_values


class GraphedEncoder:
    """What ``encode`` launches, in one launch: crops to their visual tokens, for inference.

    A graph reads the parameters where they lie: make it again after moving, casting or training the
    encoder.

    Args:
        encoder: in eval mode, on a CUDA or ROCm device.
        encode: crops to visual tokens, by the parameters and caches of ``encoder``; it never waits
            for the device.
        crops: of the shape and dtype of every call. The graph reads them: they are written over.

    Raises:
        ValueError: the encoder is in training mode, or ``crops`` are on another device.

    Source: torch.cuda.CUDAGraph.
    """

    def __init__(
        self, encoder: nn.Module, encode: Callable[[Tensor], Tensor], crops: Tensor
    ) -> None:
        if crops.device.type != "cuda":
            raise ValueError(f"encoder must be on a CUDA or ROCm device; got {crops.device}")
        if encoder.training:
            raise ValueError("encoder must be in eval mode; got training mode")
        self._crops = crops
        with torch.no_grad(), torch.cuda.device(crops.device):
            warm_up = torch.cuda.Stream()
            warm_up.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(warm_up):  # compiles, tunes and fills caches
                for _ in range(3):
                    encode(crops)
            torch.cuda.current_stream().wait_stream(warm_up)
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):
                self._tokens = encode(crops)
        # What the graph reads has to stay where it is, the caches' contents too.
        self._alive = encoder, encode, held_values(encoder)

    def __call__(self, crops: Tensor) -> Tensor:
        """Crops of the recorded shape, [N, 3, H, W], to [N, n_queries, output_dim].

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
