"""``VisionTransformer.quantize``: the ViT's projections in 8 bits."""

from __future__ import annotations

import copy
import io
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from monkey_model.encoder import quantization
from monkey_model.encoder.quantization import PROJECTIONS, quantize_blocks
from monkey_model.visual import TransformerBlock
from tests.helpers.numerics import relative_l2
from tests.helpers.tiny import tiny_encoder

pytest.importorskip("torchao")
pytestmark = pytest.mark.filterwarnings("ignore")  # torchao's own

DOCS = Path(__file__).parents[2] / "docs" / "encoding.md"
INDEX = [0, 1, 2, 3, None]


# ---- error ---------------------------------------------------------------------------------------


def deep_vit(outliers: float) -> TransformerBlock:
    """48 blocks in float64; three channels are ``outliers`` times as large as the others."""
    torch.manual_seed(0)
    vit = TransformerBlock(128, 48, 4, 4.9231).eval().double()
    with torch.no_grad():
        for block in vit.resblocks:
            for name, parameter in block.named_parameters():
                if name.endswith("bias"):
                    parameter.normal_(std=0.1)
                if name.endswith("lora_b.weight"):
                    parameter.normal_(std=0.02)
            for norm in (block.ln_1, block.ln_2):
                norm.weight.normal_(1, 0.2)[:3] *= outliers**0.5
    return vit


def to_fp8(x: Tensor) -> Tensor:
    """The e4m3 values of ``x`` with a scale per row, in float32."""
    scale = x.float().abs().amax(-1, keepdim=True).clamp(min=1e-12) / 448
    return (x.float() / scale).to(torch.float8_e4m3fn).float() * scale


def emulate_fp8(vit: TransformerBlock) -> TransformerBlock:
    """What the GPU's fp8 products compute: sums in float32 of rounded values, then rounded."""

    def forward(projection: nn.Linear, x: Tensor) -> Tensor:
        sums = F.linear(to_fp8(x), to_fp8(projection.weight), projection.bias.float())
        return sums.to(x.dtype)

    for block in vit.resblocks:
        for name in PROJECTIONS:
            projection = block.get_submodule(name)
            projection.forward = lambda x, projection=projection: forward(projection, x)
    return vit


@pytest.mark.slow
def test_error_beside_that_of_bfloat16() -> None:
    """The table of docs/encoding.md; its figures vary a little with a machine's order of sums."""
    rows = [line for line in DOCS.read_text().splitlines() if line.startswith("| outliers ")]
    assert len(rows) == 3
    for row in rows:
        name, *documented = (cell.strip() for cell in row.strip("|").split("|"))
        outliers = float(name.split()[1])
        exact = deep_vit(outliers)
        x = torch.randn(16, 5, 128, dtype=torch.float64)
        x[..., :3] *= outliers
        plain = copy.deepcopy(exact).bfloat16()
        int8 = copy.deepcopy(plain)
        quantize_blocks(int8.resblocks, "int8")
        with torch.no_grad():
            expected = exact(x, idx=tuple(INDEX))
            for form, figure in zip(
                (plain, emulate_fp8(copy.deepcopy(plain)), int8), documented, strict=True
            ):
                error = relative_l2(form(x.bfloat16(), idx=tuple(INDEX)), expected)
                print(row, error)
                assert error == pytest.approx(float(figure), rel=0.2)


# ---- what is quantised ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_quantised(dtype) -> None:
    encoder = tiny_encoder().to(dtype)
    before, crops = copy.deepcopy(encoder), torch.randn(5, 3, 28, 28)
    assert encoder.quantize("int8") is encoder
    assert encoder.transformer.get_cast_dtype() == dtype
    changed = {
        name
        for (name, ours), theirs in zip(
            encoder.named_parameters(), before.parameters(), strict=True
        )
        if type(ours) is not type(theirs) or not torch.equal(ours, theirs)
    }
    assert changed == {
        f"transformer.resblocks.{block}.{name}.weight" for block in range(2) for name in PROJECTIONS
    }
    with torch.no_grad():
        together, exact = encoder(crops, INDEX), before(crops, INDEX)
        alone = [encoder(crop[None], i) for crop, i in zip(crops, INDEX, strict=True)]
    assert 1e-4 < relative_l2(together, exact) < 0.05
    torch.testing.assert_close(together, torch.cat(alone))


