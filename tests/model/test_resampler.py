"""The resampler, folded and not: accuracy against float64, when the fold is used, and compilers."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from benchmarks.memory import saved_for_backward, total_bytes
from monkey_model.encoder import folded_resampler as folded_module
from monkey_model.encoder import positions as positions_module
from monkey_model.encoder import resampler as resampler_module
from monkey_model.encoder.resampler import Resampler, get_abs_pos
from tests.helpers.golden import load_golden
from tests.helpers.numerics import check_error, relative_l2

SMALL = {"grid_size": 4, "embed_dim": 256, "num_heads": 2, "kv_dim": 96}
REAL = {"grid_size": 16, "embed_dim": 4096, "num_heads": 32, "kv_dim": 1664}
# As many channels to add up, an eighth of the width.
LONG_SUMS = {**REAL, "embed_dim": 512, "num_heads": 4}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def make_resampler(seed: int = 0, **settings) -> Resampler:
    """Random weights, so that no bias, LayerNorm or query is a no-op."""
    torch.manual_seed(seed)
    resampler = Resampler(**{**SMALL, **settings})
    with torch.no_grad():
        for name, parameter in resampler.named_parameters():
            if "ln_" in name and "weight" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
            elif "bias" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
            elif name == "query":
                parameter.mul_(10)
    return resampler.eval()


def plain_form(resampler: Resampler, x: Tensor) -> Tensor:
    """Upstream's form on torch's own modules, in the resampler's dtype."""
    tokens = resampler.ln_kv(resampler.kv_proj(x)).transpose(0, 1)
    query = (resampler.ln_q(resampler.query) + resampler.pos_embed)[:, None]
    keys = tokens + get_abs_pos(resampler.pos_embed, x.shape[1])[:, None]
    query = query.expand(-1, x.shape[0], -1)
    return resampler.attn(query, keys, tokens, need_weights=False)[0].transpose(0, 1)


def tokens_like(kind: str, shape: tuple[int, int, int]) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(shape, generator=generator)
    if kind == "norms over six orders":
        x *= torch.logspace(-3, 3, shape[1])[torch.randperm(shape[1], generator=generator), None]
    elif kind == "a zero token":
        x[:, 3] = 0
    elif kind == "large mean":
        x += 30
    elif kind == "a few huge channels":
        x[..., :3] += torch.tensor([300.0, -150.0, 90.0])
    return x


KINDS = ["normal", "norms over six orders", "a zero token", "large mean", "a few huge channels"]


