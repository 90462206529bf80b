"""Fine-tuning on one process: what trains, what is saved, and what comes of broken runs."""

from __future__ import annotations

import dataclasses
import errno
import itertools
import json
import math
import os
import resource
import shutil
from contextlib import contextmanager
from dataclasses import fields

import pytest
import torch
from accelerate.utils.deepspeed import HfDeepSpeedConfig
from matplotlib.figure import Figure
from PIL import Image
from safetensors.torch import load_file
from transformers import Trainer, TrainerState
from transformers.integrations import integration_utils
from typer.testing import CliRunner

from monkey_model.commands.__main__ import app
from monkey_model.configuration_monkey import MonkeyConfig
from monkey_model.modeling_monkey import MonkeyLMHeadModel
from monkey_model.parameter_names import upstream_name
from monkey_model.processing_monkey import MonkeyProcessor
from monkey_model.training import finetune as module
from monkey_model.training.config import (
    RECIPE,
    FinetuneConfig,
    check_arguments,
    launch_arguments,
    load_config,
    training_arguments,
)
from monkey_model.training.finetune import draw_loss_curve, finetune
from monkey_model.training.peft_model import MonkeyPeftModel
from monkey_model.training.run_directory import (
    BEGUN,
    COMPLETE,
    FINISHED,
    LOCK,
    CompleteCheckpoints,
    checkpoints,
    last_complete_checkpoint,
)
from monkey_model.visual import VisionTransformer
from tests.helpers.checkpoint import write_checkpoint, write_data
from tests.helpers.finetuning import QUICK, finetune_config

TRAINING = {**QUICK, "max_steps": 30, "save_steps": 10}


@pytest.fixture(autouse=True)
def one_thread():
    """Products this small are slower on two."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A checkpoint and data."""
    folder = tmp_path_factory.mktemp("start")
    return write_checkpoint(folder / "checkpoint"), write_data(folder)


@pytest.fixture(scope="module")
def resumable(start, tmp_path_factory):
    """The directory of a run that had two steps."""
    checkpoint, data = start
    output = tmp_path_factory.mktemp("resumable") / "out"
    training = {**TRAINING, "max_steps": 2}
    finetune(FinetuneConfig(str(checkpoint), str(data), str(output), dtype="float32",
                            training=training))  # fmt: skip
    return output


@pytest.fixture
def config(start, tmp_path):
    def config(name="out", training=None, **settings):
        training = {**TRAINING, **(training or {})}
        return finetune_config(*start, tmp_path / name, training, **settings)

    return config


def losses(directory):
    """The training loss of each step, as the last checkpoint keeps it."""
    state = json.loads((last_complete_checkpoint(directory) / "trainer_state.json").read_text())
    return [entry["loss"] for entry in state["log_history"] if "loss" in entry]


def weights(checkpoint):
    return load_file(checkpoint / "model.safetensors")


def test_lora_and_resampler_learn_and_nothing_else_changes(config, start, tmp_path, capsys):
    report = finetune(config(merge=True))
    curve = losses(tmp_path / "out")
    assert len(curve) == 30 and sum(curve[-5:]) < sum(curve[:5]) - 2.5
    assert "LLM LoRA" in capsys.readouterr().out  # the table of what trains
    assert report.parts["LLM LoRA"].trainable and report.parts["resampler"].trainable

    # Bit for bit: exactly the reported parameters have changed.
    base = MonkeyLMHeadModel.from_pretrained(start[0])
    trained = MonkeyPeftModel.from_pretrained(base, tmp_path / "out" / "model")
    before = weights(start[0])
    changed = set()
    for name, parameter in trained.named_parameters():
        if ".original_module." in name:
            continue
        short = upstream_name(name) or name
        origin = before.get(short.replace(".modules_to_save.default", "").removeprefix(
            "base_model.model."))  # fmt: skip
        if origin is None:  # LoRA's A, which starts at random, and B, which starts at zero
            assert "lora_" in name
            if "lora_A" in name or parameter.any():
                changed.add(name)
        elif not torch.equal(parameter, origin):
            changed.add(name)
    assert changed == report.trainable

    # Merged: upstream's keys, and the same logits.
    merged = weights(tmp_path / "out" / "merged")
    assert {k: v.shape for k, v in merged.items()} == {k: v.shape for k, v in before.items()}
    whole = MonkeyLMHeadModel.from_pretrained(tmp_path / "out" / "merged").eval()
    ids = torch.arange(20)[None]
    with torch.no_grad():
        torch.testing.assert_close(whole(ids).logits, trained.eval()(ids).logits)
    with Image.open(tmp_path / "out" / "loss.png") as picture:
        assert picture.size == (960, 540)


