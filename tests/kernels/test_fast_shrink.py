"""How far the CPU's fast path for large shrinks is from Pillow: what docs/encoding.md states.

torch's uint8 filter has 16-bit weights. Its error depends on the ratio of the sides, not on the
processor; the sizes here are the worst that a search over ratios from 2.5 to 8 found.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.workloads import photo
from monkey_kernels.crops.reference import resize_uint8

#: Share of the resized picture's values that are a level off, at most, in photos.
WORST = {"bilinear": 0.017, "bicubic": 0.012}
#: As 3456 and 3808 pixels to 896.
SIDES = {"bilinear": 1728, "bicubic": 1904}


def noise(side: int, darkest: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(darkest, 256, (side, side, 3), generator=generator, dtype=torch.uint8)


PICTURES: dict[str, Callable[[int], Tensor]] = {
    "photo": lambda side: photo(side, side),
    "noise": noise,
    "bright": lambda side: noise(side, 200),
}


def share_off(image: Tensor, interpolation: str) -> tuple[float, int]:
    """The share of values that differ from Pillow's, and by how many levels at most."""
    fast, exact = (resize_uint8(image, (448, 448), interpolation, exact=e) for e in (False, True))
    levels = (fast.int() - exact.int()).abs()
    return (levels > 0).double().mean().item(), int(levels.max())


@pytest.mark.parametrize("interpolation", WORST)
def test_photos_at_the_worst_sizes(interpolation: str) -> None:
    """The bounds hold, and are no looser than they have to be."""
    found = [share_off(f(SIDES[interpolation]), interpolation) for f in PICTURES.values()]
    worst = max(share for share, _ in found)
    assert 0.85 * WORST[interpolation] < worst <= WORST[interpolation]
    assert max(levels for _, levels in found) <= 2


def test_drawings_at_the_worst_size() -> None:
    """Black and white fall on ties between two levels, which torch rounds its own way."""
    dots = noise(368)[..., :1] // 128 * 255
    drawing = dots.repeat_interleave(6, 0).repeat_interleave(6, 1).expand(-1, -1, 3)
    share, levels = share_off(drawing.contiguous(), "bilinear")
    assert 0.1 < share <= 0.15 and levels == 1


def test_the_guide_states_the_bounds() -> None:
    guide = (Path(__file__).parents[2] / "docs" / "encoding.md").read_text(encoding="utf-8")
    for interpolation, share in WORST.items():
        assert f"{100 * share:.1f} % ({interpolation})" in guide
    assert "15 %" in guide
