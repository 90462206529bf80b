"""Our encoder inside a model of upstream's shape: the same tokens, the same weights, and back."""

from __future__ import annotations

import copy
import os
import subprocess
import sys

import pytest
import torch
from peft import get_peft_model
from torch import nn

from benchmarks.record import ROOT
from monkey_model.freeze import freeze
from monkey_model.patching import patch_visual, unpatch_visual
from monkey_model.training.peft_presets import lora_config
from monkey_model.visual import VisionTransformer
from tests.helpers import stock as stock_module
from tests.helpers.golden import DATA
from tests.helpers.stock import StockModel, image_ids
from tests.helpers.tiny import tiny_model

IMAGE = "A_image0.jpg"


@pytest.fixture(autouse=True)
def beside_the_pictures(monkeypatch):
    monkeypatch.chdir(DATA)


@pytest.fixture
def stock():
    return StockModel().eval()


def count_passes(encoder) -> list[int]:
    """The number of crops in every pass of the ViT, as they come."""
    passes: list[int] = []
    block = encoder.transformer.resblocks[0].ln_1  # [N, crops, width] there, or [crops, N, width]
    block.register_forward_hook(lambda _, args, out: passes.append(args[0].numel() // (1024 * 16)))
    return passes


def test_same_logits_and_back(stock):
    ids = image_ids(IMAGE)
    original = stock.transformer.visual
    state = {name: value.clone() for name, value in stock.state_dict().items()}
    with torch.no_grad():
        expected = stock(ids)["logits"]
        assert patch_visual(stock) is stock
        assert type(stock.transformer.visual) is not type(original)
        assert isinstance(stock.transformer.visual, VisionTransformer)
        patched = stock(ids)["logits"]
        torch.testing.assert_close(patched, expected, rtol=2e-5, atol=2e-5)
        assert not torch.equal(stock(image_ids("A_image1.png"))["logits"], patched)
        assert unpatch_visual(stock) is stock
        assert stock.transformer.visual is original
        assert torch.equal(stock(ids)["logits"], expected)
    assert stock.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in stock.state_dict().items())


def test_weights_are_shared(stock):
    parameters = dict(stock.named_parameters())
    freeze(stock)
    trains = {name: p.requires_grad for name, p in parameters.items()}
    patch_visual(stock)
    patched = dict(stock.named_parameters())
    assert patched.keys() == parameters.keys()
    assert all(patched[name] is p for name, p in parameters.items())
    assert {name: p.requires_grad for name, p in patched.items()} == trains
    assert not any(p.is_meta for p in patched.values())
    unpatch_visual(stock)
    assert all(p is parameters[name] for name, p in stock.named_parameters())
    assert {name: p.requires_grad for name, p in parameters.items()} == trains


def test_gradients(stock):
    """The loop over crops trains the same through one pass."""
    ids = image_ids(IMAGE)
    report = freeze(stock)  # in eval mode: without dropout

    def gradients():
        stock.zero_grad()
        stock(ids, labels=ids)["loss"].backward()
        return {n: p.grad.clone() for n, p in stock.named_parameters() if p.grad is not None}

    expected = gradients()
    patch_visual(stock)
    got = gradients()
    assert got.keys() == expected.keys() == report.trainable
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-3, atol=1e-6, msg=name)


def test_training_while_patched_stays(stock):
    optimizer = torch.optim.SGD(stock.parameters(), lr=0.1)
    patch_visual(stock)
    before = {name: p.detach().clone() for name, p in stock.named_parameters()}
    ids = image_ids(IMAGE)
    stock(ids, labels=ids)["loss"].backward()
    optimizer.step()
    unpatch_visual(stock)
    changed = {name for name, p in stock.named_parameters() if not torch.equal(p, before[name])}
    assert {"transformer.visual.proj", "transformer.visual.conv1.weight"} <= changed


def test_one_pass_for_all_crops(stock, monkeypatch):
    patch_visual(stock)
    encoder = stock.transformer.visual
    calls = []
    encode_crops = type(encoder).encode_crops

    def watched(self, crops, **settings):
        calls.append(len(crops))
        return encode_crops(self, crops, **settings)

    monkeypatch.setattr(type(encoder), "encode_crops", watched)
    ids = image_ids(IMAGE).expand(2, -1)
    passes = count_passes(encoder)
    with torch.no_grad():
        stock(ids)
    assert calls == [10]
    assert sum(passes) == 10  # on a CPU crop by crop; nothing twice
    # Nothing is kept for longer than the loop.
    assert encoder._given == {} and encoder._ready is None