def test_saving_and_loading() -> None:
    """The keys are upstream's; torch.save's file loads into an encoder that is quantised alike."""
    encoder, crops = tiny_encoder().quantize("int8"), torch.randn(5, 3, 28, 28)
    file = io.BytesIO()
    torch.save(encoder.state_dict(), file)
    file.seek(0)
    loaded = tiny_encoder(seed=1).quantize("int8")
    assert list(loaded.state_dict()) == list(tiny_encoder().state_dict())
    loaded.load_state_dict(torch.load(file, weights_only=True))
    with torch.no_grad():
        assert torch.equal(loaded(crops, INDEX), encoder(crops, INDEX))
        assert torch.equal(copy.deepcopy(encoder)(crops, INDEX), encoder(crops, INDEX))
    with pytest.raises(RuntimeError, match=r"in_proj\.weight"):
        loaded.load_state_dict(tiny_encoder().state_dict())


# ---- bad input -----------------------------------------------------------------------------------


class Wrapped(nn.Linear):
    pass


def wrap(encoder) -> None:
    encoder.transformer.resblocks[1].mlp.c_fc.__class__ = Wrapped


@pytest.mark.parametrize(
    "spoil, kind, error, message",
    [
        (lambda e: None, "int4", ValueError, "kind must be one of fp8, int8; got 'int4'"),
        (lambda e: e.train(), "int8", ValueError, "must be in eval mode .*; got training mode"),
        (wrap, "int8", ValueError, r"resblocks\.1\.mlp\.c_fc must be a plain nn.Linear .*Wrapped"),
        (lambda e: e.quantize("int8"), "int8", ValueError, "a plain weight .*; got Int8Tensor"),
        (lambda e: e.to("meta"), "int8", ValueError, "must be on a CPU or a GPU .*: it is offload"),
        (lambda e: e.double(), "int8", TypeError, "the dtype of .*in_proj.* must be one of"),
        (lambda e: e.float(), "fp8", TypeError, "must be one of torch.bfloat16; got torch.float32"),
        (
            lambda e: e.bfloat16(),
            "fp8",
            ValueError,
            "'fp8' needs a GPU that .*; got the CPU, which",
        ),
    ],
)
def test_bad_input(spoil, kind, error, message) -> None:
    encoder = tiny_encoder()
    spoil(encoder)
    before = [type(parameter) for parameter in encoder.parameters()]
    with pytest.raises(error, match=message):
        encoder.quantize(kind)
    assert [type(parameter) for parameter in encoder.parameters()] == before


@pytest.mark.parametrize(
    "hip, capability, name, message",
    [
        (None, (8, 0), "", r"compute capability 8\.9 or later.*; got compute capability 8\.0"),
        (None, (8, 9), "", None),
        (None, (9, 0), "", None),
        ("7", None, "gfx90a:sramecc+", "AMD's gfx942 or gfx950; got gfx90a"),
        ("7", None, "gfx942:sramecc+", None),
    ],
)
def test_gpus_for_fp8(hip, capability, name, message, monkeypatch) -> None:
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    properties = SimpleNamespace(gcnArchName=name)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    gpu = torch.device("cuda", 0)
    assert quantization._why_not("int8", gpu) is None
    reason = quantization._why_not("fp8", gpu)
    if message is None:
        assert reason is None
    else:
        assert reason is not None
        with pytest.raises(ValueError, match=message):
            raise ValueError(reason)


def test_a_missing_torchao_says_what_to_install(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(ImportError, match=r'pip install "monkey-vision\[quantize\]"'):
        tiny_encoder().quantize("int8")
