"""Inference at its fastest: compiled blocks, CUDA graphs, no waiting."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from monkey_kernels import extract_crops, keep_alive, use_backend
from monkey_model.encoder.cuda_graph import check_recorded
from monkey_model.encoder.parameter_cache import held_values
from tests.helpers.golden import assert_tokens_match, load_golden
from tests.helpers.launches import WAITING
from tests.helpers.numerics import relative_l2
from tests.helpers.tiny import tiny_encoder

INDEX = [0, 1, 2, 3, None]


# ---- compiled -----------------------------------------------------------------------------------


@pytest.fixture
def graphs():
    """How many graphs torch.compile has made since."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    yield lambda: counters["stats"]["unique_graphs"]
    torch._dynamo.reset()


def test_whole_encoder_compiles_without_graph_breaks():
    """Adapters of a mixed batch, forward and backward."""
    encoder, crops = tiny_encoder().double(), torch.randn(5, 3, 28, 28).double()
    out_grad = torch.randn(5, 4, 128).double()
    compiled = torch.compile(encoder, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(crops, INDEX), encoder(crops, INDEX))
    trained = [p for p in encoder.parameters() if p.requires_grad]
    expected = torch.autograd.grad(encoder(crops, INDEX), trained, out_grad)
    got = torch.autograd.grad(compiled(crops, INDEX), trained, out_grad)
    for g, e in zip(got, expected, strict=True):
        assert relative_l2(g, e) < 1e-9


def test_one_compiled_block_serves_all_layers_and_batch_sizes(graphs):
    encoder = tiny_encoder(layers=6)
    encoder.compile(backend="aot_eager")
    with torch.no_grad():
        for batch in (1, 2):
            encoder.encode_crops(torch.randn(5 * batch, 3, 28, 28), crop_chunk=5 * batch)
        made = graphs()
        assert made <= 2
        for batch in (3, 7, 4):
            encoder.encode_crops(torch.randn(5 * batch, 3, 28, 28), crop_chunk=5 * batch)
        assert graphs() == made
        # Crops one at a time: a graph for those with an adapter, whichever it is, and one without.
        encoder.encode_crops(torch.randn(5, 3, 28, 28), crop_chunk=1)
        assert graphs() <= made + 2


def test_compiled_gradients():
    """Recomputed activations and dropout-free adapters, block by block."""
    encoder, crops = tiny_encoder().double(), torch.randn(5, 3, 28, 28).double()
    out_grad = torch.randn(5, 4, 128).double()
    trained = [p for p in encoder.parameters() if p.requires_grad]
    expected = torch.autograd.grad(encoder(crops, INDEX), trained, out_grad)
    encoder.compile(backend="aot_eager")
    got = torch.autograd.grad(encoder(crops, INDEX), trained, out_grad)
    for g, e in zip(got, expected, strict=True):
        assert relative_l2(g, e) < 1e-9


@pytest.mark.slow
def test_golden_compiled():
    """Through inductor, as users compile."""
    golden = load_golden()
    encoder = golden.encoder()
    encoder.compile()
    with torch.no_grad():
        assert_tokens_match(encoder.encode_images(golden.images), golden)


# ---- CUDA graphs and host synchronisation -------------------------------------------------------


@pytest.mark.gpu
def test_cuda_graph_replays_the_encoder():
    encoder = tiny_encoder().to("cuda", torch.float16)
    crops = torch.randn(2, 10, 3, 28, 28, device="cuda", dtype=torch.float16)
    for compiled in (False, True):
        if compiled:
            encoder.compile()
        graphed = encoder.cuda_graph(2)
        with torch.no_grad():
            for batch in crops:
                torch.testing.assert_close(graphed(batch), encoder.encode_crops(batch))
    with pytest.raises(ValueError, match=r"crops must be \[10, 3, 28, 28\], as recorded; got \[5"):
        graphed(crops[0, :5])
    with pytest.raises(ValueError, match="encoder must be in eval mode; got training mode"):
        encoder.train().cuda_graph(2)


@pytest.mark.gpu
def test_cuda_graph_replays_photos():
    """From pixels; the tables of the sizes outlive the calls that would push them out."""
    encoder = tiny_encoder().to("cuda", torch.float16)
    sizes = [(40, 50), (300, 200)]
    with torch.inference_mode():
        graphed = encoder.cuda_graph(sizes)
    prepared().clear()
    for seed in range(3):
        torch.manual_seed(seed)
        photos = [torch.randint(0, 256, (*size, 3), dtype=torch.uint8) for size in sizes]
        with torch.no_grad():
            expected = encoder.encode_images([photo.cuda() for photo in photos])
        torch.testing.assert_close(graphed(photos), expected)
    with pytest.raises(ValueError, match=r"images\[1\] must be \[300, 200, 3\], as recorded; got"):
        graphed([photos[0], photos[0]])


def prepared():
    from monkey_kernels.crops import launch

    return launch.prepared


def test_a_graph_keeps_the_tables_of_the_crops(monkeypatch):
    """All tables that are read inside, though the op forgets them."""
    pytest.importorskip("triton")
    images = [torch.randint(0, 256, (6, 5, 3), dtype=torch.uint8) for _ in range(2)]
    with use_backend("triton"):
        with keep_alive() as tables:
            expected = extract_crops(images, crop_size=4)
            assert extract_crops(images[:1], crop_size=4).shape[0] == 5
        kept = list(tables)
        assert [len(table.images) for table in kept] == [2, 1]
        extract_crops(images, crop_size=4)  # outside: nobody keeps it
        assert tables == kept
    prepared().clear()
    torch.testing.assert_close(extract_crops(images, crop_size=4), expected)


