"""Which implementation runs, and what is said where one cannot."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from monkey_kernels import backend, backend_report, extract_crops, resampler_attention, use_backend
from monkey_kernels.backend import requested_backend, resolve, why_not_triton

CPU = torch.device("cpu")
IMAGE = [torch.zeros(4, 4, 3, dtype=torch.uint8)]


def attention():
    x = torch.randn(2, 5, 128)
    return resampler_attention(x[0], x, x, num_heads=2)


@pytest.fixture(autouse=True)
def no_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.delenv(backend.ENVIRONMENT_VARIABLE, raising=False)


def test_context_manager_nests_and_restores(monkeypatch):
    assert requested_backend() == "auto"
    with use_backend("torch"):
        assert requested_backend() == "torch"
        with use_backend("triton"):
            assert requested_backend() == "triton"
        assert requested_backend() == "torch"
    monkeypatch.setenv(backend.ENVIRONMENT_VARIABLE, "torch")
    assert requested_backend() == "torch"
    with pytest.raises(KeyError), use_backend("auto"):
        assert requested_backend() == "auto"
        raise KeyError
    assert requested_backend() == "torch"


def test_overlapping_blocks(monkeypatch):
    """Two threads' blocks need not end in the order in which they began."""
    first, second = use_backend("torch"), use_backend("auto")
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert requested_backend() == "auto"
    second.__exit__(None, None, None)
    monkeypatch.setenv(backend.ENVIRONMENT_VARIABLE, "triton")
    assert requested_backend() == "triton"
    monkeypatch.setenv(backend.ENVIRONMENT_VARIABLE, "")
    assert requested_backend() == "auto"


def test_unknown_names(monkeypatch):
    with pytest.raises(ValueError, match=r"name must be one of auto, triton, torch; got 'cuda'"):
        use_backend("cuda").__enter__()
    monkeypatch.setenv(backend.ENVIRONMENT_VARIABLE, "fast")
    with pytest.raises(ValueError, match=r"MONKEY_KERNELS_BACKEND must be one of .*got 'fast'"):
        extract_crops(IMAGE, crop_size=2)


@pytest.mark.parametrize("call", [lambda: extract_crops(IMAGE, crop_size=2), attention])
def test_triton_on_the_cpu_raises_and_never_falls_back(call, monkeypatch):
    with use_backend("triton"), pytest.raises(RuntimeError, match="'triton' was requested for"):
        call()
    monkeypatch.setenv(backend.ENVIRONMENT_VARIABLE, "triton")
    with pytest.raises(RuntimeError, match="'triton' was requested for"):
        call()
    with use_backend("torch"):
        call()


def test_reasons(monkeypatch):
    assert "on the CPU" in why_not_triton("extract_crops", CPU)
    assert "not on 'meta'" in why_not_triton("extract_crops", torch.device("meta"))
    with use_backend("triton"), pytest.raises(RuntimeError, match=r"cannot run: .* on the CPU"):
        resolve("extract_crops", CPU)

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    gpu = torch.device("cuda", 0)
    assert "7.5 is below 8.0" in why_not_triton("extract_crops", gpu)
    assert resolve("extract_crops", gpu) == "torch"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert why_not_triton("extract_crops", gpu) is None
    assert resolve("extract_crops", gpu) == "triton"
    assert resolve("extract_crops", gpu, "float64 input") == "torch"
    with use_backend("triton"), pytest.raises(RuntimeError, match="float64 input"):
        resolve("extract_crops", gpu, "float64 input")

    monkeypatch.setattr(backend.importlib.util, "find_spec", lambda name: None)
    assert "not installed" in why_not_triton("extract_crops", gpu)
    assert resolve("extract_crops", gpu) == "torch"


def test_interpreter_runs_on_request_only(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert resolve("extract_crops", CPU) == "torch"
    with use_backend("triton"):
        assert resolve("extract_crops", CPU) == "triton"


def test_report():
    rows = backend_report()
    assert {row.op for row in rows} == set(backend.OPS)
    cpu = [row for row in rows if row.device == "cpu"]
    assert len(cpu) == len(backend.OPS)
    for row in cpu:
        assert row.auto == "torch" and row.why_not_triton


def test_imports_without_triton_and_without_transformers():
    """Both packages import where Triton is absent, and do not pull transformers in."""
    program = (
        "import sys; sys.modules['triton'] = None\n"
        "import monkey_kernels, monkey_model, monkey_model.visual, torch\n"
        "assert 'transformers' not in sys.modules and 'peft' not in sys.modules\n"
        "image = torch.zeros(4, 4, 3, dtype=torch.uint8)\n"
        "assert monkey_kernels.extract_crops([image], crop_size=2).shape == (5, 3, 2, 2)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
