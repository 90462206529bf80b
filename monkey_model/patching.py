"""This project's encoder inside a model object of upstream's own code, and out again.

    patch_visual(model)  # model.transformer.visual is now this project's
    model.generate(...)
    unpatch_visual(model)

The parts that hold weights (every ``nn.Linear``, ``nn.LayerNorm``, adapter, ...) and the bare
parameters are shared objects: an optimizer, ``requires_grad``, hooks on those parts and quantised
layers stay as they are. What changes is the code around them.

Upstream's model calls ``visual.encode(paths)`` and then ``visual(crop, idx)`` for each crop
position. The patched encoder remembers the crops that ``encode`` gave out; when the first of them
comes back it encodes all in one pass, and answers the others from that.

Torch, numpy and Pillow are enough here, so that it runs beside the transformers release that
upstream's code needs; ``docs/two-packages.md`` says how two packages of one name share a process.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from monkey_model.encoder.resampler import Resampler
from monkey_model.encoder.vit import TransformerBlock, VisualAttention, VisualAttentionBlock
from monkey_model.files import list_problems
from monkey_model.inputs.images import ImageSource
from monkey_model.parameter_names import upstream_name
from monkey_model.visual import VisionTransformer

# The modules whose code changes; everything below them is shared.
_REPLACED = (
    VisionTransformer,
    TransformerBlock,
    nn.ModuleList,
    VisualAttentionBlock,
    VisualAttention,
    Resampler,
)
_SHARED_LISTS = ("in_proj_lora", "out_proj_lora", "mlp_lora")


class _PatchedVisual(VisionTransformer):
    """Answers upstream's loop over crop positions from one pass over all crops."""

    def __init__(self, original: nn.Module, allow_urls: bool, **settings: Any) -> None:
        super().__init__(**settings)
        self._original = (original,)  # in a tuple: no submodule
        self._allow_urls = allow_urls
        self._given: dict[int, Tensor] = {}  # crops that have not come back, by position
        self._ready: Tensor | None = None  # [B, positions, n_queries, output_dim]

    def encode(
        self, image_paths: Sequence[ImageSource], *, allow_urls: bool | None = None
    ) -> tuple[list[list[Tensor]], Tensor]:
        allow_urls = self._allow_urls if allow_urls is None else allow_urls
        windows, images_448 = super().encode(image_paths, allow_urls=allow_urls)
        crops = [*(window for row in windows for window in row), images_448]
        self._given, self._ready = dict(enumerate(crops)), None
        return windows, images_448

    def forward(self, x: Tensor, idx: int | Sequence[int | None] | None = None) -> Tensor:
        position = next((i for i, crop in self._given.items() if crop is x), None)
        if position is None or self.adapter_index()[position] != idx:
            return super().forward(x, idx)
        if self._ready is None:
            crops = torch.stack(list(self._given.values()), dim=1)
            tokens = self.encode_crops(crops.flatten(0, 1))
            self._ready = tokens.unflatten(0, (-1, self.crop_settings.crops_per_image))
        tokens = self._ready[:, position]
        del self._given[position]
        if not self._given:
            self._ready = None
        return tokens


def patch_visual(model: nn.Module, *, allow_urls: bool = False) -> nn.Module:
    """Put this project's encoder into a model of upstream's code, in place.

    Weights are shared, not copied; training mode, dtype and device stay.

    Args:
        model: with ``transformer.visual`` of upstream's ``monkey_model/visual.py``, and its
            ``config.visual``. peft may have wrapped layers, and ``model`` itself.
        allow_urls: whether http(s) locations in prompts may be fetched (upstream: always).

    Returns:
        ``model``.

    Raises:
        TypeError: ``model`` has no ``transformer.visual`` module or no ``config.visual``.
        ValueError: it is patched, or of this project's own code; another encoder than the config
            says; hooks, or a wrapper of peft or accelerate, on a module whose code would change.
    """
    transformer, stock = _visual(model)
    if isinstance(stock, _PatchedVisual):
        raise ValueError("model must not be patched yet; got one that is")
    if isinstance(stock, VisionTransformer):
        raise ValueError("model must be upstream's; got one with this project's encoder already")
    config = getattr(getattr(model, "config", None), "visual", None)
    if not isinstance(config, dict):
        raise TypeError(f"model.config.visual must be a dict; got {type(config).__name__}")
    with torch.device("meta"):
        patched = _PatchedVisual(stock, allow_urls, **config)
    _check_layout(patched, stock)
    levels = list(_levels(patched, stock))
    for path, _, theirs, _ in levels:
        _check_hooks(path, theirs)
    for _, ours, theirs, shared in levels:
        ours.training = theirs.training
        for name in shared:
            setattr(ours, name, getattr(theirs, name))
        for name, parameter in theirs.named_parameters(recurse=False):
            setattr(ours, name, parameter)
    transformer.visual = patched
    return model


