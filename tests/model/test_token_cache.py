"""Visual tokens kept on disk: the same run, and no file is taken for what it is not."""

from __future__ import annotations

import dataclasses
import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from monkey_model.inputs.picture_files import picture_digest
from monkey_model.training import token_cache
from monkey_model.training.conversations import (
    ConversationCollator,
    ConversationDataset,
    read_conversations,
)
from monkey_model.training.finetune import build_model, encoder, finetune, training_arguments
from monkey_model.training.monitor import SAMPLES
from monkey_model.training.run_directory import CompleteCheckpoints, last_complete_checkpoint
from monkey_model.training.token_cache import TokenCache, encoder_digest
from monkey_model.visual import VisionTransformer
from tests.helpers.checkpoint import COLOURS, tiny_processor, write_checkpoint, write_data
from tests.helpers.finetuning import QUICK, finetune_config
from tests.helpers.tiny import SPAN, tiny_batch, tiny_model

TRAINING = {**QUICK, "max_steps": 2, "warmup_steps": 0}
FROZEN = {"train_resampler": False, "train_vit_lora": False}


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    folder = tmp_path_factory.mktemp("start")
    return write_checkpoint(folder / "checkpoint"), write_data(folder)


@pytest.fixture
def config(start, tmp_path):
    def config(name="out", training=None, **settings):
        training = {**TRAINING, **(training or {})}
        return finetune_config(*start, tmp_path / name, training, **{"freeze": FROZEN, **settings})

    return config


def losses(directory):
    state = json.loads((last_complete_checkpoint(directory) / "trainer_state.json").read_text())
    return [
        entry[key]
        for entry in state["log_history"]
        for key in ("loss", "eval_loss")
        if key in entry
    ]


@pytest.fixture
def encoded(monkeypatch):
    """How many crops each call of the encoder had."""
    calls = []
    original = VisionTransformer.encode_crops

    def encode_crops(self, crops, **kwargs):
        calls.append(len(crops))
        return original(self, crops, **kwargs)

    monkeypatch.setattr(VisionTransformer, "encode_crops", encode_crops)
    return calls


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_a_cached_run_is_the_uncached_one(config, tmp_path, encoded, dtype):
    """To the bit; LoRA drops values in both, and the encoder, which is frozen, in neither."""
    finetune(config("uncached", dtype=dtype))
    assert encoded == [20, 20]
    encoded.clear()
    cache = tmp_path / "cache"
    finetune(config("cached", dtype=dtype, cache_visual_tokens=str(cache)))
    assert encoded == [5] * len(COLOURS)  # each picture once, before training
    encoded.clear()
    again = {"dataloader_num_workers": 1, "eval_strategy": "steps", "eval_steps": 1}
    held_out = dict.fromkeys(("eval_data", "sample_data"), config().data)
    settings = config("again", again, dtype=dtype, cache_visual_tokens=str(cache), **held_out)
    finetune(dataclasses.replace(settings, sample_tokens=1))
    assert (tmp_path / "again" / SAMPLES).is_file()
    assert encoded == []  # from the disk, in another process
    runs = [tmp_path / name for name in ("uncached", "cached", "again")]
    assert losses(runs[0]) == losses(runs[1])
    assert losses(runs[2])[0] == losses(runs[0])[0] and len(losses(runs[2])) == 4
    adapters = [load_file(run / "model" / "adapter_model.safetensors") for run in runs]
    assert all("lora_A" in name or "lora_B" in name for name in adapters[0])  # what trains
    for name, tensor in adapters[0].items():
        assert torch.equal(tensor, adapters[1][name]) and torch.equal(tensor, adapters[2][name])
    (folder,) = cache.iterdir()
    assert len(list(folder.iterdir())) == len(COLOURS)


@pytest.mark.slow
def test_packed_and_beside_the_run(config, tmp_path, encoded):
    finetune(config("uncached", packing=True, model_max_length=128))
    encoded.clear()
    finetune(config("cached", packing=True, model_max_length=128, cache_visual_tokens=True))
    assert encoded == [5] * len(COLOURS)
    torch.testing.assert_close(losses(tmp_path / "cached"), losses(tmp_path / "uncached"))
    assert len(list((tmp_path / "cached" / "visual_tokens").glob("*/*.safetensors"))) == 4


def test_a_torn_or_foreign_file_is_written_anew(config, tmp_path, encoded):
    settings = config("first", cache_visual_tokens=str(tmp_path / "cache"))
    finetune(settings)
    torn, foreign, empty, good = sorted((tmp_path / "cache").glob("*/*"))
    before = {
        path: load_file(path)["visual_tokens"].clone() for path in (torn, foreign, empty, good)
    }
    torn.write_bytes(torn.read_bytes()[:-1])
    shutil.copy(good, foreign)  # another picture's
    empty.write_bytes(b"")
    encoded.clear()
    finetune(config("second", cache_visual_tokens=str(tmp_path / "cache")))
    assert encoded == [5] * 3
    for path, tokens in before.items():
        assert torch.equal(load_file(path)["visual_tokens"], tokens)
    assert losses(tmp_path / "first") == losses(tmp_path / "second")


