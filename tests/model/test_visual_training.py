"""Training through the encoder: gradients, what is kept for backward, half precision."""

from __future__ import annotations

import itertools
import re
import weakref

import pytest
import torch

from benchmarks import baselines
from benchmarks.memory import saved_for_backward, total_bytes
from benchmarks.workloads import real_blocks
from monkey_model.encoder.vit import CHECKPOINT_EVERY, VisualAttentionBlock
from monkey_model.visual import VisionTransformer
from tests.helpers.golden import load_golden
from tests.helpers.numerics import check_error, relative_l2
from tests.helpers.tiny import tiny_encoder

INDEX = [0, 1, 2, 3, None]


def train_as_in_the_recipe(encoder: VisionTransformer) -> dict[str, torch.nn.Parameter]:
    """Adapters and resampler train, the rest is frozen; returns what trains."""
    for name, parameter in encoder.named_parameters():
        parameter.requires_grad_("lora" in name or name.startswith("attn_pool."))
    encoder.attn_pool.pos_embed.requires_grad_(False)
    return {name: p for name, p in encoder.named_parameters() if p.requires_grad}


def gradients(tokens, parameters, out_grad):
    grads = torch.autograd.grad(tokens, list(parameters.values()), out_grad)
    return dict(zip(parameters, grads, strict=True))


# ---- gradients --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def golden_gradients():
    """The golden model in float64 and the gradients of upstream's sequential form."""
    golden = load_golden()
    encoder = golden.encoder()
    crops = encoder.extract_crops(golden.images[:1]).double()
    encoder = encoder.double()
    parameters = train_as_in_the_recipe(encoder)
    tokens = baselines.upstream_tokens(encoder, crops)
    out_grad = torch.randn(tokens.shape, generator=torch.Generator().manual_seed(0)).double()
    return encoder, crops, out_grad, gradients(tokens, parameters, out_grad)


@pytest.mark.parametrize("crop_chunk", [1, 3, 5])
@pytest.mark.parametrize("keep", ["recompute", "everything", "checkpoints"])
def test_gradients_are_upstreams(golden_gradients, crop_chunk, keep):
    """Of every adapter and resampler parameter, however the crops are batched and kept."""
    encoder, crops, out_grad, expected = golden_gradients
    encoder.recompute(keep != "everything")
    encoder.train(keep == "checkpoints")
    for module in encoder.modules():
        if isinstance(module, torch.nn.Dropout):
            module.eval()
    if keep == "checkpoints":
        encoder.gradient_checkpointing_enable()
    try:
        tokens = encoder.encode_crops(crops, crop_chunk=crop_chunk)
        got = gradients(tokens.view_as(out_grad), train_as_in_the_recipe(encoder), out_grad)
    finally:
        encoder.eval().recompute().gradient_checkpointing_disable()
    assert got.keys() == expected.keys() and len(got) == 2 * 3 * 4 * 3 + 10
    for name, value in expected.items():
        assert value.abs().max() > 0, name
        error = (got[name] - value).norm() / value.norm()
        assert error <= 1e-9, f"{name}: {error:.1e}"


def test_adapter_gradients_of_a_mixed_batch():
    """Each adapter gets the gradient of its own crops, of no other."""
    encoder = tiny_encoder().double()
    crops = torch.randn(6, 3, 28, 28, dtype=torch.float64)
    index, out_grad = [0, 2, None, 2, 1, 0], torch.randn(6, 4, 128, dtype=torch.float64)
    parameters = [p for p in encoder.parameters() if p.requires_grad]
    got = torch.autograd.grad(encoder(crops, index), parameters, out_grad, allow_unused=True)
    one_by_one = torch.cat([encoder(c[None], i) for c, i in zip(crops, index, strict=True)])
    expected = torch.autograd.grad(one_by_one, parameters, out_grad, allow_unused=True)
    for g, e in zip(got, expected, strict=True):
        e = torch.zeros_like(g) if e is None and g is not None else e  # adapter 3: unused
        torch.testing.assert_close(g, e, rtol=1e-9, atol=1e-12)


def test_an_adapter_that_no_crop_uses_gets_no_gradient():
    """Zeros would be a gradient: AdamW's weight decay would shrink it."""
    encoder = tiny_encoder().train()
    parameters = train_as_in_the_recipe(encoder)
    size = encoder.crop_settings.crop_size
    encoder(torch.randn(2, 3, size, size), 1).square().mean().backward()
    used = {name for name, p in parameters.items() if p.grad is not None and "lora" in name}
    assert used == {name for name in parameters if re.search(r"_lora\.1\.", name)} != set()


