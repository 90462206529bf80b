"""What the name of a parameter says: its part of the model, and what peft has added to it.

The names are those of upstream's layout, with any prefix (``module.``, ``base_model.model.``) and
with peft's wrappers inside (``base_layer``, ``modules_to_save``, ``lora_A``).
"""

from __future__ import annotations

import re

#: The parts of a model, for freezing and for reports.
PARTS = ("LLM", "embeddings and head", "LLM LoRA", "ViT", "ViT adapters", "resampler")

# The leftmost match counts: the ViT has a "transformer" of its own.
_PLACE = re.compile(r"(?:^|\.)(?:transformer\.(?P<child>visual|h|wte|ln_f)|lm_head)\.")
# What peft adds for an adapter; upstream's own adapters are `lora_a`, `lora_b` and `lora_scale`.
_PEFT_LORA = re.compile(
    r"\.lora_(?:A|B|embedding_A|embedding_B|magnitude_vector)\.(?P<adapter>[^.]+)"
)
_PEFT_COPY = re.compile(r"\.modules_to_save\.(?P<adapter>[^.]+)")


def part_of(name: str) -> str | None:
    """The part, one of :data:`PARTS`, that a parameter belongs to; None for other models'."""
    place = _PLACE.search(name)
    if place is None:
        return None
    if place["child"] == "visual":
        if name.startswith("attn_pool.", place.end()):
            return "resampler"
        return "ViT adapters" if "lora" in name else "ViT"
    if "lora" in name:
        return "LLM LoRA"
    return "LLM" if place["child"] in ("h", "ln_f") else "embeddings and head"


def upstream_name(name: str) -> str | None:
    """Upstream's name of a base weight, without prefixes and peft's ``base_layer``.

    None for what is no base weight: peft's LoRA, its copies of ``modules_to_save`` and their frozen
    twins, and what is no part of Monkey.
    """
    place = _PLACE.search(name)
    if place is None or peft_adapter(name) is not None or is_frozen_twin(name):
        return None
    return name[place.start() :].lstrip(".").replace(".base_layer.", ".")


def is_peft_lora(name: str) -> bool:
    """Whether peft has added the parameter as LoRA."""
    return _PEFT_LORA.search(name) is not None


def peft_adapter(name: str) -> str | None:
    """peft's adapter that LoRA, or a copy of ``modules_to_save``, belongs to; None for the rest."""
    match = _PEFT_LORA.search(name) or _PEFT_COPY.search(name)
    return None if match is None else match["adapter"]


def is_frozen_twin(name: str) -> bool:
    """Whether this is the original that peft keeps beside a copy of ``modules_to_save``."""
    return ".original_module." in name
