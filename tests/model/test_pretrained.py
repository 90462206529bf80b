"""Checkpoints: from_pretrained and save_pretrained, upstream's layout, devices, damaged files."""

from __future__ import annotations

import json
import logging
import re
from collections import Counter
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.utils.logging import warning_once

from monkey_model.checkpoint import load_visual
from monkey_model.configuration_monkey import MonkeyConfig
from monkey_model.configuration_qwen import QWenConfig
from monkey_model.modeling_monkey import MonkeyLMHeadModel, MonkeyModel
from monkey_model.modeling_qwen import QWenLMHeadModel
from monkey_model.resampler import get_2d_sincos_pos_embed
from tests.golden import DATA, load_golden_lm
from tests.tiny import left_pad, pixels, span, tiny_batch, tiny_config, tiny_model

BATCH = left_pad([[5, 6, *span(), 7], [8, 9]])
PICTURES = pixels(1)


@pytest.fixture(scope="module")
def model() -> MonkeyLMHeadModel:
    return tiny_model()


@pytest.fixture
def shards(model: MonkeyLMHeadModel, tmp_path: Path) -> Path:
    """A checkpoint of several shards."""
    model.save_pretrained(tmp_path, max_shard_size="300KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    return tmp_path


def edit_config(directory: Path, **settings: object) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))


def greedy(model: MonkeyLMHeadModel) -> torch.Tensor:
    return model.generate(**BATCH, pixel_values=PICTURES, max_new_tokens=4, do_sample=False)


def assert_same_weights(ours: torch.nn.Module, theirs: torch.nn.Module) -> None:
    expected = theirs.state_dict()
    state = ours.state_dict()
    assert state.keys() == expected.keys()
    for key, tensor in expected.items():
        assert torch.equal(state[key], tensor.to(state[key])), key


@pytest.mark.parametrize("size", ["300KB", "5GB"])
def test_saved_and_loaded(model, tmp_path, size):
    model.save_pretrained(tmp_path, max_shard_size=size)
    again, info = MonkeyLMHeadModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert not again.training
    assert_same_weights(again, model)
    assert torch.equal(greedy(again), greedy(model))


def test_auto_classes(model, shards):
    assert json.loads((shards / "config.json").read_text())["model_type"] == "monkey"
    config = AutoConfig.from_pretrained(shards)
    assert type(config) is MonkeyConfig
    assert config.to_diff_dict() == model.config.to_diff_dict()
    assert type(AutoModelForCausalLM.from_pretrained(shards)) is MonkeyLMHeadModel
    assert type(AutoModel.from_pretrained(shards)) is MonkeyModel
    assert type(AutoModelForCausalLM.from_config(tiny_config())) is MonkeyLMHeadModel


def test_text_model_of_its_own_type(tmp_path):
    config = QWenConfig(vocab_size=64, hidden_size=32, num_attention_heads=2, kv_channels=16,
                        num_hidden_layers=1, intermediate_size=32)  # fmt: skip
    QWenLMHeadModel(config).save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again) is QWenLMHeadModel
    assert type(again.config) is QWenConfig


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dtype(model, shards, dtype):
    again = MonkeyLMHeadModel.from_pretrained(shards, dtype=dtype)
    assert {p.dtype for p in again.parameters()} == {dtype}
    with torch.no_grad():
        logits = again(**BATCH, pixel_values=PICTURES).logits
    assert logits.dtype == dtype
    assert torch.isfinite(logits[BATCH["attention_mask"].bool()]).all()


def test_the_flags_of_published_configs_leave_the_dtype_alone(shards):
    """Upstream's config.json says bf16 and torch_dtype; whoever asks for a dtype gets it."""
    edit_config(shards, bf16=True, torch_dtype="bfloat16", dtype=None)
    assert MonkeyLMHeadModel.from_pretrained(shards, dtype=torch.float32).dtype == torch.float32
    assert MonkeyLMHeadModel.from_pretrained(shards).dtype == torch.bfloat16


