"""Two processes, launched as a user would, agree with one: DDP, FSDP2, ZeRO-2 and ZeRO-3.

A run that is stopped and resumed is the uninterrupted one.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from monkey_model.training.config import launch_arguments
from monkey_model.training.monitor import SAMPLES
from monkey_model.training.run_directory import FINISHED, checkpoints, only_run
from tests.helpers.checkpoint import write_checkpoint, write_data

pytestmark = pytest.mark.slow

FROZEN = {"train_resampler": False, "train_vit_lora": False}
ROOT = Path(__file__).parents[2]
HUNG = 3600  # seconds: a run takes one or two, and the first with DeepSpeed compiles for minutes
TRAINING = {
    "use_cpu": True,
    "max_steps": 4,
    "gradient_accumulation_steps": 1,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "constant",
    "warmup_steps": 0,
    # Adam's first steps have the size of the learning rate however small the gradient, so they
    # would turn its rounding into a difference. This much epsilon makes them proportional.
    "adam_epsilon": 1e-3,
    "max_grad_norm": 0.1,
    "save_steps": 2,
    "dataloader_num_workers": 0,
    "disable_tqdm": True,
    "report_to": "none",
}


@pytest.fixture(scope="module")
def train(tmp_path_factory):
    folder = tmp_path_factory.mktemp("distributed")
    checkpoint, data = write_checkpoint(folder / "checkpoint"), write_data(folder)
    samples = write_data(folder, 2, "samples.json")

    def train(name, processes, launch="ddp", *flags, dtype="float32", **settings):
        """The output directory, the losses of its last checkpoint, and the adapter."""
        output = folder / name
        training = {**TRAINING, "per_device_train_batch_size": 4 // processes}
        if launch == "zero3":
            # Of this model too, the position table stays whole and larger matrices are sharded.
            training |= launch_arguments("zero3")
            training["deepspeed"]["zero_optimization"]["stage3_param_persistence_threshold"] = 512
        config = {
            "checkpoint": str(checkpoint),
            "data": str(data),
            "output_dir": str(output),
            "dtype": dtype,
            "lora": {"lora_dropout": 0.0},
            "launch": launch,
            "merge": True,
            "training": training,
            **settings,
        }
        if processes > 1:  # watched, which changes nothing
            config |= {"eval_data": str(samples), "sample_data": str(samples), "sample_tokens": 3}
            training |= {"eval_strategy": "steps", "eval_steps": 2}
        (folder / f"{name}.json").write_text(json.dumps(config))
        done = run(name, processes, *flags)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
        state = json.loads((output / "checkpoint-4" / "trainer_state.json").read_text())
        losses = [entry["loss"] for entry in state["log_history"] if "loss" in entry]
        return output, losses, load_file(output / "model" / "adapter_model.safetensors")

    def run(name, processes, *flags):
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
                    str(processes)]  # fmt: skip
        command = [sys.executable, *(torchrun if processes > 1 else []),
                   "-m", "tests.helpers.finetune_without_dropout",
                   "finetune", "--config", str(folder / f"{name}.json"), *flags]  # fmt: skip
        # DeepSpeed compiles at its first run on a machine, with the ninja that it has installed.
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        environment = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1",
                       "DS_ACCELERATOR": "cpu"}  # fmt: skip
        return subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=HUNG
        )

    train.checkpoint, train.run = checkpoint, run
    return train


@pytest.fixture(scope="module")
def alone(train):
    return train("alone", 1)


@pytest.fixture(scope="module", params=["ddp", "fsdp2", "zero2", "zero3"])
def launch(request):
    if request.param.startswith("zero"):
        pytest.importorskip("deepspeed")
    return request.param


@pytest.fixture(scope="module")
def together(train, launch):
    return train(launch, 2, launch)


def test_two_processes_agree_with_one(train, alone, together):
    output, losses, adapter = together
    _, expected_losses, expected = alone
    assert len(losses) == 4
    torch.testing.assert_close(losses, expected_losses, rtol=0, atol=1e-5)
    assert adapter.keys() == expected.keys()
    for name, tensor in adapter.items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-5, msg=name)
    # The visual part has trained: resampler and the adapters of every local crop.
    before = load_file(train.checkpoint / "model.safetensors")
    changed = {
        name: (tensor - before[name.removeprefix("base_model.model.")]).abs().max().item()
        for name, tensor in adapter.items()
        if name.removeprefix("base_model.model.") in before
    }
    for part in ("attn_pool.query", "attn_pool.kv_proj", *(f"in_proj_lora.{n}." for n in range(4))):
        steps = [change for name, change in changed.items() if part in name]
        assert steps and max(steps) > 1e-4, part
    assert (output / "checkpoint-4" / "complete").is_file()
    assert (output / "loss.png").is_file()
    lines = [json.loads(line) for line in (output / SAMPLES).read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 2, 4, 4]
    assert [line["expected"] for line in lines] == ["red", "green"] * 2
    assert load_file(output / "merged" / "model.safetensors").keys() == before.keys()


# ZeRO-2's checkpoints are DeepSpeed's, as ZeRO-3's are.
@pytest.mark.parametrize("launch", ["ddp", "fsdp2", "zero3"], indirect=True, scope="module")
def test_a_resumed_run_is_the_uninterrupted_one(train, launch, together):
    output, losses, adapter = together
    for mark in (output / "checkpoint-4" / "complete", output / FINISHED):
        mark.unlink()  # as if killed while it wrote this checkpoint
    first = (output / "checkpoint-2" / "complete").stat().st_mtime_ns
    _, resumed_losses, resumed = train(launch, 2, launch, "--resume")
    assert (output / "checkpoint-2" / "complete").stat().st_mtime_ns == first  # not from the start
    assert (output / "checkpoint-4" / "complete").is_file()
    assert resumed_losses == losses
    assert resumed.keys() == adapter.keys()
    assert all(torch.equal(resumed[name], adapter[name]) for name in adapter)
    # As if killed before it wrote its results: they come from the last checkpoint, with no step.
    shutil.rmtree(output / "model")
    last = (output / "checkpoint-4" / "complete").stat().st_mtime_ns
    _, _, again = train(launch, 2, launch, "--resume")
    assert (output / "checkpoint-4" / "complete").stat().st_mtime_ns == last
    assert again.keys() == adapter.keys()
    assert all(torch.equal(again[name], adapter[name]) for name in adapter)


@pytest.fixture(scope="module")
def alone_frozen(train):
    return train("frozen", 1, freeze=FROZEN)


# The two in which a process that runs the encoder waits for the others to run it too.
@pytest.mark.parametrize("launch", ["fsdp2", "zero3"], indirect=True, scope="module")
def test_each_process_encodes_its_share_once(train, alone_frozen, launch):
    """And none runs the encoder in training: processes whose batches lack pictures would wait."""
    output, losses, adapter = train(
        f"cached-{launch}", 2, launch, freeze=FROZEN, cache_visual_tokens=True
    )
    torch.testing.assert_close(losses, alone_frozen[1], rtol=0, atol=1e-5)
    for name, tensor in adapter.items():
        torch.testing.assert_close(tensor, alone_frozen[2][name], rtol=0, atol=1e-5, msg=name)
    assert len(list(output.glob("visual_tokens/*/*.safetensors"))) == 4


def test_finished_or_locked(train):
    """Both processes leave a finished run alone, and a directory that another run has."""
    flags = ("--set", "training.max_steps=4", "--resume")
    output, *_ = train("finished", 2, "ddp", *flags)
    files = [path for path in output.rglob("*") if path.is_file()]
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in files}
    train("finished", 2, "ddp", *flags)
    assert {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in files} == before
    with only_run(output):
        done = train.run("finished", 2, "--resume", "--set", "training.max_steps=8")
    assert done.returncode != 0 and "output_dir must have no other run" in done.stderr
    assert list(checkpoints(output)) == [2, 4]


def test_zero3_in_bfloat16(train, alone):
    pytest.importorskip("deepspeed")
    _, losses, adapter = train("bfloat16", 2, "zero3", dtype="bfloat16")
    torch.testing.assert_close(losses, alone[1], rtol=0, atol=1e-2)
    assert {tensor.dtype for tensor in adapter.values()} == {torch.bfloat16}