def test_a_resumed_run_is_the_uninterrupted_one(config, tmp_path, monkeypatch):
    settings = {"training": {"max_steps": 9, "save_steps": 3, "save_total_limit": 2}}
    finetune(config("whole", **settings))

    def killed(self, *args, **kwargs):
        original(self, *args, **kwargs)
        if self.state.global_step == 6:  # everything written, but for the mark
            raise KeyboardInterrupt

    original = module.Trainer._save_checkpoint
    monkeypatch.setattr(module.Trainer, "_save_checkpoint", killed)
    with pytest.raises(KeyboardInterrupt):
        finetune(config("broken", **settings))
    monkeypatch.undo()
    assert list(checkpoints(tmp_path / "broken")) == [3, 6]
    assert last_complete_checkpoint(tmp_path / "broken").name == "checkpoint-3"
    assert not (tmp_path / "broken" / "model").exists()

    with pytest.raises(ValueError, match=r"--resume\); .* has checkpoint-3, checkpoint-6$"):
        finetune(config("broken", **settings))
    finetune(config("broken", **settings), resume=True)
    for run in ("whole", "broken"):
        assert list(checkpoints(tmp_path / run)) == [6, 9]
    assert losses(tmp_path / "broken") == losses(tmp_path / "whole")
    adapters = [load_file(tmp_path / run / "model" / "adapter_model.safetensors")
                for run in ("whole", "broken")]  # fmt: skip
    assert all(torch.equal(adapters[0][name], adapters[1][name]) for name in adapters[0])


def test_a_resumed_run_is_the_same_run(config, start, tmp_path):
    """One that would go on with what a checkpoint does not mean is refused, and changes nothing."""
    training = {"max_steps": 2, "save_steps": 1}
    finetune(config(training=training))
    before = snapshot(tmp_path / "out")
    del before[tmp_path / "out"]  # where a lock comes and goes
    other_data = write_data(tmp_path / "other", records=8)
    other_model = write_checkpoint(tmp_path / "model", intermediate_size=64)
    longer = {**training, "max_steps": 4}
    for settings, message in (
        ({"data": str(other_data)}, r"data was \S+/data.json \(sha256 \w{8}\), and is \S+/other/"),
        ({"checkpoint": str(other_model)}, r"checkpoint was \S+ \(sha256 \w{8}\), and is \S+/mod"),
        ({"lora": {"r": 4}}, "lora.r was not set, and is 4$"),
        ({"mode": "frozen"}, "mode was 'lora', and is 'frozen'$"),
        ({"training": {**longer, "learning_rate": 1.0}}, "training.learning_rate was 0.003, and i"),
        ({"training": {**training, "max_steps": 1}}, "training.max_steps was 2, and is 1$"),
    ):
        with pytest.raises(ValueError, match=f"--resume must go on with the run of .*; {message}"):
            finetune(config(**{"training": longer, **settings}), resume=True)
    assert {**snapshot(tmp_path / "out"), **before} == snapshot(tmp_path / "out")
    # The same data elsewhere, and what decides on nothing that is learned.
    moved = write_data(tmp_path / "moved")
    free = {**longer, "save_steps": 2, "logging_steps": 2}
    finetune(config(data=str(moved), merge=True, training=free), resume=True)
    assert list(checkpoints(tmp_path / "out")) == [1, 2, 4]