def test_crops_out_of_the_loop(stock):
    """Any order, twice, another adapter, a crop of one's own: what upstream's encoder would say."""
    reference = copy.deepcopy(stock.transformer.visual)
    patch_visual(stock)
    encoder = stock.transformer.visual
    windows, images_448 = encoder.encode([IMAGE])
    local = [*windows[0], *windows[1]]
    with torch.no_grad():
        for crop, idx in (
            (images_448, None),
            (local[2], 2),
            (local[2], 2),
            (local[1], 0),
            (local[1].clone(), 1),
            (local[0], 0),
            (local[3], None),
        ):
            got, expected = encoder(crop, idx), reference(crop, idx)
            torch.testing.assert_close(got, expected, rtol=2e-5, atol=2e-5)
        torch.testing.assert_close(
            encoder(torch.cat(local[:2]), [0, 1]),
            torch.cat([reference(crop, i) for i, crop in enumerate(local[:2])]),
            rtol=2e-5,
            atol=2e-5,
        )
    assert encoder.encode_images([IMAGE]).shape == (1, 20, 128)


def test_mode_dtype_and_device(stock):
    stock.train()
    stock.transformer.visual.attn_pool.eval()
    stock.transformer.visual.transformer.resblocks[1].mlp_lora[2].eval()
    modes = {name: module.training for name, module in stock.named_modules()}
    patch_visual(stock)
    patched = {name: module.training for name, module in stock.named_modules()}
    assert patched == modes
    stock.to(torch.bfloat16)
    assert {p.dtype for p in stock.parameters()} == {torch.bfloat16}
    with torch.no_grad():
        assert stock(image_ids(IMAGE))["logits"].dtype == torch.bfloat16
    stock.eval()
    unpatch_visual(stock)
    assert {p.dtype for p in stock.parameters()} == {torch.bfloat16}
    assert not any(module.training for module in stock.modules())


def test_hooks_on_layers_are_kept(stock):
    calls = []
    stock.transformer.visual.ln_post.register_forward_hook(lambda *_: calls.append("ln_post"))
    stock.transformer.visual.attn_pool.kv_proj.register_forward_hook(lambda *_: calls.append("kv"))
    patch_visual(stock)
    with torch.no_grad():
        stock(image_ids(IMAGE))
    assert calls.count("ln_post") == 5 and calls.count("kv") == 5


@pytest.mark.parametrize("path", ["", ".transformer.resblocks.1.attn", ".attn_pool"])
def test_hooks_that_would_be_lost(stock, path):
    name = f"transformer.visual{path}"
    handle = stock.get_submodule(name).register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match=rf"^{name} must have no hooks, which would be lost; got"):
        patch_visual(stock)
    handle.remove()
    patch_visual(stock)
    handle = stock.get_submodule(name).register_forward_pre_hook(lambda *_: None)
    with pytest.raises(ValueError, match=rf"^{name} must have no hooks"):
        unpatch_visual(stock)
    handle.remove()
    unpatch_visual(stock)


def test_inside_peft(stock):
    """Layers that peft wraps are shared too; LoRA in the resampler needs the patch first."""
    lora_alone = lora_config(stock, ("llm", "vit"), train_resampler=False, train_vit_lora=False)
    model = get_peft_model(stock, lora_alone).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.5)
        expected = model(image_ids(IMAGE))["logits"]
        patch_visual(model)
        got = model(image_ids(IMAGE))["logits"]
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert any("visual" in n and "lora_A" in n for n, _ in model.named_parameters())
    unpatch_visual(model)

    other = patch_visual(StockModel())
    wrapped = get_peft_model(other, lora_config(other, ("resampler",)))
    with pytest.raises(
        ValueError, match=r"attn_pool.kv_proj must still be upstream's module; got a Linear: unload"
    ):
        unpatch_visual(wrapped)
    unpatch_visual(wrapped.merge_and_unload())


def test_addresses_in_prompts(stock, monkeypatch):
    fetched = []

    def fetch(source, *rest):
        fetched.append(source)
        return (DATA / IMAGE).read_bytes()

    monkeypatch.setattr("monkey_model.inputs.images.fetch", fetch)
    url = "http://a.b/c.jpg"
    ids = image_ids(url)
    patch_visual(stock)
    with pytest.raises(ValueError, match="allow_urls is False"):
        stock(ids)
    unpatch_visual(stock)
    patch_visual(stock, allow_urls=True)
    with torch.no_grad():
        got = stock(ids)["logits"]
        assert fetched == [url]
        assert torch.equal(got[:, :1], stock(image_ids(IMAGE))["logits"][:, :1])


def test_copies_of_a_patched_model(stock):
    patch_visual(stock)
    twin = copy.deepcopy(stock)
    with torch.no_grad():
        twin.transformer.visual.proj.mul_(2)
        unpatch_visual(twin)
        assert torch.equal(twin.transformer.visual.proj, 2 * stock.transformer.visual.proj)
        twin(image_ids(IMAGE))


# ---- beside upstream's own package --------------------------------------------------------------

