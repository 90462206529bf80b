"""Launch parameters: defaults, device files, and what is wrong with a file."""

import json
from dataclasses import dataclass

import pytest
import torch

from monkey_kernels import self_attention, tuning
from monkey_kernels.self_attention import SelfAttention, candidates


@dataclass(frozen=True)
class Parameters:
    block: int = 64
    num_warps: int = 4
    num_stages: int = 2


def test_a_device_file_overrides_the_default(tmp_path, monkeypatch):
    path = tmp_path / "nvidia-h100-80gb-hbm3.json"
    path.write_text(json.dumps({"cut": {"block": 128, "num_stages": 3}, "other": {}}))
    monkeypatch.setattr(tuning, "CONFIGS", tmp_path)
    names = {0: "NVIDIA H100 80GB HBM3", 1: "NVIDIA L4"}
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: names[device.index])
    device = torch.device("cuda", 0)
    assert tuning.launch_parameters("cut", Parameters(), device) == Parameters(128, num_stages=3)
    assert tuning.launch_parameters("other", Parameters(), device) == Parameters()
    assert tuning.launch_parameters("cut", Parameters(), torch.device("cpu")) == Parameters()
    other = torch.device("cuda", 1)
    assert tuning.launch_parameters("cut", Parameters(), other) == Parameters()
    assert tuning.shipped("cut", Parameters()) == {
        "default": Parameters(),
        "nvidia-h100-80gb-hbm3": Parameters(128, num_stages=3),
    }


def test_parameters_can_be_tried():
    device = torch.device("cpu")
    with tuning.trying("cut", Parameters(32)), tuning.trying("other", Parameters(16)):
        assert tuning.launch_parameters("cut", Parameters(), device) == Parameters(32)
        with pytest.raises(RuntimeError), tuning.trying("cut", Parameters(128)):
            assert tuning.launch_parameters("cut", Parameters(), device) == Parameters(128)
            raise RuntimeError
        assert tuning.launch_parameters("cut", Parameters(), device) == Parameters(32)
        assert tuning.launch_parameters("other", Parameters(), device) == Parameters(16)
    assert tuning.launch_parameters("cut", Parameters(), device) == Parameters()


@pytest.mark.parametrize(
    "text, message",
    [
        ("{", "bad.json is not JSON"),
        ("[]", "bad.json must hold an object of objects"),
        ('{"cut": 3}', "bad.json must hold an object of objects"),
        (
            '{"cut": {"blok": 1}}',
            "cut has no parameter 'blok'; it takes block, num_warps, num_stages",
        ),
        ('{"cut": {"block": 48}}', "cut.block must be a power of two; got 48"),
        ('{"cut": {"block": true}}', "cut.block must be a positive int; got True"),
        ('{"cut": {"num_stages": 0}}', "cut.num_stages must be a positive int; got 0"),
    ],
)
def test_a_bad_file_is_named(tmp_path, text, message):
    path = tmp_path / "bad.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        tuning.from_file(path, "cut", Parameters())


# ---- which attention kernel ---------------------------------------------------------------------


def views(dtype=torch.bfloat16, width=16):
    """Query, key and value as parts of a packed projection, as in the ViT."""
    packed = torch.randn(2, 5, 3 * 2 * width, dtype=dtype)
    return packed.unflatten(-1, (2, 3 * width)).transpose(1, 2).chunk(3, dim=-1)


def test_the_attention_kernel_is_the_tables(monkeypatch):
    flags = {
        "flash": torch.backends.cuda.flash_sdp_enabled,
        "cudnn": torch.backends.cuda.cudnn_sdp_enabled,
        "efficient": torch.backends.cuda.mem_efficient_sdp_enabled,
        "math": torch.backends.cuda.math_sdp_enabled,
    }

    def allowed(*tensors):
        """The backends that torch may choose from, while it attends to these very tensors."""
        calls = []

        def attend(*given):
            assert all(a is b for a, b in zip(given, tensors, strict=True))
            calls.append({name for name, enabled in flags.items() if enabled()})

        monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attend)
        self_attention(*tensors)
        (names,) = calls
        return names

    everything = set(flags)
    assert allowed(*views()) == everything
    for choice in candidates():
        with tuning.trying("self_attention", choice):
            only = everything if choice.backend == "torch" else {choice.backend}
            assert allowed(*views()) == only
            assert allowed(*views(torch.float32)) == everything
            assert allowed(*views(width=12)) == everything
    assert allowed(*views()) == everything


def test_a_wrong_attention_kernel_in_a_file(tmp_path):
    path = tmp_path / "bad.json"
    path.write_text(json.dumps({"self_attention": {"backend": "fast"}}))
    with pytest.raises(ValueError, match=r"self_attention.backend must be one of torch, flash"):
        tuning.from_file(path, "self_attention", SelfAttention())
    path = tmp_path / "good.json"
    path.write_text(json.dumps({"self_attention": {"backend": "cudnn"}}))
    assert tuning.from_file(path, "self_attention", SelfAttention()) == SelfAttention("cudnn")
