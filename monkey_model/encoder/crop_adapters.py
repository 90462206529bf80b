"""Upstream's LoRA adapters: one per local crop, beside every adapted projection of the ViT."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from monkey_model.encoder.parameter_cache import ParameterCache

#: The adapters of a batch of crops: None for no adapter; a number for one adapter on all crops; a
#: tuple of numbers and None for as many runs of equal length; or a tensor [crops, adapters] with a
#: one-hot row per crop, where a row of zeros means no adapter.
AdapterSelection = int | tuple[int | None, ...] | Tensor | None


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


class AdapterBank(nn.ModuleList):
    """The adapters of one projection, in crop order, and their weights stacked for inference."""

    def __init__(self, adapters: Iterable[nn.Module] | None = None) -> None:
        super().__init__(adapters)
        self._stacked: ParameterCache[tuple[Tensor, Tensor]] = ParameterCache()

    def stacked(self) -> tuple[Tensor, Tensor]:
        """Down [adapters + 1, r, d_model] and scaled up [adapters + 1, r, out_feat] weights.

        The last one is zero: no adapter. They are made again when a parameter has changed, and
        every time while gradients are on.
        """
        bank = [cast(Lora_Adapter, adapter) for adapter in self]
        downs = [adapter.lora_a.weight for adapter in bank]
        ups = [adapter.lora_b.weight for adapter in bank]
        scales = [adapter.lora_scale for adapter in bank]

        def build() -> tuple[Tensor, Tensor]:
            scaled = [up.T * scale for up, scale in zip(ups, scales, strict=True)]
            down, up = (torch.stack([*x, torch.zeros_like(x[0])]) for x in (downs, scaled))
            return down, up

        if torch.is_grad_enabled():
            self._stacked.drop()  # an optimizer's step may follow, and a fused one leaves no trace
            return build()
        if torch.compiler.is_compiling():
            return build()
        return self._stacked.get([*downs, *ups, *scales], None, build)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._stacked.drop()  # weights made under inference_mode count no versions
        super()._load_from_state_dict(*args, **kwargs)


def adapter_bank(count: int, d_model: int, out_feat: int, r: int = 16) -> AdapterBank:
    """``count`` adapters of one projection, in crop order."""
    return AdapterBank(Lora_Adapter(d_model, out_feat, r) for _ in range(count))


def with_adapters(
    base: Callable[[Tensor], Tensor],
    x: Tensor,
    adapters: AdapterBank,
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
    t, up = _low_rank(x, adapters, selection)
    if t.requires_grad or up.requires_grad:
        term = (t @ up).view(*x.shape[:-1], -1)
        return base(x) + term
    out = base(x)
    if out.dtype == t.dtype and _is_ours(out, base):
        # No backward follows, so the product adds to the output in place and saves a pass over it.
        target, up = out.view(*t.shape[:-1], -1), up.to(t.dtype)
        target.baddbmm_(t, up) if t.dim() == 3 else target.addmm_(t, up)
        return out
    return out + (t @ up).view(out.shape)


def _low_rank(
    x: Tensor, adapters: AdapterBank, selection: int | tuple[int | None, ...] | Tensor
) -> tuple[Tensor, Tensor]:
    """What the selected adapters make of the rows of ``x``, as two factors of the same rank.

    One adapter, or rows of zeros and ones: [rows, ranks] and [ranks, out_feat]. With zeros and
    ones each row goes through all adapters, and a mask clears the ranks of the other crops': a row
    then costs the rank of all adapters, 4 x 16 beside a width of 1664, and none has to be sorted.

    Runs of equal length: [runs, rows, rank] and [runs, rank, out_feat], each run by its adapter.
    """
    down, up = adapters.stacked()
    # Each row uses one adapter, so one dropout for all rows equals a dropout per adapter.
    x = cast(Lora_Adapter, adapters[0]).lora_dropout(x)
    if isinstance(selection, int):
        return F.linear(x.flatten(0, -2), down.select(0, selection)), up.select(0, selection)
    if isinstance(selection, tuple):
        down, up = (_of_runs(weights, selection) for weights in (down, up))
        return x.reshape(len(selection), -1, x.shape[-1]) @ down.mT, up
    down, up = (weights.narrow(0, 0, len(adapters)).flatten(0, 1) for weights in (down, up))
    t = F.linear(x, down).unflatten(-1, (len(adapters), -1))
    t = t * selection.to(t.dtype).unsqueeze(1).unsqueeze(3)
    return t.flatten(-2).flatten(0, -2), up


def _of_runs(weights: Tensor, runs: tuple[int | None, ...]) -> Tensor:
    """The stacked ``weights`` of each run: a view where the adapters follow each other."""
    last = len(weights) - 1
    numbers = [last if run is None else run for run in runs]
    if numbers == list(range(numbers[0], numbers[0] + len(numbers))):
        return weights.narrow(0, numbers[0], len(numbers))
    return torch.stack([weights.select(0, number) for number in numbers])


def _modules_term(
    x: Tensor, bank: Sequence[Lora_Adapter], selection: int | tuple[int | None, ...] | Tensor
) -> Tensor:
    if isinstance(selection, int):
        return bank[selection](x)
    if isinstance(selection, tuple):
        runs = zip(selection, x.chunk(len(selection)), strict=True)
        width = bank[0].out_feat
        return torch.cat([
            part.new_zeros((*part.shape[:-1], width)) if i is None else bank[i](part)
            for i, part in runs
        ])  # fmt: skip
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


def repeats(index: Sequence[int | None]) -> int:
    """How often ``index`` says the same: the images of a batch whose crops have one adapter each.

    1 where the crops of an image share adapters, or where images differ.
    """
    pattern = len(set(index))
    times = len(index) // pattern if pattern else 1
    return times if list(index) == list(index[:pattern]) * times else 1


def select_adapters(
    index: Sequence[int | None], adapters: int, device: torch.device, *, one_hot: bool = False
) -> AdapterSelection:
    """``index``, one checked entry per crop of a batch, as the selection that the blocks take.

    ``one_hot`` asks for rows in place of numbers, to which torch.compile would specialise a block.
    """
    if all(entry is None for entry in index):
        return None
    if not one_hot:
        if len(set(index)) == 1:
            return index[0]
        runs = tuple(dict.fromkeys(index))
        length = len(index) // len(runs)
        if [run for run in runs for _ in range(length)] == list(index):
            return runs
    rows = [[float(entry == adapter) for adapter in range(adapters)] for entry in index]
    return torch.tensor(rows).to(device, non_blocking=True)