@pytest.mark.parametrize("index", [INDEX, [2] * 5])
def test_dropout_is_the_same_when_computed_again(index):
    encoder = tiny_encoder(layers=5).train()
    train_as_in_the_recipe(encoder)
    crops, out_grad = torch.randn(5, 3, 28, 28), torch.randn(5, 4, 128)
    trained = [p for p in encoder.parameters() if p.requires_grad]

    def run():
        torch.manual_seed(7)
        return torch.autograd.grad(encoder(crops, index), trained, out_grad, allow_unused=True)

    everything, *others = (
        encoder.recompute(False) and run(),
        encoder.recompute() and run(),
        encoder.gradient_checkpointing_enable() or run(),
    )
    assert sum(g is not None for g in everything) > len(trained) // 4
    for other in others:
        for got, want in zip(other, everything, strict=True):
            assert (got is None) == (want is None)
            assert got is None or torch.equal(got, want)
    with pytest.raises(ValueError, match="must not set use_reentrant=True"):
        encoder.gradient_checkpointing_enable({"use_reentrant": True})


# ---- what is kept for backward ------------------------------------------------------------------


def kept(module, run) -> int:
    return total_bytes(saved_for_backward(module, run))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_kept_at_real_width(dtype):
    """A quarter of upstream's form, and a fortieth with gradient checkpointing."""
    blocks = real_blocks(CHECKPOINT_EVERY, dtype).train()
    for name, parameter in blocks.named_parameters():
        parameter.requires_grad_("lora" in name)
    x = torch.randn(1024, 1, 1664, dtype=dtype, requires_grad=True)
    first = blocks.resblocks[0]
    upstream = kept(first, lambda: baselines.upstream_block(first, x, 0))
    ours = kept(first, lambda: first(x, idx=0))
    mixed = kept(first, lambda: first(x, idx=torch.tensor([[0.0, 1, 0, 0]])))
    blocks.gradient_checkpointing = True
    checkpointed = kept(blocks, lambda: blocks(x, idx=0)) / CHECKPOINT_EVERY
    width = 1024 * 1664 * dtype.itemsize
    assert ours == pytest.approx(7 * width, rel=0.01)  # x, ln_1, q, k, v, context, the middle
    assert mixed == pytest.approx(ours, rel=0.01)
    assert ours <= upstream / 4
    assert checkpointed == pytest.approx(width / CHECKPOINT_EVERY, rel=0.01)
    assert checkpointed <= upstream / 40


def test_hidden_layers_are_freed():
    """Not only unseen by autograd's hooks: the tensors are gone after the forward."""
    block = real_blocks(1, torch.float32).resblocks[0]
    alive = []
    block.mlp.gelu.register_forward_hook(lambda *args: alive.append(weakref.ref(args[-1])))
    out = block(torch.randn(32, 2, 1664, requires_grad=True), idx=1)
    assert alive[0]() is None
    block.recompute = False
    out_too = block(torch.randn(32, 2, 1664, requires_grad=True), idx=1)
    assert alive[1]() is not None
    assert out.requires_grad and out_too.requires_grad


@pytest.mark.parametrize("checkpointing", [False, True])
def test_frozen_vit_keeps_nothing(checkpointing):
    """With only the resampler training, the ViT saves nothing, however many blocks it has."""
    sizes = []
    for layers in (1, 4):
        encoder = tiny_encoder(layers=layers).train()
        for name, parameter in encoder.named_parameters():
            parameter.requires_grad_(name.startswith("attn_pool.") and "pos_embed" not in name)
        if checkpointing:
            encoder.gradient_checkpointing_enable()
        crops = torch.randn(5, 3, 28, 28)
        sizes.append(kept(encoder, lambda e=encoder, c=crops: e(c, INDEX)))
    assert sizes[0] == sizes[1]


def test_blocks_below_the_first_trainable_parameter_keep_nothing():
    def bytes_kept(first_trained: int) -> int:
        encoder = tiny_encoder(layers=4).train().requires_grad_(False)
        for block in encoder.transformer.resblocks[first_trained:]:
            block.attn.in_proj_lora.requires_grad_(True)
        return kept(encoder, lambda: encoder(torch.randn(5, 3, 28, 28), INDEX))

    sizes = [bytes_kept(first) for first in range(4)]
    steps = {a - b for a, b in itertools.pairwise(sizes)}
    assert len(steps) == 1 and steps.pop() > 0


def test_without_adapters_a_frozen_projection_keeps_no_input():
    blocks = [real_blocks(1, torch.float32, adapters).resblocks[0] for adapters in (4, 0)]
    x, sizes = torch.randn(16, 1, 1664, requires_grad=True), []
    for block in blocks:
        block.requires_grad_(False)
        sizes.append(kept(block, lambda b=block: b(x, idx=0)))
    assert sizes[0] - sizes[1] == 16 * 1664 * 4  # the output of ln_1


