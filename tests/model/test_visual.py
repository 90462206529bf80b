"""The drop-in encoder against the outputs of upstream's own code, and its contracts."""

from __future__ import annotations

import itertools
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from monkey_kernels.crops import reference
from monkey_model.crop_settings import CropSettings
from monkey_model.encoder.crop_adapters import adapter_bank, select_adapters, with_adapters
from monkey_model.encoder.vit import embed_patches
from monkey_model.visual import (
    Lora_Adapter,
    Resampler,
    TransformerBlock,
    VisionTransformer,
    VisualAttention,
    VisualAttentionBlock,
    get_2d_sincos_pos_embed,
    get_abs_pos,
    reconstruct_matrix,
    sliding_window,
)
from tests.helpers.golden import assert_crops_match, assert_tokens_match, load_golden
from tests.helpers.numerics import check_error, nan_filled, relative_l2
from tests.helpers.tiny import VISUAL, tiny_encoder


@pytest.fixture(scope="module")
def golden():
    return load_golden()


@pytest.fixture(scope="module")
def encoder(golden):
    return golden.encoder()


@pytest.fixture(scope="module")
def crops(golden, encoder):
    return encoder.extract_crops(golden.images)


# ---- parity with upstream -------------------------------------------------------------------


def test_golden_crops(golden, crops):
    assert_crops_match(crops, golden)


def test_golden_crop_by_crop(golden, encoder, crops):
    """Upstream's own loop: encode, then forward(x, idx) for each crop position."""
    windows, images_448 = encoder.encode(golden.images)
    local = list(itertools.chain.from_iterable(windows))
    assert len(windows) == 2 and len(local) == 4
    with torch.no_grad():
        tokens = [encoder(window, idx=i) for i, window in enumerate(local)]
        tokens.append(encoder(images_448))
    assert_tokens_match(torch.cat(tokens, dim=1), golden)
    stacked = torch.stack([*local, images_448], dim=1).flatten(0, 1)
    assert torch.equal(stacked, crops)


@pytest.mark.parametrize("crop_chunk", [None, 1, 3, 5, 10, 99])
def test_golden_batched(golden, encoder, crop_chunk):
    with torch.no_grad():
        tokens = encoder.encode_images(golden.images, crop_chunk=crop_chunk)
    assert tokens.shape == (2, 1280, 256)
    assert_tokens_match(tokens, golden)


def test_golden_state_dict_is_upstreams(golden, encoder):
    state = encoder.state_dict()
    assert {k: v.shape for k, v in state.items()} == {k: v.shape for k, v in golden.state.items()}
    # The position table is deterministic: ours is upstream's to the bit.
    table = VisionTransformer(**golden.config).attn_pool.pos_embed
    assert torch.equal(table, golden.state["attn_pool.pos_embed"])


@pytest.mark.parametrize("crop_chunk", [1, 10])
def test_planted_swapped_crops_are_caught(golden, encoder, crops, crop_chunk):
    swapped = crops.unflatten(0, (2, 5))[:, [1, 0, 2, 3, 4]].flatten(0, 1)
    with pytest.raises(AssertionError):
        assert_crops_match(swapped, golden)
    with torch.no_grad(), pytest.raises(AssertionError):
        tokens = encoder.encode_crops(swapped, crop_chunk=crop_chunk)
        assert_tokens_match(tokens.view(2, 1280, 256), golden)


@pytest.mark.parametrize("crop_chunk", [1, 10])
@pytest.mark.parametrize("index", [[0, 1, None, 3, None], [0, 1, 2, 2, None], [0, 1, 2, 3, 0]])
def test_planted_wrong_adapters_are_caught(golden, encoder, index, crop_chunk):
    with torch.no_grad(), pytest.raises(AssertionError):
        tokens = encoder.encode_images(golden.images, adapter_index=index, crop_chunk=crop_chunk)
        assert_tokens_match(tokens, golden)


