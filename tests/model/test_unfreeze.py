"""Thawing blocks inside a real Trainer: what changes when, and that resuming changes nothing."""

from __future__ import annotations

import logging
import os
import shutil
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType
from peft import get_peft_model
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed

from monkey_model.freeze import freeze
from monkey_model.parameter_names import upstream_name
from monkey_model.training.peft_model import MonkeyPeftModel
from monkey_model.training.peft_presets import lora_config
from monkey_model.training.unfreeze import ProgressiveUnfreeze
from tests.helpers.tiny import tiny_batch, tiny_model

DATA = [{name: value[0] for name, value in tiny_batch(seed).items()} for seed in range(8)]
SCHEDULE = {2: 1, 4: 2}


class Snapshots(TrainerCallback):
    """The parameters before every step, by upstream's names."""

    def __init__(self):
        self.taken: dict[int, dict[str, torch.Tensor]] = {}

    def on_step_begin(self, args, state, control, model, **kwargs):
        self.taken[state.global_step] = {
            name: p.detach().clone() for name, p in model.named_parameters()
        }

    on_train_end = on_step_begin

    def changed(self, step: int) -> set[str]:
        """What the step after ``step`` others changed."""
        before, after = self.taken[step], self.taken[step + 1]
        return {name for name in before if not torch.equal(before[name], after[name])}


def plain():
    return tiny_model(num_hidden_layers=3)


def with_lora():
    model = plain()
    return MonkeyPeftModel(model, lora_config(model))


def make_trainer(directory, make_model=plain, schedule=SCHEDULE, unit="steps", **arguments):
    set_seed(3)
    model = make_model()
    report = freeze(model, train_vit_lora=False)
    settings = {
        "per_device_train_batch_size": 2,
        "max_steps": 6,
        "learning_rate": 1e-3,
        "weight_decay": 0.1,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 2,
        "logging_steps": 1,
        "save_steps": 1,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 3,
        "dataloader_pin_memory": False,
    }
    trainer = Trainer(
        model=model,
        args=TrainingArguments(str(directory), **{**settings, **arguments}),
        train_dataset=DATA,
        callbacks=[ProgressiveUnfreeze(schedule, unit), Snapshots()],
    )
    return trainer, report


def snapshots(trainer) -> Snapshots:
    (found,) = (c for c in trainer.callback_handler.callbacks if isinstance(c, Snapshots))
    return found


def block_names(model, *blocks: int) -> set[str]:
    named = ((name, upstream_name(name) or "") for name, _ in model.named_parameters())
    heads = tuple(f"transformer.h.{block}." for block in blocks)
    return {name for name, short in named if short.startswith(heads)}


def history(trainer) -> list[dict]:
    """Without what depends on the clock."""
    clock = ("runtime", "per_second")
    return [
        {key: value for key, value in entry.items() if not key.endswith(clock)}
        for entry in trainer.state.log_history
        if "train_runtime" not in entry
    ]


def thaws(trainer) -> list[tuple]:
    return [
        (entry["step"], entry["thawed_blocks"], entry["thawed_parameters"])
        for entry in trainer.state.log_history
        if "thawed_blocks" in entry
    ]