# The published config.json but for the sizes, in which a test may differ.
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
}  # fmt: skip
SIZES = {
    "hidden_size": 4096, "intermediate_size": 22016, "kv_channels": 128,
    "num_attention_heads": 32, "num_hidden_layers": 32, "vocab_size": 151936,
    "visual": {"heads": 16, "image_size": 896, "image_start_id": 151857, "layers": 48,
               "mlp_ratio": 4.9231, "output_dim": 4096, "patch_size": 14, "width": 1664,
               "lora_repeat_num": 4},
}  # fmt: skip


@pytest.mark.parametrize("pickles", [True, False])
def test_a_directory_as_upstream_ships_it(tmp_path, monkeypatch, pickles):
    """Its config.json, shards of its weights: loaded by the auto class, and upstream's answer."""
    golden = load_golden_lm()
    (tmp_path / "config.json").write_text(json.dumps({**golden.config, **PUBLISHED}))
    name, suffix = ("pytorch_model", "bin") if pickles else ("model", "safetensors")
    keys, places = sorted(golden.state), {}
    for number, part in enumerate((keys[::2], keys[1::2]), 1):
        file = f"{name}-{number:05}-of-00002.{suffix}"
        state = {key: golden.state[key] for key in part}
        if pickles:
            torch.save(state, tmp_path / file)
        else:
            save_file(state, tmp_path / file, {"format": "pt"})
        places |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 0}, "weight_map": places}
    (tmp_path / f"{name}.{suffix}.index.json").write_text(json.dumps(index))

    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert type(model) is MonkeyLMHeadModel
    assert model.state_dict().keys() == golden.state.keys()
    assert all(torch.equal(model.state_dict()[key], golden.state[key]) for key in keys)
    monkeypatch.chdir(DATA)  # where the picture is that the ids name
    batch = {"input_ids": golden.input_ids, "attention_mask": golden.attention_mask}
    out = model.generate(**batch, max_new_tokens=2, do_sample=False)
    assert torch.equal(out[:, golden.input_ids.shape[1] :], golden.generated[:, :2])


def test_config_of_upstream():
    published = {**PUBLISHED, **SIZES}
    config = MonkeyConfig.from_dict(published)
    assert config.dtype == torch.bfloat16
    for key, value in published.items():
        if key not in ("torch_dtype", "transformers_version"):
            assert getattr(config, key) == value, key
    saved = config.to_dict()
    for key in ("seq_length", "visual", "no_bias", "kv_channels", "onnx_safe"):
        assert saved[key] == published[key]
    defaults = MonkeyConfig()
    for key in ("hidden_size", "visual", "intermediate_size", "vocab_size", "seq_length"):
        assert getattr(defaults, key) == published[key]
    defaults.visual["layers"] = 1
    assert MonkeyConfig().visual["layers"] == 48


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hidden_size": 96}, r"hidden_size must be .*, 4 \* 32; got 96"),
        ({"rotary_pct": 1.5}, r"rotary_pct must be in \(0, 1\]; got 1.5"),
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


