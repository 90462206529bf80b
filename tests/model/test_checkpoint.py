"""Reading the encoder out of checkpoint directories, whole and broken ones."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from monkey_model.checkpoint import PREFIX, load_visual
from monkey_model.configuration_monkey import MonkeyConfig
from monkey_model.image_processing_monkey import MonkeyImageProcessor
from monkey_model.visual import VisionTransformer
from tests.helpers.golden import assert_tokens_match, load_golden
from tests.helpers.tiny import VISUAL, tiny_encoder


def write_config(directory, **visual):
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps({"visual": {**VISUAL, **visual}}))


def full_state(encoder):
    """The encoder's tensors among others, as in a checkpoint of the whole model."""
    state = {PREFIX + name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    return {**state, "transformer.wte.weight": torch.zeros(3, 3), "lm_head.weight": torch.zeros(2)}


@pytest.fixture
def encoder():
    return tiny_encoder()


@pytest.fixture
def checkpoint(tmp_path, encoder):
    """A sharded safetensors checkpoint."""
    directory = tmp_path / "checkpoint"
    write_config(directory)
    state = full_state(encoder)
    keys = sorted(state)
    shards = {"a.safetensors": keys[::2], "b.safetensors": keys[1::2]}
    weight_map = {}
    for name, shard_keys in shards.items():
        save_file({key: state[key] for key in shard_keys}, directory / name)
        weight_map.update(dict.fromkeys(shard_keys, name))
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory


def assert_same(loaded, encoder):
    assert not loaded.training
    for name, tensor in encoder.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


def test_shards(checkpoint, encoder):
    loaded = load_visual(checkpoint)
    assert_same(loaded, encoder)
    assert not loaded.attn_pool.pos_embed.requires_grad and loaded.proj.requires_grad
    # Published checkpoints were trained with bicubic and do not say so.
    assert loaded.crop_settings.interpolation == "bicubic"


def test_single_file_and_settings(tmp_path, encoder):
    write_config(tmp_path, interpolation="bilinear", fit="pad")
    save_file(full_state(encoder), tmp_path / "model.safetensors")
    loaded = load_visual(tmp_path)
    assert_same(loaded, encoder)
    assert loaded.crop_settings.interpolation == "bilinear" and loaded.crop_settings.fit == "pad"
    loaded = load_visual(tmp_path, interpolation="bicubic", grid=(1, 2), dtype=torch.bfloat16)
    assert loaded.crop_settings.interpolation == "bicubic" and loaded.crop_settings.grid == (1, 2)
    assert loaded.proj.dtype == torch.bfloat16


def test_golden_tokens_from_a_checkpoint(tmp_path):
    golden = load_golden()
    (tmp_path / "config.json").write_text(json.dumps({"visual": golden.config}))
    state = {PREFIX + name: tensor for name, tensor in golden.state.items()}
    save_file(state, tmp_path / "model.safetensors")
    with torch.no_grad():
        assert_tokens_match(load_visual(tmp_path).encode_images(golden.images), golden)


def test_pickles_only_when_asked(tmp_path, encoder):
    write_config(tmp_path)
    torch.save(full_state(encoder), tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"only pickles \(pytorch_model.bin\).*allow_pickle"):
        load_visual(tmp_path)
    assert_same(load_visual(tmp_path, allow_pickle=True), encoder)


def test_pickles_run_no_code(tmp_path):
    class Attack:
        def __reduce__(self):
            return (open, (str(tmp_path / "attacked"), "w"))

    write_config(tmp_path)
    torch.save({PREFIX + "proj": Attack()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model.bin is no readable weights file"):
        load_visual(tmp_path, allow_pickle=True)
    assert not (tmp_path / "attacked").exists()
    torch.save([1], tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model.bin must hold a state dict; got list"):
        load_visual(tmp_path, allow_pickle=True)


def test_pickles_of_before_torch_1_6(tmp_path, encoder):
    write_config(tmp_path)
    path = tmp_path / "pytorch_model.bin"
    torch.save(full_state(encoder) | {7: 8}, path, _use_new_zipfile_serialization=False)
    assert_same(load_visual(tmp_path, allow_pickle=True), encoder)
    path.write_text("nonsense")
    with pytest.raises(ValueError, match="is no readable weights file: it is damaged"):
        load_visual(tmp_path, allow_pickle=True)


def test_what_is_no_weight_is_named(tmp_path, encoder):
    write_config(tmp_path)
    state = full_state(encoder) | {
        PREFIX + "proj": "text",
        PREFIX + "ln_pre.bias": torch.ones(16).int(),
    }
    torch.save(state, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError) as error:
        load_visual(tmp_path, allow_pickle=True)
    assert "transformer.visual.proj must be a tensor of floats, got str" in str(error.value)
    assert "transformer.visual.ln_pre.bias must be a tensor of floats, got torch.int32" in str(
        error.value
    )


def test_arguments(checkpoint):
    with pytest.raises(TypeError, match=r"dtype must be one of .*; got float16"):
        load_visual(checkpoint, dtype="float16")
    with pytest.raises(TypeError, match="interpolaton"):
        load_visual(checkpoint, interpolaton="bilinear")


def test_missing_files(tmp_path, checkpoint):
    with pytest.raises(FileNotFoundError, match=r"checkpoint must be a directory; got .*nowhere"):
        load_visual(tmp_path / "nowhere")
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(FileNotFoundError, match=r"checkpoint has no config.json"):
        load_visual(empty)
    write_config(empty)
    with pytest.raises(FileNotFoundError, match=r"has no transformer.visual.\* in any of model"):
        load_visual(empty)
    (checkpoint / "b.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"checkpoint lacks shards: .*b\.safetensors"):
        load_visual(checkpoint)


def test_broken_files(tmp_path, checkpoint):
    (checkpoint / "b.safetensors").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match=r"b\.safetensors is no readable safetensors file"):
        load_visual(checkpoint)
    index = checkpoint / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {PREFIX + "proj": "../secret"}}))
    with pytest.raises(ValueError, match=r"must name files of its own directory; got .*secret"):
        load_visual(checkpoint)
    index.write_text("{}")
    with pytest.raises(ValueError, match="must have an object 'weight_map'"):
        load_visual(checkpoint)
    index.write_text("[]")
    with pytest.raises(ValueError, match="must hold a JSON object; got list"):
        load_visual(checkpoint)
    (checkpoint / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json must be JSON"):
        load_visual(checkpoint)
    (checkpoint / "config.json").write_bytes(b"\xff{}")
    with pytest.raises(ValueError, match=r"config\.json must be JSON"):
        load_visual(checkpoint)
    (checkpoint / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"config\.json must have an object 'visual'"):
        load_visual(checkpoint)
    index.unlink()
    (checkpoint / "config.json").write_text('{"visual": {"width": 16}}')
    save_file({PREFIX + "proj": torch.zeros(1)}, checkpoint / "model.safetensors")
    with pytest.raises(ValueError, match=r"'visual' does not describe an encoder: .*missing"):
        load_visual(checkpoint)


def test_wrong_keys_and_shapes_are_named(tmp_path, encoder):
    write_config(tmp_path)
    state = full_state(encoder)
    state[PREFIX + "proj"] = torch.zeros(3, 4)
    state[PREFIX + "extra"] = torch.zeros(1)
    del state[PREFIX + "ln_pre.bias"]
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(ValueError) as error:
        load_visual(tmp_path)
    message = str(error.value)
    assert "missing transformer.visual.ln_pre.bias" in message
    assert "unexpected transformer.visual.extra" in message
    assert "transformer.visual.proj must be [128, 128], got [3, 4]" in message


# TextMonkey's, as upstream's fine-tuning writes them.
TEXTMONKEY = {"add_window": True, "use_global": True, "resampler": True, "r": 512}
WINDOW = "transformer.visual.transformer.window_attention.0.qkv.weight"


@pytest.mark.parametrize("field", TEXTMONKEY)
def test_textmonkey_is_told_by_its_config(checkpoint, field):
    visual = {**VISUAL, field: TEXTMONKEY[field]}
    write_config(checkpoint, **visual)
    message = f"got {field}: this is TextMonkey"
    for load in (
        lambda: load_visual(checkpoint),
        lambda: MonkeyImageProcessor.from_pretrained(checkpoint),
        lambda: VisionTransformer.from_config(visual),
        lambda: MonkeyConfig(visual={**MonkeyConfig().visual, field: TEXTMONKEY[field]}),
    ):
        with pytest.raises(ValueError, match=message):
            load()
    # Upstream's constructor ignores the keys that it does not know.
    VisionTransformer(**visual)


def test_textmonkey_is_told_by_its_weights(tmp_path, encoder):
    write_config(tmp_path)
    state = full_state(encoder) | {WINDOW: torch.zeros(1)}
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=rf"\(this is TextMonkey.*: unexpected {WINDOW}"):
        load_visual(tmp_path)


def test_a_name_that_is_there_twice(tmp_path, checkpoint, encoder):
    shard = checkpoint / "b.safetensors"
    with safe_open(shard, "pt") as file:
        state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    with safe_open(checkpoint / "a.safetensors", "pt") as file:
        twice = sorted(file.keys())[0]
        save_file({**state, twice: file.get_tensor(twice)}, shard)
    with pytest.raises(ValueError, match=rf"a\.safetensors and b\.safetensors both hold {twice}"):
        load_visual(checkpoint)
    # In one file: safetensors reads the last of two entries of the same name.
    write_config(tmp_path)
    path = tmp_path / "model.safetensors"
    save_file(full_state(encoder), path)
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = content[8 : 8 + size].rstrip()
    entry = json.dumps(json.loads(header)[PREFIX + "proj"])
    header = header[:-1] + f', "{PREFIX}proj": {entry}}}'.encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + content[8 + size :])
    with pytest.raises(ValueError, match=rf"an object has the key '{PREFIX}proj' twice"):
        load_visual(tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_no_numbers_are_named(tmp_path, encoder, value):
    write_config(tmp_path)
    state = full_state(encoder)
    state[PREFIX + "proj"][3, 4] = value
    save_file(state, tmp_path / "model.safetensors")
    message = r"holds NaN or infinity in transformer.visual.proj \(torch.float32\)$"
    with pytest.raises(ValueError, match=message):
        load_visual(tmp_path)
    # Fine in bfloat16, too large for float16.
    state[PREFIX + "proj"][3, 4] = 1e6
    save_file(state, tmp_path / "model.safetensors")
    load_visual(tmp_path, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"in transformer.visual.proj \(torch.float16\)$"):
        load_visual(tmp_path, dtype=torch.float16)


def test_a_config_of_more_layers_than_the_weights_builds_nothing(checkpoint, monkeypatch):
    write_config(checkpoint, layers=200_000)
    monkeypatch.setattr(VisionTransformer, "from_config", None)
    held = VISUAL["layers"]
    message = rf"visual.layers must be at most {held}, .*; got 200000"
    with pytest.raises(ValueError, match=message):
        load_visual(checkpoint)


@pytest.mark.parametrize("field", ["width", "output_dim", "lora_repeat_num", "n_queries"])
def test_sizes_beyond_any_tensor(checkpoint, field):
    write_config(checkpoint, **{field: 10**9})
    with pytest.raises(ValueError, match=f"{field} must be at most 262144; got 1000000000"):
        load_visual(checkpoint)
