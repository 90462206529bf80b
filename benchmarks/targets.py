"""What the project set out to reach, each target once; ``report.py`` puts the measured beside."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.results import Run, gain


@dataclass(frozen=True)
class Target:
    """``quantity`` of one provider in one group, at least or at most ``bound``.

    "speed" is how many times faster than ``against`` a row is, "saving" how many times less it
    takes, "cost" how many times more; "s", "ms", "us", "MiB" and "GiB" are the row's value;
    "TFLOP/s" and "share of roofline" are the run's; "share of GEMM" is of the TFLOP/s that the
    run measured for a large product.
    """

    what: str
    where: str  #: a word of the GPU's name, or "CPU"
    group: str
    bound: float
    quantity: str = "speed"
    provider: str = "ours"
    against: str = "upstream"

    @property
    def at_least(self) -> bool:
        return self.quantity in ("speed", "saving", "TFLOP/s") or self.quantity.startswith("share")


def _cpu(what: str, group: str, bound: float, quantity: str = "speed", **more: str) -> Target:
    return Target(what, "CPU", group, bound, quantity, **more)


def _h100(what: str, group: str, bound: float, quantity: str = "speed", **more: str) -> Target:
    return Target(what, "H100", group, bound, quantity, **more)


_PHOTO = "crops: 4000x3000, {}"
_RESAMPLER = "resampler + ln_post + proj, 5 crops: {}"
_ENCODER = "encoder, {} layers, {} image(s): {}"
_SAVED = "saved for backward, per block and crop: {}"

TARGETS = [
    _cpu("12 MP photo to crops, bilinear", _PHOTO.format("bilinear"), 5),
    _cpu("12 MP photo to crops, bicubic", _PHOTO.format("bicubic"), 5),
    _cpu("resampler and projection, float32", _RESAMPLER.format("float32"), 2),
    _cpu("resampler and projection, bfloat16", _RESAMPLER.format("bfloat16"), 2),
    _cpu("ViT block, float32", "ViT block, 5 crops: float32", 1.05),
    _cpu("encoder, 2 layers, float32", _ENCODER.format(2, 1, "float32"), 1.25),
    _cpu("encoder, 2 layers, bfloat16", _ENCODER.format(2, 1, "bfloat16"), 1),
    _cpu("peak memory, encoding", "peak memory, encode, 2 layers, 1 image: float32", 1.5, "cost"),
    *(
        _cpu(f"saved for backward, {dtype}, {provider}", _SAVED.format(dtype), bound,
             "saving", provider=provider)
        for dtype in ("float32", "bfloat16")
        for provider, bound in (("ours", 4), ("ours, checkpointed", 40))
    ),
    _cpu("compiled, import to first tokens", "cold start, 2 layers, 1 image: float32", 60, "s",
         provider="ours, compiled"),
    _cpu("training the encoder fits a 24 GB card",
         "training, 48 layers, 1 image: bfloat16, counted", 24e9 / 2**30, "GiB",
         provider="ours, checkpointed"),
    _cpu("training the whole model fits a 24 GB card",
         "training, LLM and encoder, 2048 tokens, 1 image: bfloat16, counted", 24e9 / 2**30, "GiB",
         provider="ours, checkpointed"),
    _cpu("training the whole model in 4 bits fits a 24 GB card",
         "training, LLM and encoder, 2048 tokens, 1 image: bfloat16, counted", 24e9 / 2**30, "GiB",
         provider="ours, checkpointed, 4-bit"),
    # 14 us is what moving the bytes takes at 3.0 TB/s.
    _h100("12 MP photo, bilinear", _PHOTO.format("bilinear"), 2.5 * 14, "us"),
    _h100("12 MP photo, bicubic", _PHOTO.format("bicubic"), 4 * 14, "us"),
    _h100("12 MP photo, bicubic", _PHOTO.format("bicubic"), 8, against="torch"),
    _h100("12 MP photo, bicubic", _PHOTO.format("bicubic"), 8,
          against="torch, compiled"),
    _h100("64 ragged photos", "crops: 64 ragged photos, bilinear", 0.6, "share of roofline"),
    _h100("resampler and projection", _RESAMPLER.format("bfloat16"), 0.55, "ms"),
    _h100("resampler and projection", _RESAMPLER.format("bfloat16"), 2),
    _h100("resampler and projection", _RESAMPLER.format("bfloat16"), 1.5,
          against="upstream, compiled"),
    _h100("cross-attention forward", "cross-attention forward, 40 crops: bfloat16", 450,
          "TFLOP/s"),
    _h100("cross-attention backward", "cross-attention backward, 40 crops: bfloat16", 350,
          "TFLOP/s"),
    _h100("cross-attention forward", "cross-attention forward, 40 crops: bfloat16",
          1, against="SDPA"),
    _h100("cross-attention backward",
          "cross-attention backward, 40 crops: bfloat16", 1, against="SDPA"),
    _h100("encoder, 1 image", _ENCODER.format(48, 1, "bfloat16"), 38, "ms"),
    _h100("encoder, 1 image, compiled and graphed", _ENCODER.format(48, 1, "bfloat16"), 32, "ms",
          provider="ours, compiled and graphed"),
    _h100("encoder, 8 images", _ENCODER.format(48, 8, "bfloat16"), 0.75, "share of GEMM"),
    _h100("encoder, 8 images", _ENCODER.format(48, 8, "bfloat16"), 2),
    _h100("encoder compiled, 8 images",
          _ENCODER.format(48, 8, "bfloat16"), 1.2, provider="ours, compiled",
          against="library, compiled"),
]  # fmt: skip

_PER_SECOND = {"s": 1.0, "ms": 1e3, "us": 1e6}


def measure(target: Target, run: Run) -> float | None:
    """The target's quantity in a run; None where the run does not have it."""
    row = run.row(target.group, target.provider)
    if row is None:
        return None
    if target.quantity in ("speed", "saving", "cost"):
        spread = gain(row, run.groups()[row.group], target.against)
        if spread is None:
            return None
        return 1 / spread.median if target.quantity == "cost" else spread.median
    if target.quantity in _PER_SECOND:
        return row.value.median * _PER_SECOND[target.quantity]
    if target.quantity == row.unit:
        return row.value.median
    if target.quantity == "share of GEMM":
        if run.ceilings is None:
            return None
        return row.info["TFLOP/s"] / run.ceilings["GEMM TFLOP/s"]
    return row.info.get(target.quantity)


def find_run(target: Target, runs: Sequence[Run]) -> Run | None:
    """The first run on the target's kind of machine."""
    for run in runs:
        gpu = run.machine["gpu"]
        if target.where in gpu if gpu else target.where == "CPU":
            return run
    return None