def unpatch_visual(model: nn.Module) -> nn.Module:
    """Put upstream's encoder back: the very module object, with the weights of now.

    Returns:
        ``model``.

    Raises:
        TypeError: ``model`` has no ``transformer.visual``.
        ValueError: it is not patched; hooks that would be lost; a shared layer that was replaced
            meanwhile (by peft, say). The model stays patched.
    """
    transformer, patched = _visual(model)
    if not isinstance(patched, _PatchedVisual):
        raise ValueError(f"model must be patched; got a {type(patched).__qualname__}")
    (stock,) = patched._original
    levels = list(_levels(patched, stock))
    for path, ours, theirs, shared in levels:
        _check_hooks(path, ours)
        for name in shared:
            if getattr(ours, name) is not getattr(theirs, name):
                raise ValueError(
                    f"{path}.{name} must still be upstream's module; got a "
                    f"{type(getattr(ours, name)).__qualname__}: unload what replaced it first"
                )
    for _, ours, theirs, _ in levels:
        theirs.training = ours.training
        for name, parameter in ours.named_parameters(recurse=False):
            setattr(theirs, name, parameter)
    transformer.visual = stock
    return model


def _visual(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    """``model.transformer`` and its ``visual``."""
    transformer = getattr(model, "transformer", None)
    visual = getattr(transformer, "visual", None)
    if not isinstance(transformer, nn.Module) or not isinstance(visual, nn.Module):
        raise TypeError(
            f"model must be a Monkey model, with transformer.visual; got {type(model).__qualname__}"
        )
    return transformer, visual


def _levels(
    ours: nn.Module, stock: nn.Module, path: str = "transformer.visual"
) -> Iterator[tuple[str, nn.Module, nn.Module, list[str]]]:
    """Every module whose code changes: its path, ours, upstream's, and the children they share."""
    shared = []
    for name, child in ours.named_children():
        if isinstance(child, _REPLACED) and name not in _SHARED_LISTS:
            yield from _levels(child, getattr(stock, name), f"{path}.{name}")
        else:
            shared.append(name)
    yield path, ours, stock, shared


def _check_layout(ours: nn.Module, stock: nn.Module) -> None:
    expected = {name: parameter.shape for name, parameter in ours.named_parameters()}
    found = {}
    for name, parameter in stock.named_parameters():
        short = upstream_name(f"transformer.visual.{name}")
        if short is not None:  # peft's LoRA goes along with the layer that it wraps
            found[short.removeprefix("transformer.visual.")] = parameter
    problems = [f"no {name}" for name in expected if name not in found]
    problems += [f"a {name}" for name in found if name not in expected]
    problems += [
        f"{name} of shape {list(parameter.shape)} instead of {list(expected[name])}"
        for name, parameter in found.items()
        if parameter.is_floating_point()  # a quantised weight is packed
        and parameter.shape != expected.get(name, parameter.shape)
    ]
    if problems:
        raise ValueError(
            "model.transformer.visual must be the encoder of config.visual, before peft copies "
            f"parts of it (modules_to_save); got {list_problems(problems, 5)}"
        )


def _check_hooks(path: str, module: nn.Module) -> None:
    hooks = (
        module._forward_hooks,
        module._forward_pre_hooks,
        module._backward_hooks,
        module._backward_pre_hooks,
        getattr(module, "_hf_hook", None),  # accelerate's, which also replaces forward
    )
    if any(hooks):
        raise ValueError(f"{path} must have no hooks, which would be lost; got some")