@pytest.fixture(scope="module", params=[plain, with_lora], ids=["plain", "lora"])
def uninterrupted(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp("run")
    trainer, report = make_trainer(directory, request.param)
    trainer.train()
    return trainer, report, directory, request.param


def test_exactly_what_has_thawed_changes(uninterrupted):
    trainer, report, _, _ = uninterrupted
    taken = snapshots(trainer)
    first = 1  # in the warm-up's first step the learning rate is zero
    for step in range(first, 6):
        blocks = [block for when, block in ((2, 2), (4, 1)) if step >= when]
        thawed = block_names(trainer.model, *blocks)
        assert taken.changed(step) == report.trainable | thawed, step
    assert taken.changed(0) == set()


def test_log(uninterrupted):
    trainer, _, _, _ = uninterrupted
    size = sum(p.numel() for p in plain().transformer.h[0].parameters())
    assert thaws(trainer) == [(2, 1, size), (4, 2, size)]


def test_a_thawed_block_is_trained_as_the_trainer_trains(uninterrupted):
    """Weight decay by the Trainer's own split, and the learning rate of everything else."""
    trainer, _, _, _ = uninterrupted
    decayed, plain_group = trainer.optimizer.param_groups
    assert (decayed["weight_decay"], plain_group["weight_decay"]) == (0.1, 0.0)
    assert decayed["lr"] == plain_group["lr"]
    names = {id(p): upstream_name(name) for name, p in trainer.model.named_parameters()}
    held = [{names[id(p)] for p in group["params"]} for group in (decayed, plain_group)]
    for block in (1, 2):
        assert f"transformer.h.{block}.attn.c_attn.weight" in held[0]
        assert f"transformer.h.{block}.attn.c_attn.bias" in held[1]
    assert not any((name or "").startswith("transformer.h.0.") for group in held for name in group)


def test_no_optimizer_state_before_the_thaw(uninterrupted):
    """A block begins like any fresh parameter: no moments, no step count."""
    trainer, _, directory, _ = uninterrupted
    weight = "transformer.h.1.mlp.w1.weight"
    order = [
        name
        for group in trainer.optimizer.param_groups
        for p in group["params"]
        for name in [next(upstream_name(n) for n, q in trainer.model.named_parameters() if q is p)]
    ]
    steps = {}
    for saved in range(1, 7):
        state = torch.load(directory / f"checkpoint-{saved}" / "optimizer.pt")["state"]
        entry = state.get(order.index(weight))
        steps[saved] = None if entry is None else int(entry["step"])
    assert steps == {1: None, 2: None, 3: None, 4: None, 5: 1, 6: 2}


@pytest.mark.parametrize("step", range(1, 6))
def test_resumed_run_is_the_uninterrupted_one(uninterrupted, step, tmp_path):
    expected, _, directory, make_model = uninterrupted
    shutil.copytree(directory / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")
    trainer, _ = make_trainer(tmp_path, make_model)
    trainer.train(resume_from_checkpoint=True)
    assert history(trainer) == history(expected)
    state = trainer.model.state_dict()
    for name, value in expected.model.state_dict().items():
        assert torch.equal(state[name], value), name
    got, want = trainer.optimizer.state_dict(), expected.optimizer.state_dict()
    assert got["param_groups"] == want["param_groups"]
    for key, moments in want["state"].items():
        assert all(torch.equal(got["state"][key][m], v) for m, v in moments.items())


@pytest.mark.parametrize("when", [0, 1, 1.5])
def test_epochs(tmp_path, when):
    trainer, report = make_trainer(tmp_path, schedule={when: 1}, unit="epochs", max_steps=8)
    trainer.train()
    step = int(4 * when)  # 8 records in batches of 2
    assert [entry[:2] for entry in thaws(trainer)] == [(step, 1)]
    taken = snapshots(trainer)
    for before in range(1, 8):
        thawed = block_names(trainer.model, 2) if before >= step else set()
        assert taken.changed(before) == report.trainable | thawed


def test_gradient_accumulation(tmp_path):
    """A schedule counts optimizer steps."""
    trainer, _ = make_trainer(tmp_path, schedule={2: 1}, gradient_accumulation_steps=2, max_steps=3)
    trainer.train()
    assert [entry[:2] for entry in thaws(trainer)] == [(2, 1)]
    taken = snapshots(trainer)
    assert not taken.changed(1) & block_names(trainer.model, 2)
    assert block_names(trainer.model, 2) <= taken.changed(2)


def test_python_log(tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="monkey_model.training.unfreeze")
    trainer, _ = make_trainer(tmp_path, max_steps=3)
    trainer.train()
    assert caplog.messages == ["step 2: the last 1 LLM blocks train"]
    caplog.clear()
    trainer, _ = make_trainer(tmp_path, max_steps=4)
    trainer.train(resume_from_checkpoint=True)
    assert caplog.messages == ["resumed with the last 1 LLM blocks thawed"]


# Adam's first steps are the signs of gradients: rounding would decide on the smallest.
SGD = {"optim": "sgd", "learning_rate": 0.1, "save_strategy": "no"}


def without_dropout():
    """Which would draw other numbers in each process."""
    model = plain()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def in_each_process(rank: int, directory: str) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}  # asked for, and not dialled
    torch.set_num_threads(1)
    # They meet in a file: a free port can be taken by the time it is used.
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{directory}/meeting", rank=rank, world_size=2
    )
    settings = {**SGD, "per_device_train_batch_size": 1, "ddp_backend": "gloo"}
    with pytest.raises(ValueError, match=r"ddp_find_unused_parameters must be True .* got None"):
        make_trainer(directory, **settings)
    trainer, _ = make_trainer(
        directory, without_dropout, ddp_find_unused_parameters=True, **settings
    )
    trainer.train()
    state = {name: p.detach() for name, p in trainer.model.named_parameters()}
    torch.save(state, f"{directory}/rank{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_agree_with_one(tmp_path):
    one, _ = make_trainer(tmp_path / "one", without_dropout, **SGD)
    one.train()
    torch.multiprocessing.spawn(in_each_process, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1))
    start = plain().state_dict()
    assert not torch.equal(
        first["transformer.h.1.mlp.w1.weight"], start["transformer.h.1.mlp.w1.weight"]
    )
    for name, parameter in one.model.named_parameters():
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], parameter, rtol=1e-5, atol=1e-5, msg=name)


