"""Two processes, launched as a user would, agree with one: DDP, FSDP2, ZeRO-2 and ZeRO-3."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.tiny_checkpoint import write_checkpoint, write_data

ROOT = Path(__file__).parents[2]
TRAINING = {
    "use_cpu": True,
    "max_steps": 3,
    "gradient_accumulation_steps": 1,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "constant",
    "warmup_steps": 0,
    # Adam's first steps have the size of the learning rate however small the gradient, so they
    # would turn its rounding into a difference. This much epsilon makes them proportional.
    "adam_epsilon": 1e-3,
    "max_grad_norm": 0.1,
    "save_steps": 3,
    "dataloader_num_workers": 0,
    "disable_tqdm": True,
}


@pytest.fixture(scope="module")
def train(tmp_path_factory):
    folder = tmp_path_factory.mktemp("distributed")
    checkpoint, data = write_checkpoint(folder / "checkpoint"), write_data(folder)

    def train(name, processes, *flags, **training):
        config = {
            "checkpoint": str(checkpoint),
            "data": str(data),
            "output_dir": str(folder / name),
            "dtype": "float32",
            "lora": {"lora_dropout": 0.0},
            "training": {**TRAINING, "per_device_train_batch_size": 4 // processes, **training},
        }
        (folder / f"{name}.json").write_text(json.dumps(config))
        run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
               str(processes), str(ROOT / "tests" / "finetune_without_dropout.py"),
               "finetune", "--config", str(folder / f"{name}.json"), *flags]  # fmt: skip
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1",
                       "DS_ACCELERATOR": "cpu"}  # fmt: skip
        done = subprocess.run(run, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
        state = json.loads((folder / name / "checkpoint-3" / "trainer_state.json").read_text())
        losses = [entry["loss"] for entry in state["log_history"] if "loss" in entry]
        return losses, load_file(folder / name / "model" / "adapter_model.safetensors")

    train.checkpoint = checkpoint
    train.folder = folder
    return train


@pytest.fixture(scope="module")
def alone(train):
    return train("alone", 1)


@pytest.mark.parametrize("launch", ["ddp", "fsdp2", "zero2", "zero3"])
def test_two_processes_agree_with_one(train, alone, launch):
    if launch.startswith("zero"):
        pytest.importorskip("deepspeed")
    losses, adapter = train(launch, 2, "--launch", launch)
    expected_losses, expected = alone
    assert len(losses) == 3
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
    assert (train.folder / launch / "checkpoint-3" / "complete").is_file()
    assert (train.folder / launch / "loss.png").is_file()
