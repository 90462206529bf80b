"""The encoder's pass over inputs of fixed sizes, recorded once as a CUDA graph and replayed."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from monkey_kernels import keep_alive
from monkey_model.encoder.parameter_cache import held_values


def check_recorded(name: str, tensors: Sequence[Tensor], recorded: Sequence[Tensor]) -> None:
    """``tensors``, the argument called ``name``, are as many as ``recorded``, of their shapes.

    Raises:
        TypeError: one is no tensor, or of another dtype where the recorded one holds integers.
        ValueError: another number or another shape.
    """
    if len(tensors) != len(recorded):
        raise ValueError(f"{name} must be {len(recorded)}, as recorded; got {len(tensors)}")
    for number, (x, buffer) in enumerate(zip(tensors, recorded, strict=True)):
        one = name if len(recorded) == 1 else f"{name}[{number}]"
        if not isinstance(x, Tensor):
            raise TypeError(f"{one} must be a tensor; got {type(x).__name__}")
        if x.shape != buffer.shape:
            raise ValueError(
                f"{one} must be {list(buffer.shape)}, as recorded; got {list(x.shape)}"
            )
        if not buffer.is_floating_point() and x.dtype != buffer.dtype:
            raise TypeError(f"{one} must be of {buffer.dtype}, as recorded; got {x.dtype}")


class GraphedEncoder:
    """What ``encode`` launches, in one launch: crops or photos to visual tokens, for inference.

    A graph reads the parameters where they lie: make it again after moving, casting or training the
    encoder.

    Args:
        encoder: in eval mode, on a CUDA or ROCm device.
        encode: ``inputs`` to visual tokens, by the parameters and caches of ``encoder``; it never
            waits for the device.
        name: of the inputs, in errors.
        inputs: of the shapes and dtypes of every call. The graph reads them: they are written over.

    Raises:
        ValueError: the encoder is in training mode, or ``inputs`` are on another device.

    Source: torch.cuda.CUDAGraph.
    """

    def __init__(
        self,
        encoder: nn.Module,
        encode: Callable[..., Tensor],
        name: str,
        inputs: Sequence[Tensor],
    ) -> None:
        device = inputs[0].device
        if device.type != "cuda":
            raise ValueError(f"encoder must be on a CUDA or ROCm device; got {device}")
        if encoder.training:
            raise ValueError("encoder must be in eval mode; got training mode")
        self._name, self._inputs = name, list(inputs)
        # No inference tensors: those could not be written over outside of that mode.
        with torch.inference_mode(False), torch.no_grad(), torch.cuda.device(device):
            # One stream for both: what a call keeps for the next one, it keeps by stream. And one
            # of this device: torch's own is of the device of the first graph.
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with keep_alive() as tables:
                with torch.cuda.stream(stream):  # compiles, tunes and fills caches
                    for _ in range(3):
                        encode(*self._inputs)
                torch.cuda.current_stream().wait_stream(stream)
                self._graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(self._graph, stream=stream):
                    self._tokens = encode(*self._inputs)
        # What the graph reads has to stay where it is, the caches' contents too.
        self._alive = encoder, encode, held_values(encoder), tables

    def __call__(self, inputs: Tensor | Sequence[Tensor]) -> Tensor:
        """Crops, or photos, of the recorded shapes to visual tokens.

        Raises:
            TypeError: no tensors, or photos of another dtype.
            ValueError: another number or another shape.
        """
        tensors = [inputs] if isinstance(inputs, Tensor) else list(inputs)
        check_recorded(self._name, tensors, self._inputs)
        for buffer, x in zip(self._inputs, tensors, strict=True):
            buffer.copy_(x, non_blocking=True)
        self._graph.replay()
        return self._tokens.clone()
