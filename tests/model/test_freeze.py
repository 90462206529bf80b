"""For every combination of flags the exact set of names that train, in and out of peft."""

from __future__ import annotations

import io
import itertools

import pytest
import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from torch import nn

from monkey_model.configuration_monkey import MonkeyConfig
from monkey_model.freeze import FLAGS, freeze, freeze_report, trainable_names
from monkey_model.modeling_monkey import MonkeyLMHeadModel
from monkey_model.parameter_names import PARTS, part_of
from monkey_model.training.peft_presets import lora_config
from tests.helpers.stock import StockModel
from tests.helpers.tiny import tiny_batch, tiny_model

# ---- what belongs where, written out ----------------------------------------------------------

ADAPTED = ("attn.c_attn", "attn.c_proj", "mlp.w1", "mlp.w2")
BLOCK = (
    "ln_1.weight",
    "attn.c_attn.weight",
    "attn.c_attn.bias",
    "attn.c_proj.weight",
    "ln_2.weight",
    "mlp.w1.weight",
    "mlp.w2.weight",
    "mlp.c_proj.weight",
)
LLM = {f"transformer.h.{i}.{leaf}" for i in range(2) for leaf in BLOCK} | {
    "transformer.ln_f.weight"
}
EMBEDDINGS = {"transformer.wte.weight", "lm_head.weight"}
VISUAL = "transformer.visual."
RESBLOCKS = [f"{VISUAL}transformer.resblocks.{i}." for i in range(2)]
VIT = {
    VISUAL + name
    for name in (
        "positional_embedding",
        "proj",
        "conv1.weight",
        "ln_pre.weight",
        "ln_pre.bias",
        "ln_post.weight",
        "ln_post.bias",
    )
} | {
    f"{block}{layer}.{leaf}"
    for block in RESBLOCKS
    for layer in ("ln_1", "ln_2", "attn.in_proj", "attn.out_proj", "mlp.c_fc", "mlp.c_proj")
    for leaf in ("weight", "bias")
}
ADAPTERS = {
    (f"{block}{bank}.{i}", leaf)
    for block in RESBLOCKS
    for bank in ("attn.in_proj_lora", "attn.out_proj_lora", "mlp_lora")
    for i in range(4)
    for leaf in ("lora_a.weight", "lora_b.weight", "lora_scale")
}
POOL = VISUAL + "attn_pool"
RESAMPLER = {
    "query",
    "kv_proj.weight",
    "attn.in_proj_weight",
    "attn.in_proj_bias",
    "attn.out_proj.weight",
    "attn.out_proj.bias",
    "ln_q.weight",
    "ln_q.bias",
    "ln_kv.weight",
    "ln_kv.bias",
}
FIXED = f"{POOL}.pos_embed"

COMBINATIONS = [
    dict(zip(FLAGS, values, strict=True))
    for values in itertools.product([True, False], repeat=len(FLAGS))
]


def expected_names(flags: dict[str, bool], *, peft: bool) -> set[str]:
    names: set[str] = set()
    prefix = "base_model.model." if peft else ""
    copy = ".modules_to_save.default" if peft else ""
    if not flags["fix_llm"]:
        for name in LLM | EMBEDDINGS:
            layer, _, leaf = name.rpartition(".")
            wrapped = peft and layer.endswith(ADAPTED)
            names.add(f"{prefix}{layer}.base_layer.{leaf}" if wrapped else prefix + name)
    if not flags["fix_vit"]:
        names |= {prefix + name for name in VIT}
    if flags["train_resampler"]:
        names |= {f"{prefix}{POOL}{copy}.{leaf}" for leaf in RESAMPLER}
    if flags["train_vit_lora"]:
        names |= {f"{prefix}{adapter}{copy}.{leaf}" for adapter, leaf in ADAPTERS}
    if peft and flags["train_llm_lora"]:
        names |= {
            f"{prefix}transformer.h.{i}.{layer}.lora_{side}.default.weight"
            for i in range(2)
            for layer in ADAPTED
            for side in "AB"
        }
    return names


@pytest.fixture(scope="module", params=["ours", "stock"])
def plain(request):
    return tiny_model() if request.param == "ours" else StockModel()


