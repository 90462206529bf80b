"""The whole model against upstream's outputs, and its state dict against upstream's layout."""

from __future__ import annotations

import pytest
import torch

from monkey_model.modeling_monkey import MonkeyLMHeadModel
from tests.golden import DATA, GoldenLM, load_golden_lm
from tests.tiny import tiny_model


@pytest.fixture(scope="module")
def golden() -> GoldenLM:
    return load_golden_lm()


@pytest.fixture(scope="module")
def model(golden: GoldenLM) -> MonkeyLMHeadModel:
    return golden.model()


@pytest.fixture(autouse=True)
def beside_the_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Paths in the ids are relative to the working directory."""
    monkeypatch.chdir(DATA)


def assert_logits_match(logits: torch.Tensor, golden: GoldenLM) -> None:
    """To 1e-4 on every token; what a model says on padding is nobody's concern."""
    real = golden.attention_mask[:, -24:].bool()
    difference = (logits[:, -24:] - golden.logits_last_24)[real].abs()
    assert difference.max() <= 1e-4, f"max {difference.max():.2e}"


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_logits_are_upstreams(golden, model, attention):
    model.set_attn_implementation(attention)
    with torch.no_grad():
        out = model(input_ids=golden.input_ids, attention_mask=golden.attention_mask)
    assert_logits_match(out.logits, golden)


@pytest.mark.parametrize("use_cache", [True, False])
def test_greedy_tokens_are_upstreams(golden, model, use_cache):
    out = model.generate(
        golden.input_ids,
        attention_mask=golden.attention_mask,
        max_new_tokens=12,
        do_sample=False,
        use_cache=use_cache,
    )
    assert torch.equal(out[:, golden.input_ids.shape[1] :], golden.generated)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_checkpoints_answer_and_train(tmp_path, dtype):
    """``from_pretrained(dtype=...)``: every parameter has it, in eval and in training."""
    tiny_model().save_pretrained(tmp_path)
    model = MonkeyLMHeadModel.from_pretrained(tmp_path, dtype=dtype).eval()
    assert {p.dtype for p in model.parameters()} == {dtype}
    visual = model.transformer.visual
    crops = torch.randn(visual.crops_per_image, 3, visual.crop_size, visual.crop_size)
    with torch.no_grad():
        expected = visual.encode_crops(crops)
    assert expected.dtype == dtype and torch.isfinite(expected).all()
    visual.encode_crops(crops).float().square().sum().backward()
    assert torch.isfinite(visual.attn_pool.kv_proj.weight.grad).all()
