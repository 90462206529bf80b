"""What is counted as saved for backward."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from benchmarks.memory import saved_for_backward, shapes_alone, total_bytes, without_memory
from tests.helpers.tiny import tiny_batch, tiny_model


def test_each_storage_counts_once_and_parameters_do_not():
    layer = nn.Linear(8, 4)
    x = torch.randn(6, 8, requires_grad=True)
    # x for the weight's gradient; each product's two factors; both views are of one storage.
    saved = saved_for_backward(layer, lambda: layer(x) * x[:, :4] + layer(x).square())
    assert total_bytes(saved) == 4 * (6 * 8 + 2 * 6 * 4)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_fake_tensors_count_as_real_ones_do(checkpointed):
    """The model's whole training step, in bfloat16 with its trained weights in float32."""
    model = tiny_model().to(torch.bfloat16).train()
    for name, parameter in model.named_parameters():
        trained = "lora" in name or "attn_pool" in name
        parameter.requires_grad_(trained and "pos_embed" not in name)
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    if checkpointed:
        model.gradient_checkpointing_enable()
    visual, batch = model.transformer.visual, tiny_batch()
    ids, pixels = batch["input_ids"].shape, batch["pixel_values"].flatten(0, 1).shape

    def forward():
        crops, given = torch.zeros(pixels), torch.zeros(ids, dtype=torch.long)
        mask = torch.zeros(ids, dtype=torch.bool)
        with torch.autocast("cpu", torch.bfloat16):
            tokens = visual.encode_crops(crops, crop_chunk=len(crops)).flatten(0, 1)
            return model(input_ids=given, visual_mask=mask, visual_tokens=tokens, labels=given).loss

    real = total_bytes(saved_for_backward(model, forward))
    with shapes_alone():
        without_memory(model)
        fake = total_bytes(saved_for_backward(model, forward))
    # Which crop has which adapter, 80 bytes, counts differently.
    assert fake == pytest.approx(real, abs=80) and real > 100_000
