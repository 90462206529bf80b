"""Kernels of the Monkey vision frontend: ops on tensors, each with a plain-torch reference.

Importing it needs neither Triton nor a GPU.
"""

from monkey_kernels.add_layer_norm.op import add_layer_norm
from monkey_kernels.backend import BackendStatus, backend_report, use_backend
from monkey_kernels.crops.op import extract_crops
from monkey_kernels.crops.reference import CLIP_MEAN, CLIP_STD, FITS, INTERPOLATIONS, place
from monkey_kernels.launching import keep_alive
from monkey_kernels.resampler_attention.op import resampler_attention
from monkey_kernels.self_attention import self_attention

__all__ = [
    "CLIP_MEAN",
    "CLIP_STD",
    "FITS",
    "INTERPOLATIONS",
    "BackendStatus",
    "add_layer_norm",
    "backend_report",
    "extract_crops",
    "keep_alive",
    "place",
    "resampler_attention",
    "self_attention",
    "use_backend",
]
