"""Memory of a training step of the whole model, as published: 7B LLM and 48-layer encoder.

As ``monkey finetune`` trains by default: LoRA in the LLM, the encoder's adapters and the resampler
in float32 under autocast, all else frozen in bfloat16.

Counted, not measured: the forward pass of the step runs on fake tensors, which have every shape and
storage and no memory. A row adds up the weights, what trains once more as gradient and twice as
AdamW's moments, and what is saved for backward. Not in it are CUDA's own memory, and what a step
needs for a moment: the block that is computed again, 256 positions' logits.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.quantizers.quantizers_utils import should_convert_module

from benchmarks.baselines import upstream_tokens
from benchmarks.memory import (
    record,
    saved_for_backward,
    shapes_alone,
    total_bytes,
    without_memory,
)
from benchmarks.workloads import CROPS, PUBLISHED_CONFIG, PUBLISHED_LAYERS
from monkey_model.configuration_monkey import MonkeyConfig
from monkey_model.freeze import freeze
from monkey_model.modeling_monkey import MonkeyLMHeadModel
from monkey_model.training.peft_model import MonkeyPeftModel
from monkey_model.training.peft_presets import NOT_QUANTISED, lora_config

PROVIDERS = ["upstream", "ours", "ours, checkpointed", "ours, checkpointed, 4-bit"]
LENGTH = 2048
GIB = 2**30
#: Bytes of a weight in bitsandbytes' nf4: 4 bits, and a float32 scale for each 64.
NF4 = 0.5 + 4 / 64


@pytest.fixture(scope="module")
def published():
    """The published model, frozen, and how many of its weights 4-bit loading quantises.

    On the meta device: no memory.
    """
    settings = {**PUBLISHED_CONFIG, "layers": PUBLISHED_LAYERS, "image_start_id": 151857}
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            model = MonkeyLMHeadModel(MonkeyConfig(visual=settings))
            quantised = sum(
                module.weight.numel()
                for name, module in model.named_modules()
                if isinstance(module, nn.Linear) and should_convert_module(name, NOT_QUANTISED)
            )
            model = MonkeyPeftModel(model, lora_config(model)).train()
    finally:
        torch.set_default_dtype(torch.float32)
    freeze(model)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return model, quantised


def loss_of_upstreams_form(base, tokens, ids, mask):
    """Upstream checkpoints the LLM alone, and keeps every position's logits."""
    hidden = base.transformer(input_ids=ids, visual_mask=mask, visual_tokens=tokens)
    logits = base.lm_head(hidden.last_hidden_state)
    return base.loss_function(logits=logits, labels=ids, vocab_size=base.config.vocab_size)


@pytest.mark.parametrize("provider", PROVIDERS)
def test_training_step(benchmark, published, provider):
    """One image in 2048 tokens, batch 1; see the top of this file."""
    model, quantised = published
    base = model.get_base_model()
    visual = base.transformer.visual

    def forward():
        ids = torch.zeros(1, LENGTH, dtype=torch.long)
        mask = torch.zeros(1, LENGTH, dtype=torch.bool)
        crops = torch.zeros(CROPS, 3, 448, 448)
        with torch.autocast("cpu", torch.bfloat16):
            if provider == "upstream":
                tokens = upstream_tokens(visual, crops).flatten(0, 1)
                return loss_of_upstreams_form(base, tokens, ids, mask)
            tokens = visual.encode_crops(crops, crop_chunk=CROPS).flatten(0, 1)
            inputs = {"input_ids": ids, "visual_mask": mask, "visual_tokens": tokens}
            return model(**inputs, labels=ids).loss

    def count():
        with shapes_alone():
            without_memory(model)
            if provider == "ours":
                base.gradient_checkpointing_disable()
            else:
                base.gradient_checkpointing_enable()
            saved = total_bytes(saved_for_backward(model, forward))
        weights = sum(p.nbytes for p in model.parameters())
        if "4-bit" in provider:
            weights -= quantised * (2 - NF4)
        trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
        parts = {"weights": weights, "gradients and AdamW": 3 * trained, "saved": saved}
        benchmark.extra_info["GiB"] = {part: size / GIB for part, size in parts.items()}
        return sum(parts.values()) / GIB

    benchmark.group = f"training, LLM and encoder, {LENGTH} tokens, 1 image: bfloat16, counted"
    record(benchmark, count, "GiB")
