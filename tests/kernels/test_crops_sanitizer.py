"""No kernel touches memory that is not its own.

Two checks. The addresses of every access in the interpreter are held against the tensors of the
call: that covers every kernel, for the shapes that are run. And tilelens' symbolic sanitizer proves
it for all programs of ``cut_kernel``, whose addresses are functions of its arguments; those of the
other kernels come out of the table in memory, where it does not follow.
"""

import numpy as np
import pytest
import torch

from monkey_kernels import extract_crops, use_backend
from monkey_kernels.backend import interpreting
from monkey_kernels.crops import plan
from monkey_kernels.crops.reference import place

if not interpreting():
    pytest.skip("needs Triton's interpreter", allow_module_level=True)
tilelens = pytest.importorskip("tilelens")

from tilelens.core.patch import _frontend  # noqa: E402
from triton.runtime.interpreter import InterpreterBuilder, interpreter_builder  # noqa: E402

from monkey_kernels.crops import launch  # noqa: E402
from tests.helpers.sanitizer import Sanitizer  # noqa: E402

INTERPOLATIONS, FITS = ("bilinear", "bicubic"), ("stretch", "crop", "pad")


def photo(height, width):
    return torch.randint(0, 256, (height, width, 3), dtype=torch.uint8)


class OutOfBounds(Exception):
    pass


@pytest.fixture
def owned(monkeypatch):
    """A list for the tensors that a call may touch, which every access is checked against.

    The launcher's own buffers are added as they are allocated.
    """
    tensors = []
    load, store = (
        InterpreterBuilder.create_masked_load,
        InterpreterBuilder.create_masked_store,
    )

    def tracked(allocate):
        def allocated(*args, **kwargs):
            tensors.append(allocate(*args, **kwargs))
            return tensors[-1]

        return allocated

    def tracked_plan(*args):
        made = plan.make_plan(*args)
        tensors.append(made.table)
        return made

    def check(pointers, mask, writes):
        size = max(pointers.get_element_ty().primitive_bitwidth // 8, 1)
        address = pointers.data[np.asarray(mask.data, dtype=bool)].astype(np.int64)
        fine = np.zeros(address.shape, dtype=bool)
        for tensor in tensors:
            start = tensor.data_ptr()
            extent = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
            end = start + (extent + 1) * tensor.element_size()
            if tensor.dtype == torch.uint8 and not writes:
                # Pixels are read as aligned vectors that hold at least one byte of the image.
                start, end = start // 16 * 16, -(-end // 16) * 16
            fine |= (address >= start) & (address + size <= end)
        if not fine.all():
            raise OutOfBounds(f"{(~fine).sum()} of {fine.size} addresses")

    def checked_load(self, pointers, mask, *args):
        check(pointers, mask, writes=False)
        return load(self, pointers, mask, *args)

    def checked_store(self, pointers, value, mask, *args):
        check(pointers, mask, writes=True)
        return store(self, pointers, value, mask, *args)

    monkeypatch.setattr(torch, "empty", tracked(torch.empty))
    monkeypatch.setattr(torch, "zeros", tracked(torch.zeros))
    monkeypatch.setattr(launch, "make_plan", tracked_plan)
    monkeypatch.setattr(InterpreterBuilder, "create_masked_load", checked_load)
    monkeypatch.setattr(InterpreterBuilder, "create_masked_store", checked_store)
    return tensors


def run(owned, images, **settings):
    owned.extend(images)
    with use_backend("triton"):
        return extract_crops(images, **settings)


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
def test_uint8_images_stay_inside_their_memory(owned, interpolation, fit):
    sizes = [(40, 30), (1, 1), (1, 9), (9, 1), (200, 12), (14, 130), (5, 7)]
    images = [photo(*size) for size in sizes] + [photo(33, 31)[2:31, 1:30], photo(9, 48)[:, 5:]]
    run(owned, images, grid=(2, 1), crop_size=9, interpolation=interpolation, fit=fit)


@pytest.mark.parametrize("fit", FITS)
def test_float_images_stay_inside_their_memory(owned, fit):
    images = [torch.rand(3, 40, 30), torch.rand(3, 5, 90)[:, 1:, ::3], torch.rand(3, 1, 1)]
    run(owned, images, grid=(1, 2), crop_size=14, interpolation="bicubic", fit=fit)


# Multiples of 16 bytes in all: vectors of the image end where it does. Rows alike, and not.
@pytest.mark.parametrize("size", [(20, 32), (16, 22)])
def test_a_planted_off_by_one_is_found(owned, monkeypatch, size):
    def wider(*args):
        source, target = place(*args)
        return source._replace(width=source.width + 1), target

    image = photo(*size)
    run(owned, [image], crop_size=8)
    monkeypatch.setattr(plan, "place", wider)
    launch.prepared.clear()
    with pytest.raises(Exception, match="OutOfBounds"):
        run(owned, [image], crop_size=8)


@pytest.fixture
def sanitizer(monkeypatch):
    """Runs ``cut_kernel`` symbolically; the other kernels are interpreted."""
    arguments = InterpreterBuilder.create_masked_load.__code__.co_argcount - 1
    # Where tilelens keeps the operators that it wraps, from its first use in the process on.
    originals = _frontend("triton").original_ops[interpreter_builder]
    load = originals["create_masked_load"]
    monkeypatch.setitem(originals, "create_masked_load", lambda *args: load(*args[:arguments]))
    client = Sanitizer(abort_on_error=False)
    monkeypatch.setattr(launch, "cut_kernel", tilelens.trace(client)(launch.cut_kernel))
    return client


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("grid", [(1, 1), (2, 3)])
def test_cutting_is_in_bounds_symbolically(sanitizer, grid, fit, interpolation):
    settings = {"fit": fit, "interpolation": interpolation, "grid": grid}
    with use_backend("triton"):
        extract_crops([photo(20, 31), photo(30, 8)], crop_size=9, **settings)
    assert not sanitizer.records


def test_a_planted_off_by_one_is_found_symbolically(sanitizer, monkeypatch):
    empty = torch.empty

    def one_short(shape, **kwargs):
        buffer = empty(shape, **kwargs)
        return buffer.view(-1)[:-1] if buffer.dtype == torch.uint8 and buffer.dim() == 4 else buffer

    monkeypatch.setattr(torch, "empty", one_short)
    with use_backend("triton"):
        extract_crops([photo(8, 8)], grid=(1, 1), crop_size=8)
    assert sanitizer.records
