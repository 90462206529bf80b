"""What benchmarks compare with is upstream's arithmetic, held against the stock outputs."""

from __future__ import annotations

import pytest
import torch
from PIL import Image
from torch._dynamo.testing import CompileCounter

from benchmarks import baselines
from monkey_model.visual import VisionTransformer
from tests.helpers.golden import assert_crops_match, assert_tokens_match, load_golden
from tests.helpers.pictures import needs_pillow_13


@pytest.fixture(scope="module")
def golden():
    return load_golden()


@pytest.fixture(scope="module")
def crops(golden):
    return torch.cat([baselines.upstream_crops(Image.open(path)) for path in golden.images])


@needs_pillow_13
def test_upstream_crops(golden, crops):
    assert_crops_match(crops, golden)


@needs_pillow_13
def test_upstream_tokens(golden, crops):
    with torch.no_grad():
        assert_tokens_match(baselines.upstream_tokens(golden.encoder(), crops), golden)


def test_upstream_compiles_to_a_graph_for_each_adapter(golden):
    """Its comparison of query and key would break every block's graph in two."""
    encoder = golden.encoder()
    block, width = encoder.transformer.resblocks[0], encoder.transformer.width
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(baselines.upstream_block, backend=counter, fullgraph=True)
    x = torch.randn(16, 1, width)
    with torch.no_grad():
        for index in encoder.adapter_index():
            assert torch.equal(compiled(block, x, index), baselines.upstream_block(block, x, index))
    assert counter.frame_count == len(encoder.adapter_index())


def test_forms_of_the_encoder_cache_what_they_fold(golden, monkeypatch):
    """A copy made under inference_mode would fold the resampler anew in every call."""
    from benchmarks.test_bench_encoder import encoder_form

    copies = []
    monkeypatch.setattr(VisionTransformer, "compile", lambda self: copies.append(self))
    with torch.inference_mode():
        encoder_form("ours, compiled", golden.encoder(), 1)
    assert not any(p.is_inference() for p in copies[0].parameters())


@needs_pillow_13
def test_library_tokens(golden, crops):
    encoder = golden.encoder()
    with torch.no_grad():
        assert_tokens_match(baselines.library_encoder(encoder, compiled=False)(crops), golden)


def test_torch_crops(golden, crops):
    """The torch form rounds elsewhere: a level or two at most."""
    pixels = [torch.from_numpy(baselines.np.array(Image.open(p))) for p in golden.images]
    ours = [baselines.torch_crops(image, "bicubic", torch.float32) for image in pixels]
    assert (torch.cat(ours) - crops).abs().mean() < 1 / 255 / 0.26


def test_missing_providers_say_why():
    assert baselines.why_missing("ours") is None
    assert baselines.why_missing("upstream") is None


def test_a_provider_that_is_not_installed(monkeypatch):
    monkeypatch.setitem(baselines._NEEDS, "torchvision", ("no_such_package", False))
    assert baselines.why_missing("torchvision") == "no_such_package is not installed"


def test_a_provider_that_is_broken(monkeypatch, tmp_path):
    (tmp_path / "broken_package.py").write_text("raise RuntimeError('built for another torch')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(baselines._NEEDS, "DALI", ("broken_package", False))
    expected = "broken_package cannot be imported: RuntimeError: built for another torch"
    assert baselines.why_missing("DALI") == expected


def test_a_provider_that_needs_a_gpu(monkeypatch):
    monkeypatch.setattr(baselines, "DEVICE", torch.device("cpu"))
    assert baselines.why_missing("CV-CUDA") == "cvcuda needs a GPU"
