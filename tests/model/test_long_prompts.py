"""Dynamic NTK and log-n attention, against their formulas written out plainly."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache, StaticCache

from monkey_model.configuration_qwen import QWenConfig
from monkey_model.modeling_qwen import QWenLMHeadModel, RotaryEmbedding, ntk_alpha
from tests.helpers.tiny import left_pad

SEQ = 16
ALPHA = {1: 1, 15: 1, 16: 1, 17: 3, 32: 3, 33: 7, 64: 7, 65: 15, 1024: 127, 1025: 255}


def make(**settings) -> QWenLMHeadModel:
    config = QWenConfig(
        vocab_size=97,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        kv_channels=16,
        intermediate_size=48,
        seq_length=SEQ,
        **settings,
    )
    torch.manual_seed(0)
    model = QWenLMHeadModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


@pytest.fixture(scope="module")
def model() -> QWenLMHeadModel:
    return make()


def prompt(length: int, seed: int = 0) -> list[int]:
    return torch.randint(97, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def plain_logits(model: QWenLMHeadModel, ids: list[int], alpha: float, logn: bool) -> Tensor:
    """The whole model in float64, one head, channel pair and query scale at a time."""
    config, weights = model.config, {k: v.double() for k, v in model.state_dict().items()}
    dim = int(config.kv_channels * config.rotary_pct)
    base = config.rotary_emb_base * alpha ** (dim / (dim - 2))

    def norm(x: Tensor, name: str) -> Tensor:
        mean_square = (x**2).mean(-1, keepdim=True)
        return x / (mean_square + config.layer_norm_epsilon).sqrt() * weights[name]

    def rotate(x: Tensor) -> Tensor:
        out = x.clone()
        for pair in range(dim // 2):
            angle = torch.arange(len(ids)).double() * base ** (-2 * pair / dim)
            a, b = x[:, pair], x[:, pair + dim // 2]
            out[:, pair] = a * angle.cos() - b * angle.sin()
            out[:, pair + dim // 2] = b * angle.cos() + a * angle.sin()
        return out

    scale = [math.log(n, SEQ) if logn and n > SEQ else 1.0 for n in range(1, len(ids) + 1)]
    causal = torch.ones(len(ids), len(ids)).tril().bool()
    x = weights["transformer.wte.weight"][ids]
    for i in range(config.num_hidden_layers):
        at = f"transformer.h.{i}."
        packed = F.linear(
            norm(x, at + "ln_1.weight"),
            weights[at + "attn.c_attn.weight"],
            weights[at + "attn.c_attn.bias"],
        )
        heads = []
        for head in range(config.num_attention_heads):
            q, k, v = (
                part[:, head * config.kv_channels : (head + 1) * config.kv_channels]
                for part in packed.split(config.hidden_size, dim=-1)
            )
            q = rotate(q) * torch.tensor(scale).double()[:, None]
            scores = q @ rotate(k).T / math.sqrt(config.kv_channels)
            heads.append(scores.masked_fill(~causal, -math.inf).softmax(-1) @ v)
        x = x + F.linear(torch.cat(heads, -1), weights[at + "attn.c_proj.weight"])
        h = norm(x, at + "ln_2.weight")
        gate = F.silu(F.linear(h, weights[at + "mlp.w2.weight"]))
        hidden = F.linear(h, weights[at + "mlp.w1.weight"]) * gate
        x = x + F.linear(hidden, weights[at + "mlp.c_proj.weight"])
    return F.linear(norm(x, "transformer.ln_f.weight"), weights["lm_head.weight"])


def assert_close(logits: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(logits.double(), expected, rtol=0, atol=1e-4)


def test_alpha_steps_where_upstreams_does():
    def upstream(length: int) -> float:
        return max(2 ** math.ceil(math.log(length / SEQ, 2) + 1) - 1, 1)

    assert ntk_alpha(torch.tensor(list(ALPHA)), SEQ).tolist() == list(ALPHA.values())
    assert [upstream(length) for length in ALPHA] == list(ALPHA.values())
    lengths = list(range(1, 5000))
    assert ntk_alpha(torch.tensor(lengths), SEQ).tolist() == [upstream(n) for n in lengths]


def test_rotary_has_no_tensors_of_its_own():
    rotary = RotaryEmbedding(8)
    assert not rotary.state_dict() and not list(rotary.buffers())
    cos, sin = rotary.bfloat16()(torch.tensor([[0, 3]]), torch.ones(1))
    assert cos.dtype == sin.dtype == torch.float32


@pytest.mark.parametrize("length", [12, 16, 17, 33, 70])
@pytest.mark.parametrize("rotary_pct", [1.0, 0.5])
def test_prompt_of_any_length(length, rotary_pct):
    model, ids = make(rotary_pct=rotary_pct), prompt(length)
    alpha = max(2 ** math.ceil(math.log2(length / SEQ) + 1) - 1, 1)
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0]
    assert_close(logits, plain_logits(model, ids, alpha, logn=True))


@pytest.mark.parametrize("ntk", [True, False])
@pytest.mark.parametrize("logn", [True, False])
def test_each_rule_can_be_off(ntk, logn):
    model, ids = make(use_dynamic_ntk=ntk, use_logn_attn=logn), prompt(40)
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0]
    assert_close(logits, plain_logits(model, ids, 7 if ntk else 1, logn))


def test_training_uses_neither(model):
    ids = prompt(40)
    try:
        logits = model.train()(torch.tensor([ids])).logits[0].detach()
    finally:
        model.eval()
    assert_close(logits, plain_logits(model, ids, 1, logn=False))


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize(("length", "alpha"), [(12, 1), (30, 3)])
def test_decoding_keeps_the_stretch_of_the_prompt(model, static, length, alpha):
    """From 12 to 20 and from 30 to 38 tokens: past a limit that the prompt was below."""
    ids = prompt(length + 8)
    cache = StaticCache(model.config, max_cache_len=64) if static else DynamicCache()
    with torch.no_grad():
        logits = [model(torch.tensor([ids[:length]]), past_key_values=cache).logits[0]]
        for token in ids[length:]:
            logits.append(model(torch.tensor([[token]]), past_key_values=cache).logits[0])
    assert_close(torch.cat(logits), plain_logits(model, ids, alpha, logn=True))


def test_without_a_cache_each_step_decides_anew(model):
    ids = torch.tensor([prompt(12)])
    settings = {"max_new_tokens": 8, "do_sample": False}
    out = model.generate(ids, use_cache=False, **settings)[0].tolist()
    expected = ids[0].tolist()
    for length in range(12, 20):
        alpha = 1 if length <= SEQ else 3
        expected.append(int(plain_logits(model, expected, alpha, logn=True)[-1].argmax()))
    assert out == expected


@pytest.mark.parametrize("length", [3, 18, 40])
def test_cache_changes_nothing_while_the_stretch_is_the_same(model, length):
    """From 3 to 13, 18 to 28 and 40 to 50 tokens no limit is passed."""
    ids, settings = torch.tensor([prompt(length)]), {"max_new_tokens": 10, "do_sample": False}
    with_cache = model.generate(ids, use_cache=True, **settings)
    assert torch.equal(with_cache, model.generate(ids, use_cache=False, **settings))


@pytest.mark.parametrize("settings", [{}, {"num_beams": 2}, {"cache_implementation": "static"}])
def test_padding_does_not_count_in_a_prompts_length(model, settings):
    """Each row of a batch gets the stretch that its own prompt asks for: 1, 3, 7."""
    rows = [prompt(10, 1), prompt(20, 2), prompt(40, 3)]
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, **settings}
    together = model.generate(**left_pad(rows, pad=0), **settings)[:, 40:]
    for row, ids in enumerate(rows):
        alone = model.generate(torch.tensor([ids]), **settings)[0, len(ids) :]
        assert torch.equal(together[row], alone)


def test_a_static_cache_can_be_used_again(model):
    """After reset() the next prompt's length counts, not the last one's."""
    cache = StaticCache(model.config, max_cache_len=64)
    with torch.no_grad():
        model(torch.tensor([prompt(40)]), past_key_values=cache)
        cache.reset()
        ids = prompt(14, seed=5)
        logits = [model(torch.tensor([ids[:1]]), past_key_values=cache).logits[0]]
        logits.append(model(torch.tensor([ids[1:]]), past_key_values=cache).logits[0])
    assert_close(torch.cat(logits), plain_logits(model, ids, 1, logn=True))