# ---- half precision -----------------------------------------------------------------------------


def tokens_and_gradients(encoder, crops, forward) -> dict[str, torch.Tensor]:
    """By name; the gradients of all blocks and adapters end to end, since one number's error
    (``lora_scale``) says nothing.
    """
    parameters = train_as_in_the_recipe(encoder)
    tokens = forward(encoder, crops)
    generator = torch.Generator().manual_seed(1)
    out_grad = torch.randn(tokens.shape, generator=generator).to(tokens.dtype)
    kinds: dict[str, list[torch.Tensor]] = {"tokens": [tokens.detach().flatten()]}
    for name, gradient in gradients(tokens, parameters, out_grad).items():
        kinds.setdefault(re.sub(r"\.\d+", "", name), []).append(gradient.flatten())
    return {kind: torch.cat(values) for kind, values in kinds.items()}


def ours_form(encoder, crops):
    return encoder.encode_crops(crops).view(1, -1, encoder.output_dim)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_error_of_every_tensor(dtype):
    """The error rule for tokens and gradients of the golden model; -s prints the table."""
    golden = load_golden()
    crops = golden.encoder().extract_crops(golden.images[:1])
    runs = []
    for cast_to, forward in (
        (dtype, ours_form),
        (dtype, baselines.upstream_tokens),
        (torch.float64, baselines.upstream_tokens),
    ):
        # The exact result is that of the rounded parameters and crops.
        encoder = golden.encoder().to(dtype).to(cast_to)
        runs.append(tokens_and_gradients(encoder, crops.to(dtype).to(cast_to), forward))
    # A bank has eight scales, whose errors are eight draws: too few to compare. All banks' are
    # enough, each over the power of two of its size, which rounds nothing.
    for bank in [name for name in runs[-1] if name.endswith("lora_scale")]:
        size = 2.0 ** runs[-1][bank].square().mean().sqrt().log2().round().item()
        for run in runs:
            scales = run.setdefault("all banks' lora_scale", run[bank][:0])
            run["all banks' lora_scale"] = torch.cat([scales, run.pop(bank) / size])
    ours, plain, exact = runs
    assert len(exact["all banks' lora_scale"]) == 24
    for name in plain:
        check_error(name, ours[name], plain[name], exact[name])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("index", [INDEX, [1] * 5])
def test_large_activations_stay_finite(dtype, index):
    """A residual stream beyond a third of float16's largest value, forward and backward."""
    encoder = tiny_encoder().to(dtype).train()
    largest = []
    encoder.attn_pool.register_forward_pre_hook(lambda m, i: largest.append(i[0].abs().max()))
    with torch.no_grad():
        encoder.ln_pre.weight.fill_(1e4)
        for name, parameter in encoder.named_parameters():
            if "lora_b" in name:
                parameter.mul_(0.02)
    crops = torch.randn(5, 3, 28, 28)
    parameters = {n: p for n, p in train_as_in_the_recipe(encoder).items() if "lora" not in n}
    tokens = encoder(crops, index)
    assert torch.isfinite(tokens).all() and largest[0] > 2.2e4
    for name, grad in gradients(tokens, parameters, torch.randn_like(tokens)).items():
        assert torch.isfinite(grad).all(), name
    encoder.eval()
    with torch.no_grad():
        assert torch.isfinite(encoder(crops, index)).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    """Float32 parameters under autocast: about the error of a half-precision model."""
    encoder = tiny_encoder().train()
    crops, out_grad = torch.randn(5, 3, 28, 28), torch.randn(5, 4, 128)
    parameters = train_as_in_the_recipe(encoder)
    for module in encoder.modules():
        if isinstance(module, torch.nn.Dropout):
            module.eval()
    expected = encoder(crops, INDEX)
    want = gradients(expected, parameters, out_grad)
    with torch.autocast("cpu", dtype):
        tokens = encoder(crops, INDEX)
    got = gradients(tokens, parameters, out_grad.to(tokens.dtype))
    assert all(grad.dtype == torch.float32 for grad in got.values())
    limit = 10 * torch.finfo(dtype).eps
    assert relative_l2(tokens, expected) <= limit
    got, want = (torch.cat([g.flatten() for g in each.values()]) for each in (got, want))
    assert relative_l2(got, want) <= limit


def test_a_block_alone():
    """Upstream's block, as a module of its own, trains as the stack does."""
    block = VisualAttentionBlock(16, 2)
    x = torch.randn(5, 3, 16, requires_grad=True)
    block(x, idx=0).sum().backward()
    assert x.grad is not None and block.mlp_lora[0].lora_b.weight.grad is not None
