"""Thaw the last blocks of the LLM while training goes on.

A parameter that joins an optimizer in mid-run needs a group, a learning rate in the scheduler, and
the same groups again before a saved state can be loaded; DDP would not even reduce its gradient.
So the blocks are in the optimizer from the start: they require a gradient while the Trainer builds
the optimizer, and are frozen again when training begins. Until a block thaws its gradient is None,
which optimizers skip: no step, no weight decay, no state. A checkpoint always has the same groups,
and resuming needs nothing but the step it resumes at.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Mapping
from typing import Any

from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from peft import PeftModel
from torch import nn
from torch.optim import Optimizer
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.training_args import ParallelMode

from monkey_kernels.checks import check_choice, check_positive_int
from monkey_model.parameter_names import upstream_name
from monkey_model.training.peft_model import MonkeyPeftModel

logger = logging.getLogger(__name__)


class ProgressiveUnfreeze(TrainerCallback):
    """Thaws the last k blocks of ``transformer.h`` on a schedule of steps or epochs.

    The schedule owns the blocks that it names: they are frozen before their time, whatever they
    were. LoRA in them is left alone. Each thaw is logged, and is an entry of the Trainer's
    ``state.log_history``.

    Args:
        schedule: when (optimizer steps or epochs done) to how many of the last blocks train from
            then on, e.g. ``{200: 2, 400: 4}``; both rise.
        unit: ``"steps"`` or ``"epochs"``; an epoch may be a fraction.

    Raises:
        TypeError, ValueError: a schedule or unit that is none; when the Trainer is built, a model
            with too few blocks or quantised ones, a ``PeftModel`` that would not save them,
            DeepSpeed or FSDP (a sharded optimizer does not skip what has no gradient), or DDP
            without ``ddp_find_unused_parameters=True``; when training begins, an optimizer without
            the blocks.
    """

    def __init__(self, schedule: Mapping[int | float, int], unit: str = "steps") -> None:
        check_choice("unit", unit, ("steps", "epochs"))
        if not isinstance(schedule, Mapping) or not schedule:
            raise ValueError(f"schedule must map {unit} to blocks; got {schedule!r}")
        numbers = (int,) if unit == "steps" else (int, float)
        for when, blocks in schedule.items():
            if isinstance(when, bool) or not isinstance(when, numbers) or not when >= 0:
                raise ValueError(f"schedule must have {unit} of at least 0 as keys; got {when!r}")
            check_positive_int("schedule's blocks", blocks)
        self.schedule = dict(sorted(schedule.items()))
        counts = list(self.schedule.values())
        if any(later <= earlier for earlier, later in itertools.pairwise(counts)):
            raise ValueError(f"schedule must thaw more blocks each time; got {self.schedule}")
        self.unit = unit
        self._blocks: list[list[nn.Parameter]] = []  # the last one first
        self._thawed = 0

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Require gradients, so that the Trainer puts the blocks into its optimizer."""
        _check_distribution(args)
        model = kwargs["model"]
        if isinstance(model, PeftModel) and not isinstance(model, MonkeyPeftModel):
            raise ValueError(
                "model must be a MonkeyPeftModel, which saves the blocks that thaw; got a "
                f"{type(model).__name__}"
            )
        self._blocks = _last_blocks(model, max(self.schedule.values()))
        self._require_grad(len(self._blocks))

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Freeze what is not due yet; in a resumed run, what its log has thawed stays thawed."""
        _check_optimizer(kwargs["optimizer"], self._blocks)
        done = [entry["thawed_blocks"] for entry in state.log_history if "thawed_blocks" in entry]
        self._thawed = int(done[-1]) if done else 0
        self._require_grad(self._thawed)
        if done:
            logger.info("resumed with the last %d LLM blocks thawed", self._thawed)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Thaw what is due."""
        done = float(state.global_step if self.unit == "steps" else state.epoch or 0)
        due = max((blocks for when, blocks in self.schedule.items() if when <= done), default=0)
        if due == self._thawed:
            return
        added = [p for block in self._blocks[self._thawed : due] for p in block]
        self._thawed = due
        self._require_grad(due)
        entry = {
            "thawed_blocks": due,
            "thawed_parameters": sum(p.numel() for p in added),
            "epoch": state.epoch,
            "step": state.global_step,
        }
        state.log_history.append(entry)
        logger.info("step %(step)d: the last %(thawed_blocks)d LLM blocks train", entry)

    def _require_grad(self, blocks: int) -> None:
        for number, parameters in enumerate(self._blocks):
            for parameter in parameters:
                parameter.requires_grad_(number < blocks)


def _check_distribution(args: TrainingArguments) -> None:
    kind = AcceleratorState().distributed_type
    if kind in (DistributedType.DEEPSPEED, DistributedType.FSDP, DistributedType.MEGATRON_LM):
        raise ValueError(
            "ProgressiveUnfreeze needs an optimizer that holds every parameter by itself and skips "
            f"those without a gradient: one process or DDP; got {kind.value}"
        )
    if args.parallel_mode == ParallelMode.DISTRIBUTED and not args.ddp_find_unused_parameters:
        raise ValueError(
            "ddp_find_unused_parameters must be True with ProgressiveUnfreeze: its blocks have no "
            f"gradient before they thaw; got {args.ddp_find_unused_parameters}"
        )


def _last_blocks(model: nn.Module, count: int) -> list[list[nn.Parameter]]:
    """The base weights of the last ``count`` blocks, the last block first."""
    blocks: dict[int, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        short = upstream_name(name) or ""
        if short.startswith("transformer.h."):
            blocks.setdefault(int(short.split(".")[2]), []).append(parameter)
    if count > len(blocks):
        raise ValueError(
            f"schedule must thaw at most the model's {len(blocks)} blocks (transformer.h); "
            f"got {count}"
        )
    last = sorted(blocks, reverse=True)[:count]
    for number in last:
        if not all(parameter.is_floating_point() for parameter in blocks[number]):
            raise ValueError(
                f"schedule must not thaw quantised weights, which cannot train; got transformer.h."
                f"{number}"
            )
    return [blocks[number] for number in last]


def _check_optimizer(optimizer: Optimizer, blocks: list[list[nn.Parameter]]) -> None:
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if any(id(p) not in held for block in blocks for p in block):
        raise ValueError(
            "the Trainer's optimizer must hold the blocks of the schedule: let the Trainer build "
            "it (no optimizers=, no model_init=), and freeze the model before that"
        )
