"""LoRA through peft: what is wrapped, that it learns, and that nothing trained is lost."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils.integrations import dequantize_module_weight
from safetensors.torch import load_file, save_file
from transformers import BitsAndBytesConfig

from monkey_model.freeze import freeze, freeze_report
from monkey_model.modeling_monkey import MonkeyLMHeadModel
from monkey_model.training.peft_model import BASE_WEIGHTS, MonkeyPeftModel, load_peft_model
from monkey_model.training.peft_presets import NOT_QUANTISED, TARGETS, lora_config
from tests.helpers.numerics import relative_l2
from tests.helpers.stock import StockModel
from tests.helpers.tiny import tiny_batch, tiny_model

BLOCK = "transformer.visual.transformer.resblocks."
WRAPPED = {
    "llm": {
        f"transformer.h.{i}.{layer}"
        for i in range(2)
        for layer in ("attn.c_attn", "attn.c_proj", "mlp.w1", "mlp.w2")
    },
    "resampler": {f"transformer.visual.attn_pool.{n}" for n in ("kv_proj", "attn.out_proj")},
    "vit": {
        f"{BLOCK}{i}.{layer}"
        for i in range(2)
        for layer in ("attn.in_proj", "attn.out_proj", "mlp.c_fc", "mlp.c_proj")
    },
}


def wrapped_model(targets=("llm",), kind=MonkeyPeftModel, **settings):
    """In eval mode, no adapter a no-op."""
    model = tiny_model()
    model = kind(model, lora_config(model, targets, **settings)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.5)
    return model


def move_everything_trained(model) -> None:
    """Every trainable tensor off its initial value."""
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(**tiny_batch()).logits


def assert_same_state(model, other) -> None:
    state, expected = model.state_dict(), other.state_dict()
    assert state.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(state[name], expected[name])] == []


# ---- the presets --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "targets", [("llm",), ("resampler",), ("vit",), ("llm", "resampler", "vit")]
)
def test_exact_layers(targets):
    model = wrapped_model(targets).get_base_model()
    layers = {name for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    assert layers == set().union(*(WRAPPED[target] for target in targets))


def test_stock_model_has_the_same_layers():
    stock = StockModel()
    model = get_peft_model(stock, lora_config(stock, ("llm", "vit"))).get_base_model()
    layers = {name for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    assert layers == WRAPPED["llm"] | WRAPPED["vit"]


def test_settings():
    config = lora_config(tiny_model(), r=4, lora_alpha=8, use_rslora=True, modules_to_save=["wte"])
    assert (config.r, config.lora_alpha, config.lora_dropout, config.use_rslora) == (
        4,
        8,
        0.05,
        True,
    )
    banks = ("in_proj_lora", "mlp_lora", "out_proj_lora")
    adapters = [f"{bank}.{i}" for bank in banks for i in range(4)]
    assert config.modules_to_save == ["wte", "attn_pool", *adapters]
    config = lora_config(tiny_model(), train_resampler=False, train_vit_lora=False)
    assert config.modules_to_save is None
    config = lora_config(tiny_model(visual={"lora_repeat_num": 0}), ("llm", "resampler"))
    assert config.modules_to_save is None


def test_bad_targets():
    model = tiny_model()
    with pytest.raises(ValueError, match="targets must be one of llm, resampler, vit; got 'llms'"):
        lora_config(model, ("llms",))
    with pytest.raises(
        ValueError, match="targets must be a list of llm, resampler, vit; got 'vit'"
    ):
        lora_config(model, "vit")
    with pytest.raises(ValueError, match=r"targets must not hold 'resampler' with upstream's enc"):
        lora_config(StockModel(), ("llm", "resampler"))
    with pytest.raises(ValueError, match=r"peft_config.task_type must be None; got 'CAUSAL_LM'"):
        MonkeyPeftModel(model, lora_config(model, task_type="CAUSAL_LM"))


# ---- forward, gradients, merging ----------------------------------------------------------------


@pytest.mark.parametrize("targets", [("llm",), ("resampler",), ("vit",), tuple(TARGETS)])
def test_forward_is_base_plus_low_rank(targets):
    """peft's layers act everywhere: the same logits as with their products added to the weights."""
    model = wrapped_model(targets)
    base = tiny_model()
    plain, state = logits(base), base.state_dict()
    for name, module in model.get_base_model().named_modules():
        if isinstance(module, LoraLayer):
            a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
            state[f"{name}.weight"] += (b @ a).detach() * 2  # lora_alpha / r
        elif match := re.search(r"(.*)\.modules_to_save\.default$", name):
            state |= {f"{match[1]}.{leaf}": v.clone() for leaf, v in module.state_dict().items()}
    base.load_state_dict(state, strict=True)
    torch.testing.assert_close(logits(model), logits(base), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits(model), plain, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("targets", [("llm",), tuple(TARGETS)])
def test_every_trained_parameter_gets_a_gradient(targets):
    model = wrapped_model(targets).train()
    trained = freeze(model).trainable
    model(**tiny_batch()).loss.backward()
    parameters = dict(model.named_parameters())
    assert {n for n, p in parameters.items() if p.grad is not None and p.grad.any()} == trained


def test_gradient_of_lora_in_out_proj():
    """nn.MultiheadAttention's projection, wrapped: the gradient of the product written out."""
    model = wrapped_model(("resampler",), lora_dropout=0.0)
    layer = model.get_base_model().transformer.visual.attn_pool.attn.out_proj
    freeze(model)
    seen = {}
    layer.register_forward_hook(lambda _, args, out: seen.update(x=args[0], out=out))
    tokens = model.get_base_model().transformer.visual(torch.randn(2, 3, 28, 28), [0, None])
    out_grad = torch.randn_like(tokens)
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    grad_a, grad_b, grad_out = torch.autograd.grad(tokens, [a, b, seen["out"]], out_grad)
    x, g = seen["x"].flatten(0, 1), grad_out.flatten(0, 1)
    torch.testing.assert_close(grad_b, 2 * g.T @ (x @ a.T), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(grad_a, 2 * (g @ b).T @ x, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("targets", [("llm",), tuple(TARGETS)])
def test_merged_model_is_stock(targets, tmp_path):
    model = wrapped_model(targets)
    freeze(model)
    move_everything_trained(model)
    model.double()  # where the merge is exact to many digits, whatever the order of a sum
    expected = logits(model)
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged), expected, rtol=1e-9, atol=1e-9)
    merged.float()
    assert merged.state_dict().keys() == tiny_model().state_dict().keys()
    merged.save_pretrained(tmp_path)
    assert load_file(tmp_path / "model.safetensors").keys() == tiny_model().state_dict().keys()
    assert torch.equal(logits(MonkeyLMHeadModel.from_pretrained(tmp_path)), logits(merged))


def test_disabled_adapter_is_the_base_model():
    model = wrapped_model(tuple(TARGETS))
    freeze(model)
    move_everything_trained(model)
    with model.disable_adapter():
        got = logits(model)
    # The resampler of the base model runs folded, which is another rounding.
    torch.testing.assert_close(got, logits(tiny_model()), rtol=1e-5, atol=1e-5)


# ---- saving -------------------------------------------------------------------------------------


@pytest.mark.parametrize("loader", [MonkeyPeftModel, PeftModel])
@pytest.mark.parametrize("targets", [("llm",), tuple(TARGETS)])
def test_published_recipe_is_saved_whole(targets, loader, tmp_path):
    """LoRA, resampler and per-crop adapters; plain peft reads it too."""
    model = wrapped_model(targets)
    freeze(model)
    move_everything_trained(model)
    model.save_pretrained(tmp_path)
    assert not (tmp_path / BASE_WEIGHTS).exists()
    loaded = loader.from_pretrained(tiny_model(), tmp_path)
    assert_same_state(loaded, model)
    assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize("adapter", ["default", "mine"])
def test_whatever_trains_is_saved(adapter, tmp_path):
    model = tiny_model()
    model = MonkeyPeftModel(model, lora_config(model), adapter)
    freeze(model, fix_vit=False)
    model.get_base_model().transformer.h[1].requires_grad_(True)  # thawed
    move_everything_trained(model)
    model.save_pretrained(tmp_path)
    directory = tmp_path / ("" if adapter == "default" else adapter)
    names = load_file(directory / BASE_WEIGHTS).keys()
    assert "transformer.visual.proj" in names and "transformer.h.1.attn.c_attn.weight" in names
    assert not any("lora" in name or "attn_pool" in name or ".h.0." in name for name in names)
    loaded = MonkeyPeftModel.from_pretrained(tiny_model(), directory, adapter_name=adapter)
    assert_same_state(loaded, model)
    # Frozen as it is now, it keeps what came with it.
    assert not any(p.requires_grad for p in loaded.parameters())
    loaded.save_pretrained(tmp_path / "again")
    again = load_file((tmp_path / "again" / directory.relative_to(tmp_path)) / BASE_WEIGHTS)
    assert again.keys() == names
    merged = loaded.merge_and_unload()
    assert merged.state_dict().keys() == tiny_model().state_dict().keys()
    torch.testing.assert_close(logits(merged), logits(model.eval()), rtol=1e-4, atol=1e-4)


def test_state_dict_that_is_passed_is_what_is_saved(tmp_path):
    """As the Trainer does where the model is sharded."""
    model = wrapped_model()
    freeze(model, fix_vit=False)
    state = {name: value + 1 for name, value in model.state_dict().items()}
    model.save_pretrained(tmp_path, state_dict=state)
    loaded = MonkeyPeftModel.from_pretrained(tiny_model(), tmp_path).state_dict()
    for name in ("proj", "attn_pool.modules_to_save.default.query"):
        name = f"base_model.model.transformer.visual.{name}"
        assert torch.equal(loaded[name], state[name])


def trained_state(model):
    """The Trainer's state dict under ZeRO-3."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def test_frozen_parameters_missing_from_the_state_dict_are_saved_too(tmp_path):
    """The position table; LoRA that does not train; base weights that came with the adapter."""
    model = wrapped_model()
    freeze(model, fix_vit=False)
    move_everything_trained(model)
    model.save_pretrained(tmp_path / "first")
    model = MonkeyPeftModel.from_pretrained(tiny_model(), tmp_path / "first")
    freeze(model, train_llm_lora=False)
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    state = trained_state(model)
    for value in state.values():
        value.add_(1)  # what is passed outranks the model
    model.save_pretrained(tmp_path / "second", state_dict=state)
    loaded = MonkeyPeftModel.from_pretrained(tiny_model(), tmp_path / "second").state_dict()
    expected |= state
    assert [name for name in expected if not torch.equal(loaded[name], expected[name])] == []
    assert not any("pos_embed" in name for name in state) and loaded.keys() == expected.keys()


def test_sharded_parameters_missing_from_the_state_dict_are_refused(tmp_path):
    model = wrapped_model()
    freeze(model)
    state = trained_state(model)
    table = model.get_base_model().transformer.visual.attn_pool.modules_to_save.default.pos_embed
    table.ds_numel, table.data = table.numel(), torch.empty(0)
    with pytest.raises(
        ValueError,
        match=r"state_dict must hold base_model\.model\.\S*attn_pool\.modules_to_save\.default\."
        r"pos_embed, which DeepSpeed has sharded: only a stage3_param_persistence_threshold of at "
        rf"least {table.ds_numel} keeps it whole",
    ):
        model.save_pretrained(tmp_path, state_dict=state)
    assert list(tmp_path.iterdir()) == []


def test_other_processes_write_nothing(tmp_path):
    model = wrapped_model()
    freeze(model, fix_vit=False)
    model.save_pretrained(tmp_path, is_main_process=False)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_no_stale_base_weights(tmp_path):
    model = wrapped_model()
    freeze(model, fix_vit=False)
    model.save_pretrained(tmp_path)
    assert (tmp_path / BASE_WEIGHTS).exists()
    freeze(model)
    model.save_pretrained(tmp_path)
    assert not (tmp_path / BASE_WEIGHTS).exists()


def test_failed_write_leaves_the_last_one(tmp_path, monkeypatch):
    model = wrapped_model()
    freeze(model, fix_vit=False)
    model.save_pretrained(tmp_path)
    before = (tmp_path / BASE_WEIGHTS).read_bytes()

    def fail(tensors, path, metadata):
        Path(path).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("monkey_model.training.peft_model.save_file", fail)
    move_everything_trained(model)
    with pytest.raises(OSError, match="disk full"):
        model.save_pretrained(tmp_path)
    assert (tmp_path / BASE_WEIGHTS).read_bytes() == before


def test_adapters_that_make_no_sense_are_named(tmp_path):
    model = wrapped_model()
    move_everything_trained(model)
    model.save_pretrained(tmp_path)
    weights = tmp_path / "adapter_model.safetensors"
    state = load_file(weights)
    name = next(iter(state))
    save_file({**state, name: torch.full_like(state[name], torch.nan)}, weights)
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors holds NaN or infinity in "):
        load_peft_model(tiny_model(), tmp_path)
    save_file({**state, name: state[name][:1].contiguous()}, weights)
    with pytest.raises(ValueError, match=r"does not fit the model: RuntimeError: .*size mismatch"):
        load_peft_model(tiny_model(), tmp_path)
    others = {key: value for key, value in state.items() if key != name}
    save_file({**others, "model.stray": torch.ones(2)}, weights)
    # peft calls the missing one by the name that it has in the model.
    message = rf"does not fit its .*: missing {name[:40]}\S*; unexpected model.stray"
    with pytest.raises(ValueError, match=message):
        load_peft_model(tiny_model(), tmp_path)
    save_file(state, weights)
    config = tmp_path / "adapter_config.json"
    settings = json.loads(config.read_text())
    for broken in ({"peft_type": "unknown"}, {"target_modules": "(("}, {"r": "8"}):
        config.write_text(json.dumps({**settings, **broken}))
        with pytest.raises(ValueError, match=f"^adapter {tmp_path} does not fit the model: "):
            load_peft_model(tiny_model(), tmp_path)


def test_base_weights_that_do_not_fit(tmp_path):
    model = wrapped_model()
    freeze(model, fix_vit=False)
    model.save_pretrained(tmp_path)
    base = load_file(tmp_path / BASE_WEIGHTS)
    save_file({**base, "transformer.visual.cls": torch.ones(1)}, tmp_path / BASE_WEIGHTS)
    with pytest.raises(ValueError, match=r"holds transformer.visual.cls, which the model has not"):
        MonkeyPeftModel.from_pretrained(tiny_model(), tmp_path)
    save_file({**base, "transformer.visual.proj": torch.ones(2, 3)}, tmp_path / BASE_WEIGHTS)
    fresh = tiny_model()
    with pytest.raises(
        ValueError,
        match=r"holds transformer.visual.proj \[2, 3\]; the model has \[128, 128\] torch",
    ):
        MonkeyPeftModel.from_pretrained(fresh, tmp_path)
    assert torch.equal(
        fresh.transformer.visual.conv1.weight, tiny_model().transformer.visual.conv1.weight
    )
    save_file(base, tmp_path / BASE_WEIGHTS)
    fresh.transformer.visual.to("meta")
    with pytest.raises(ValueError, match=r"which the model has offloaded: load it on a device"):
        MonkeyPeftModel.from_pretrained(fresh, tmp_path)


# ---- quantised base weights ---------------------------------------------------------------------


@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_base_weights(bits, tmp_path):
    """LoRA, per-crop adapters and the resampler train in floats beside 4-bit or 8-bit weights."""
    pytest.importorskip("bitsandbytes")
    plain = tiny_model(visual={"width": 64})  # bitsandbytes packs blocks of 64
    plain.save_pretrained(tmp_path / "base")
    config = BitsAndBytesConfig(
        load_in_4bit=bits == 4,
        load_in_8bit=bits == 8,
        llm_int8_skip_modules=NOT_QUANTISED,
        bnb_4bit_compute_dtype=torch.float32,
    )

    def load():
        return MonkeyLMHeadModel.from_pretrained(
            tmp_path / "base", quantization_config=config, dtype=torch.float32
        )

    model = load()
    visual = model.transformer.visual
    expected = {4: torch.uint8, 8: torch.int8}[bits]
    for layer in (model.transformer.h[0].mlp.w1, visual.transformer.resblocks[0].mlp.c_fc):
        assert layer.weight.dtype == expected
    assert visual.transformer.get_cast_dtype() == torch.float32
    part = freeze_report(model).parts["LLM"]
    assert part.parameters == freeze_report(plain).parts["LLM"].parameters
    assert part.bytes < 0.6 * 4 * part.parameters
    with pytest.raises(ValueError, match=r"parameters that the flags would train are quantised"):
        freeze(model, fix_llm=False)

    # The logits of the weights that the packed ones stand for, but for bitsandbytes' own rounding:
    # on a CPU its 4-bit product runs in bfloat16, and its 8-bit one rounds the inputs to 8 bits.
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not parameter.is_floating_point():
                layer = name.removesuffix(".weight")
                weight = dequantize_module_weight(model.get_submodule(layer))
                plain.get_parameter(name).copy_(weight)
    assert relative_l2(logits(model), logits(plain)) < 2.5e-2
    # On a CPU, bitsandbytes packs the weights for inference alone at the first call in eval mode.
    model = load()
    model = MonkeyPeftModel(model, lora_config(model, ("llm", "vit"))).train()
    report = freeze(model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=3e-3)
    losses = []
    for _ in range(8):
        loss = model(**tiny_batch()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == report.trainable
    model.eval().save_pretrained(tmp_path / "adapter")
    loaded = MonkeyPeftModel.from_pretrained(load(), tmp_path / "adapter")
    assert torch.equal(logits(loaded), logits(model))