def test_a_checkpoint_without_adapters_gets_fresh_ones(model, shards):
    """A Qwen-VL checkpoint has none: they start as no-ops, and the loaded weights stay."""
    missing = [".in_proj_lora.", ".mlp_lora.", "attn_pool.pos_embed", "attn_pool.query"]
    missing += ["positional_embedding", "visual.proj", "attn.in_proj_weight", "ln_post.weight"]
    dropped = set()
    for shard in shards.glob("model-*.safetensors"):
        state = load_file(shard)
        drop = {key for key in state if any(part in key for part in missing)}
        save_file({k: v for k, v in state.items() if k not in drop}, shard, {"format": "pt"})
        dropped |= drop
    index = json.loads((shards / "model.safetensors.index.json").read_text())
    index["weight_map"] = {k: v for k, v in index["weight_map"].items() if k not in dropped}
    (shards / "model.safetensors.index.json").write_text(json.dumps(index))

    torch.manual_seed(0)
    again, info = MonkeyLMHeadModel.from_pretrained(shards, output_loading_info=True)
    assert set(info["missing_keys"]) == dropped
    for key, tensor in model.state_dict().items():
        value = again.state_dict()[key]
        assert torch.isfinite(value).all()
        if key not in dropped:
            assert torch.equal(value, tensor), key
        elif key.endswith("lora_scale") or key.endswith("ln_post.weight"):
            assert (value == 1).all(), key
        elif key.endswith("lora_b.weight"):
            assert (value == 0).all(), key
        else:
            assert 0.005 < value.std() < 1, key
    pool = again.transformer.visual.attn_pool
    assert torch.equal(pool.pos_embed, torch.tensor(get_2d_sincos_pos_embed(128, 2)))


def test_fresh_weights_have_the_sizes_that_the_constructors_give(model):
    torch.manual_seed(0)
    fresh = MonkeyLMHeadModel(tiny_config())
    std = {key: tensor.std(correction=0).item() for key, tensor in fresh.state_dict().items()}
    assert std["transformer.wte.weight"] == pytest.approx(0.02, rel=0.1)
    assert std["transformer.h.1.mlp.w1.weight"] == pytest.approx(0.02, rel=0.1)
    assert std["transformer.h.1.mlp.c_proj.weight"] == pytest.approx(0.02 / 4**0.5, rel=0.1)
    assert std["transformer.h.1.attn.c_proj.weight"] == pytest.approx(0.02 / 4**0.5, rel=0.1)
    assert std["transformer.visual.proj"] == pytest.approx(128**-0.5, rel=0.1)
    assert std["transformer.visual.positional_embedding"] == pytest.approx(16**-0.5, rel=0.1)
    assert std["transformer.visual.transformer.resblocks.0.mlp_lora.0.lora_b.weight"] == 0


def test_shards_are_those_of_the_encoder_alone_too(model, shards):
    """`load_visual` reads what the whole model wrote."""
    encoder = load_visual(shards)
    assert_same_weights(encoder, model.transformer.visual)


def test_a_missing_shard(shards):
    name = sorted(shards.glob("model-*.safetensors"))[1]
    name.unlink()
    with pytest.raises(FileNotFoundError, match=name.name):
        MonkeyLMHeadModel.from_pretrained(shards)


def test_a_truncated_shard(shards):
    name = sorted(shards.glob("model-*.safetensors"))[1]
    name.write_bytes(name.read_bytes()[:-8])
    with pytest.raises(SafetensorError, match="not fully covered"):
        MonkeyLMHeadModel.from_pretrained(shards)


def test_another_shape(shards, caplog):
    """transformers' report names each key with both shapes; what it raises points there."""
    edit_config(shards, vocab_size=330)
    logging.getLogger("transformers").addHandler(caplog.handler)
    with pytest.raises(RuntimeError, match="For details look at the above report"):
        MonkeyLMHeadModel.from_pretrained(shards)
    logging.getLogger("transformers").removeHandler(caplog.handler)
    for key in ("transformer.wte.weight", "lm_head.weight"):
        assert re.search(rf"{key} .*MISMATCH.*\[320, 128\].*\[330, 128\]", caplog.text)


def test_tied_embeddings(tmp_path):
    model = tiny_model(tie_word_embeddings=True)
    assert model.lm_head.weight is model.transformer.wte.weight
    model.save_pretrained(tmp_path)
    again = MonkeyLMHeadModel.from_pretrained(tmp_path)
    assert again.lm_head.weight is again.transformer.wte.weight
    assert torch.equal(greedy(again), greedy(model))