def test_planted_half_pixel_shift_is_caught(golden, encoder, monkeypatch):
    def shifted(image, size, interpolation, *, exact=True):
        doubled = right(image, (2 * size[0], 2 * size[1]), interpolation, exact=exact)
        return doubled[1::2, 1::2]

    right = reference.resize_uint8
    monkeypatch.setattr(reference, "resize_uint8", shifted)
    with pytest.raises(AssertionError):
        assert_crops_match(encoder.extract_crops(golden.images), golden)


# ---- adapters ---------------------------------------------------------------------------------


def test_adapters_of_a_mixed_batch():
    encoder = tiny_encoder()
    crops = torch.randn(7, 3, 28, 28)
    index = [2, None, 0, 0, 3, None, 1]
    with torch.no_grad():
        together = encoder(crops, index)
        for crop, adapter, tokens in zip(crops, index, together, strict=True):
            torch.testing.assert_close(tokens, encoder(crop[None], adapter)[0])
        assert not torch.allclose(encoder(crops[:1], 0), encoder(crops[:1], 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("selection", [1, "runs", "rows"])
def test_error_of_adapters_written_into_the_output(dtype, selection):
    """Without gradients; the error rule against base(x) + adapter(x), under autocast too."""
    torch.manual_seed(0)
    base, bank = torch.nn.Linear(64, 96), adapter_bank(3, 64, 96)
    for adapter in bank:
        torch.nn.init.normal_(adapter.lora_b.weight, std=0.1)
        adapter.lora_scale.data.fill_(0.7)
    x = torch.randn(4, 50, 64)
    rows = [selection] * 4 if selection == 1 else [0, 1, None, 2]

    def plain(x: torch.Tensor) -> torch.Tensor:
        out = base(x)
        return torch.stack([
            o if i is None else o + bank[i](row)
            for o, i, row in zip(out, rows, x, strict=True)
        ])  # fmt: skip

    chosen = select_adapters(rows, 3, x.device, one_hot=selection == "rows")
    for module in (base, bank):
        module.to(dtype).requires_grad_(False)
    with torch.no_grad(), nan_filled():
        ours, simple = with_adapters(base, x.to(dtype), bank, chosen), plain(x.to(dtype))
        base.double(), bank.double()
        exact = plain(x.to(dtype).double())
        check_error("adapters", ours, simple, exact)
        if dtype != torch.float32:
            base.float(), bank.float()
            x = x.to(dtype).float()
            with torch.autocast("cpu", dtype):
                ours, simple = with_adapters(base, x, bank, chosen), plain(x)
            check_error("autocast", ours, simple.to(dtype), exact)


def test_changed_adapters_are_stacked_again():
    """After a step, a load and a cast, and after a call with gradients whatever came then."""
    encoder, other = tiny_encoder(), tiny_encoder(seed=1)
    crops, index = torch.randn(5, 3, 28, 28), [0, 1, 2, 3, None]

    def check() -> None:
        fresh = tiny_encoder().to(encoder.proj.dtype)
        fresh.load_state_dict(encoder.state_dict())
        with torch.no_grad():
            torch.testing.assert_close(encoder(crops, index), fresh(crops, index))

    check()
    scale = encoder.transformer.resblocks[0].attn.in_proj_lora[1].lora_scale
    with torch.no_grad():
        scale.mul_(3)
    check()
    encoder.load_state_dict(other.state_dict())
    check()
    encoder.double()
    check()
    encoder(crops.double(), index).sum().backward()
    scale.data.mul_(3)  # no version counts it
    check()


def test_a_hook_on_a_projection_sees_its_own_output():
    """What a forward hook holds on to is not written over by the adapters."""
    encoder = tiny_encoder()
    crops, index, seen = torch.randn(5, 3, 28, 28), [0, 1, 2, 3, None], []
    attention = encoder.transformer.resblocks[0].attn
    with torch.no_grad():
        expected = encoder(crops, index)
        handle = attention.in_proj.register_forward_hook(lambda m, i, o: seen.append((i[0], o)))
        torch.testing.assert_close(encoder(crops, index), expected)
        handle.remove()
        (x, out), *_ = seen
        assert torch.equal(out, attention.in_proj(x))


def test_wrapped_adapters_run_as_modules():
    """An adapter whose layers are not plain nn.Linear (quantised, wrapped) gives the same."""

    class Wrapped(torch.nn.Linear):
        pass

    encoder = tiny_encoder()
    crops, index = torch.randn(5, 3, 28, 28), [0, 1, 2, 3, None]
    with torch.no_grad():
        expected = encoder(crops, index)
        for module in encoder.modules():
            if isinstance(module, Lora_Adapter):
                module.lora_a.__class__ = Wrapped
        torch.testing.assert_close(encoder(crops, index), expected)


def test_adapter_dropout():
    adapter = Lora_Adapter(64, 8, dropout=0.5)
    torch.nn.init.normal_(adapter.lora_b.weight)
    x = torch.randn(10, 64)
    assert not torch.equal(adapter(x), adapter(x))
    adapter.eval()
    torch.testing.assert_close(adapter(x), x @ adapter.lora_a.weight.T @ adapter.lora_b.weight.T)
    encoder = tiny_encoder().train()
    crops = torch.randn(5, 3, 28, 28)
    index = [0, 1, 2, 3, None]
    first, second = encoder(crops, index), encoder(crops, index)
    assert not torch.equal(first[:4], second[:4])
    torch.testing.assert_close(first[4], second[4])  # the global crop has no adapter


def test_kinds_of_adapter_index():
    encoder, crops = tiny_encoder(), torch.randn(3, 3, 28, 28)
    with torch.no_grad():
        expected = encoder(crops, [0, 1, 2])
        for index in (range(3), (0, 1, 2), list(np.arange(3))):
            assert torch.equal(encoder(crops, index), expected)
        assert encoder(crops[:0]).shape == (0, 4, 128)


def test_without_adapters():
    encoder = tiny_encoder(lora_repeat_num=0)
    assert not any("lora" in name for name in encoder.state_dict())
    images = [torch.randint(0, 256, (30, 40, 3), dtype=torch.uint8)]
    assert encoder.encode_images(images).shape == (1, 20, 128)


def test_more_crops_than_adapters():
    encoder = tiny_encoder(grid=(2, 3))
    images = [torch.randint(0, 256, (30, 40, 3), dtype=torch.uint8)]
    with pytest.raises(ValueError, match=r"grid \(2, 3\) has 6 local crops but there are 4 adapt"):
        encoder.encode_images(images)
    index = [0, 1, 2, 3, None, 0, None]
    assert encoder.encode_images(images, adapter_index=index).shape == (1, 28, 128)


# ---- inputs -----------------------------------------------------------------------------------


def test_mixed_sources_in_one_list(tmp_path):
    encoder = tiny_encoder()
    pixels = torch.randint(0, 256, (40, 50, 3), dtype=torch.uint8)
    picture = Image.fromarray(pixels.numpy())
    path = tmp_path / "picture.png"
    picture.save(path)
    sources = [str(path), path, picture, path.read_bytes(), pixels.numpy(), pixels]
    with torch.no_grad():
        tokens = encoder.encode_images(sources)
        for row in tokens[1:]:
            torch.testing.assert_close(row, tokens[0])
        # A float image takes the float path: the same picture, not rounded to levels.
        float_image = (pixels / 255).permute(2, 0, 1)
        mixed = encoder.encode_images([pixels, float_image])
    torch.testing.assert_close(mixed[0], tokens[0])
    assert relative_l2(mixed[1], tokens[0]) < 0.05


def test_fast_decode(tmp_path):
    y, x = np.mgrid[0:400, 0:600]
    values = np.stack([x % 256, y % 256, (x + y) % 256], -1)
    path = tmp_path / "large.jpg"
    Image.fromarray(values.astype(np.uint8)).save(path, quality=95)
    encoder = tiny_encoder()
    exact = encoder.extract_crops([path])
    fast = encoder.extract_crops([path], fast_decode=True)
    assert not torch.equal(exact, fast)
    assert (exact - fast).abs().mean() < 0.05


def test_settings_come_from_a_config_and_unknown_keys_are_ignored():
    config = {**VISUAL, "interpolation": "bilinear", "fit": "pad", "grid": [1, 2], "other": 7}
    encoder = VisionTransformer(**config)
    assert encoder.crop_settings == CropSettings((1, 2), 28, "bilinear", "pad", 4)
    assert encoder.image_size == (28, 56) and encoder.grid_size == (2, 4)
    default = VisionTransformer(**VISUAL)
    assert default.crop_settings == CropSettings((2, 2), 28, "bicubic", "stretch", 4)
    assert VisionTransformer(**{**VISUAL, "image_size": [28, 84]}).crop_settings.grid == (1, 3)


def test_patch_embedding_is_the_convolution():
    encoder, crops = tiny_encoder(), torch.randn(2, 3, 28, 28)
    expected = encoder.conv1(crops).flatten(2).transpose(1, 2)
    torch.testing.assert_close(embed_patches(encoder.conv1, crops), expected)

    class Wrapped(torch.nn.Conv2d):
        pass

    encoder.conv1.__class__ = Wrapped
    assert torch.equal(embed_patches(encoder.conv1, crops), expected)


def test_half_precision_runs():
    for dtype in (torch.float16, torch.bfloat16):
        encoder = tiny_encoder().to(dtype)
        with torch.no_grad():
            tokens = encoder.encode_images([torch.zeros(9, 9, 3, dtype=torch.uint8)])
        assert tokens.dtype == dtype and torch.isfinite(tokens).all()


def test_peak_memory_of_a_large_photo(tmp_path):
    """At most the decoded image plus four times the crops."""
    path = tmp_path / "photo.jpg"
    noise = np.random.default_rng(0).integers(0, 256, (375, 500, 3), dtype=np.uint8)
    Image.fromarray(noise).resize((4000, 3000)).save(path)
    program = (
        "import resource, sys\n"
        "from monkey_model.visual import VisionTransformer\n"
        f"encoder = VisionTransformer(**{dict(VISUAL, image_size=896, crop_size=448)!r})\n"
        "def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024\n"
        "import io; from PIL import Image\n"
        "small = io.BytesIO(); Image.new('RGB', (2500, 2300)).save(small, 'JPEG')\n"
        "encoder.extract_crops([Image.new('RGB', (9, 9))]); before = peak()\n"
        "encoder.extract_crops([sys.argv[1]]); print(peak() - before)\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", program, path], check=True, capture_output=True, text=True
    )
    decoded, crops = 3 * 4000 * 3000, 5 * 3 * 448 * 448 * 4
    assert int(run.stdout) <= decoded + 4 * crops, f"{int(run.stdout) / 2**20:.0f} MiB"


def test_cpu_gemms_stay_on_onednn():
    """A bfloat16 linear on a permuted input makes torch switch oneDNN off for the process."""
    encoder = tiny_encoder().bfloat16()
    with torch.no_grad():
        encoder.encode_images([torch.zeros(9, 9, 3, dtype=torch.uint8)] * 2, crop_chunk=10)
    assert torch._C._get_mkldnn_enabled()


# ---- upstream's parts, by name ----------------------------------------------------------------


def test_windows():
    matrix = torch.randn(2, 3, 8, 12)
    windows = sliding_window(matrix, window_size=(4, 4), stride=4)
    assert len(windows) == 2 and len(windows[0]) == 3
    assert torch.equal(windows[1][2], matrix[:, :, 4:8, 8:12])
    assert torch.equal(reconstruct_matrix(windows), matrix)
    assert len(sliding_window(matrix, window_size=(4, 4), stride=2)[0]) == 5


def test_get_abs_pos():
    table = torch.randn(16, 6)
    assert get_abs_pos(table, 16) is table
    resized = get_abs_pos(table.half(), 64)
    assert resized.shape == (64, 6) and resized.dtype == torch.float16
    constant = torch.full((16, 6), 2.5)
    torch.testing.assert_close(get_abs_pos(constant, 64), torch.full((64, 6), 2.5))


def test_sincos_positions():
    table = get_2d_sincos_pos_embed(8, 3)
    assert isinstance(table, np.ndarray) and table.shape == (9, 8)
    row, column = 2, 1
    angle = np.array([1.0, 0.01])
    expected = [f(p * angle) for p in (column, row) for f in (np.sin, np.cos)]
    np.testing.assert_allclose(table[row * 3 + column], np.concatenate(expected), atol=1e-6)
    with_token = get_2d_sincos_pos_embed(8, 3, cls_token=True)
    assert not with_token[0].any() and np.array_equal(with_token[1:], table)


def test_attention_mask():
    """[N, N], [1, N, N] and [crops * heads, N, N] masks, against bmm as upstream adds them."""
    attention = VisualAttention(16, 2).eval()
    x = torch.randn(5, 3, 16)
    for mask in (torch.randn(5, 5), torch.randn(1, 5, 5), torch.randn(6, 5, 5)):
        packed = attention.in_proj(x).view(5, 3, 2, 24)
        q, k, v = (p.reshape(5, 6, 8).transpose(0, 1) for p in packed.split(8, dim=-1))
        scores = torch.baddbmm(mask, q / 8**0.5, k.transpose(1, 2)).softmax(-1)
        context = torch.bmm(scores, v).view(3, 2, 5, 8).permute(2, 0, 1, 3).reshape(5, 3, 16)
        expected = attention.out_proj(context)
        torch.testing.assert_close(attention(x, x, x, attn_mask=mask), expected)
    block = VisualAttentionBlock(16, 2)
    x = torch.randn(5, 3, 16)
    causal = torch.full((5, 5), float("-inf")).triu(1)
    changed = x.clone()
    changed[-1] += 1
    torch.testing.assert_close(
        block(x, attn_mask=causal)[:-1], block(changed, attn_mask=causal)[:-1]
    )


def test_resampler_mask_is_multihead_attentions():
    resampler = Resampler(2, 16, 2, kv_dim=8)
    tokens, mask = torch.randn(3, 9, 8), torch.zeros(4, 9)
    torch.testing.assert_close(resampler(tokens, attn_mask=mask), resampler(tokens))
    mask[:, 5:] = float("-inf")
    changed = tokens.clone()
    changed[:, 5:] += 1
    torch.testing.assert_close(
        resampler(tokens, attn_mask=mask), resampler(changed, attn_mask=mask)
    )


def test_cast_dtype_is_not_a_quantised_weights():
    blocks = TransformerBlock(16, 1, 2)
    blocks.resblocks[0].mlp.c_fc.weight = torch.nn.Parameter(
        torch.zeros(8, dtype=torch.uint8), requires_grad=False
    )
    assert blocks.get_cast_dtype() == torch.float32
    assert blocks.get_cast_device() == torch.device("cpu")


# ---- bad input --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"heads": 3}, ValueError, "heads must divide width; got heads 3 and width 16"),
        ({"heads": "2"}, TypeError, "heads must be an int; got str"),
        ({"layers": True}, TypeError, "layers must be an int; got bool"),
        ({"lora_repeat_num": -1}, ValueError, "lora_repeat_num must be at least 0; got -1"),
        ({"mlp_ratio": "2"}, TypeError, "mlp_ratio must be a number; got str"),
        ({"mlp_ratio": float("inf")}, ValueError, "mlp_ratio must give .*; got inf"),
        ({"mlp_ratio": -1.0}, ValueError, "mlp_ratio must give .*; got -1"),
        ({"image_size": "56"}, TypeError, "image_size must be an int; got str"),
        ({"image_size": [56]}, ValueError, r"a side or \(height, width\); got \[56\]"),
        ({"n_queries": -4}, ValueError, "n_queries must be positive; got -4"),
        ({"crop_size": 8}, ValueError, "crop_size must be a multiple of patch_size, 14; got 8"),
        ({"image_size": 57}, ValueError, "image_size must be a multiple of crop_size, 28.*got 57"),
        ({"image_size": 0}, ValueError, "image_size must be positive; got 0"),
        ({"patch_size": 1.5}, TypeError, "patch_size must be an int; got float"),
        ({"grid": (0, 1)}, ValueError, "grid rows must be positive; got 0"),
        ({"n_queries": 5}, ValueError, "n_queries must be a square number; got 5"),
        ({"output_dim": 100}, ValueError, "output_dim must be a multiple of 128; got 100"),
        ({"interpolation": "area"}, ValueError, "interpolation must be one of .*got 'area'"),
        ({"fit": "cover"}, ValueError, "fit must be one of .*got 'cover'"),
    ],
)
def test_bad_constructor(settings, error, message):
    with pytest.raises(error, match=message):
        VisionTransformer(**{**VISUAL, **settings})


