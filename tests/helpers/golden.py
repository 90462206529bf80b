"""Outputs of upstream's own code on a small seeded model (tests/data/README.md)."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from monkey_model.configuration_monkey import MonkeyConfig
from monkey_model.modeling_monkey import MonkeyLMHeadModel
from monkey_model.visual import VisionTransformer
from tests.helpers.numerics import relative_l2

DATA = Path(__file__).parents[1] / "data"


@dataclass(frozen=True)
class Golden:
    config: dict
    images: list[str]
    state: dict[str, Tensor]
    crops_every_7th: Tensor  # [2, 5, 3, 64, 64]
    tokens_every_2nd: Tensor  # [2, 640, 256]

    def encoder(self, **settings) -> VisionTransformer:
        encoder = VisionTransformer(**{**self.config, **settings})
        encoder.load_state_dict(self.state, strict=True)
        return encoder.eval()


def load_golden() -> Golden:
    with safe_open(DATA / "stock_visual.safetensors", "pt") as file:
        metadata = file.metadata()
        state = {
            key.removeprefix("state."): file.get_tensor(key).float()
            for key in file.keys()  # noqa: SIM118
            if key.startswith("state.")
        }
        return Golden(
            config=json.loads(metadata["config"]),
            images=[str(DATA / name) for name in json.loads(metadata["images"])],
            state=state,
            crops_every_7th=file.get_tensor("crops_every_7th"),
            tokens_every_2nd=file.get_tensor("tokens_every_2nd"),
        )


@dataclass(frozen=True)
class GoldenLM:
    config: dict
    state: dict[str, Tensor]
    input_ids: Tensor  # [2, 1296]
    attention_mask: Tensor
    logits_last_24: Tensor  # [2, 24, 512]
    generated: Tensor  # [2, 12]

    def model(self, **settings) -> MonkeyLMHeadModel:
        model = MonkeyLMHeadModel(MonkeyConfig(**{**self.config, **settings}))
        model.load_state_dict(self.state, strict=True)
        return model.eval()


def load_golden_lm() -> GoldenLM:
    with safe_open(DATA / "stock_lm.safetensors", "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        return GoldenLM(
            config=json.loads(file.metadata()["config"]),
            state={
                key.removeprefix("state."): tensors.pop(key).float()
                for key in list(tensors)
                if key.startswith("state.")
            },
            **tensors,
        )


def assert_tokens_match(tokens: Tensor, golden: Golden) -> None:
    """Upstream's arithmetic itself supports 2e-5 in float32."""
    assert torch.isfinite(tokens).all()
    error = relative_l2(tokens[:, ::2], golden.tokens_every_2nd)
    assert error <= 2e-5, f"relative L2 {error:.2e}"


def assert_crops_match(crops: Tensor, golden: Golden) -> None:
    """Within 2 levels of 255 everywhere and equal on 99 % of values; crops [10, 3, 448, 448]."""
    crops = crops.unflatten(0, (2, 5))[..., ::7, ::7]
    difference = (crops - golden.crops_every_7th).abs()
    two_levels = 2 / 255 / 0.26130258
    assert difference.max() <= two_levels, f"max {difference.max():.2e}"
    off = (difference > 1e-5).float().mean()
    assert off <= 0.01, f"{off:.2%} of values off"
