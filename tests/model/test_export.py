"""The export to Qwen2: the same logits, ids and replies, for whoever has transformers alone."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2ForCausalLM
from typer.testing import CliRunner

from monkey_model import load_model, load_visual
from monkey_model.checkpoint import PREFIX
from monkey_model.commands.__main__ import app
from monkey_model.configuration_monkey import MonkeyConfig
from monkey_model.modeling_monkey import MonkeyLMHeadModel
from monkey_model.processing_monkey import MonkeyProcessor
from monkey_model.serving.export import exact_length, export_qwen2, qwen2_config, qwen2_weights
from monkey_model.training.peft_presets import lora_config
from tests.helpers.checkpoint import write_checkpoint
from tests.helpers.tiny import SPAN, tiny_config

LENGTH = 256


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Every weight in it matters: biases and norms too."""
    folder = write_checkpoint(tmp_path_factory.mktemp("export") / "DIR", seq_length=LENGTH)
    generator = torch.Generator().manual_seed(1)
    path = folder / "model.safetensors"
    weights = {
        name: weight + 0.05 * torch.randn(weight.shape, generator=generator)
        for name, weight in load_file(path).items()
    }
    save_file(weights, path, metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def exported(checkpoint):
    out = checkpoint.parent / "OUT"
    export_qwen2(checkpoint, out)
    return out


@pytest.fixture(scope="module")
def ours(checkpoint):
    return load_model(checkpoint).eval()


@pytest.fixture(scope="module")
def theirs(exported):
    return AutoModelForCausalLM.from_pretrained(exported).eval()


@pytest.fixture(scope="module")
def processor(checkpoint):
    return MonkeyProcessor.from_pretrained(checkpoint)


@pytest.fixture
def run(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments, code=0):
        done = CliRunner().invoke(app, ["export", *(str(argument) for argument in arguments)])
        assert done.exit_code == code, done.output
        return done

    return run


def copy_of(checkpoint, folder, change=None, config=None):
    """A checkpoint with weights changed in place, and other fields in its config."""
    folder.mkdir()
    for path in checkpoint.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    if change is not None:
        weights = load_file(folder / "model.safetensors")
        change(weights)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**content, **(config or {})}))
    return folder


def random_ids(length, rows=2):
    generator = torch.Generator().manual_seed(length)
    return torch.randint(0, 300, (rows, length), generator=generator)


# ---- the same model -----------------------------------------------------------------------------


@torch.inference_mode()
@pytest.mark.parametrize("length", [1, 7, LENGTH])
def test_logits_of_ids(ours, theirs, length):
    assert type(theirs) is Qwen2ForCausalLM
    ids = random_ids(length)
    expected = ours(ids).logits
    assert expected.std() > 0.1
    torch.testing.assert_close(theirs(ids).logits, expected, rtol=0, atol=1e-5)


@torch.inference_mode()
def test_the_length_is_the_last_at_which_they_are_the_same(ours, theirs):
    """Dynamic NTK changes all positions of a longer prompt, log-n its last."""
    assert theirs.config.max_position_embeddings == LENGTH == exact_length(ours.config)
    ids = random_ids(LENGTH + 1)
    assert (theirs(ids).logits - ours(ids).logits).abs().amax() > 1e-2


@torch.inference_mode()
def test_logits_and_replies_with_pictures(ours, theirs, exported, processor):
    """The example of docs/serving.md: the encoder's tokens in place of <imgpad>."""
    pictures = [Image.new("RGB", (60, 40), "red"), Image.new("RGB", (40, 60), "blue")]
    content = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "the image user"}]
    messages = [{"role": "user", "content": content}]
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    inputs = processor(images=pictures, text=text, return_tensors="pt")

    tokenizer = AutoTokenizer.from_pretrained(exported)
    visual = load_visual(exported / "visual")
    ids = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )["input_ids"]
    assert torch.equal(ids, inputs["input_ids"])
    embeds = theirs.get_input_embeddings()(ids)
    places = ids == tokenizer.convert_tokens_to_ids("<imgpad>")
    assert places.sum() == 2 * SPAN
    embeds[places] = visual.encode_images(pictures).flatten(0, 1)

    expected = ours(**inputs).logits
    torch.testing.assert_close(theirs(inputs_embeds=embeds).logits, expected, rtol=0, atol=1e-5)
    settings = {"do_sample": False, "max_new_tokens": 24}
    reply = ours.generate(**inputs, **settings, eos_token_id=theirs.generation_config.eos_token_id)
    reply = reply[:, ids.shape[1] :]
    assert len(set(reply[0].tolist())) > 3
    attention_mask = torch.ones_like(ids)
    again = theirs.generate(inputs_embeds=embeds, attention_mask=attention_mask, **settings)
    assert torch.equal(again, reply)


