"""Where the supported releases of transformers differ (5.17 to 5.24): each entry says when it goes.

No other file of the package knows releases, but for the first override of mypy in pyproject.toml.
"""

from __future__ import annotations

from collections.abc import Container

from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast

# transformers.AutoImageProcessor asks for torchvision: goes with 5.17.
from transformers.models.auto.image_processing_auto import AutoImageProcessor

__all__ = ["CACHE", "AutoImageProcessor", "checkpointing_argument", "one_cache"]

#: The name by which transformers passes a cache on and looks for it: goes with 5.23.
CACHE = "cache" if "cache" in BaseModelOutputWithPast.__dataclass_fields__ else "past_key_values"


def one_cache(past_key_values: Cache | None, cache: Cache | None) -> Cache | None:
    """The cache under either of its names; goes when callers no longer use the old one.

    Raises:
        ValueError: both are given.
    """
    if past_key_values is not None and cache is not None:
        raise ValueError("past_key_values and cache are two names of one argument; got both")
    return past_key_values if cache is None else cache


def checkpointing_argument(known: Container[str]) -> str:
    """TrainingArguments' name, among those ``known``, for gradient checkpointing: goes with 5.23.

    That of its settings ends in ``_kwargs``.
    """
    new, old = "activation_checkpointing", "gradient_checkpointing"
    return new if new in known else old