CROP = torch.zeros(1, 3, 28, 28)


@pytest.mark.parametrize(
    ("x", "idx", "error", "message"),
    [
        ([CROP], None, TypeError, r"x must be a tensor \[N, 3, H, W\]; got list"),
        (CROP[0], None, ValueError, r"x must have 4 dimensions .*got \[3, 28, 28\]"),
        (CROP[:, :2], None, ValueError, r"H = W a multiple of 14; got \[1, 2, 28, 28\]"),
        (CROP[..., :14], None, ValueError, r"H = W a multiple of 14; got \[1, 3, 28, 14\]"),
        (CROP[..., :15, :15], None, ValueError, r"H = W a multiple of 14"),
        (CROP, 4, ValueError, r"idx must name one of the 4 adapters \(0 to 3\); got 4"),
        (CROP, -1, ValueError, r"idx must name one of the 4 adapters \(0 to 3\); got -1"),
        (CROP, "0", TypeError, r"adapter numbers or None; got '0' \(str\)"),
        (CROP, [0, 1], ValueError, "an entry for each of 1 crops; got 2"),
        (CROP, [1.0], TypeError, r"adapter numbers or None; got 1.0 \(float\)"),
    ],
)
def test_bad_forward(x, idx, error, message):
    with pytest.raises(error, match=message):
        tiny_encoder()(x, idx)