@torch.no_grad()
def assert_accurate(name: str, resampler: Resampler, x: Tensor, dtype: torch.dtype) -> None:
    """Folded and unfolded: at most 1.1 times the float64 error of torch's form in the dtype."""
    resampler = copy.deepcopy(resampler).to(dtype)
    x = x.to(dtype)
    exact = plain_form(copy.deepcopy(resampler).double(), x.double())
    plain = relative_l2(plain_form(resampler, x), exact)
    for form in ("folded", "unfolded"):
        out = resampler.fold(form == "folded")(x)
        assert (resampler._folded._held is not None) == (form == "folded")
        assert out.dtype == dtype and torch.isfinite(out).all()
        error = relative_l2(out, exact)
        report = f"{name}, {dtype}, {form}: {error:.3e}, plain torch {plain:.3e}"
        print(report)
        assert error <= 1.1 * plain, report


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", [0, 1])
def test_accuracy_small(kind, dtype, seed):
    assert_accurate(kind, make_resampler(seed), tokens_like(kind, (2, 64, 96)), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_accuracy_tiny_layer_norm_weights(dtype):
    resampler = make_resampler()
    with torch.no_grad():
        resampler.ln_kv.weight.mul_(1e-3)
        resampler.ln_kv.weight[::7] = 0
    assert_accurate("LayerNorm near 0", resampler, tokens_like("normal", (2, 64, 96)), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["normal", "a few huge channels"])
@pytest.mark.parametrize("sizes", [LONG_SUMS, pytest.param(REAL, marks=pytest.mark.slow)])
def test_accuracy_of_long_sums(sizes, kind, dtype):
    """Most of all of what the tokens share, which nothing averages."""
    name = f"{sizes['kv_dim']} -> {sizes['embed_dim']}, {kind}"
    assert_accurate(name, make_resampler(**sizes), tokens_like(kind, (1, 256, 1664)), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_accuracy_golden_weights(dtype):
    resampler = load_golden().encoder().attn_pool
    for kind in KINDS:
        assert_accurate(f"golden, {kind}", resampler, tokens_like(kind, (2, 64, 32)), dtype)


def test_planted_wrong_fold_is_caught(monkeypatch):
    """Without the output's share of the mean: what attention averages would hide it."""

    def wrong(**parts):
        form = right(**parts)
        form.mean_weight.zero_()
        return form

    right = folded_module.fold_resampler
    monkeypatch.setattr(resampler_module, "fold_resampler", wrong)
    with pytest.raises(AssertionError):
        assert_accurate("", make_resampler(), tokens_like("normal", (2, 64, 96)), torch.bfloat16)


# ---- when the fold is used --------------------------------------------------------------------


@pytest.fixture
def builds(monkeypatch):
    """A list that grows with each build of the folded form."""
    made = []
    right = folded_module.fold_resampler

    def counting(**parts):
        made.append(1)
        return right(**parts)

    monkeypatch.setattr(resampler_module, "fold_resampler", counting)
    return made


def assert_same_up_to_rounding(out, expected):
    """Of float32: a fold that is stale, or another resampler's, is a thousand times further."""
    assert relative_l2(out, expected) < 1e-5


def assert_is_plain_form(resampler, x):
    with torch.no_grad():
        assert_same_up_to_rounding(resampler(x), plain_form(resampler, x))


def test_built_once_and_rebuilt_when_a_parameter_changes(builds):
    resampler, x = make_resampler(), torch.randn(2, 64, 96)
    for _ in range(3):
        assert_is_plain_form(resampler, x)
    assert len(builds) == 1
    for name, parameter in resampler.named_parameters():
        with torch.no_grad():
            parameter.add_(0.05 * torch.randn_like(parameter))
        before = len(builds)
        assert_is_plain_form(resampler, x)
        assert len(builds) == before + 1, name
    optimizer = torch.optim.SGD([p for p in resampler.parameters() if p.requires_grad], lr=0.1)
    resampler(x).square().mean().backward()
    optimizer.step()
    before = len(builds)
    assert_is_plain_form(resampler, x)
    assert len(builds) == before + 1
    assert_is_plain_form(resampler, torch.randn(2, 16, 96))  # another number of tokens
    assert len(builds) == before + 2


def test_rebuilt_after_a_fused_optimizer_step(builds):
    """It does not count the parameters' versions."""
    resampler, x = make_resampler(), torch.randn(2, 64, 96)
    assert_is_plain_form(resampler, x)
    trained = [p for p in resampler.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.05, fused=True)
    resampler(x).square().mean().backward()
    optimizer.step()
    assert_is_plain_form(resampler, x)
    assert len(builds) == 2


def test_rebuilt_after_cast_load_and_replacement(builds):
    resampler, x = make_resampler(), torch.randn(2, 64, 96)
    assert_is_plain_form(resampler, x)
    resampler.double()
    with torch.no_grad():
        exact = plain_form(resampler, x.double())
        torch.testing.assert_close(resampler(x.double()), exact, rtol=1e-6, atol=1e-6)
    resampler.float().load_state_dict(make_resampler(seed=5).state_dict())
    assert_is_plain_form(resampler, x)
    resampler.ln_kv.weight = nn.Parameter(torch.rand(256))
    assert_is_plain_form(resampler, x)
    assert len(builds) == 4


def test_training_drops_it(builds):
    resampler, x = make_resampler(), torch.randn(2, 64, 96)
    resampler(x)  # gradients are on: the module's own projections
    assert not builds
    assert_is_plain_form(resampler, x)
    assert resampler._folded._held is not None
    resampler.train()
    assert resampler._folded._held is None
    with torch.no_grad():
        resampler(x)
    assert len(builds) == 1
    resampler.eval().fold(False)
    assert_is_plain_form(resampler, x)
    assert len(builds) == 1
    resampler.fold()
    with torch.inference_mode():
        resampler(x)
    assert len(builds) == 2


def test_parameters_made_in_inference_mode_are_folded(builds):
    """Once, whichever mode the calls are in; torch refuses what would make the fold stale."""
    with torch.inference_mode():
        resampler = make_resampler()
    assert all(p.is_inference() for p in resampler.parameters())
    x = torch.randn(2, 64, 96)
    with torch.no_grad():
        expected = plain_form(make_resampler(), x)
    for mode in (torch.inference_mode, torch.no_grad, torch.inference_mode):
        with mode():
            assert_same_up_to_rounding(resampler(x), expected)
    assert len(builds) == 1
    for parameter in resampler.parameters():
        with torch.no_grad(), pytest.raises(RuntimeError, match="outside InferenceMode"):
            parameter.mul_(2)
    weight = resampler.ln_kv.weight
    resampler.ln_kv.weight = nn.Parameter(torch.rand(256))
    assert_is_plain_form(resampler, x)
    resampler.ln_kv.weight = weight
    assert_is_plain_form(resampler, x)
    assert len(builds) == 3


def test_a_change_in_inference_mode(builds):
    """To a parameter that was made there: fold() after it. Loading is seen."""
    with torch.inference_mode():
        resampler, x = make_resampler(), torch.randn(2, 64, 96)
        before = resampler(x)
        resampler.ln_kv.weight.mul_(2)
        assert torch.equal(resampler(x), before)
        resampler.fold()
        assert_is_plain_form(resampler, x)
        assert not torch.allclose(resampler(x), before)
        assert len(builds) == 2
        nn.ModuleDict({"attn_pool": resampler}).load_state_dict(
            {f"attn_pool.{name}": v for name, v in make_resampler(seed=5).state_dict().items()}
        )
        assert_is_plain_form(resampler, x)
        assert len(builds) == 3
    with torch.inference_mode():
        ordinary = torch.inference_mode(False)(make_resampler)()
        assert_is_plain_form(ordinary, x)
        ordinary.ln_kv.weight.mul_(2)  # an ordinary parameter counts its versions here too
        assert_is_plain_form(ordinary, x)
    assert len(builds) == 5


def test_positions_made_in_inference_mode_are_kept(monkeypatch):
    """The resized table: built once, dropped by fold() and by loading."""
    resized = []
    right = positions_module.get_abs_pos

    def counting(*arguments):
        resized.append(1)
        return right(*arguments)

    monkeypatch.setattr(positions_module, "get_abs_pos", counting)
    with torch.inference_mode():
        resampler, x = make_resampler().fold(False), torch.randn(2, 64, 96)
        for _ in range(2):
            assert_is_plain_form(resampler, x)
        assert len(resized) == 1
        resampler.pos_embed.mul_(2)
        resampler.fold(False)
        assert_is_plain_form(resampler, x)
        resampler.load_state_dict(make_resampler(seed=5).state_dict())
        assert_is_plain_form(resampler, x)
        assert len(resized) == 3


def test_an_encoder_made_and_loaded_in_inference_mode(builds):
    """Both of its position tables follow the weights, and its resampler folds."""
    golden = load_golden()
    crops = torch.randn(2, 3, 448, 448)
    plain = golden.encoder().eval()
    with torch.inference_mode():
        encoder = golden.encoder().eval()
        assert encoder.positional_embedding.is_inference()
        assert torch.equal(encoder(crops), plain(crops))
        for model in (encoder, plain):
            weights = {name: value.clone() for name, value in model.state_dict().items()}
            weights["positional_embedding"] *= 3
            model.load_state_dict(weights)
        assert torch.equal(encoder(crops), plain(crops))
    assert len(builds) == 4


def test_compiled_with_parameters_made_in_inference_mode():
    with torch.inference_mode():
        resampler, x = make_resampler(), torch.randn(2, 64, 96)
    compiled = torch.compile(resampler, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        expected = plain_form(resampler, x)
        assert_same_up_to_rounding(compiled(x), expected)
        resampler(x)
        assert resampler._folded._held is not None
        assert_same_up_to_rounding(compiled(x), expected)


def test_hooks_on_a_part_are_called(builds):
    resampler, x, seen = make_resampler(), torch.randn(2, 64, 96), []
    handle = resampler.attn.out_proj.register_forward_hook(lambda *arguments: seen.append(1))
    assert_is_plain_form(resampler, x)
    assert seen and not builds
    handle.remove()
    assert_is_plain_form(resampler, x)
    assert len(builds) == 1


def test_copies_and_pickles_leave_the_cache(builds):
    resampler, x = make_resampler(), torch.randn(2, 64, 96)
    assert_is_plain_form(resampler, x)
    for other in (copy.deepcopy(resampler), pickle.loads(pickle.dumps(resampler))):
        assert other._folded._held is None
        assert_is_plain_form(other, x)
    assert set(resampler.state_dict()) == {name for name, _ in resampler.named_parameters()}


@pytest.mark.parametrize("target", ["kv_proj", "out_proj", "attn"])
def test_peft_wraps_a_projection(builds, target):
    """The adapter trains and counts in eval too, where the fold would leave it out."""
    x = torch.randn(2, 64, 96)
    model = nn.ModuleDict({"attn_pool": make_resampler()})
    expected = model["attn_pool"](x).detach()
    model = get_peft_model(model, LoraConfig(target_modules=[target]))
    resampler = model.base_model.model["attn_pool"]
    for module in resampler.modules():
        if hasattr(module, "lora_B"):
            nn.init.normal_(module.lora_B["default"].weight, std=0.1)
    out = resampler(x)
    out.backward(torch.randn_like(out))
    trained = {name for name, p in resampler.named_parameters() if p.grad is not None}
    assert trained and all("lora_" in name for name in trained)
    with torch.no_grad():
        torch.testing.assert_close(resampler.eval()(x), out)
    assert not torch.allclose(out, expected) and not builds


def test_no_repeated_query_and_no_attention_matrix_is_saved():
    resampler = make_resampler().train()
    crops, tokens, heads, queries, width = 3, 64, 2, 16, 256
    x = torch.randn(crops, tokens, 96, requires_grad=True)
    saved = saved_for_backward(resampler, lambda: resampler(x))
    shapes = sorted(list(tensor.shape) for tensor in saved)
    assert not any(shape[-2:] == [queries, tokens] for shape in shapes), shapes
    numel = total_bytes(saved) // 4
    # kv_proj's input and output (LayerNorm's input), tokens, keys (input of a projection), K, V.
    per_token = tokens * (96 + 5 * width)
    # Attention's output and log-sum-exp per crop; the shared query's own chain once.
    per_query = queries * (width + heads)
    statistics = 2 * tokens
    limit = crops * (per_token + per_query + statistics) + queries * (4 * width + 2)
    assert numel <= limit, (numel, limit, shapes)


# ---- compilers, autocast, masks ---------------------------------------------------------------


def test_compile_without_graph_breaks():
    x = torch.randn(2, 64, 96)
    train = make_resampler().train()
    out_grad = torch.randn(2, 16, 256)
    parameters = [p for p in train.parameters() if p.requires_grad]
    expected = torch.autograd.grad(train(x), parameters, out_grad)
    compiled = torch.compile(train, fullgraph=True, backend="aot_eager")
    got = torch.autograd.grad(compiled(x), parameters, out_grad)
    for g, e in zip(got, expected, strict=True):
        assert_same_up_to_rounding(g, e)

    resampler = make_resampler()
    compiled = torch.compile(resampler, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        unfolded = compiled(x)
        assert_same_up_to_rounding(unfolded, plain_form(resampler, x))
        resampler(x)  # an eager call folds; the compiled one takes it from there
        assert_same_up_to_rounding(compiled(x), unfolded)
        resampler.load_state_dict(make_resampler(seed=3).state_dict())
        expected = plain_form(resampler, x)
        assert_same_up_to_rounding(compiled(x), expected)


@pytest.mark.parametrize("fold", [True, False])
def test_export(fold):
    resampler, x = make_resampler().fold(fold), torch.randn(2, 64, 96)
    with torch.no_grad():
        expected = resampler(x)
        program = torch.export.export(resampler, (x,))
        assert_same_up_to_rounding(program.module()(x), expected)
    graphs = [m.graph for m in program.graph_module.modules() if hasattr(m, "graph")]
    products = [n for graph in graphs for n in graph.nodes if "linear" in str(n.target)]
    # Folded: R in 4 blocks, [K; V], W_o, the mean's share. Else: kv_proj, query, key, value, W_o.
    assert len(products) == (7 if fold else 5)


@pytest.mark.parametrize("fold", [True, False])
def test_autocast(fold):
    resampler, x = make_resampler().fold(fold), torch.randn(2, 64, 96)
    with torch.no_grad():
        exact = plain_form(resampler, x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = resampler(x)
    assert out.dtype == torch.bfloat16
    assert relative_l2(out, exact) < 2e-2


def test_masks_are_multihead_attentions():
    resampler, x = make_resampler(), torch.randn(3, 9, 96)
    tokens = resampler.ln_kv(resampler.kv_proj(x)).transpose(0, 1)
    query = (resampler.ln_q(resampler.query) + resampler.pos_embed)[:, None].expand(-1, 3, -1)
    keys = tokens + get_abs_pos(resampler.pos_embed, 9)[:, None]
    boolean = torch.rand(16, 9) < 0.3
    for mask in (boolean, torch.randn(16, 9), torch.randn(6, 16, 9), boolean.expand(6, -1, -1)):
        expected = resampler.attn(query, keys, tokens, attn_mask=mask)[0].transpose(0, 1)
        torch.testing.assert_close(resampler(x, attn_mask=mask), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@torch.no_grad()
def test_attention_weights_multiplied_out_are_the_output(dtype):
    resampler, x = make_resampler().to(dtype), tokens_like("normal", (3, 49, 96)).to(dtype)
    weights = resampler.attention_weights(x)
    assert weights.dtype == torch.float32 and weights.shape == (3, 2, 16, 49)
    torch.testing.assert_close(weights.sum(-1), torch.ones(3, 2, 16))

    attn, tokens = resampler.attn, resampler.ln_kv(resampler.kv_proj(x))
    value = nn.functional.linear(
        tokens, attn.in_proj_weight.chunk(3)[2], attn.in_proj_bias.chunk(3)[2]
    )
    value = value.unflatten(-1, (2, -1)).transpose(1, 2)
    ours = attn.out_proj((weights @ value.float()).transpose(1, 2).flatten(2).to(dtype))
    exact = plain_form(copy.deepcopy(resampler).double(), x.double())
    check_error("multiplied out", ours, plain_form(resampler, x), exact)
    check_error("the module", resampler.fold(False)(x), plain_form(resampler, x), exact)


@torch.no_grad()
def test_attention_weights_are_those_of_torch():
    resampler, x = make_resampler().double(), tokens_like("normal", (3, 49, 96)).double()
    tokens = resampler.ln_kv(resampler.kv_proj(x)).transpose(0, 1)
    query = resampler.ln_q(resampler.query) + resampler.pos_embed
    keys = tokens + get_abs_pos(resampler.pos_embed, 49)[:, None]
    _, expected = resampler.attn(
        query[:, None].expand(-1, 3, -1), keys, tokens, average_attn_weights=False
    )
    torch.testing.assert_close(resampler.attention_weights(x), expected)


def test_attention_weights_need_the_attention_itself():
    wrapped = get_peft_model(make_resampler(), LoraConfig(target_modules=["attn"]))
    with pytest.raises(TypeError, match=r"attn must be a plain nn\.MultiheadAttention, with what"):
        wrapped.base_model.model.attention_weights(torch.zeros(1, 4, 96))
