"""What a run shows: speed, answers to samples and TensorBoard, none of which changes it."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from safetensors.torch import load_file
from transformers import TrainerState

from monkey_model.training.config import training_arguments
from monkey_model.training.conversations import read_conversations
from monkey_model.training.finetune import draw_loss_curve, finetune
from monkey_model.training.monitor import SAMPLES, SampleAnswers, Speed, count
from monkey_model.training.run_directory import last_complete_checkpoint
from tests.helpers.checkpoint import tiny_processor, write_checkpoint, write_data
from tests.helpers.finetuning import QUICK, finetune_config

SPEED = (
    "samples_per_second",
    "tokens_per_second",
    "images_per_second",
    "waiting_share",
    "peak_memory_gib",
)
TRAINING = {**QUICK, "max_steps": 4}
BLUE = (31, 119, 180)  # of a figure's first line


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    folder = tmp_path_factory.mktemp("monitor")
    data = write_data(folder)
    write_data(folder, 2, "samples.json")
    return write_checkpoint(folder / "checkpoint"), data


@pytest.fixture
def config(start, tmp_path):
    def config(name="out", training=None, **settings):
        training = {**TRAINING, **(training or {})}
        return finetune_config(*start, tmp_path / name, training, **settings)

    return config


def history(directory):
    path = last_complete_checkpoint(directory) / "trainer_state.json"
    return json.loads(path.read_text())["log_history"]


def test_a_watched_run_is_the_run(config, start, tmp_path, monkeypatch):
    """Evaluated, asked for answers and shown in TensorBoard, by default, it learns the same."""
    finetune(config("alone"))
    samples = start[1].parent / "samples.json"
    watched = config(
        "watched",
        training={"eval_strategy": "steps", "eval_steps": 2},
        eval_data=str(samples),
        sample_data=str(samples),
        sample_tokens=3,
    )
    del watched.training["report_to"]
    finetune(watched)
    logs = [[e for e in history(tmp_path / n) if "loss" in e] for n in ("alone", "watched")]
    assert [e["loss"] for e in logs[0]] == [e["loss"] for e in logs[1]] and len(logs[0]) == 4
    adapters = [
        load_file(tmp_path / name / "model" / "adapter_model.safetensors")
        for name in ("alone", "watched")
    ]
    assert all(torch.equal(adapters[0][name], adapters[1][name]) for name in adapters[0])
    for entry in logs[1]:
        assert all(entry[name] > 0 for name in SPEED) and entry["waiting_share"] <= 1
        assert entry["samples_per_second"] == pytest.approx(entry["images_per_second"])

    lines = [json.loads(line) for line in (tmp_path / "watched" / SAMPLES).read_text().splitlines()]
    assert [(line["step"], line["record"]) for line in lines] == [
        (step, f"record {n} (id 'r{n}')") for step in (2, 4) for n in (0, 1)
    ]
    assert lines[1]["question"] == "<img>green.png</img> Colour? Answer: "
    assert lines[1]["expected"] == "green" and lines[1]["images"][0].endswith("/green.png")
    assert all(isinstance(line["answer"], str) for line in lines)
    # The last one is what the trained model says.
    assert {line["answer"] for line in lines[2:]} != {""}

    monkeypatch.setenv("PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION", "python")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (run,) = (tmp_path / "watched" / "runs").iterdir()
    events = EventAccumulator(str(run)).Reload()
    tags = events.Tags()
    assert {"train/loss", "eval/loss", *(f"train/{name}" for name in SPEED)} <= {*tags["scalars"]}
    assert tags["images"] == ["samples/0.0", "samples/1.0"]
    assert {"samples/0/text_summary", "samples/1/text_summary"} <= {*tags["tensors"]}
    (text, *_), (picture, *_) = (
        events.Tensors("samples/1/text_summary"),
        events.Images("samples/1.0"),
    )
    assert b"Colour? Answer: " in text.tensor_proto.string_val[0]
    assert (picture.width, picture.height) == (60, 40)


def test_a_line_that_was_cut_stays_apart(start, tmp_path):
    conversations = read_conversations(start[1].parent / "samples.json")
    samples = SampleAnswers(conversations, tiny_processor(tmp_path), 200, 1)
    path, state = tmp_path / SAMPLES, TrainerState(global_step=5)
    for before in (None, '{"step": 1', '{"step": 1}\n'):
        if before is not None:
            path.write_text(before)
        samples.write(path, state, ["a", "b"])
        *first, one, two = path.read_text().splitlines()
        assert "".join(first) == (before or "").strip()
        assert [json.loads(line)["answer"] for line in (one, two)] == ["a", "b"]


def test_samples_that_cannot_be_asked(config, start, tmp_path):
    samples = str(start[1].parent / "samples.json")
    evaluated = {"eval_data": samples, "training": {"eval_strategy": "steps"}}
    many = write_data(tmp_path / "many", 101)
    for settings, message in (
        ({}, "sample_data must come with training.eval_strategy, .*; got none"),
        (
            {**evaluated, "sample_data": str(many)},
            "sample_data must hold at most 100 conversations, .*; got 101",
        ),
        (
            {**evaluated, "model_max_length": 60, "sample_tokens": 50},
            r"^sample_data: record 0 \(id 'r0'\): \d+ tokens exceed model_max_length, 10, .* less "
            "sample_tokens, 50$",
        ),
        ({**evaluated, "sample_data": "nowhere"}, "sample_data must be a file; got nowhere"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            finetune(config(**{"sample_data": samples, **settings}))
    with pytest.raises(ValueError, match="sample_tokens must be below model_max_length, 9; got 9"):
        config(sample_data=samples, sample_tokens=9, model_max_length=9)


def test_tensorboard_that_is_not_installed(config, monkeypatch):
    monkeypatch.setattr("transformers.integrations.is_tensorboard_available", lambda: False)
    settings = config()
    del settings.training["report_to"]
    assert training_arguments(settings).report_to == []
    for given in ("tensorboard", ["tensorboard"]):
        with pytest.raises(ValueError, match=r'pip install "monkey-vision\[tensorboard\]"$'):
            training_arguments(config(training={"report_to": given}))


def test_speed_counts_steps_and_nothing_between_them():
    now = 0.0

    def data():
        nonlocal now
        for length in (3, 5, 7, 9):
            now += 2  # to wait for
            mask = torch.ones(2, length, dtype=torch.long)
            mask[1, 1:] = 0
            batch = {"input_ids": mask, "attention_mask": mask}
            yield {**batch, "pixel_values": torch.zeros(3, 1)} if length < 7 else batch

    speed, batches = Speed(lambda: now), data()
    accelerator = Accelerator(cpu=True)
    for _ in range(2):  # steps of two batches
        taken = speed.start(batches)
        next(taken), next(taken)
        now += 6
        speed.stop()
        now += 100  # evaluation
        speed.stop()
    report = speed.report(accelerator)
    assert report.pop("peak_memory_gib") > 0
    tokens = 3 + 5 + 7 + 9 + 4
    assert report == {
        "samples_per_second": 8 / 20,
        "tokens_per_second": tokens / 20,
        "images_per_second": 6 / 20,
        "waiting_share": 8 / 20,
    }
    assert speed.report(accelerator) == {}  # nothing since
    assert list(speed.start(batches)) == []


def test_packed_batches_are_counted_by_conversation():
    positions = torch.tensor([[0, 1, 2, 0, 1], [0, 1, -1, -1, -1]])
    batch = {"input_ids": torch.zeros(2, 5, dtype=torch.long), "position_ids": positions}
    assert count(batch).tolist() == [3, 7, 0]


def blue_pixels(path):
    with Image.open(path) as picture:
        return (np.asarray(picture.convert("RGB")) == BLUE).all(-1).sum()


def test_the_loss_curve_is_never_empty(config, tmp_path):
    finetune(config(training={"max_steps": 2, "logging_steps": 500, "save_strategy": "no"}))
    assert blue_pixels(tmp_path / "out" / "loss.png") > 20
    path = tmp_path / "loss.png"
    draw_loss_curve([{"loss": 1.0, "step": 1}], path)
    assert blue_pixels(path) > 20
    with Image.open(path) as picture:
        size = picture.size
    ink = []
    for entries in ([], [{"loss": float("nan"), "step": 1}], [{"loss": float("inf"), "step": 2}]):
        draw_loss_curve(entries, path)
        with Image.open(path) as picture:
            assert picture.size == size
            middle = np.asarray(picture.convert("L"))[200:300, 380:600]
            ink.append((middle < 100).sum())
    assert min(ink) > 50  # a sentence