def test_bad_encode():
    encoder = tiny_encoder()
    image = torch.zeros(9, 9, 3, dtype=torch.uint8)
    with pytest.raises(TypeError, match=r"images must be a list of images; got str"):
        encoder.encode_images("photo.jpg")
    with pytest.raises(TypeError, match=r"images must be a list of images; got Tensor"):
        encoder.encode_images(image)
    with pytest.raises(ValueError, match="at least one image; got an empty list"):
        encoder.encode_images([])
    with pytest.raises(ValueError, match="entry for each of 5 crops; got 2"):
        encoder.encode_images([image], adapter_index=[0, 1])
    with pytest.raises(ValueError, match=r"multiple of 5 crops .*got 4"):
        encoder.encode_crops(CROP.expand(4, -1, -1, -1))
    with pytest.raises(ValueError, match="crop_chunk must be positive; got 0"):
        encoder.encode_images([image], crop_chunk=0)
    with pytest.raises(ValueError, match="idx must be None: the encoder has no adapters; got 0"):
        tiny_encoder(lora_repeat_num=0)(CROP, 0)
    with pytest.raises(ValueError, match="allow_urls is False"):
        encoder.encode(["https://example.com/a.jpg"])


def test_bad_parts():
    x = torch.randn(5, 1, 16)
    with pytest.raises(ValueError, match="key and value must be the tensor query itself"):
        VisualAttention(16, 2)(x, x.clone(), x)
    with pytest.raises(ValueError, match=r"kdim must be embed_dim, 16 \(self-attention\); got 8"):
        VisualAttention(16, 2, kdim=8)
    with pytest.raises(ValueError, match="is_cross_attention must be False"):
        VisualAttentionBlock(16, 2, is_cross_attention=True)
    with pytest.raises(ValueError, match="num_heads must divide embed_dim"):
        Resampler(2, 16, 3)
    with pytest.raises(ValueError, match="abs_pos must have a square number of positions; got 5"):
        get_abs_pos(torch.zeros(5, 4), 16)
    with pytest.raises(ValueError, match="tgt_size must have a square number of positions; got 6"):
        get_abs_pos(torch.zeros(4, 4), 6)
    with pytest.raises(ValueError, match="embed_dim must be a positive multiple of 4; got 6"):
        get_2d_sincos_pos_embed(6, 2)
