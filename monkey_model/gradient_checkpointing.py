"""What the language model and the encoder both ask of gradient checkpointing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def check_not_reentrant(settings: Mapping[str, Any]) -> None:
    """Raise a ValueError if ``settings`` of ``torch.utils.checkpoint.checkpoint`` lose gradients.

    A reentrant checkpoint passes no gradient on where none of its inputs requires one; the weights
    inside (adapters, LoRA) then get none either.
    """
    if settings.get("use_reentrant"):
        raise ValueError(
            "gradient_checkpointing_kwargs must not set use_reentrant=True: adapters behind a "
            "frozen input would get no gradient"
        )
