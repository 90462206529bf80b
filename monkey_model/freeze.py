"""What trains and what is frozen: a set of parameter names, computed from the names and five flags.

Upstream's recipes, and what is kept of them:

- ``fix_vit`` freezes ``transformer.visual`` but for the resampler (``attn_pool``) and every
  parameter with "lora" in its name. ``ln_post`` and ``proj`` come after the resampler and freeze
  with the ViT, as in Monkey's and Qwen-VL's recipes; TextMonkey's trains them.
- ``fix_llm`` freezes ``transformer.h``, ``wte``, ``ln_f`` and ``lm_head``. TextMonkey's recipe
  freezes whole modules after it has enabled LoRA, so LoRA inside ``transformer.h`` freezes again.
  The recipe's words are "train LoRA and the resampler": here they train.
- ``attn_pool.pos_embed`` is a fixed sine-cosine table and never trains; ``requires_grad_`` on the
  whole resampler, in upstream's recipes, trains it.
- a resampler with peft's LoRA in it trains through that LoRA alone.
"""

from __future__ import annotations

import io
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from torch import nn

from monkey_model.parameter_names import (
    PARTS,
    is_frozen_twin,
    is_peft_lora,
    part_of,
    peft_adapter,
)

if TYPE_CHECKING:
    from rich.box import Box
    from rich.table import Table

#: Every flag of :func:`freeze` and its default: the published recipe.
FLAGS: Mapping[str, bool] = MappingProxyType(
    {
        "fix_llm": True,
        "fix_vit": True,
        "train_resampler": True,
        "train_vit_lora": True,
        "train_llm_lora": True,
    }
)


def trainable_names(
    names: Iterable[str], *, active_adapters: Collection[str] | None = None, **flags: bool
) -> list[str]:
    """The names, in their order, of the parameters that :func:`freeze` would train.

    Args:
        names: of all parameters of a model.
        active_adapters: peft's adapters that train; None for all.
        flags: see :func:`freeze`.

    Raises:
        TypeError, ValueError: those of :func:`freeze` that concern names and flags.
    """
    names, on = list(names), _check_flags(flags)
    trains = {
        "LLM": not on["fix_llm"],
        "embeddings and head": not on["fix_llm"],
        "LLM LoRA": on["train_llm_lora"],
        "ViT": not on["fix_vit"],
        "ViT adapters": on["train_vit_lora"],
        "resampler": on["train_resampler"],
    }
    parts = {name: _known_part(name) for name in names}
    resampler_lora = any(parts[name] == "resampler" and is_peft_lora(name) for name in names)

    def frozen_by_rule(name: str) -> bool:
        adapter = peft_adapter(name)
        return (
            is_frozen_twin(name)
            or name.endswith(".pos_embed")
            or (resampler_lora and parts[name] == "resampler" and not is_peft_lora(name))
            or (
                adapter is not None
                and active_adapters is not None
                and adapter not in active_adapters
            )
        )

    return [name for name in names if trains[parts[name]] and not frozen_by_rule(name)]


def _known_part(name: str) -> str:
    part = part_of(name)
    if part is None:
        raise ValueError(
            "model must have upstream's layout (transformer.h, wte, ln_f, visual, and lm_head) and "
            f"not be sharded yet; got a parameter {name!r}"
        )
    return part


def _check_flags(flags: Mapping[str, Any]) -> dict[str, bool]:
    unknown = sorted(set(flags) - set(FLAGS))
    if unknown:
        raise TypeError(f"flags must be among {', '.join(FLAGS)}; got {', '.join(unknown)}")
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise TypeError(f"{name} must be True or False; got {value!r}")
    return {**FLAGS, **flags}


@dataclass(frozen=True)
class PartReport:
    """What trains in one part of a model. Bytes are those of the parameters alone."""

    trainable: tuple[str, ...]  # names, in the model's order
    trainable_parameters: int
    trainable_bytes: int
    parameters: int
    bytes: int


