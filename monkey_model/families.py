"""Checkpoints that look like Monkey's and are not: told by their config or by their weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

# What upstream's TextMonkey adds to `visual`, and to the weights of its encoder.
_TEXTMONKEY_FIELDS = ("add_window", "use_global", "resampler", "r")
_TEXTMONKEY_MODULES = ("visual.transformer.window_attention.", "visual.downresampler.")

_TEXTMONKEY = (
    "this is TextMonkey, whose encoder has window attention and a token resampler that Monkey's "
    "has not; it runs with upstream's modeling_textmonkey"
)


def check_is_monkey(visual: Mapping[str, Any]) -> None:
    """Raise a ValueError if ``visual`` of a config is none, or describes another family's encoder.

    Source: upstream ``monkey_model/text_monkey/visual_text.py``.
    """
    if not isinstance(visual, Mapping):
        raise ValueError(f"visual must be an object; got {visual!r}")
    fields = [name for name in _TEXTMONKEY_FIELDS if name in visual]
    if fields:
        raise ValueError(f"visual must be Monkey's; got {', '.join(fields)}: {_TEXTMONKEY}")


def family_of_keys(keys: Iterable[str]) -> str:
    """What an error about unexpected weights should add: the family that they belong to, if known.

    Args:
        keys: names of weights that a Monkey model has not, of the whole model.
    """
    foreign = any(module in key for key in keys for module in _TEXTMONKEY_MODULES)
    return f" ({_TEXTMONKEY})" if foreign else ""