def test_embeddings_are_found_and_resized():
    model = tiny_model()
    assert model.get_input_embeddings() is model.transformer.wte
    assert model.get_output_embeddings() is model.lm_head
    model.resize_token_embeddings(330)
    assert model.transformer.wte.weight.shape == model.lm_head.weight.shape == (330, 128)
    assert model.config.vocab_size == 330
    greedy(model)


def language(place: str) -> dict[str, str]:
    parts = ("transformer.wte", "transformer.h", "transformer.ln_f", "lm_head")
    return dict.fromkeys(parts, place)


VISUAL = "transformer.visual"
_NAMES = "positional_embedding proj conv1 ln_pre transformer attn_pool ln_post"
PARTS = [f"{VISUAL}.{part}" for part in _NAMES.split()]


def assert_same_outputs(ours: MonkeyLMHeadModel, theirs: MonkeyLMHeadModel) -> None:
    """Of pictures, of text, twice (caches are filled now), and of generation."""
    text = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        for inputs in ({**BATCH, "pixel_values": PICTURES}, {"input_ids": text}) * 2:
            torch.testing.assert_close(
                ours(**inputs).logits, theirs(**inputs).logits, rtol=0, atol=1e-5
            )
    assert torch.equal(greedy(ours), greedy(theirs))


@pytest.mark.parametrize(
    "device_map",
    [
        "auto",
        {"": "cpu"},
        {"": "disk"},
        {**language("cpu"), VISUAL: "disk"},
        {**language("disk"), VISUAL: "cpu"},
        *({**language("cpu"), **dict.fromkeys(PARTS, "cpu"), part: "disk"} for part in PARTS[2:]),
    ],
    ids=lambda map_: map_ if map_ == "auto" else str([k for k in map_ if map_[k] == "disk"]),
)
def test_device_map(model, shards, tmp_path, device_map):
    """Whatever is on the disk, between calls: the outputs are those of the model in memory."""
    folder = tmp_path / "offload"
    again = MonkeyLMHeadModel.from_pretrained(shards, device_map=device_map, offload_folder=folder)
    offloaded = "disk" in (device_map.values() if isinstance(device_map, dict) else ())
    assert any(p.is_meta for p in again.parameters()) == offloaded
    assert_same_outputs(again, model)
    assert any(p.is_meta for p in again.parameters()) == offloaded


def test_offloaded_from_memory(model):
    """accelerate's own offload, as it also comes where a GPU runs what a CPU keeps."""
    again = cpu_offload(tiny_model(), execution_device=torch.device("cpu"))
    assert all(p.is_meta for p in again.parameters())
    assert_same_outputs(again, model)
    visual = again.transformer.visual
    images = [DATA / "A_image0.jpg"]
    expected = model.transformer.visual.encode_images(images)
    torch.testing.assert_close(visual.encode_images(images), expected, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="only layers in memory can be merged; got one that is"):
        visual.merge_adapter(0)


def test_memory_limits_split_between_blocks_and_the_whole_encoder(model, shards, tmp_path):
    visual = sum(p.numel() * 4 for p in model.transformer.visual.parameters())
    limits = {"max_memory": {"cpu": int(2.6 * visual)}, "offload_folder": tmp_path / "offload"}
    again = MonkeyLMHeadModel.from_pretrained(shards, device_map="auto", **limits)
    places = again.hf_device_map
    assert (places["transformer.h.0"], places["transformer.h.1"]) == ("cpu", "disk")
    assert {key: places[key] for key in places if VISUAL in key} == {VISUAL: "disk"}
    assert_same_outputs(again, model)


def test_training_warns_of_no_loss_type(caplog):
    warning_once.cache_clear()
    logging.getLogger("transformers").addHandler(caplog.handler)
    for model in (tiny_model().train(), MonkeyLMHeadModel(tiny_config())):
        assert torch.isfinite(model(**tiny_batch()).loss)
    logging.getLogger("transformers").removeHandler(caplog.handler)
    assert "loss" not in caplog.text
