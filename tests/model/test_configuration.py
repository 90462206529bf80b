"""Upstream's config.json, configs that make no model, and the published shape's exact keys."""

from __future__ import annotations

import re
from collections import Counter

import pytest
import torch

from monkey_model.configuration_monkey import MonkeyConfig
from monkey_model.modeling_monkey import MonkeyLMHeadModel
from tests.helpers.tiny import tiny_config

# The published config.json.
PUBLISHED = {
    "architectures": ["MonkeyLMHeadModel"], "attn_dropout_prob": 0.0, "bf16": True,
    "auto_map": {"AutoConfig": "configuration_qwen.QWenConfig",
                 "AutoModelForCausalLM": "modeling_monkey.MonkeyLMHeadModel"},
    "emb_dropout_prob": 0.0, "fp16": False, "fp32": False, "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-06, "max_position_embeddings": 8192, "model_type": "monkey",
    "no_bias": True, "onnx_safe": None, "rotary_emb_base": 10000, "rotary_pct": 1.0,
    "scale_attn_weights": True, "seq_length": 2048, "tie_word_embeddings": False,
    "tokenizer_type": "QWenTokenizer", "torch_dtype": "bfloat16",
    "transformers_version": "4.32.0", "use_cache": False, "use_dynamic_ntk": True,
    "use_flash_attn": False, "use_logn_attn": True,
    "hidden_size": 4096, "intermediate_size": 22016, "kv_channels": 128,
    "num_attention_heads": 32, "num_hidden_layers": 32, "vocab_size": 151936,
    "visual": {"heads": 16, "image_size": 896, "image_start_id": 151857, "layers": 48,
               "mlp_ratio": 4.9231, "output_dim": 4096, "patch_size": 14, "width": 1664,
               "lora_repeat_num": 4},
}  # fmt: skip


def test_config_of_upstream():
    config = MonkeyConfig.from_dict(PUBLISHED)
    assert config.dtype == torch.bfloat16
    for key, value in PUBLISHED.items():
        if key not in ("torch_dtype", "transformers_version"):
            assert getattr(config, key) == value, key
    saved = config.to_dict()
    for key in ("seq_length", "visual", "no_bias", "kv_channels", "onnx_safe"):
        assert saved[key] == PUBLISHED[key]
    defaults = MonkeyConfig()
    for key in ("hidden_size", "visual", "intermediate_size", "vocab_size", "seq_length"):
        assert getattr(defaults, key) == PUBLISHED[key]
    defaults.visual["layers"] = 1
    assert MonkeyConfig().visual["layers"] == 48


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hidden_size": 96}, r"hidden_size must be .*, 4 \* 32; got 96"),
        ({"rotary_pct": 1.5}, "rotary_pct must be above 0 and at most 1; got 1.5"),
        ({"layer_norm_epsilon": 0.0}, "layer_norm_epsilon must be above 0; got 0.0"),
        ({"initializer_range": float("nan")}, "initializer_range must be at least 0; got nan"),
        ({"intermediate_size": 127}, "intermediate_size must be even; got 127"),
        ({"bf16": True, "fp32": True}, "at most one of bf16, fp16 and fp32 can be true; got bf16"),
        ({"seq_length": 1}, "seq_length must be at least 2; got 1"),
        ({"visual": {"image_start_id": None}}, "visual must have an integer image_start_id.*None"),
        ({"visual": {"output_dim": 256}}, "visual must have the hidden_size, 128, .*; got 256"),
    ],
)
def test_config_that_makes_no_model(settings, message):
    if "hidden_size" in settings:
        settings = {**settings, "visual": {"output_dim": settings["hidden_size"]}}
    with pytest.raises(ValueError, match=message):
        tiny_config(**settings)


@pytest.mark.parametrize("value", ["a", None, True])
def test_config_of_no_numbers(value):
    with pytest.raises(TypeError, match="layer_norm_epsilon must be a number; got"):
        tiny_config(layer_norm_epsilon=value)


def test_published_shape_on_the_meta_device():
    """Upstream's exact key set, by part, and not a byte allocated."""
    with torch.device("meta"):
        model = MonkeyLMHeadModel(MonkeyConfig())
    state = model.state_dict()
    assert all(tensor.is_meta for tensor in [*state.values(), *model.buffers()])
    parts = Counter(
        re.sub(r"\.\d+\.", ".N.", re.sub(r"(resblocks|h)\.\d+\..*", r"\1.N", key)) for key in state
    )
    assert parts == {
        "transformer.wte.weight": 1,
        "transformer.h.N": 32 * 8,  # 2 norms, c_attn with its bias, c_proj, w1, w2, c_proj
        "transformer.ln_f.weight": 1,
        "lm_head.weight": 1,
        "transformer.visual.positional_embedding": 1,
        "transformer.visual.proj": 1,
        "transformer.visual.conv1.weight": 1,
        "transformer.visual.ln_pre.weight": 1,
        "transformer.visual.ln_pre.bias": 1,
        "transformer.visual.transformer.resblocks.N": 48 * (12 + 3 * 4 * 3),
        "transformer.visual.attn_pool.query": 1,
        "transformer.visual.attn_pool.pos_embed": 1,
        "transformer.visual.attn_pool.kv_proj.weight": 1,
        "transformer.visual.attn_pool.attn.in_proj_weight": 1,
        "transformer.visual.attn_pool.attn.in_proj_bias": 1,
        "transformer.visual.attn_pool.attn.out_proj.weight": 1,
        "transformer.visual.attn_pool.attn.out_proj.bias": 1,
        "transformer.visual.attn_pool.ln_q.weight": 1,
        "transformer.visual.attn_pool.ln_q.bias": 1,
        "transformer.visual.attn_pool.ln_kv.weight": 1,
        "transformer.visual.attn_pool.ln_kv.bias": 1,
        "transformer.visual.ln_post.weight": 1,
        "transformer.visual.ln_post.bias": 1,
    }
    sizes = Counter()
    for key, tensor in state.items():
        part = "visual" if ".visual." in key else "language"
        sizes[part] += tensor.numel()
    # QWen-7B's published size; the encoder's 1.9 B are the ViT, its adapters and the resampler.
    assert sizes["language"] == 7_721_324_544
    assert 1.9e9 < sizes["visual"] < 2.2e9
