"""Upstream's LoRA adapters: one per local crop, beside every adapted projection of the ViT."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

#: The adapters of a batch of crops: None for no adapter, a number for one adapter on all crops, or
#: a tensor [crops, adapters] with a one-hot row per crop, where a row of zeros means no adapter.
AdapterSelection = int | Tensor | None


class Lora_Adapter(nn.Module):
    """``lora_b(lora_a(dropout(x))) * lora_scale``: a low-rank term of a frozen projection.

    Args:
        d_model: width of the input.
        out_feat: width of the output.
        r: rank.
        dropout: probability of dropping an input value in training.

    Source: upstream ``monkey_model/visual.py``; Hu et al., LoRA (2021).
    """

    def __init__(self, d_model: int, out_feat: int, r: int = 16, dropout: float = 0.05) -> None:
        super().__init__()
        self.d_model = d_model
        self.out_feat = out_feat
        self.r = r
        self.lora_scale = nn.Parameter(torch.ones(1))
        self.lora_a = nn.Linear(d_model, r, bias=False)
        self.lora_b = nn.Linear(r, out_feat, bias=False)
        self.lora_dropout = nn.Dropout(p=dropout)
        nn.init.kaiming_uniform_(self.lora_a.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_b.weight)

    def forward(self, x: Tensor) -> Tensor:
        """[..., d_model] -> [..., out_feat]."""
        return self.lora_b(self.lora_a(self.lora_dropout(x))) * self.lora_scale


def adapter_bank(count: int, d_model: int, out_feat: int, r: int = 16) -> nn.ModuleList:
    """``count`` adapters of one projection, in crop order."""
    return nn.ModuleList(Lora_Adapter(d_model, out_feat, r) for _ in range(count))


def with_adapters(
    base: Callable[[Tensor], Tensor],
    x: Tensor,
    adapters: nn.ModuleList,
    selection: AdapterSelection,
) -> Tensor:
    """``base(x)`` plus what the selected adapters make of ``x``.

    The adapters run before ``base``. When backward recomputes this call, the recomputation stops
    after the adapters, and so skips the product of a frozen base.

    Args:
        base: the adapted projection.
        x: [crops, N, d_model].
        adapters: the projection's adapters.
        selection: see :data:`AdapterSelection`.

    Returns:
        [crops, N, out_feat].
    """
    if selection is None or len(adapters) == 0:
        return base(x)
    bank = [cast(Lora_Adapter, adapter) for adapter in adapters]
    layers = [layer for adapter in bank for layer in (adapter.lora_a, adapter.lora_b)]
    plain = all(type(layer) is nn.Linear and not layer.weight.is_meta for layer in layers)
    if not plain or (isinstance(selection, int) and torch.is_grad_enabled()):
        # Call the adapters as modules. A quantised or wrapped adapter has no plain weight, and an
        # offloaded one has its weight only during its call. In half precision this form also gives
        # a more exact gradient of lora_scale.
        term = _modules_term(x, bank, selection)
        return base(x) + term
    t, up = _low_rank(x, bank, selection)
    if t.requires_grad or up.requires_grad:
        term = F.linear(t, up)
        return base(x) + term
    out = base(x)
    if out.dtype == t.dtype and _is_ours(out, base):
        # No backward follows, so the product adds to the output in place and saves a pass over it.
        out.view(-1, out.shape[-1]).addmm_(t.flatten(0, -2), up.to(t.dtype).T)
        return out
    return out + F.linear(t, up)


def _low_rank(
    x: Tensor, bank: Sequence[Lora_Adapter], selection: int | Tensor
) -> tuple[Tensor, Tensor]:
    """What the selected adapters make of ``x``, as factors [crops, N, ranks], [out_feat, ranks].

    In a batch that mixes crops each row goes through all adapters: one product with the stacked
    ``lora_a``, a mask that zeroes the columns of the other crops' adapters, and one product with
    the stacked ``lora_b``. A row then costs the rank of all adapters, 4 x 16 beside a width of
    1664, and no row has to be sorted.
    """
    if isinstance(selection, int):
        bank = bank[selection : selection + 1]
    # Each row uses one adapter, so one dropout for all rows equals a dropout per adapter.
    x = bank[0].lora_dropout(x)
    down = torch.cat([adapter.lora_a.weight for adapter in bank])
    up = torch.cat([adapter.lora_b.weight * adapter.lora_scale for adapter in bank], dim=1)
    t = F.linear(x, down)
    if isinstance(selection, Tensor):
        t = t.unflatten(-1, (len(bank), -1)) * selection[:, None, :, None].to(t.dtype)
        t = t.flatten(-2)
    return t, up


def _modules_term(x: Tensor, bank: Sequence[Lora_Adapter], selection: int | Tensor) -> Tensor:
    if isinstance(selection, int):
        return bank[selection](x)
    chosen = selection.to(x.dtype)[:, :, None, None]
    return torch.stack([a(x) * chosen[:, i] for i, a in enumerate(bank)]).sum(dim=0)


def _is_ours(out: Tensor, base: Callable[[Tensor], Tensor]) -> bool:
    """Whether the caller may overwrite ``out``: ``base`` has just made it and no hook saw it."""
    hooked = isinstance(base, nn.Module) and len(base._forward_hooks) > 0
    return out.is_contiguous() and not out.requires_grad and not hooked


def check_adapter_index(name: str, index: Any, adapters: int, crops: int) -> list[int | None]:
    """``index``, the argument called ``name``, as a list: an existing adapter or None per crop.

    Raises:
        TypeError: it is no sequence, or an entry is neither an integer nor None.
        ValueError: an entry is out of range, or there are not as many as crops.
    """
    if not isinstance(index, Sequence) or isinstance(index, (str, bytes)):
        raise TypeError(
            f"{name} must be a sequence of adapter numbers and None; got {type(index).__name__}"
        )
    checked: list[int | None] = []
    for entry in index:
        if entry is None:
            checked.append(None)
            continue
        # numpy's integers are fine; a bool or a tensor is a mistake.
        if isinstance(entry, (bool, Tensor)) or not hasattr(entry, "__index__"):
            raise TypeError(
                f"{name} must hold adapter numbers or None; got {entry!r} ({type(entry).__name__})"
            )
        number = operator.index(entry)
        if not 0 <= number < adapters:
            raise ValueError(
                f"{name} must name one of the {adapters} adapters (0 to {adapters - 1}); got "
                f"{number}"
                if adapters
                else f"{name} must be None: the encoder has no adapters; got {number}"
            )
        checked.append(number)
    if len(checked) != crops:
        raise ValueError(f"{name} must have an entry for each of {crops} crops; got {len(checked)}")
    return checked


def default_adapter_index(grid: tuple[int, int], adapters: int) -> list[int | None]:
    """Upstream's: local crop i has adapter i, the global crop none; without adapters none has.

    Raises:
        ValueError: more local crops than adapters.
    """
    local = grid[0] * grid[1]
    if adapters == 0:
        return [None] * (local + 1)
    if local > adapters:
        raise ValueError(
            f"grid {grid} has {local} local crops but there are {adapters} adapters: pass "
            "adapter_index, an adapter or None for each crop"
        )
    return [*range(local), None]


def select_adapters(
    index: Sequence[int | None], adapters: int, device: torch.device, *, one_hot: bool = False
) -> AdapterSelection:
    """``index``, one checked entry per crop of a batch, as the selection that the blocks take.

    ``one_hot`` asks for rows in place of a single number, to which torch.compile would specialise
    a block.
    """
    if all(entry is None for entry in index):
        return None
    if len(set(index)) == 1 and not one_hot:
        return index[0]
    rows = [[float(entry == adapter) for adapter in range(adapters)] for entry in index]
    return torch.tensor(rows).to(device, non_blocking=True)