def test_visual_is_the_encoder(checkpoint, exported):
    expected, visual = load_visual(checkpoint), load_visual(exported / "visual")
    assert visual.crop_settings == expected.crop_settings
    state = visual.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.state_dict().items())
    held = load_file(exported / "visual" / "model.safetensors")
    assert all(name.startswith(PREFIX) for name in held)


def test_nothing_of_ours_is_needed(exported):
    """The model, the tokenizer and the template, in a process without this package."""
    program = f"""
import sys
sys.modules["monkey_model"] = sys.modules["monkey_kernels"] = None
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained({str(exported)!r}, dtype="auto")
tokenizer = AutoTokenizer.from_pretrained({str(exported)!r})
messages = [{{"role": "user", "content": [{{"type": "image"}}, {{"type": "text", "text": "is"}}]}}]
ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
assert ids.count(tokenizer.convert_tokens_to_ids("<imgpad>")) == {SPAN}
assert tokenizer.is_fast and tokenizer.model_max_length == {LENGTH}
assert tokenizer.eos_token == tokenizer.pad_token == "<|endoftext|>"
assert model.generation_config.eos_token_id == tokenizer.convert_tokens_to_ids(
    ["<|im_end|>", "<|endoftext|>"])
assert model.dtype == torch.float32
assert model.generate(torch.tensor([ids]), max_new_tokens=2).shape[1] > len(ids)
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_tokenizer_has_the_same_ids_and_text(exported, processor):
    tokenizer = AutoTokenizer.from_pretrained(exported)
    for text in (
        "the image is\n\n user's  Answer: 12",
        "e\u0301 \u56fe \U0001f412 \u00e9",  # brought to NFC
        "<|im_start|>user\n<ref>it</ref><box>(1,2),(3,4)</box><|im_end|>\n<|extra_7|>",
        "",
    ):
        ids = processor.tokenizer.encode(text)
        assert tokenizer.encode(text) == ids
        assert tokenizer.decode(ids) == processor.tokenizer.decode(ids)


# ---- the published model's sizes ----------------------------------------------------------------


def test_names_and_shapes_of_the_published_model():
    """Qwen-7B, 14 GB, on the meta device: no memory."""
    config = MonkeyConfig()
    with torch.device("meta"):
        state = MonkeyLMHeadModel(config).state_dict()
        expected = Qwen2ForCausalLM(qwen2_config(config)).state_dict()
    weights = qwen2_weights(state, config)
    assert {name: weight.shape for name, weight in weights.items()} == {
        name: weight.shape for name, weight in expected.items()
    }
    # Beside transformers' own table, what is known of Qwen-7B.
    assert len(weights) == 32 * 12 + 3
    shapes = {
        "model.embed_tokens.weight": (151936, 4096),
        "lm_head.weight": (151936, 4096),
        "model.layers.31.self_attn.v_proj.weight": (4096, 4096),
        "model.layers.31.self_attn.v_proj.bias": (4096,),
        "model.layers.31.self_attn.o_proj.weight": (4096, 4096),
        "model.layers.31.mlp.gate_proj.weight": (11008, 4096),
        "model.layers.31.mlp.up_proj.weight": (11008, 4096),
        "model.layers.31.mlp.down_proj.weight": (4096, 11008),
    }
    assert {name: tuple(weights[name].shape) for name in shapes} == shapes
    assert sum(weight.numel() for weight in weights.values()) == 7_721_324_544
    assert qwen2_config(config).max_position_embeddings == 2048
    assert qwen2_config(config).rms_norm_eps == 1e-6


@pytest.mark.parametrize(
    "settings, length",
    [
        ({"use_dynamic_ntk": False}, 2048),
        ({"use_logn_attn": False}, 2048),
        ({"use_dynamic_ntk": False, "use_logn_attn": False}, 8192),
    ],
    ids=str,
)
def test_length(settings, length):
    assert qwen2_config(tiny_config(**settings)).max_position_embeddings == length


# ---- files --------------------------------------------------------------------------------------


def test_shards(checkpoint, exported, tmp_path):
    """Several small files and an index; the same weights."""
    export_qwen2(checkpoint, tmp_path / "OUT", max_shard_size=100_000)
    for part in ("", "visual"):
        files = sorted((tmp_path / "OUT" / part).glob("*.safetensors"))
        assert len(files) > 2
        weights = {name: tensor for file in files for name, tensor in load_file(file).items()}
        expected = load_file(exported / part / "model.safetensors")
        assert weights.keys() == expected.keys()
        assert all(torch.equal(weights[name], tensor) for name, tensor in expected.items())
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "OUT")
    assert load_visual(tmp_path / "OUT" / "visual")


def test_dtypes_are_kept(checkpoint, tmp_path):
    def halve(weights):
        for name, tensor in weights.items():
            weights[name] = tensor.to(torch.bfloat16)

    export_qwen2(copy_of(checkpoint, tmp_path / "DIR", halve), tmp_path / "OUT")
    for part in ("", "visual"):
        weights = load_file(tmp_path / "OUT" / part / "model.safetensors")
        assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    config = json.loads((tmp_path / "OUT" / "config.json").read_text())
    assert config["dtype"] == config["torch_dtype"] == "bfloat16"
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "OUT", dtype="auto").dtype == (
        torch.bfloat16
    )


def test_mixed_dtypes_have_one_that_is_exact_for_each(checkpoint, tmp_path):
    def mix(weights):
        weights["transformer.wte.weight"] = weights["transformer.wte.weight"].half()
        weights["lm_head.weight"] = weights["lm_head.weight"].bfloat16()

    result = export_qwen2(copy_of(checkpoint, tmp_path / "DIR", mix), tmp_path / "OUT")
    assert result.dtype == torch.float32


def test_rope_base_under_both_names(checkpoint, tmp_path):
    folder = copy_of(checkpoint, tmp_path / "DIR", config={"rotary_emb_base": 5000})
    export_qwen2(folder, tmp_path / "OUT")
    config = json.loads((tmp_path / "OUT" / "config.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 5000
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "OUT")
    ids = random_ids(9)
    with torch.inference_mode():
        expected = load_model(folder).eval()(ids).logits
        torch.testing.assert_close(model(ids).logits, expected, rtol=0, atol=1e-5)


def test_tied_embeddings(checkpoint, tmp_path):
    def untie(weights):
        del weights["lm_head.weight"]

    folder = copy_of(checkpoint, tmp_path / "DIR", untie, {"tie_word_embeddings": True})
    export_qwen2(folder, tmp_path / "OUT")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "OUT")
    ids = random_ids(9)
    with torch.inference_mode():
        expected = load_model(folder).eval()(ids).logits
        torch.testing.assert_close(model(ids).logits, expected, rtol=0, atol=1e-5)


def test_frequencies_of_published_checkpoints_are_left_out(checkpoint, exported, tmp_path):
    def add(weights):
        weights["transformer.rotary_emb.inv_freq"] = torch.ones(16)

    export_qwen2(copy_of(checkpoint, tmp_path / "DIR", add), tmp_path / "OUT")
    held = load_file(tmp_path / "OUT" / "model.safetensors")
    assert held.keys() == load_file(exported / "model.safetensors").keys()


def test_command(checkpoint, exported, tmp_path, run):
    out = tmp_path / "new" / "OUT"
    done = run(checkpoint, out, "--to", "qwen2")
    assert "the same up to 256 tokens" in done.output
    names = sorted(str(path.relative_to(out)) for path in out.rglob("*"))
    assert names == [
        *("config.json", "generation_config.json", "model.safetensors", "tokenizer.json"),
        *("tokenizer_config.json", "visual", "visual/config.json", "visual/model.safetensors"),
    ]
    for name in names:
        if (out / name).is_file():
            assert (out / name).read_bytes() == (exported / name).read_bytes()
    assert [path.name for path in out.parent.iterdir()] == ["OUT"]


def test_pickles_only_when_asked_for(checkpoint, exported, tmp_path, run):
    folder = copy_of(checkpoint, tmp_path / "DIR")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    assert "--allow-pickle" in run(folder, tmp_path / "OUT", code=2).output
    assert not (tmp_path / "OUT").exists()
    run(folder, tmp_path / "OUT", "--allow-pickle")
    for part in ("", "visual"):
        name = f"{part}/model.safetensors".lstrip("/")
        assert (tmp_path / "OUT" / name).read_bytes() == (exported / name).read_bytes()


def test_pickled_tensors_that_share_memory_or_are_transposed(checkpoint, tmp_path):
    """safetensors writes neither."""
    folder = copy_of(checkpoint, tmp_path / "DIR")
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] = weights["transformer.wte.weight"]
    transposed = "transformer.h.0.attn.c_proj.weight"
    weights[transposed] = weights[transposed].T
    torch.save(weights, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    export_qwen2(folder, tmp_path / "OUT", allow_pickle=True)
    held = load_file(tmp_path / "OUT" / "model.safetensors")
    assert torch.equal(held["lm_head.weight"], held["model.embed_tokens.weight"])
    assert torch.equal(held["model.layers.0.self_attn.o_proj.weight"], weights[transposed])


# ---- what is refused ----------------------------------------------------------------------------


def refused(run, checkpoint, out, message):
    """One line, exit code 2, and nothing is left behind."""
    before = sorted(out.parent.iterdir())
    output = run(checkpoint, out, code=2).output
    assert output.startswith("Error: ") and output.count("\n") == 1, output
    assert message in output
    assert sorted(out.parent.iterdir()) == before


@pytest.mark.parametrize("kind", ["file", "directory", "dangling link"])
def test_an_existing_out(checkpoint, tmp_path, run, kind):
    out = tmp_path / "OUT"
    if kind == "file":
        out.write_text("mine")
    elif kind == "directory":
        out.mkdir()
    else:
        out.symlink_to(tmp_path / "nowhere")
    refused(run, checkpoint, out, f"OUT must not exist yet; got {out}")


def test_no_checkpoint(tmp_path, run):
    refused(run, tmp_path / "DIR", tmp_path / "OUT", "checkpoint must be a directory; got ")
    (tmp_path / "DIR").mkdir()
    refused(run, tmp_path / "DIR", tmp_path / "OUT", "checkpoint has no config.json")


def test_an_adapter(ours, tmp_path, run):
    import copy

    import peft

    adapter = tmp_path / "model"
    peft.get_peft_model(copy.deepcopy(ours), lora_config(ours)).save_pretrained(adapter)
    refused(run, adapter, tmp_path / "OUT", "merge it first (monkey merge ")


@pytest.mark.parametrize(
    "config, message",
    [
        (
            {"no_bias": False},
            "no_bias must be true, as only q, k and v have a bias there; got false",
        ),
        ({"rotary_pct": 0.5}, "rotary_pct must be 1, as whole heads are rotated there; got 0.5"),
        (
            {"num_attention_heads": 128, "kv_channels": 1},
            "kv_channels must be even, as its halves are rotated; got 1",
        ),
        ({"visual": {"add_window": True}}, "TextMonkey"),
        ({"visual": 3}, "visual must be an object; got 3"),
        ({"num_hidden_layers": 3}, "num_hidden_layers must be at most 2"),
        ({"num_hidden_layers": 1}, "unexpected transformer.h.1."),
        ({"vocab_size": 641}, "transformer.wte.weight must be [641, 128], got [640, 128]"),
    ],
    ids=str,
)
def test_what_qwen2_or_the_config_has_not(checkpoint, tmp_path, run, config, message):
    refused(run, copy_of(checkpoint, tmp_path / "DIR", config=config), tmp_path / "OUT", message)


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("transformer.h.0.ln_1.weight", None, "missing transformer.h.0.ln_1.weight"),
        ("transformer.h.0.mlp.w3.weight", 0.0, "unexpected transformer.h.0.mlp.w3.weight"),
        (
            "transformer.h.1.mlp.w1.weight",
            float("nan"),
            "holds NaN or infinity in transformer.h.1.",
        ),
        (f"{PREFIX}proj", float("inf"), f"holds NaN or infinity in {PREFIX}proj"),
        ("transformer.wte.weight", torch.int8, "must be a tensor of floats, got torch.int8"),
    ],
    ids=str,
)
def test_broken_weights(checkpoint, tmp_path, run, name, value, message):
    def change(weights):
        if value is None:
            del weights[name]
        elif isinstance(value, torch.dtype):
            weights[name] = weights[name].to(value)
        else:
            weights.setdefault(name, torch.zeros(4)).view(-1)[3] = value

    refused(run, copy_of(checkpoint, tmp_path / "DIR", change), tmp_path / "OUT", message)


def test_nothing_is_left_where_writing_fails(checkpoint, tmp_path, run, monkeypatch):
    from monkey_model.serving import export

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export.GenerationConfig, "save_pretrained", full)
    refused(run, checkpoint, tmp_path / "OUT", "No space left on device")