@pytest.fixture(scope="module", params=["ours", "stock"])
def wrapped(request):
    model = tiny_model() if request.param == "ours" else StockModel()
    return get_peft_model(model, lora_config(model))


def assert_trains(model: nn.Module, flags: dict[str, bool], expected: set[str]) -> None:
    if not expected:
        with pytest.raises(ValueError, match="flags must leave something to train; got fix_llm=T"):
            freeze(model, **flags)
        return
    report = freeze(model, **flags)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == expected
    assert report.trainable == expected


@pytest.mark.parametrize("flags", COMBINATIONS, ids=str)
def test_exact_names(plain, flags):
    assert_trains(plain, flags, expected_names(flags, peft=False))


@pytest.mark.parametrize("flags", COMBINATIONS, ids=str)
def test_exact_names_in_peft(wrapped, flags):
    assert_trains(wrapped, flags, expected_names(flags, peft=True))


def test_the_lists_above_are_the_model(plain):
    adapters = {f"{adapter}.{leaf}" for adapter, leaf in ADAPTERS}
    resampler = {f"{POOL}.{leaf}" for leaf in RESAMPLER}
    names = LLM | EMBEDDINGS | VIT | adapters | resampler | {FIXED}
    assert {name for name, _ in plain.named_parameters()} == names


# ---- peft's other forms -------------------------------------------------------------------------


def test_resampler_with_lora_trains_through_it():
    model = tiny_model()
    model = get_peft_model(model, lora_config(model, ("llm", "resampler", "vit")))
    report = freeze(model)
    assert set(report.parts["resampler"].trainable) == {
        f"base_model.model.{POOL}.{layer}.lora_{side}.default.weight"
        for layer in ("kv_proj", "attn.out_proj")
        for side in "AB"
    }
    of_peft = {n for n in report.parts["ViT adapters"].trainable if "lora_A" in n or "lora_B" in n}
    assert len(of_peft) == 2 * 4 * 2  # blocks, layers, sides
    assert not freeze(model, train_resampler=False).parts["resampler"].trainable


def test_only_the_active_adapter_trains():
    model = tiny_model()
    model = get_peft_model(model, lora_config(model))
    model.add_adapter("second", lora_config(model.get_base_model()))
    model.set_adapter("second")
    trained = freeze(model).trainable
    assert trained and not any(".default" in name for name in trained)
    assert len(trained) == len(expected_names(dict(FLAGS), peft=True))


def test_modules_that_flags_freeze_stay_frozen_in_modules_to_save():
    model = tiny_model()
    model = get_peft_model(model, lora_config(model, modules_to_save=["lm_head"]))
    assert not any("lm_head" in name for name in freeze(model).trainable)
    trained = freeze(model, fix_llm=False).trainable
    assert {name for name in trained if "lm_head" in name} == {
        "base_model.model.lm_head.modules_to_save.default.weight"
    }


# ---- the recipes --------------------------------------------------------------------------------


def test_snippet_of_the_recipe():
    """LoRA on by name, then the LLM's modules frozen: what upstream's users run."""
    model = tiny_model()
    model.requires_grad_(False)
    for n, p in model.named_parameters():
        if "lora" in n:
            p.requires_grad = True
    model.transformer.h.requires_grad_(False)
    model.transformer.wte.requires_grad_(False)
    model.transformer.ln_f.requires_grad_(False)
    model.lm_head.requires_grad_(False)
    adapters = {f"{adapter}.{leaf}" for adapter, leaf in ADAPTERS}
    assert freeze_report(model).trainable == adapters
    assert freeze(model, train_resampler=False).trainable == adapters


def test_names_are_all_that_counts():
    names = [name for name, _ in tiny_model().named_parameters()]
    expected = expected_names(dict(FLAGS), peft=False)
    assert set(trainable_names(names)) == expected
    for prefix in ("module.", "_orig_mod.", "module._orig_mod."):
        prefixed = trainable_names([prefix + name for name in names])
        assert set(prefixed) == {prefix + name for name in expected}


