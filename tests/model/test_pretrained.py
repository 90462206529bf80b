"""Checkpoints: from_pretrained and save_pretrained, upstream's layout, damaged files."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.utils.logging import warning_once

from monkey_model.checkpoint import load_model, load_visual
from monkey_model.configuration_monkey import MonkeyConfig
from monkey_model.configuration_qwen import QWenConfig
from monkey_model.encoder.resampler import get_2d_sincos_pos_embed
from monkey_model.modeling_monkey import MonkeyLMHeadModel, MonkeyModel
from monkey_model.modeling_qwen import QWenLMHeadModel
from tests.helpers.golden import DATA, load_golden_lm
from tests.helpers.tiny import VOCAB, left_pad, pixels, span, tiny_config, tiny_model

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


@pytest.fixture
def transformers_log(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """Its logger passes nothing on to the root's, which ``caplog`` listens to."""
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)


def edit_config(directory: Path, **settings: object) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))


def greedy(model: MonkeyLMHeadModel) -> torch.Tensor:
    return model.generate(**BATCH, pixel_values=PICTURES, max_new_tokens=4, do_sample=False)


def assert_same_weights(ours: torch.nn.Module, theirs: torch.nn.Module) -> None:
    state, expected = ours.state_dict(), theirs.state_dict()
    assert state.keys() == expected.keys()
    for key, tensor in expected.items():
        assert torch.equal(state[key], tensor), key


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


def test_the_flags_of_published_configs_leave_the_dtype_alone(shards):
    """Upstream's config.json says bf16 and torch_dtype; whoever asks for a dtype gets it."""
    edit_config(shards, bf16=True, torch_dtype="bfloat16", dtype=None)
    assert MonkeyLMHeadModel.from_pretrained(shards, dtype=torch.float32).dtype == torch.float32
    assert MonkeyLMHeadModel.from_pretrained(shards).dtype == torch.bfloat16