def test_cuda_graph_needs_a_gpu():
    for images in (1, [(40, 50), (30, 20)]):
        with pytest.raises(ValueError, match="encoder must be on a CUDA or ROCm device; got cpu"):
            tiny_encoder().cuda_graph(images)


@pytest.mark.parametrize(
    "images, error, message",
    [
        (0, ValueError, "images must be positive; got 0"),
        ("two", TypeError, "images must be a number, or a pair .* for each; got 'two'"),
        ([], TypeError, r"images must be a number, or a pair .* for each; got \[\]"),
        ([40, 50], TypeError, "images must be a number, or a pair .* for each; got 40"),
        ([(40, 50), (0, 3)], ValueError, r"height of images\[1\] must be positive; got 0"),
        ([(40, 5.0)], TypeError, r"width of images\[0\] must be an int; got float"),
    ],
)
def test_bad_images_of_a_cuda_graph(images, error, message):
    with pytest.raises(error, match=message):
        tiny_encoder().cuda_graph(images)


PHOTO = torch.zeros(4, 5, 3, dtype=torch.uint8)


@pytest.mark.parametrize(
    "tensors, error, message",
    [
        ([PHOTO], ValueError, "images must be 2, as recorded; got 1"),
        ([PHOTO, PHOTO[:3]], ValueError, r"images\[1\] must be \[4, 5, 3\], as recorded; got \[3,"),
        (
            [PHOTO.float(), PHOTO],
            TypeError,
            r"images\[0\] must be of torch.uint8, as recorded; got",
        ),
        ([PHOTO, "photo.jpg"], TypeError, r"images\[1\] must be a tensor; got str"),
    ],
)
def test_what_a_graph_did_not_record(tensors, error, message):
    check_recorded("images", [PHOTO, PHOTO], [PHOTO, PHOTO])
    with pytest.raises(error, match=message):
        check_recorded("images", tensors, [PHOTO, PHOTO])


def test_values_that_a_graph_keeps_alive():
    """A fold, position tables and stacked adapters, which a call with gradients forgets."""
    encoder, crops = tiny_encoder(image_size=112, crop_size=56), torch.randn(5, 3, 56, 56)
    with torch.no_grad():
        encoder(crops, INDEX)
    kinds = [type(held[1]) for held in held_values(encoder) if held is not None]
    banks = ["tuple"] * 3 * len(encoder.transformer.resblocks)
    assert sorted(kind.__name__ for kind in kinds) == ["FoldedResampler", "Tensor", *banks]
    encoder(crops, INDEX)
    assert all(held is None or isinstance(held[1], torch.Tensor) for held in held_values(encoder))


@pytest.mark.gpu
@pytest.mark.parametrize("training", [False, True])
def test_forward_never_waits_for_the_gpu(training):
    encoder = tiny_encoder().to("cuda").train(training)
    crops = torch.randn(10, 3, 28, 28, device="cuda")
    with torch.set_grad_enabled(training):
        encoder.encode_crops(crops)  # the first call compiles kernels and builds the fold
        torch.cuda.set_sync_debug_mode("error")
        try:
            tokens = encoder.encode_crops(crops)
            if training:
                tokens.backward(torch.ones_like(tokens))
        finally:
            torch.cuda.set_sync_debug_mode("default")


class NoValuesOnTheHost(TorchDispatchMode):
    """Raises at an operation that hands values of a tensor to Python: a wait, on a GPU."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in WAITING:
            raise AssertionError(f"{func} waits for its tensor")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("training", [False, True])
def test_forward_reads_no_values(training):
    """The same without a GPU: no .item(), no comparison, no shape that depends on values."""
    encoder, crops = tiny_encoder().train(training), torch.randn(10, 3, 28, 28)
    with torch.set_grad_enabled(training), NoValuesOnTheHost():
        tokens = encoder.encode_crops(crops, crop_chunk=10)
        if training:
            tokens.backward(torch.ones_like(tokens))
    with NoValuesOnTheHost(), pytest.raises(AssertionError, match="waits for its tensor"):
        tokens.sum().item()
    with NoValuesOnTheHost(), pytest.raises(AssertionError, match="waits for its tensor"):
        torch.equal(crops, crops)


# ---- position tables ----------------------------------------------------------------------------


def resized_tables(monkeypatch) -> list[int]:
    import monkey_model.encoder.positions as positions

    calls: list[int] = []
    resize = positions.F.interpolate

    def counted(*args, **kwargs):
        calls.append(1)
        return resize(*args, **kwargs)

    monkeypatch.setattr(positions.F, "interpolate", counted)
    return calls


def test_position_tables_are_resized_once(monkeypatch):
    """While frozen, in training too; again after a change; every time while it trains."""
    calls = resized_tables(monkeypatch)
    encoder = tiny_encoder(image_size=112, crop_size=56, layers=1).requires_grad_(False)
    crops = torch.randn(5, 3, 56, 56)
    for training in (True, False):
        encoder.train(training)
        encoder.attn_pool.query.requires_grad_(training)
        tokens = [encoder(crops, INDEX) for _ in range(3)]
        assert len(calls) == 2  # the ViT's and the resampler's
    assert torch.equal(tokens[0], tokens[2])
    encoder.positional_embedding += 1
    changed = encoder(crops, INDEX)
    assert len(calls) == 3 and not torch.allclose(changed, tokens[0])
    with torch.inference_mode():
        torch.testing.assert_close(encoder(crops, INDEX), changed)
    encoder.positional_embedding.requires_grad_(True)
    before = len(calls)
    for _ in range(2):
        encoder(crops, INDEX).sum().backward()
    assert len(calls) == before + 2
    assert encoder.positional_embedding.grad.abs().sum() > 0
