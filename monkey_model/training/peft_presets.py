"""LoRA through peft: the layers that it wraps, and the modules that are saved beside it.

    model = MonkeyPeftModel(model, lora_config(model))
    report = freeze(model)
    ...
    model.save_pretrained("adapter")
    model = MonkeyPeftModel.from_pretrained(base, "adapter")
    model.merge_and_unload().save_pretrained("merged")  # upstream's keys

The resampler and upstream's per-crop adapters are in peft's ``modules_to_save``: peft trains copies
of them, saves the copies with LoRA, and puts them in the place of the originals when it merges. So
plain ``PeftModel.from_pretrained`` loads what the published recipe saves, too.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from peft import LoraConfig
from torch import nn
from transformers import BitsAndBytesConfig

from monkey_kernels.checks import check_choice, check_int, check_number
from monkey_model.files import need_extra
from monkey_model.training.config import QUANTIZATIONS
from monkey_model.visual import VisionTransformer

#: The layers of each part that LoRA can wrap. peft matches a pattern against the whole name.
TARGETS = {
    "llm": r"transformer\.h\.\d+\.(?:attn\.(?:c_attn|c_proj)|mlp\.(?:w1|w2))",
    "resampler": r"transformer\.visual\.attn_pool\.(?:kv_proj|attn\.out_proj)",
    "vit": (
        r"transformer\.visual\.transformer\.resblocks\.\d+\."
        r"(?:attn\.(?:in_proj|out_proj)|mlp\.(?:c_fc|c_proj))"
    ),
}

#: The modules that bitsandbytes must not quantise: the head, whose rounding every logit would show,
#: and the resampler and the per-crop adapters, which train as they are. transformers matches a
#: pattern from the start of the name.
NOT_QUANTISED = [r"lm_head", r".*\.attn_pool", r".*_lora"]


def quantization_config(
    quantization: str, dtype: torch.dtype, device: torch.device | None = None
) -> BitsAndBytesConfig:
    """How ``from_pretrained`` is to quantise a Monkey model.

    Args:
        quantization: ``"4bit"`` (NF4) or ``"8bit"``.
        dtype: of the arithmetic.
        device: that it has to run on, if that is known.

    Raises:
        ImportError: bitsandbytes is not installed.
        ValueError: another one, or bitsandbytes has nothing for the device.
    """
    check_choice("quantization", quantization, QUANTIZATIONS)
    bitsandbytes = need_extra("bitsandbytes", "quantization", f"quantization {quantization}")
    kinds = bitsandbytes.supported_torch_devices
    if device is not None and device.type not in kinds:
        raise ValueError(
            f"quantization {quantization} runs on {', '.join(sorted(kinds))}; got the device "
            f"{device}"
        )
    return BitsAndBytesConfig(
        load_in_4bit=quantization == "4bit",
        load_in_8bit=quantization == "8bit",
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_type="nf4",
        llm_int8_skip_modules=NOT_QUANTISED,
    )


def lora_config(
    model: nn.Module,
    targets: Sequence[str] = ("llm",),
    *,
    r: int = 16,
    lora_alpha: int = 32,
    lora_dropout: float = 0.05,
    train_resampler: bool = True,
    train_vit_lora: bool = True,
    **settings: Any,
) -> LoraConfig:
    """peft's config for LoRA in some parts of a Monkey model.

    Args:
        model: the model to wrap, before peft has wrapped it.
        targets: parts to put LoRA in: ``"llm"`` (``c_attn``, ``attn.c_proj``, ``w1``, ``w2``),
            ``"resampler"`` (``kv_proj``, ``attn.out_proj``), ``"vit"`` (``in_proj``, ``out_proj``,
            ``c_fc``, ``c_proj``).
        r: rank, at most the smaller side of the largest layer that it is put in.
        lora_alpha: peft scales LoRA's output by lora_alpha / r.
        lora_dropout: the probability of dropping an element of LoRA's input.
        train_resampler: train and save the resampler itself. With ``"resampler"`` among the targets
            this is ignored: the resampler then trains through LoRA alone.
        train_vit_lora: train and save upstream's per-crop adapters.
        settings: anything else that ``peft.LoraConfig`` takes.

    Raises:
        TypeError, ValueError: a rank or lora_alpha that is none.
        ValueError: an unknown target; LoRA in the resampler of upstream's own encoder, whose
            ``nn.MultiheadAttention`` reads ``out_proj.weight`` without calling ``out_proj``.

    Source: upstream ``finetune_multitask.py`` (rank, alpha, dropout), Qwen (the LLM's layers).
    """
    if not targets or isinstance(targets, str):
        raise ValueError(f"targets must be a list of {', '.join(TARGETS)}; got {targets!r}")
    for target in targets:
        check_choice("targets", target, list(TARGETS))
    visual = getattr(getattr(model, "transformer", None), "visual", None)
    if "resampler" in targets and not isinstance(visual, VisionTransformer):
        raise ValueError(
            "targets must not hold 'resampler' with upstream's encoder, which would ignore the "
            f"LoRA of out_proj: call patch_visual(model) first; got {type(visual).__name__}"
        )
    modules_to_save = list(settings.pop("modules_to_save", None) or [])
    if train_resampler and "resampler" not in targets:
        modules_to_save.append("attn_pool")
    if train_vit_lora:
        modules_to_save += _adapter_suffixes(model)
    pattern = "|".join(f"(?:{TARGETS[target]})" for target in targets)
    # A larger one adds memory and nothing that the layer could learn.
    sides = [
        min(module.in_features, module.out_features)
        for name, module in model.named_modules()
        if re.fullmatch(pattern, name) and hasattr(module, "in_features")
    ]
    check_int("r", r, least=1, most=max(sides, default=None))
    check_number("lora_alpha", lora_alpha, least=0)
    return LoraConfig(
        r=r,
        lora_alpha=lora_alpha,
        lora_dropout=lora_dropout,
        target_modules=pattern,
        modules_to_save=modules_to_save or None,
        **settings,
    )


def _adapter_suffixes(model: nn.Module) -> list[str]:
    """The ends of the per-crop adapters' names, the same in every block: ``in_proj_lora.0``, ..."""
    # peft cannot copy the nn.ModuleList around them. Upstream's own class has the same names.
    names = (re.search(r"\w+_lora\.\d+$", name) for name, _ in model.named_modules())
    return sorted({name[0] for name in names if name})
