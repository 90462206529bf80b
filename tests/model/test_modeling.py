"""The whole model against upstream's outputs, and its state dict against upstream's layout."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from monkey_model import modeling_qwen
from monkey_model.modeling_monkey import MonkeyLMHeadModel
from tests.helpers.golden import DATA, GoldenLM, load_golden_lm
from tests.helpers.tiny import tiny_batch, tiny_model


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
    settings = visual.crop_settings
    crops = torch.randn(settings.crops_per_image, 3, settings.crop_size, settings.crop_size)
    with torch.no_grad():
        expected = visual.encode_crops(crops)
    assert expected.dtype == dtype and torch.isfinite(expected).all()
    visual.encode_crops(crops).float().square().sum().backward()
    assert torch.isfinite(visual.attn_pool.kv_proj.weight.grad).all()


@pytest.mark.parametrize("items", [None, 50])
def test_checkpointing_keeps_no_logits(monkeypatch, items):
    """The same loss (float32) and gradients, and nothing as wide as logits saved for backward."""
    monkeypatch.setattr(modeling_qwen, "_LOSS_CHUNK", 7)
    model = tiny_model(attn_dropout_prob=0.0, emb_dropout_prob=0.0).double().train()
    model.transformer.visual.eval()  # without the adapters' dropout
    batch = tiny_batch()
    batch["pixel_values"] = batch["pixel_values"].double()
    vocab, results = model.config.vocab_size, []

    def pack(tensor: Tensor) -> Tensor:
        widths.add(tensor.shape[-1] if tensor.dim() > 1 else 0)
        return tensor

    for enable in (model.gradient_checkpointing_disable, model.gradient_checkpointing_enable):
        enable()
        widths: set[int] = set()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            out = model(**batch, num_items_in_batch=items)
        model.zero_grad()
        out.loss.backward()
        grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        results.append((out, grads, vocab in widths))
    (plain, plain_grads, plain_kept), (ours, grads, kept) = results
    assert plain_kept and not kept
    assert plain.logits.shape[-1] == vocab and ours.logits is None
    torch.testing.assert_close(ours.loss, plain.loss, atol=0, rtol=1e-6)
    assert grads.keys() == plain_grads.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(grad, plain_grads[name], atol=1e-7, rtol=1e-5, msg=name)
    model.eval()
    with torch.no_grad():  # an evaluation still has them
        assert model(**batch).logits is not None
