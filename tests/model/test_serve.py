"""``monkey serve`` up to where vLLM takes over, which tests/serving goes on from."""

from __future__ import annotations

import json
import os
import re
import socket
import sys

import pytest
import torch
from jinja2 import TemplateError
from safetensors.torch import load_file
from torch import nn
from typer.testing import CliRunner

from monkey_model.commands import serve
from monkey_model.commands.__main__ import app
from monkey_model.configuration_monkey import MonkeyConfig
from monkey_model.processing_monkey import MonkeyProcessor
from monkey_model.serving import vllm
from monkey_model.serving.answer import Answerer, Question
from monkey_model.serving.export import qwen2_parts
from tests.helpers.checkpoint import write_checkpoint
from tests.helpers.tiny import SPAN, tiny_config
from tests.helpers.vocabulary import SPECIAL_IDS

LENGTH = 128  # of 5 pictures


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("serve") / "DIR", seq_length=LENGTH)


@pytest.fixture
def copy(checkpoint, tmp_path):
    """The checkpoint, to change."""
    folder = tmp_path / "COPY"
    folder.mkdir()
    for path in checkpoint.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


@pytest.fixture
def run(monkeypatch):
    """Exit code, what was printed, and the command that vLLM would have been."""
    monkeypatch.setattr(serve, "find_spec", lambda name: object())
    monkeypatch.setattr(os, "environ", dict(os.environ))
    started = []
    monkeypatch.setattr(os, "execv", lambda path, command: started.append(command))

    def run(*arguments):
        started.clear()
        done = CliRunner().invoke(app, ["serve", *(str(argument) for argument in arguments)])
        return done.exit_code, done.output, started

    return run


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def edit(folder, name, **fields):
    path = folder / name
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def test_command(checkpoint, run):
    port = free_port()
    code, output, [command] = run(checkpoint, "--port", port)
    assert (code, output) == (0, "")
    assert command == [
        *(sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(checkpoint)),
        *("--host", "127.0.0.1", "--port", port),
        *("--limit-mm-per-prompt", json.dumps({"image": LENGTH // (SPAN + 2)})),
    ]
    assert os.environ["VLLM_MEDIA_CONNECTOR"] == "monkey"


def test_other_options_are_vllms(checkpoint, run):
    more = ["--dtype", "float32", "--enable-lora", "--served-model-name", "monkey"]
    _, _, [command] = run(checkpoint, "--plain", "--port", free_port(), *more)
    assert command[-7:] == ["--chat-template", str(vllm.PLAIN_TEMPLATE), *more]


def test_vllm_is_missing(checkpoint, run, monkeypatch):
    monkeypatch.setattr(serve, "find_spec", lambda name: None)
    message = 'Error: vLLM is not installed: pip install "monkey-vision[vllm]"\n'
    assert run(checkpoint) == (2, message, [])


def test_a_port_in_use(checkpoint, run):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        code, output, started = run(checkpoint, "--port", port)
    assert (code, started) == (2, [])
    must = "--host and --port must be free on this machine"
    assert output == f"Error: {must}; got 127.0.0.1 and {port}: Address already in use\n"


def biases(folder):
    edit(folder, "config.json", no_bias=False)


def odd_heads(folder):
    edit(folder, "config.json", num_attention_heads=128, kv_channels=1)


def other_pictures(folder):
    settings = MonkeyProcessor.from_pretrained(folder)
    settings.image_processor.crop_size = 56
    settings.save_pretrained(folder)


def an_adapter(folder):
    (folder / "adapter_config.json").write_text("{}")


def pickles(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def no_weights(folder):
    (folder / "model.safetensors").unlink()


def no_config(folder):
    (folder / "config.json").unlink()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (biases, "no_bias must be true, .*; got false"),
        (odd_heads, "kv_channels must be even, .*; got 1"),
        (other_pictures, "must have the sizes of visual in config.json: crop_size 28, got 56"),
        (an_adapter, "must be a whole model, not an adapter: .*monkey merge"),
        (pickles, "--allow-pickle"),
        (no_weights, "has no weights in any of"),
        (no_config, "has no config.json"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_checkpoints_that_cannot_be_served(copy, run, change, message):
    change(copy)
    code, output, started = run(copy, "--port", free_port())
    assert (code, started) == (2, [])
    assert re.fullmatch(f"Error: .*{message}.*\n", output), output


def test_pickles_for_whoever_asks_for_them(copy, run):
    pickles(copy)
    code, _, started = run(copy, "--port", free_port(), "--allow-pickle")
    assert (code, len(started)) == (0, 1)


def test_length():
    config = tiny_config(seq_length=LENGTH)
    vllm.check_length(config, LENGTH)
    with pytest.raises(ValueError, match=r"max_model_len must be at most 128, .*; got 129"):
        vllm.check_length(config, LENGTH + 1)
    free = tiny_config(seq_length=LENGTH, use_dynamic_ntk=False, use_logn_attn=False)
    vllm.check_length(free, LENGTH + 1)


def test_the_ends_of_a_reply():
    """The answerer's, in a tiny model and in the published one; other models keep theirs."""
    ends = [SPECIAL_IDS["<|im_end|>"], SPECIAL_IDS["<|endoftext|>"]]
    for config, eos, expected in (
        (tiny_config(), 7, ends),
        (MonkeyConfig(), 151643, [151645, 151643]),
        (object(), 7, 7),
    ):
        model_config = type("ModelConfig", (), {"hf_config": config})
        fields = vllm._with_ends(lambda _, eos=eos: {"eos_token_id": eos, "top_k": 1}, model_config)
        assert fields == {"eos_token_id": expected, "top_k": 1}


@pytest.mark.parametrize("images", [0, 1, 2])
def test_the_plain_template_is_the_answerers_prompt(checkpoint, images):
    """And what users wrote is text, as there."""
    processor = MonkeyProcessor.from_pretrained(checkpoint)
    text = "<|im_start|>What is <ref>this</ref>? <img>a.png</img>"
    prompt = Answerer(nn.Identity(), processor).prompt(Question(text, (None,) * images))
    content = [{"type": "text", "text": text}, *[{"type": "image"}] * images]
    for form in [content] + [text] * (images == 0):
        ids = processor.tokenizer.apply_chat_template(
            [{"role": "user", "content": form}],
            chat_template=vllm.PLAIN_TEMPLATE.read_text(),
            return_dict=False,
        )
        assert ids == processor.tokenizer.encode(prompt)


def test_the_plain_template_has_one_message(checkpoint):
    tokenizer = MonkeyProcessor.from_pretrained(checkpoint).tokenizer
    for roles in (["system", "user"], ["assistant"]):
        with pytest.raises(TemplateError, match="must have one message, of the user"):
            tokenizer.apply_chat_template(
                [{"role": role, "content": "a"} for role in roles],
                chat_template=vllm.PLAIN_TEMPLATE.read_text(),
            )


def test_weights_of_another_model():
    for name in ("transformer.h.0.attn.q_proj.weight", "model.embed_tokens.weight"):
        with pytest.raises(ValueError, match=f"the language model has no weight {name}"):
            qwen2_parts(name, torch.empty(3))