@pytest.mark.parametrize("pickles", [True, False])
def test_a_directory_as_upstream_ships_it(tmp_path, monkeypatch, pickles):
    """Its config.json, shards of its weights: loaded by the auto class, and upstream's answer."""
    golden = load_golden_lm()
    config = {
        **golden.config, "model_type": "monkey", "architectures": ["MonkeyLMHeadModel"],
        "auto_map": {"AutoConfig": "configuration_qwen.QWenConfig",
                     "AutoModelForCausalLM": "modeling_monkey.MonkeyLMHeadModel"},
        "bf16": True, "fp32": False, "torch_dtype": "bfloat16", "onnx_safe": None,
        "tokenizer_type": "QWenTokenizer", "transformers_version": "4.32.0",
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
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


def drop_weights(shards: Path, dropped: set[str]) -> None:
    for shard in shards.glob("model-*.safetensors"):
        state = {k: v for k, v in load_file(shard).items() if k not in dropped}
        save_file(state, shard, {"format": "pt"})
    index = json.loads((shards / "model.safetensors.index.json").read_text())
    index["weight_map"] = {k: v for k, v in index["weight_map"].items() if k not in dropped}
    (shards / "model.safetensors.index.json").write_text(json.dumps(index))


def test_the_whole_model_is_loaded_or_refused(model, shards, tmp_path):
    """What answers, trains or is merged has every weight from the checkpoint."""
    assert_same_weights(load_model(shards), model)
    adapters = {key for key in model.state_dict() if "_lora." in key}
    drop_weights(shards, adapters)
    load_model(shards, without_adapters=True)
    first = min(adapters)
    with pytest.raises(ValueError, match=f"base {shards} lacks {len(adapters)} .*: {first}, .*, "):
        load_model(shards, "base")
    drop_weights(shards, {"lm_head.weight"})
    with pytest.raises(ValueError, match=f"{shards} lacks 1 weights of the model: lm_head.weight$"):
        load_model(shards, without_adapters=True)
    (shards / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=f"checkpoint has no config.json: {shards}"):
        load_model(shards)
    with pytest.raises(FileNotFoundError, match=r"base must be a directory; got .*nowhere"):
        load_model(tmp_path / "nowhere", "base")


def test_a_checkpoint_without_adapters_gets_fresh_ones(model, shards):
    """A Qwen-VL checkpoint has none: they start as no-ops, and the loaded weights stay."""
    gone = re.compile(
        r"_lora\.|attn_pool\.(pos_embed|query)|positional_embedding|visual\.proj|"
        r"attn\.in_proj_weight|ln_post\.weight"
    )
    dropped = {key for key in model.state_dict() if gone.search(key)}
    drop_weights(shards, dropped)
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


def test_fresh_weights_have_the_sizes_that_the_constructors_give():
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
    assert_same_weights(load_visual(shards), model.transformer.visual)


def test_a_missing_or_truncated_shard(shards):
    shard = sorted(shards.glob("model-*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-8])
    with pytest.raises(ValueError, match=f"{shards} has an unreadable .*not fully covered"):
        MonkeyLMHeadModel.from_pretrained(shards)
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=shard.name):
        MonkeyLMHeadModel.from_pretrained(shards)


def test_another_shape(model, shards):
    edit_config(shards, vocab_size=330)
    message = r"its config: lm_head.weight must be \[330, 128\], got \[640, 128\]; transformer.wte"
    for auto in (MonkeyLMHeadModel, AutoModelForCausalLM):
        with pytest.raises(ValueError, match=message):
            auto.from_pretrained(shards)
    edit_config(shards, visual={**model.config.visual, "width": 32})
    with pytest.raises(ValueError, match=r"lm_head.weight must be .*; and \d+ more$"):
        MonkeyLMHeadModel.from_pretrained(shards)
    edit_config(shards, visual=model.config.visual)
    settings = {"ignore_mismatched_sizes": True, "output_loading_info": True}
    again, info = MonkeyLMHeadModel.from_pretrained(shards, **settings)
    assert len(info["mismatched_keys"]) == 2
    assert again.lm_head.weight.shape == (330, 128)


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
    model.resize_token_embeddings(VOCAB + 10)
    assert model.transformer.wte.weight.shape == model.lm_head.weight.shape == (VOCAB + 10, 128)
    assert model.config.vocab_size == VOCAB + 10
    greedy(model)


@pytest.mark.parametrize("kind", [QWenLMHeadModel, MonkeyLMHeadModel])
def test_training_warns_of_no_loss_type(transformers_log, kind):
    warning_once.cache_clear()
    ids = torch.tensor([[1, 2, 3]])
    assert torch.isfinite(kind(tiny_config())(input_ids=ids, labels=ids).loss)
    assert "loss_type" not in transformers_log.text


class Attack:
    """Runs code when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_pickles_only_when_asked(model, tmp_path):
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"base .* holds only pickles \(pytorch_model.bin\)"):
        load_model(tmp_path, "base")
    assert_same_weights(load_model(tmp_path, allow_pickle=True), model)
    torch.save({"lm_head.weight": Attack(tmp_path / "attacked")}, tmp_path / "pytorch_model.bin")
    for load in (MonkeyLMHeadModel.from_pretrained, partial(load_model, allow_pickle=True)):
        with pytest.raises(ValueError, match=r"pytorch_model.* no readable weights file") as error:
            load(tmp_path)
        assert "weights_only" not in str(error.value)
    assert not (tmp_path / "attacked").exists()


def test_no_way_round_the_rule_for_pickles(model, shards):
    """What transformers would follow: an adapter beside the model, and weights named by config."""
    (shards / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="base must be a whole model without an adapter beside it"):
        load_model(shards, "base")
    (shards / "adapter_config.json").unlink()
    edit_config(shards, transformers_weights="adapter_model.bin")
    for load in (load_model, load_visual):
        with pytest.raises(ValueError, match="must not name its weights in 'transformers_weights'"):
            load(shards)


def add_weights(shards: Path, **weights: torch.Tensor) -> None:
    shard = sorted(shards.glob("model-*.safetensors"))[0]
    save_file({**load_file(shard), **weights}, shard, {"format": "pt"})


def test_no_weight_is_left_out(model, shards):
    add_weights(shards, **{"transformer.h.0.attn.rotary_emb.inv_freq": torch.ones(2)})  # harmless
    assert_same_weights(load_model(shards), model)
    assert type(AutoModel.from_pretrained(shards)) is MonkeyModel  # leaves the head out
    add_weights(shards, **{"transformer.h.9.ln_1.weight": torch.ones(2)})
    for load in (load_model, MonkeyLMHeadModel.from_pretrained, AutoModel.from_pretrained):
        with pytest.raises(ValueError, match=r"model has not: (transformer.)?h.9.ln_1.weight$"):
            load(shards)
    add_weights(shards, **{"transformer.visual.downresampler.query": torch.ones(2)})
    for load in (load_model, MonkeyLMHeadModel.from_pretrained, AutoModel.from_pretrained):
        with pytest.raises(ValueError, match=r"model has not \(this is TextMonkey"):
            load(shards)


def test_what_is_no_number_is_named(model, shards):
    weight = model.lm_head.weight.detach().clone()
    weight[3] = float("nan")
    drop_weights(shards, {"lm_head.weight"})
    add_weights(shards, **{"lm_head.weight": weight})
    with pytest.raises(ValueError, match=r"holds NaN or infinity in lm_head.weight \(torch.float3"):
        load_model(shards)


def test_a_weight_that_is_there_twice(model, shards):
    add_weights(shards, **{"lm_head.weight": model.lm_head.weight.detach()})
    name = "transformer.wte.weight"
    add_weights(shards, **{name: model.transformer.wte.weight.detach()})
    with pytest.raises(ValueError, match=r"safetensors both hold (lm_head|transformer.wte).weight"):
        load_model(shards)


@pytest.mark.parametrize("field", ["vocab_size", "intermediate_size", "num_hidden_layers"])
def test_sizes_beyond_any_tensor(shards, field):
    edit_config(shards, **{field: 10**9})
    with pytest.raises(ValueError, match=f"{field} must be at most 16777216; got 1000000000"):
        load_model(shards)