@pytest.mark.parametrize(
    "name",
    [
        "adapter_model.safetensors",
        "optimizer.pt",
        "rng_state.pth",
        "scheduler.pt",
        "trainer_state.json",
    ],
)
def test_a_damaged_checkpoint_is_named(config, resumable, tmp_path, name):
    """A file that is not there or cut is found before anything loads; another one as it loads."""
    settings = config(training={"max_steps": 3, "save_steps": 2})
    checkpoint = tmp_path / "out" / "checkpoint-2"
    shutil.copytree(resumable, tmp_path / "out")
    content = (checkpoint / name).read_bytes()
    match = rf"^{checkpoint} cannot be resumed from: .*; move it away to go on from the one before"
    for damaged in (None, content[:-9], b"x" * len(content)):
        if damaged is None:
            (checkpoint / name).unlink()
        else:
            (checkpoint / name).write_bytes(damaged)
        with pytest.raises(ValueError, match=match) as caught:
            finetune(settings, resume=True)
        assert damaged == b"x" * len(content) or f"{name} (" in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_checkpoint_of_another_step(config, resumable, tmp_path):
    shutil.copytree(resumable, tmp_path / "out")
    state = tmp_path / "out" / "checkpoint-2" / "trainer_state.json"
    state.write_text(state.read_text().replace('"global_step": 2', '"global_step": 1'))
    with pytest.raises(ValueError, match="must be of the step in the name; got global_step 1"):
        finetune(config(training={"max_steps": 3}), resume=True)


def test_a_resumed_run_may_have_nothing_to_resume_from(config, tmp_path):
    settings = {"training": {"max_steps": 1, "save_steps": 1}}
    half = tmp_path / "out" / "checkpoint-1"
    half.mkdir(parents=True)
    (half / "adapter_model.safetensors").write_bytes(b"half")
    with pytest.raises(ValueError, match="checkpoint-1 has no file 'begun' or 'complete'"):
        finetune(config(**settings), resume=True)
    assert (half / "adapter_model.safetensors").read_bytes() == b"half"
    (half / BEGUN).touch()
    finetune(config(**settings), resume=True)
    assert (half / COMPLETE).is_file() and len(losses(tmp_path / "out")) == 1


def snapshot(directory):
    """Every file's time and bytes, and every directory's time."""
    return {
        path: (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else None)
        for path in [directory, *directory.rglob("*")]
    }


# Three steps are no whole epoch, and without checkpoints there is nothing to resume from.
@pytest.mark.parametrize("save", [{"save_steps": 2}, {"save_strategy": "no"}])
def test_a_finished_run_is_left_alone(start, tmp_path, monkeypatch, save):
    monkeypatch.setenv("COLUMNS", "200")
    checkpoint, data = start
    path, out = tmp_path / "run.yaml", tmp_path / "out"
    training = {**TRAINING, "max_steps": 3, **save}
    path.write_text(json.dumps({"training": training, "dtype": "float32", "merge": True,
                                "checkpoint": str(checkpoint), "data": str(data)}))  # fmt: skip
    arguments = ["finetune", "--config", str(path), "--output-dir", str(out)]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    before = snapshot(out)
    assert {out / "model", out / "merged", out / "loss.png"} <= before.keys()
    done = CliRunner().invoke(app, [*arguments, "--resume"])
    assert done.exit_code == 0, done.output
    assert f"{out}: the run has finished; nothing has changed" in done.output
    assert snapshot(out) == before
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 2 and "output_dir must have no run, or be resumed" in done.output


def test_a_run_that_is_refused_stays_finished(config, tmp_path, monkeypatch):
    settings = config(training={"max_steps": 1, "save_steps": 1})
    finetune(settings)
    before = snapshot(tmp_path / "out")
    with pytest.raises(FileNotFoundError):
        finetune(dataclasses.replace(settings, data=str(tmp_path / "none.json")), resume=True)
    monkeypatch.chdir(tmp_path)  # its paths, spelled otherwise
    relative = os.path.relpath(settings.checkpoint)
    assert finetune(dataclasses.replace(settings, checkpoint=relative), resume=True) is None
    after = snapshot(tmp_path / "out")
    assert {path for path in before if before[path] != after.get(path)} <= {
        tmp_path / "out", tmp_path / "out" / LOCK
    }  # fmt: skip