# In upstream's shape: a folder of that name without __init__.py, whose files import each other by
# absolute names; and the copy in a checkpoint, where they do so relatively.
CLONE = {
    "visual.py": "from tests.helpers.stock_visual import VisionTransformer",
    "modeling_monkey.py": """
import types

import torch

from monkey_model.visual import VisionTransformer


class MonkeyModel(torch.nn.Module):
    def __init__(self, visual):
        super().__init__()
        self.visual = VisionTransformer(**visual)

    def forward(self, paths):
        windows, images_448 = self.visual.encode(paths)
        crops = [crop for row in windows for crop in row]
        tokens = [self.visual(crop, idx=idx) for idx, crop in enumerate(crops)]
        return torch.cat([*tokens, self.visual(images_448)], dim=1)


class MonkeyLMHeadModel(torch.nn.Module):
    def __init__(self, visual):
        super().__init__()
        self.config = types.SimpleNamespace(visual=visual)
        self.transformer = MonkeyModel(visual)
""",
}

PROGRAM = """
import importlib.util, re, sys
from importlib.metadata import requires

needed = {"torch", "pillow", "numpy"}
for line in requires("monkey-vision"):
    name = re.match(r"[A-Za-z0-9_.-]+", line)[0].lower()
    if name not in needed:
        sys.modules[{"pyyaml": "yaml"}.get(name, name)] = None
sys.modules["tokenizers"] = sys.modules["huggingface_hub"] = None

import torch

from monkey_model import patch_visual, unpatch_visual

picture, visual, name, init = sys.argv[1], eval(sys.argv[2]), sys.argv[3], sys.argv[4:]
if init:  # as transformers loads a checkpoint's own code
    spec = importlib.util.spec_from_file_location(name.split(".")[0], init[0])
    package = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = package
    spec.loader.exec_module(package)
MonkeyLMHeadModel = importlib.import_module(name).MonkeyLMHeadModel
assert MonkeyLMHeadModel.__module__ == name
model = MonkeyLMHeadModel(visual).eval()
with torch.no_grad():
    for key, parameter in model.named_parameters():
        if key.endswith(("lora_b.weight", "lora_scale")):
            parameter.normal_(std=0.5)
    stock = model.transformer.visual
    expected = model.transformer([picture])
    patch_visual(model)
    assert type(model.transformer.visual).__module__ == "monkey_model.patching"
    torch.testing.assert_close(model.transformer([picture]), expected, rtol=2e-5, atol=2e-5)
    unpatch_visual(model)
    assert model.transformer.visual is stock
    assert torch.equal(model.transformer([picture]), expected)
print(sorted(name for name in ("transformers", "peft", "rich") if sys.modules.get(name)))
"""


@pytest.mark.parametrize("shape", ["a renamed clone", "a checkpoint's own code"])
def test_beside_upstreams_package_with_torch_alone(tmp_path, shape):
    """Two packages of one name, and none of what else the project depends on."""
    renamed = shape == "a renamed clone"
    folder = tmp_path / ("stock_monkey" if renamed else "checkpoint")
    folder.mkdir()
    for file, text in CLONE.items():  # the page's command; or how files of a checkpoint import
        text = text.replace("monkey_model.", "stock_monkey." if renamed else ".")
        (folder / file).write_text(text)
    arguments = [str(DATA / IMAGE), repr(stock_module.VISUAL), f"{folder.name}.modeling_monkey"]
    if not renamed:
        (folder / "__init__.py").touch()
        arguments.append(str(folder / "__init__.py"))
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


# ---- bad input ----------------------------------------------------------------------------------


def test_wrong_order(stock):
    with pytest.raises(ValueError, match=r"model must be patched; got a VisionTransformer"):
        unpatch_visual(stock)
    patch_visual(stock)
    with pytest.raises(ValueError, match="model must not be patched yet; got one that is"):
        patch_visual(stock)


def test_other_models(stock):
    for call in (patch_visual, unpatch_visual):
        with pytest.raises(TypeError, match=r"model must be a Monkey model, .*; got Linear"):
            call(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"model must be upstream's; got one with this project's"):
        patch_visual(tiny_model())
    stock.config.visual = None
    with pytest.raises(TypeError, match=r"model.config.visual must be a dict; got NoneType"):
        patch_visual(stock)


def test_another_encoder_than_the_config_says(stock):
    original = stock.transformer.visual
    stock.config.visual = {**stock.config.visual, "layers": 3, "output_dim": 256}
    with pytest.raises(ValueError) as error:
        patch_visual(stock)
    assert "must be the encoder of config.visual" in str(error.value)
    assert "no transformer.resblocks.2.ln_1.weight" in str(error.value)
    stock.config.visual |= {"layers": 1, "output_dim": 128}
    with pytest.raises(ValueError, match=r"a transformer.resblocks.1.attn.in_proj.weight"):
        patch_visual(stock)
    stock.config.visual |= {"layers": 2, "mlp_ratio": 3.0}
    with pytest.raises(ValueError, match=r"c_fc.weight of shape \[32, 16\] instead of \[48, 16\]"):
        patch_visual(stock)
    assert stock.transformer.visual is original
    stock.config.visual |= {"mlp_ratio": 2.0}
    wrapped = get_peft_model(stock, lora_config(stock))
    with pytest.raises(
        ValueError, match=r"before peft copies .*; got no transformer.resb.*lora_scale"
    ):
        patch_visual(wrapped)