@dataclass(frozen=True)
class FreezeReport:
    """What trains in a model, by part. ``print`` gives a plain table, ``rich.print`` draws it."""

    parts: Mapping[str, PartReport]

    @property
    def trainable(self) -> frozenset[str]:
        """The names of all trainable parameters."""
        return frozenset(name for part in self.parts.values() for name in part.trainable)

    # rich is imported here alone: freezing needs nothing but torch.
    def __rich__(self) -> Table:
        from rich.box import ROUNDED

        return self._table(ROUNDED)

    def __str__(self) -> str:
        from rich.box import MARKDOWN
        from rich.console import Console

        console = Console(file=io.StringIO(), width=100, color_system=None)
        with console.capture() as capture:
            console.print(self._table(MARKDOWN))
        return capture.get().strip()

    def _table(self, style: Box) -> Table:
        from rich.table import Table

        table = Table(box=style)
        table.add_column("part")
        for column in ("tensors trained", "parameters trained", "MiB", "of parameters", "MiB"):
            table.add_column(column, justify="right")
        rows = [(name, len(p.trainable), *_sizes(p)) for name, p in self.parts.items()]
        totals = (sum(column) for column in list(zip(*rows, strict=True))[1:])
        for name, *cells in [*rows, ("all", *totals)]:
            tensors, trained, trained_bytes, parameters, size = cells
            table.add_row(
                name,
                f"{tensors:,}",
                f"{trained:,}",
                f"{trained_bytes / 2**20:,.1f}",
                f"{parameters:,}",
                f"{size / 2**20:,.1f}",
            )
        return table


def _sizes(part: PartReport) -> tuple[int, int, int, int]:
    return part.trainable_parameters, part.trainable_bytes, part.parameters, part.bytes


def _total(parameters: Iterable[nn.Parameter]) -> tuple[int, int]:
    """Elements and bytes."""
    count = size = 0
    for parameter in parameters:
        quant_state = getattr(parameter, "quant_state", None)
        if quant_state is not None:  # 4-bit: packed
            count += quant_state.shape.numel()
            size += parameter.nbytes
        else:
            numel = getattr(parameter, "ds_numel", parameter.numel())  # under ZeRO-3: empty
            count += numel
            size += numel * parameter.element_size()
    return count, size


def freeze_report(model: nn.Module) -> FreezeReport:
    """What trains in ``model`` as it is now.

    Raises:
        ValueError: a parameter that is no part of Monkey.
    """
    grouped: dict[str, list[tuple[str, nn.Parameter]]] = {part: [] for part in PARTS}
    for name, parameter in model.named_parameters():
        grouped[_known_part(name)].append((name, parameter))
    parts = {}
    for part, parameters in grouped.items():
        trained = [(name, p) for name, p in parameters if p.requires_grad]
        names = tuple(name for name, _ in trained)
        parts[part] = PartReport(
            names, *_total(p for _, p in trained), *_total(p for _, p in parameters)
        )
    return FreezeReport(parts)


def freeze(model: nn.Module, **flags: bool) -> FreezeReport:
    """Set ``requires_grad`` of every parameter by the recipe; see the module's docstring.

    Call it last: after ``get_peft_model`` or ``PeftModel.from_pretrained``, which set
    ``requires_grad`` themselves, and before anything shards the model. Base weights that train
    inside a ``PeftModel`` are saved by
    :class:`monkey_model.training.peft_model.MonkeyPeftModel` alone.

    Args:
        model: a Monkey model of this project or of upstream, or either inside a ``PeftModel``; of
            several peft adapters the active ones train.
        fix_llm: freeze ``transformer.h``, ``wte``, ``ln_f`` and ``lm_head`` but for LoRA. Default
            True.
        fix_vit: freeze ``transformer.visual`` but for adapters and resampler. Default True.
        train_resampler: train ``transformer.visual.attn_pool``. Default True.
        train_vit_lora: train upstream's per-crop adapters, and peft's LoRA in the ViT. Default
            True.
        train_llm_lora: train peft's LoRA in the LLM. Default True.

    Returns:
        What trains, exactly.

    Raises:
        TypeError: an unknown flag, or a flag that is no bool.
        ValueError: a parameter that is no part of Monkey, a quantised parameter that would have to
            train, or nothing that trains. The model is unchanged.

    Source: upstream ``finetune_multitask.py`` and ``finetune_multitask_dialouge_doc.py``.
    """
    parameters = dict(model.named_parameters())
    active = getattr(model, "active_adapters", None)
    # A PreTrainedModel has a method of that name, for adapters that it loaded itself.
    active = active if isinstance(active, (list, tuple)) else None
    trained = set(trainable_names(parameters, active_adapters=active, **flags))
    if not trained:
        chosen = ", ".join(f"{name}={value}" for name, value in _check_flags(flags).items())
        raise ValueError(f"flags must leave something to train; got {chosen}")
    quantised = [name for name in trained if not parameters[name].is_floating_point()]
    if quantised:
        first = min(quantised)
        raise ValueError(
            f"{len(quantised)} parameters that the flags would train are quantised, e.g. {first} "
            f"({parameters[first].dtype}): keep fix_llm and fix_vit, and train LoRA beside them"
        )
    for name, parameter in parameters.items():
        parameter.requires_grad_(name in trained)
    return freeze_report(model)