def test_a_run_killed_after_its_last_step_trains_no_more(config, tmp_path, monkeypatch):
    training = {"max_steps": 3, "save_steps": 2}

    def killed(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "draw_loss_curve", killed)
    with pytest.raises(KeyboardInterrupt):
        finetune(config(training=training))
    monkeypatch.undo()
    adapter = tmp_path / "out" / "model" / "adapter_model.safetensors"
    trained, before = adapter.read_bytes(), snapshot(tmp_path / "out" / "checkpoint-3")
    assert finetune(config(training=training), resume=True) is not None
    assert (tmp_path / "out" / "loss.png").is_file() and adapter.read_bytes() == trained
    assert list(checkpoints(tmp_path / "out")) == [2, 3]
    assert snapshot(tmp_path / "out" / "checkpoint-3") == before
    # More steps are more to do.
    assert finetune(config(training={**training, "max_steps": 5}), resume=True) is not None
    assert len(losses(tmp_path / "out")) == 5 and adapter.read_bytes() != trained


#: What a run writes after its first checkpoint, in order.
RESULTS = ("checkpoint-2", "model", "loss.png", "merged", FINISHED)


@contextmanager
def files_limited_to(size):
    """The kernel refuses to write more bytes to a file, as it does on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(
    ("owner", "name", "call", "size", "place"),
    [
        (Trainer, "_save_optimizer_and_scheduler", 2, 64, "checkpoint-2"),
        (TrainerState, "save_to_json", 2, 64, "checkpoint-2"),
        (Trainer, "save_model", 3, 20_000, "model"),
        (Figure, "savefig", 1, 64, "loss.png"),
        (MonkeyLMHeadModel, "save_pretrained", 1, 20_000, "merged"),
        (module, "mark_finished", 1, 64, FINISHED),
        # Other writes to the same places.
        pytest.param(Trainer, "save_model", 2, 20_000, "checkpoint-2", marks=pytest.mark.slow),
        pytest.param(Trainer, "_save_rng_state", 2, 64, "checkpoint-2", marks=pytest.mark.slow),
        pytest.param(MonkeyProcessor, "save_pretrained", 3, 64, "model", marks=pytest.mark.slow),
        pytest.param(MonkeyProcessor, "save_pretrained", 4, 64, "merged", marks=pytest.mark.slow),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_a_full_disk_loses_nothing(start, tmp_path, monkeypatch, owner, name, call, size, place):
    monkeypatch.setenv("COLUMNS", "1000")
    checkpoint, data = start
    path, out = tmp_path / "run.yaml", tmp_path / "out"
    training = {**TRAINING, "max_steps": 2, "save_steps": 1}
    path.write_text(json.dumps({"training": training, "dtype": "float32", "merge": True,
                                "checkpoint": str(checkpoint), "data": str(data)}))  # fmt: skip
    arguments = ["finetune", "--config", str(path), "--output-dir", str(out), "--resume"]
    original, calls = getattr(owner, name), itertools.count(1)

    def limited(*args, **kwargs):
        if next(calls) != call:
            return original(*args, **kwargs)
        with files_limited_to(size):  # 20,000 bytes: room for all but the weights
            return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, limited)
    done = CliRunner().invoke(app, arguments)
    monkeypatch.undo()
    assert done.exit_code == 2 and isinstance(done.exception, SystemExit), done.output
    (line,) = [line for line in done.output.splitlines() if "rror" in line]
    assert line.startswith(f"Error: {out / place} cannot be written: ")
    whole = out / ("checkpoint-1" if place == "checkpoint-2" else "checkpoint-2")
    assert last_complete_checkpoint(out) == whole and not (out / FINISHED).exists()
    for result in ("model", "loss.png", "merged"):
        assert (out / result).exists() == (RESULTS.index(result) < RESULTS.index(place))
    left = {path.name for path in out.rglob("*")}
    assert not any(name.startswith(".monkey-") or name.endswith(".unfinished") for name in left)
    # With room again the run ends as if nothing had happened.
    assert CliRunner().invoke(app, arguments).exit_code == 0
    assert len(losses(out)) == 2 and all((out / result).exists() for result in RESULTS[1:])


def test_a_disk_that_says_late_that_it_is_full(config, tmp_path, monkeypatch):
    """As a network file system: each write succeeds, and what was written is lost."""

    def fsync(file):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match=r"checkpoint-1 cannot be written: .*No space left on device"):
        finetune(config(training={"max_steps": 1}))
    assert list(checkpoints(tmp_path / "out")) == [1]
    assert last_complete_checkpoint(tmp_path / "out") is None


def test_frozen_and_full(config, start, tmp_path):
    before = weights(start[0])
    training = {"max_steps": 2, "save_strategy": "no"}
    for mode, part in (("frozen", "transformer.visual."), ("full", "")):
        report = finetune(config(mode, mode=mode, training=training))
        after = weights(tmp_path / mode / "model")
        changed = {name for name in before if not torch.equal(before[name], after[name])}
        assert before.keys() == after.keys() and changed == report.trainable
        assert all(name.startswith(part) for name in changed)
    assert "lm_head.weight" in changed
    flags = {"freeze": {"train_resampler": False}}
    report = finetune(config("flags", mode="frozen", training=training, **flags))
    assert not report.parts["resampler"].trainable and report.parts["ViT adapters"].trainable


def test_blocks_thaw(config, tmp_path):
    unfreeze = {"schedule": {2: 1}}
    training = {"max_steps": 4, "save_steps": 4, "ddp_find_unused_parameters": True}
    finetune(config(unfreeze=unfreeze, training=training))
    state = json.loads((tmp_path / "out" / "checkpoint-4" / "trainer_state.json").read_text())
    assert [e["step"] for e in state["log_history"] if "thawed_blocks" in e] == [2]


def test_bfloat16_keeps_what_trains_in_float32(config, tmp_path):
    training = {"max_steps": 4, "save_steps": 4}
    finetune(config(dtype="bfloat16", training=training, merge=True))
    adapter = load_file(tmp_path / "out" / "model" / "adapter_model.safetensors")
    # The frozen position table comes along in the model's dtype.
    trained = {name: t for name, t in adapter.items() if not name.endswith("pos_embed")}
    assert {tensor.dtype for tensor in trained.values()} == {torch.float32}
    assert all(math.isfinite(loss) for loss in losses(tmp_path / "out"))


def test_gradient_checkpointing_changes_nothing(config, tmp_path):
    training = {"max_steps": 2, "save_steps": 2}
    for name, on in (("with", True), ("without", False)):
        finetune(config(name, gradient_checkpointing=on, training=training))
    assert losses(tmp_path / "with") == losses(tmp_path / "without")


def test_evaluation(config, start, tmp_path):
    training = {"max_steps": 2, "save_steps": 2, "eval_strategy": "steps", "eval_steps": 1}
    finetune(config(eval_data=str(start[1]), training=training))
    state = json.loads((tmp_path / "out" / "checkpoint-2" / "trainer_state.json").read_text())
    assert [e["step"] for e in state["log_history"] if "eval_loss" in e] == [1, 2]


def test_bad_data_is_found_before_anything_trains(config, tmp_path):
    bad = write_data(tmp_path / "bad")
    records = json.loads(bad.read_text())
    records[3]["conversations"].pop()
    records[5]["conversations"][0]["value"] = "<img>none.png</img>?"
    bad.write_text(json.dumps(records))
    with pytest.raises(ValueError, match=r"2 of 16 records are bad(?s:.*)id 'r3'(?s:.*)id 'r5'"):
        finetune(config(data=str(bad)))
    with pytest.raises(ValueError, match="tokens exceed model_max_length, 25"):
        finetune(config(model_max_length=25))
    assert not checkpoints(tmp_path / "out")


def test_an_image_that_breaks_in_mid_run_leaves_the_last_checkpoint(config, tmp_path, monkeypatch):
    data = write_data(tmp_path / "data")
    on_save = CompleteCheckpoints.on_save

    def break_pictures(self, *args, **kwargs):
        on_save(self, *args, **kwargs)
        for picture in data.parent.glob("*.png"):
            picture.write_bytes(picture.read_bytes()[:60])

    monkeypatch.setattr(CompleteCheckpoints, "on_save", break_pictures)
    training = {"save_steps": 1, "per_device_train_batch_size": 1}
    with pytest.raises(ValueError, match=r"record \d+ \(id 'r\d+'\): .*\.png"):
        finetune(config(data=str(data), training=training))
    assert last_complete_checkpoint(tmp_path / "out").name == "checkpoint-1"


def test_an_unreadable_image_in_a_worker_is_one_line(config, tmp_path):
    data = write_data(tmp_path / "data")
    for picture in data.parent.glob("*.png"):
        picture.write_bytes(picture.read_bytes()[:60])
    with pytest.raises(ValueError, match=r"^record \d+ \(id 'r\d+'\): [^\n]*\.png[^\n]*$"):
        finetune(config(data=str(data), training={"dataloader_num_workers": 1}))


# ---- settings ---------------------------------------------------------------------------------


def test_defaults_are_upstreams_recipe(config):
    arguments = training_arguments(config(training={"learning_rate": 2e-5}))
    assert arguments.learning_rate == 2e-5 and arguments.weight_decay == 0.1
    assert (arguments.adam_beta2, arguments.warmup_steps, arguments.seed) == (0.95, 0.02, 46)
    assert arguments.lr_scheduler_type == "cosine" and RECIPE["learning_rate"] == 1e-5
    assert FinetuneConfig("c", "d", "o").model_max_length == 2048


def test_aliases(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("checkpoint: c\ndata: &d d\noutput_dir: o\neval_data: *d\n")
    assert load_config(path).eval_data == "d"


def test_config_file_settings_and_flags(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("checkpoint: c\ndata: d\noutput_dir: o\ntraining: {learning_rate: 1e-4}\n")
    loaded = load_config(path, ["training.adam_beta1=8e-1", "merge=true"], {"mode": "lora"})
    assert loaded.training == {"learning_rate": 1e-4, "adam_beta1": 0.8} and loaded.merge is True
    path.write_text(json.dumps({"checkpoint": "c", "data": "d", "output_dir": "o"}))
    assert load_config(path, (), {"data": "other"}).data == "other"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["chekpoint=x"], "the config has no key 'chekpoint'; did you mean checkpoint?"),
        (["training.learnig_rate=1"], "training has no key 'learnig_rate'; did you mean learning_"),
        (["training.bf16=true"], "training.bf16 is set by dtype; remove it"),
        (["mode=qlora"], "mode must be one of lora, full, frozen; got 'qlora'"),
        (["dtype=bf16"], "dtype must be one of bfloat16, float16, float32; got 'bf16'"),
        (["quantization=2bit"], "quantization must be one of 4bit, 8bit; got '2bit'"),
        (
            ["launch=fsdp9"],
            "launch must be one of ddp, fsdp2, zero2, zero3, or a file; got 'fsdp9'",
        ),
        (["merge=1"], "merge must be bool; got 1"),
        (["unfreeze=3"], "unfreeze must be a section or nothing; got 3"),
        (["model_max_length=0"], "model_max_length must be positive; got 0"),
        (["model_max_length=2k"], "model_max_length must be int; got '2k'"),
        (["mode=full", "lora.r=4"], "lora belongs to mode 'lora'; got mode 'full'"),
        (["mode=full", "merge=true"], "merge belongs to mode 'lora'; got mode 'full'"),
        (["dtype=float16"], "dtype must be bfloat16 or float32 on a CPU; got 'float16'"),
        (["lora.rank=4"], "lora is refused: .*rank"),
        (["freeze.fix_llama=true"], "freeze is refused: flags must be among .*; got fix_llama"),
        (["unfreeze.at=3"], "unfreeze is refused: .*at"),
        (["training.optim=none"], "training is refused: none is not a valid OptimizerNames"),
        (["training.max_steps=x"], "training.max_steps must be a whole number; got 'x'"),
        (["training.learning_rate=true"], "training.learning_rate must be a number; got True"),
        (["training.max_steps=1e400"], "training.max_steps must be a whole number; got inf"),
        (["training.max_steps=1.5"], "training.max_steps must be a whole number; got 1.5"),
        (["training.learning_rate=.nan"], "training.learning_rate must be at least 0 .*; got nan"),
        (
            ["training.gradient_accumulation_steps=0"],
            "training.gradient_accumulation_steps must be at least 1 .*; got 0",
        ),
        (
            ["training.disable_tqdm=maybe"],
            "training.disable_tqdm must be true or false; got 'maybe'",
        ),
        (["training.fsdp_config=3"], "training.fsdp_config must be a text or a section; got 3"),
        (
            ["training.parallelism_config=3"],
            "training.parallelism_config must be left out of a file; got 3",
        ),
        (["training.report_to=nothing"], "training is refused: nothing is not supported, only "),
        (
            ["training.eval_strategy=epoch"],
            "eval_data must be given with training.eval_strategy; got None",
        ),
        (["lora.r=100000000"], "lora is refused: r must be at most 128; got 100000000"),
        (["lora.lora_alpha=x"], "lora is refused: lora_alpha must be a number; got 'x'"),
        (["checkpoint=nowhere"], "checkpoint must be a directory; got nowhere"),
        (["data=/dev/null"], "data must be a file; got /dev/null"),
        (["eval_data=nowhere"], "eval_data must be a file; got nowhere"),
        (["image_root=nowhere"], "image_root must be a directory; got nowhere"),
        (["output_dir=/dev/null"], "output_dir must be a directory that can be written to; got /d"),
        (['output_dir=""'], "output_dir must not be empty or hold a zero byte; got ''"),
        (['data="a\\0"'], r"data must not be empty or hold a zero byte; got 'a\\x00'"),
        (["checkpoint.x=1"], "--set checkpoint.x: checkpoint is no section; got '"),
        (["novalue"], "--set must be KEY=VALUE; got 'novalue'"),
        (["lora={"], "--set lora must be a YAML value; got '{'"),
    ],
)
def test_bad_settings(config, settings, message, tmp_path):
    given = config()
    flags = {name: getattr(given, name) for name in ("checkpoint", "data", "output_dir", "dtype")}
    with pytest.raises((TypeError, ValueError, OSError), match=message):
        finetune(load_config(None, [*settings, "training.use_cpu=true"], flags))


def test_a_tracker_that_is_not_installed(config, monkeypatch):
    monkeypatch.setattr(integration_utils, "is_wandb_available", lambda: False)
    with pytest.raises(ValueError, match=r"^training is refused: .*requires wandb to be installed"):
        training_arguments(config(training={"report_to": "wandb"}))


def test_a_run_that_is_refused_leaves_nothing(config, tmp_path):
    with pytest.raises(ValueError, match="lora is refused"):
        finetune(config(lora={"rank": 4}))
    assert not (tmp_path / "out").exists()


def test_a_config_that_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "none.yaml", tmp_path / "pipe"):
        with pytest.raises(FileNotFoundError, match=f"^config must be a file; got {path}$"):
            load_config(path)


def test_every_setting_is_documented():
    for field in fields(FinetuneConfig):
        assert f"\n        {field.name}: " in FinetuneConfig.__doc__


#: Ten times ten times ten ... values.
BOMB = "a0: &a0 [x]\n" + "".join(
    f"a{n + 1}: &a{n + 1} [{', '.join([f'*a{n}'] * 10)}]\n" for n in range(9)
)


def test_bad_config_files(tmp_path):
    path = tmp_path / "run.yaml"
    for content, message in (
        ("a: [\nb", r"run.yaml must be YAML or JSON: [^\n]*$"),
        ("- a", "must hold keys and values; got list"),
        (
            "mode: lora\ntraining:\n  seed: 1\n  seed: 2",
            r"'seed' comes twice .* line 4, column 3",
        ),
        ("[" * 5000, "run.yaml must be YAML or JSON: lists and sections are nested too deeply$"),
        ("data: " + "9" * 5000, "run.yaml must be YAML or JSON: Exceeds the limit"),
        ("[a]: 1", "run.yaml must be YAML or JSON: [^\n]*unhashable"),
        ("data: d", "the config must have 'checkpoint'; got data"),
        (BOMB, "run.yaml must be YAML or JSON: its aliases stand for more than 100000 values"),
        ("training: &t {seed: *t}", "run.yaml must be YAML or JSON: its aliases stand for more"),
    ):
        path.write_text(content)
        with pytest.raises(ValueError, match=message):
            load_config(path)
    path.write_text("learning_rat: 3")
    with pytest.raises(ValueError, match="launch has no key 'learning_rat'"):
        training_arguments(FinetuneConfig("c", "d", str(tmp_path), launch=str(path)))
    for name in ("ddp", "fsdp2", "zero2", "zero3"):
        assert launch_arguments(name)
        check_arguments("launch", launch_arguments(name))


def test_zero3_keeps_the_position_table_of_the_published_size_whole():
    settings = launch_arguments("zero3")["deepspeed"]["zero_optimization"]
    with torch.device("meta"):
        table = VisionTransformer(**{**MonkeyConfig().visual, "layers": 1}).attn_pool.pos_embed
    assert settings["stage3_param_persistence_threshold"] >= table.numel() == 256 * 4096


def test_zero3_that_could_not_save_is_refused_at_the_start(config):
    model, _ = module.build_model(config(), training_arguments(config()))

    def check(**zero):
        module._check_sharding(model, HfDeepSpeedConfig({"zero_optimization": zero}))

    for threshold in (511, "auto"):
        message = (
            r"stage3_param_persistence_threshold must be at least 512, so that \S*pos_embed, which "
            f"is frozen, can be saved with the adapter; got {threshold!r}"
        )
        with pytest.raises(ValueError, match=message):
            check(stage=3, stage3_param_persistence_threshold=threshold)
        check(stage=2, stage3_param_persistence_threshold=threshold)
    check(stage=3, stage3_param_persistence_threshold=512)
    check(stage=3)  # DeepSpeed's own is 100,000


def test_command(start, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    checkpoint, data = start
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps({"training": {**TRAINING, "max_steps": 1, "save_strategy": "no"}}))
    out, merged = tmp_path / "out", tmp_path / "merged"
    arguments = ["finetune", "--config", path, "--checkpoint", checkpoint, "--data", data,
                 "--output-dir", out, "--set", "dtype=float32"]  # fmt: skip
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert done.exit_code == 0, done.output
    arguments = ["merge", out / "model", "--checkpoint", checkpoint, "--out", merged]
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert done.exit_code == 0 and weights(merged).keys() == weights(checkpoint).keys()
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert done.exit_code == 2 and "--out must not exist yet" in done.output
    arguments = ["merge", checkpoint, "--checkpoint", checkpoint, "--out", tmp_path / "other"]
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert done.exit_code == 2 and "adapter has no adapter_config.json: " in done.output
    done = CliRunner().invoke(app, ["finetune", "--mode", "lora"])
    assert done.exit_code == 2 and "the config must have 'checkpoint'; got mode" in done.output


def test_loss_curve_of_nothing(tmp_path):
    draw_loss_curve([{"loss": float("nan"), "step": 1}, {"train_runtime": 2}], tmp_path / "a.png")
    draw_loss_curve([], tmp_path / "b.png")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "b.png"]
