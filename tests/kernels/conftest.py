"""The kernel tests leave Triton's interpreter as they found it, and keep no call's tables."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def clean_interpreter() -> Iterator[None]:
    """tilelens puts the operators that it has wrapped back on the one interpreter object, where
    they would hide what a later test patches in its class."""
    try:
        from triton.runtime.interpreter import interpreter_builder
    except ImportError:  # the references are tested without Triton as well
        yield
        return
    from monkey_kernels.crops import launch

    launch.prepared.clear()  # a planted fault must not meet what an earlier test prepared
    attributes = vars(interpreter_builder)
    before = dict(attributes)
    yield
    attributes.clear()
    attributes.update(before)