# ---- bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schedule", "unit", "message"),
    [
        ({2: 1}, "step", "unit must be one of steps, epochs; got 'step'"),
        ({}, "steps", r"schedule must map steps to blocks; got {}"),
        ([2, 1], "epochs", r"schedule must map epochs to blocks; got \[2, 1\]"),
        ({-1: 1}, "steps", "schedule must have steps of at least 0 as keys; got -1"),
        ({1.5: 1}, "steps", r"schedule must have steps of at least 0 as keys; got 1\.5"),
        ({"1": 1}, "epochs", "schedule must have epochs of at least 0 as keys; got '1'"),
        ({float("nan"): 1}, "epochs", "schedule must have epochs of at least 0 as keys; got nan"),
        ({2: 0}, "steps", "schedule's blocks must be positive; got 0"),
        ({4: 1, 2: 1}, "steps", r"schedule must thaw more blocks each time; got {2: 1, 4: 1}"),
    ],
)
def test_bad_schedules(schedule, unit, message):
    with pytest.raises(ValueError, match=message):
        ProgressiveUnfreeze(schedule, unit)


def test_blocks_must_be_a_count():
    with pytest.raises(TypeError, match="schedule's blocks must be an int; got str"):
        ProgressiveUnfreeze({2: "all"})


def test_too_many_blocks(tmp_path):
    with pytest.raises(ValueError, match=r"at most the model's 3 blocks \(transformer.h\); got 4"):
        make_trainer(tmp_path, schedule={2: 4})


def test_quantised_blocks(tmp_path):
    def quantised():
        model = plain()
        weight = model.transformer.h[2].mlp.w1.weight.to(torch.int8)
        model.transformer.h[2].mlp.w1.weight = nn.Parameter(weight, requires_grad=False)
        return model

    with pytest.raises(
        ValueError, match=r"must not thaw quantised weights, .* got transformer.h.2"
    ):
        make_trainer(tmp_path, quantised)


def test_peft_that_would_not_save_the_blocks(tmp_path):
    def wrapped():
        model = plain()
        return get_peft_model(model, lora_config(model))

    with pytest.raises(ValueError, match=r"model must be a MonkeyPeftModel, .*; got a PeftModel"):
        make_trainer(tmp_path, wrapped)


@pytest.mark.parametrize("kind", [DistributedType.DEEPSPEED, DistributedType.FSDP])
def test_sharded_optimizers_are_refused(tmp_path, monkeypatch, kind):
    state = SimpleNamespace(distributed_type=kind)
    monkeypatch.setattr("monkey_model.training.unfreeze.AcceleratorState", lambda: state)
    with pytest.raises(ValueError, match=rf"one process or DDP; got {kind.value}"):
        make_trainer(tmp_path)


def test_optimizer_without_the_blocks(tmp_path):
    trainer, _ = make_trainer(tmp_path)
    freeze(trainer.model)  # after the Trainer was built
    with pytest.raises(ValueError, match="the Trainer's optimizer must hold the blocks"):
        trainer.train()