def test_only_what_is_reported_changes():
    model = tiny_model().train()
    report = freeze(model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for step in range(2):
        model(**tiny_batch(step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == report.trainable


# ---- the report ---------------------------------------------------------------------------------


def test_report_counts():
    model = tiny_model().to(torch.bfloat16)
    report = freeze(model)
    assert tuple(report.parts) == PARTS
    parameters = dict(model.named_parameters())
    for part, entry in report.parts.items():
        names = [name for name in parameters if part_of(name) == part]
        assert entry.parameters == sum(parameters[name].numel() for name in names)
        assert entry.bytes == 2 * entry.parameters
        assert list(entry.trainable) == [n for n in names if parameters[n].requires_grad]
        assert entry.trainable_bytes == 2 * entry.trainable_parameters
    assert sum(p.parameters for p in report.parts.values()) == sum(
        p.numel() for p in model.parameters()
    )


def test_published_shape():
    """The sizes of the recipe, from the widths alone: nothing is allocated."""
    with torch.device("meta"):
        model = MonkeyLMHeadModel(MonkeyConfig())
    report = freeze(model)
    vit, llm, queries = 1664, 4096, 256
    lora = 4 * (16 * (vit + 3 * vit) + 16 * (vit + vit) + 32 * (vit + vit) + 3)
    attention = 4 * llm * llm + 4 * llm
    trained = {part: entry.trainable_parameters for part, entry in report.parts.items()}
    assert trained == {
        "LLM": 0,
        "embeddings and head": 0,
        "LLM LoRA": 0,
        "ViT": 0,
        "ViT adapters": 48 * lora,
        "resampler": vit * llm + attention + queries * llm + 4 * llm,
    }
    report = freeze(get_peft_model(model, lora_config(model, train_resampler=False)))
    c_attn, c_proj, mlp = llm + 3 * llm, llm + llm, llm + 11008
    assert report.parts["LLM LoRA"].trainable_parameters == 32 * 16 * (c_attn + c_proj + 2 * mlp)


def test_report_is_a_table():
    report = freeze(tiny_model())
    text = str(report)
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    assert rows[0] == [
        "part",
        "tensors trained",
        "parameters trained",
        "MiB",
        "of parameters",
        "MiB",
    ]
    assert [row[0] for row in rows[2:]] == [*PARTS, "all"]
    resampler = report.parts["resampler"]
    size = f"{resampler.trainable_bytes / 2**20:,.1f}"
    of = f"{resampler.parameters:,}"
    assert rows[2 + PARTS.index("resampler")] == [
        "resampler", "10", f"{resampler.trainable_parameters:,}", size, of,
        f"{resampler.bytes / 2**20:,.1f}",
    ]  # fmt: skip
    assert rows[-1][1] == str(len(report.trainable))
    drawn = io.StringIO()
    Console(width=100, file=drawn).print(report)
    assert "resampler" in drawn.getvalue() and "│" in drawn.getvalue()


# ---- bad input ----------------------------------------------------------------------------------


def test_unknown_flag():
    with pytest.raises(
        TypeError, match=r"flags must be among fix_llm, .*train_llm_lora; got fix_vi"
    ):
        freeze(tiny_model(), fix_vi=True)
    with pytest.raises(TypeError, match="fix_vit must be True or False; got 'no'"):
        freeze(tiny_model(), fix_vit="no")


def test_other_models():
    with pytest.raises(
        ValueError, match=r"model must have upstream's layout .* got a parameter '0"
    ):
        freeze(nn.Sequential(nn.Linear(2, 2)))
    model = get_peft_model(
        nn.Sequential(nn.Linear(2, 2)), LoraConfig(target_modules=["0"], bias="none")
    )
    with pytest.raises(ValueError, match=r"model must have upstream's layout"):
        freeze_report(model)


def test_quantised_weights_cannot_train():
    model = tiny_model()
    weight = model.transformer.h[0].mlp.w1.weight
    model.transformer.h[0].mlp.w1.weight = nn.Parameter(weight.to(torch.int8), requires_grad=False)
    assert freeze(model).trainable == expected_names(dict(FLAGS), peft=False)
    before = {n: p.requires_grad for n, p in model.named_parameters()}
    with pytest.raises(
        ValueError, match=r"1 parameters .* quantised, e.g. transformer.h.0.mlp.w1.w"
    ):
        freeze(model, fix_llm=False)
    assert before == {n: p.requires_grad for n, p in model.named_parameters()}
