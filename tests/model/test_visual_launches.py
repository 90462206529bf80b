"""What inference launches on a GPU, counted by the rule of ``tests/helpers/launches.py``."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from monkey_model.encoder.crop_adapters import select_adapters
from monkey_model.visual import VisualAttentionBlock
from tests.helpers.launches import GPU, Launches, count_launches, fake_gpu, on_fake_gpu

INDEX = [0, 1, 2, 3, None]


def of_a_block(monkeypatch: pytest.MonkeyPatch, index: Sequence[int | None]) -> Launches:
    """A block of the published width, on the crops of an image in bfloat16."""
    with torch.device("meta"):
        block = VisualAttentionBlock(1664, 16, 4.9231).to(torch.bfloat16).eval()
    with fake_gpu(monkeypatch):
        on_fake_gpu(block)
        x = torch.empty(len(index), 1024, 1664, dtype=torch.bfloat16, device=GPU)
        selection = select_adapters(index, 4, GPU)
        return count_launches(lambda: block(x.transpose(0, 1), idx=selection))


def test_a_block_launches_few_kernels(monkeypatch):
    assert len(of_a_block(monkeypatch, [None] * 5)) <= 11
    assert len(of_a_block(monkeypatch, INDEX)) <= 16
    assert len(of_a_block(monkeypatch, [i for i in INDEX for _ in range(8)])) <= 16
    assert len(of_a_block(monkeypatch, [2] * 5)) <= 16


def test_the_counter_counts():
    """Views are none, a wait is an error."""
    x = torch.randn(4, 4)
    launches = count_launches(lambda: (x.T.view(4, 4) @ x).mul_(2))
    assert launches.made == [("mm", 3 * x.nbytes), ("mul_", 2 * x.nbytes)]
    with pytest.raises(AssertionError, match=r"_local_scalar_dense.default waits for its tensor"):
        count_launches(lambda: x.sum().item())
