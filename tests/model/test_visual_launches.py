"""What inference launches on a GPU, counted by the rule of ``tests/helpers/launches.py``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.baselines import block_banks, library_block, upstream_block
from monkey_model.encoder import vit
from monkey_model.encoder.crop_adapters import select_adapters
from monkey_model.visual import VisualAttentionBlock
from tests.helpers.launches import GPU, Launches, count_launches, fake_gpu, on_fake_gpu
from tests.helpers.numerics import check_error

INDEX = [0, 1, 2, 3, None]
DOCS = Path(__file__).parents[2] / "docs" / "architecture.md"


@pytest.fixture
def block(monkeypatch) -> Iterator[VisualAttentionBlock]:
    """A block of the published width, in bfloat16, on a GPU that does not exist."""
    with torch.device("meta"):
        block = VisualAttentionBlock(1664, 16, 4.9231).to(torch.bfloat16).eval()
    with fake_gpu(monkeypatch):
        yield on_fake_gpu(block)


def rows(crops: int) -> Tensor:
    return torch.empty(crops, 1024, 1664, dtype=torch.bfloat16, device=GPU)


def ours(block: VisualAttentionBlock, index: list[int | None]) -> Launches:
    x, selection = rows(len(index)).transpose(0, 1), select_adapters(index, 4, GPU)
    return count_launches(lambda: block(x, idx=selection))


def test_a_block_launches_few_kernels(block) -> None:
    assert len(ours(block, [None] * 5)) <= 11
    for index in (INDEX, [i for i in INDEX for _ in range(8)], [2] * 5, [1, 2, 3, None]):
        assert len(ours(block, index)) <= 14, index


def test_launches_and_bytes_of_a_block(block, monkeypatch) -> None:
    """The table of docs/architecture.md, for the five crops of an image."""
    monkeypatch.setattr(torch, "equal", lambda a, b: True)  # upstream's wait, in every block
    x = rows(5)

    def upstream() -> None:
        for crop, adapter in zip(x.split(1), INDEX, strict=True):
            upstream_block(block, crop.transpose(0, 1), adapter)

    with torch.no_grad():
        banks = block_banks(block, INDEX)
    counted = {
        "upstream, crop by crop": count_launches(upstream),
        "torch's own parts, crops in a batch": count_launches(
            lambda: library_block(block, banks, x, 1024)
        ),
        "ours": ours(block, INDEX),
        "ours, without adapters": ours(block, [None] * 5),
    }
    table = [f"| {name} | {len(x)} | {x.bytes / 1e6:.0f} |" for name, x in counted.items()]
    assert "\n".join(table) in DOCS.read_text(), "\n".join(table)


def test_the_counter_counts() -> None:
    """Views are none, a copied row and a wait are seen."""
    x = torch.randn(4, 4)
    launches = count_launches(lambda: (x.T.view(4, 4) @ x).mul_(2))
    assert launches.made == [("mm", 3 * x.nbytes), ("mul_", 2 * x.nbytes)]
    launches = count_launches(lambda: F.layer_norm(x.T, (4,)))
    assert launches.names == ["copy", "native_layer_norm"]
    with pytest.raises(AssertionError, match=r"_local_scalar_dense\.default waits for its tensor"):
        count_launches(lambda: x.sum().item())


# ---- GELU in the epilogue -----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [0.3, 1.0, 4.0])
def test_error_of_gelu_in_the_epilogue(dtype, scale, monkeypatch) -> None:
    """What cuBLASLt computes, GELU's tanh form of sums in float32, is within the rule."""

    def epilogue(bias: Tensor, x: Tensor, weight: Tensor, *, use_gelu: bool) -> Tensor:
        assert use_gelu
        sums = torch.addmm(bias.float(), x.float(), weight.float())
        return F.gelu(sums, approximate="tanh").to(x.dtype)

    monkeypatch.setattr(torch, "_addmm_activation", epilogue)
    torch.manual_seed(0)
    block = VisualAttentionBlock(128, 2, lora_repeat_num=0).to(dtype)
    x = (torch.randn(2, 50, 128) * scale).to(dtype)
    with torch.no_grad():
        plain = block._run_mlp(x)
        monkeypatch.setattr(vit, "_has_gelu_epilogue", lambda x: True)
        fused = block._run_mlp(x)
        assert not torch.equal(fused, plain)
        monkeypatch.undo()
        check_error("MLP", fused, plain, block.double()._run_mlp(x.double()))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_error_of_a_block_on_a_gpu(dtype) -> None:
    torch.manual_seed(0)
    block = VisualAttentionBlock(256, 4, lora_repeat_num=0).to("cuda", dtype)
    x = torch.randn(64, 5, 256, device="cuda", dtype=dtype)
    plain = block(x).detach()  # with gradients on there is no epilogue
    with torch.no_grad():
        ours = block(x)
        check_error("block", ours, plain, block.double()(x.double()))


WATCHED: list[Callable[[VisualAttentionBlock], torch.nn.Module]] = [
    lambda block: block.ln_2,
    lambda block: block.mlp,
    lambda block: block.mlp.c_fc,
    lambda block: block.mlp.gelu,
]


@pytest.mark.parametrize("part", WATCHED)
def test_a_watched_part_is_called(part, monkeypatch) -> None:
    """A hook sees its module's call, though the block would compute without it."""
    monkeypatch.setattr(vit, "_has_gelu_epilogue", lambda x: True)
    block, x, seen = VisualAttentionBlock(16, 2, lora_repeat_num=0), torch.randn(4, 1, 16), []
    with torch.no_grad():
        block(x)
        handle = part(block).register_forward_hook(lambda *call: seen.append(call))
        block(x)
        assert len(seen) == 1
        handle.remove()
        block(x)
    assert len(seen) == 1
