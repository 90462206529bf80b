"""Configuration of the whole model: the language model's, and ``visual``, the encoder's."""

from __future__ import annotations

from dataclasses import field
from typing import Any

from transformers import AutoConfig

from monkey_model.configuration_qwen import QWenConfig
from monkey_model.families import check_is_monkey

# The published checkpoints' own.
_VISUAL = {
    "heads": 16,
    "image_size": 896,
    "image_start_id": 151857,
    "layers": 48,
    "mlp_ratio": 4.9231,
    "output_dim": 4096,
    "patch_size": 14,
    "width": 1664,
    "lora_repeat_num": 4,
}


class MonkeyConfig(QWenConfig):
    """:class:`QWenConfig` and ``visual``.

    Args:
        visual: arguments of :class:`monkey_model.visual.VisionTransformer`, and
            ``image_start_id``, the id of ``<img>``; ``</img>`` and ``<imgpad>`` are the next two.

    Raises:
        ValueError: ``visual`` is of another family, has no image_start_id, or its output_dim is not
            hidden_size.

    Source: upstream ``monkey_model/configuration_monkey.py`` and ``config.json``.
    """

    model_type = "monkey"
    # What AutoTokenizer takes where no tokenizer_config.json names a class; see tokenization_qwen.
    # Without annotation: that would make it a field.
    tokenizer_class = "QWenTokenizer"

    visual: dict[str, Any] = field(default_factory=_VISUAL.copy)

    def __post_init__(self, **kwargs: Any) -> None:
        check_is_monkey(self.visual)
        if kwargs.get("tokenizer_class", ...) is None:
            del kwargs["tokenizer_class"]  # null in a config file says nothing
        if not isinstance(self.visual.get("image_start_id"), int):
            raise ValueError(
                "visual must have an integer image_start_id, the id of <img>; got "
                f"{self.visual.get('image_start_id')!r}"
            )
        if self.visual.get("output_dim") != self.hidden_size:
            raise ValueError(
                f"visual must have the hidden_size, {self.hidden_size}, as its output_dim; got "
                f"{self.visual.get('output_dim')}"
            )
        super().__post_init__(**kwargs)


AutoConfig.register(MonkeyConfig.model_type, MonkeyConfig)