def test_a_file_that_goes_in_mid_run_is_named(config, tmp_path, monkeypatch):
    on_save = CompleteCheckpoints.on_save

    def remove(self, *args, **kwargs):
        on_save(self, *args, **kwargs)
        for path in (tmp_path / "cache").glob("*/*"):
            path.unlink()

    monkeypatch.setattr(CompleteCheckpoints, "on_save", remove)
    settings = config(training={"save_steps": 1}, cache_visual_tokens=str(tmp_path / "cache"))
    message = (
        r"^record \d+ \(id 'r\d+'\): image '.*\.png': its visual tokens cannot be read from .*"
    )
    with pytest.raises(ValueError, match=message + "start again with --resume"):
        finetune(settings)
    monkeypatch.undo()
    finetune(settings, resume=True)
    assert len(losses(tmp_path / "out")) == 2


def test_an_encoder_that_trains_is_refused(config):
    for settings, message in (
        ({"freeze": {}}, "{train_resampler: false, train_vit_lora: false}"),
        ({"freeze": {**FROZEN, "train_vit_lora": True}}, "{train_vit_lora: false}"),
        ({"mode": "full"}, "{fix_vit: true}"),
    ):
        with pytest.raises(ValueError, match=f"which nothing trains: set freeze: {message}$"):
            finetune(config(cache_visual_tokens=True, **settings))


def test_a_disk_without_room_is_refused_before_anything_is_encoded(config, monkeypatch, encoded):
    usage = SimpleNamespace(free=2**10)
    monkeypatch.setattr(token_cache.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(ValueError, match=r"needs 0\.0 GiB in .*out/visual_tokens for 4 images; 0"):
        finetune(config(cache_visual_tokens=True))
    assert encoded == []


def test_nodes_with_disks_of_their_own_are_refused(config, monkeypatch):
    elsewhere = [("other.png", "0" * 64)]
    monkeypatch.setattr(token_cache, "gather_object", lambda mine: [*mine, *elsewhere])
    with pytest.raises(ValueError, match=r"a directory that all processes share; .* lacks 0{64}.s"):
        finetune(config(cache_visual_tokens=True))


def test_a_picture_that_cannot_be_read_names_its_record(config, tmp_path):
    data = write_data(tmp_path / "data")
    picture = data.parent / "blue.png"
    picture.write_bytes(picture.read_bytes()[:60])
    with pytest.raises(ValueError, match=r"^record 2 \(id 'r2'\): .*blue.png"):
        finetune(config(data=str(data), cache_visual_tokens=True))


def test_the_directory_is_that_of_the_encoder(config):
    """The same whatever is wrapped around the encoder, and another for whatever decides."""

    def digest(change=None, described=None, **settings):
        given = config(**settings)
        model, _ = build_model(given, training_arguments(given))
        visual = encoder(model)
        if change is not None:
            with torch.no_grad():
                change(visual)
        return encoder_digest(visual, described or {"dtype": "float32"})

    digests = [
        digest(),
        digest(lambda visual: visual.conv1.weight[0, 0, 0, 0].add_(1e-3)),
        digest(lambda visual: visual.to(torch.bfloat16)),
        digest(described={"dtype": "float32", "autocast": "bf16"}),
    ]
    assert len(set(digests)) == 4
    training_lora = {"mode": "full", "freeze": {"fix_vit": True, **FROZEN}}
    assert digest(**training_lora) == digests[0]
    # With copies beside LoRA, which peft names otherwise, and their originals.
    assert digest(lora=dict.fromkeys(FROZEN, True)) == digests[0]


def test_a_picture_is_known_by_its_content(tmp_path):
    (tmp_path / "a").write_bytes(b"1")
    (tmp_path / "b").write_bytes(b"1")
    (tmp_path / "c").write_bytes(b"2")
    a, b, c = (picture_digest(str(tmp_path / name)) for name in "abc")
    assert a == b != c


def test_a_batch_of_tokens_never_runs_the_encoder(start, tmp_path, encoded):
    both = tiny_processor(tmp_path)
    (tmp_path / "data.json").write_text(json.dumps([{"conversations": [
        {"from": "user", "value": "no picture"}, {"from": "assistant", "value": "none"}
    ]}]))  # fmt: skip
    dataset = ConversationDataset(
        [*read_conversations(start[1])[:2], *read_conversations(tmp_path / "data.json")],
        both.tokenizer,
        100,
    )
    paths = [path for each in dataset.conversations for path in each.images]
    cache = TokenCache(tmp_path, "e", (SPAN, 128), {path: str(n) for n, path in enumerate(paths)})
    written = torch.randn(2, SPAN, 128)
    for number, tokens in enumerate(written):
        cache.write(str(number), tokens)
    collate = ConversationCollator(both.tokenizer.eod_id, both.image_processor)
    collate.read_tokens(cache, both.tokenizer.img_start_id)
    model = tiny_model().train()
    for members, images in (([2, 0, 1], 2), ([2], 0)):
        batch = collate([dataset[n] for n in members])
        assert "pixel_values" not in batch
        assert torch.equal(batch["visual_tokens"], written[:images])
        assert batch["visual_mask"].sum() == images * SPAN
        assert model(**batch).loss.isfinite()
    assert encoded == []


def test_tokens_in_place_of_pixels_are_the_same():
    model, batch = tiny_model(), tiny_batch()
    expected = model(**batch)
    mask, tokens = model.transformer.encode_images(batch["input_ids"], batch.pop("pixel_values"))
    for given in (tokens, tokens.view(1, SPAN, -1)):
        got = model(**batch, visual_mask=mask, visual_tokens=given)
        assert torch.equal(got.logits, expected.logits) and torch.equal(got.loss, expected.loss)
