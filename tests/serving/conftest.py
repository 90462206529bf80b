"""A vLLM server on a tiny checkpoint, and this package's own answers beside it.

:file:`tests/serving/run` makes the environment that these tests need.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from monkey_model import load_model
from monkey_model.checkpoint import PREFIX
from monkey_model.commands.demo_checkpoint import demo_config, write_demo_checkpoint
from monkey_model.processing_monkey import MonkeyProcessor
from monkey_model.serving.answer import Answerer
from monkey_model.training.peft_model import MonkeyPeftModel, load_peft_model
from monkey_model.training.peft_presets import lora_config

LENGTH = 4096  # of two pictures, and some text
REPLY = 16
# Of the server: GB for its cache; nothing is sent to anyone.
SETTINGS = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}


def write_published(folder: Path) -> Path:
    """A checkpoint as upstream ships it, whose own code must not be run.

    No weight in it is a no-op, and replies are no loops of two tokens.
    """
    write_demo_checkpoint(folder, demo_config(seq_length=LENGTH))
    generator = torch.Generator().manual_seed(1)

    def scale(name: str) -> float:
        return 0.05 if name.startswith(PREFIX) else 0.3

    weights = {
        name: weight + scale(name) * torch.randn(weight.shape, generator=generator)
        for name, weight in load_file(folder / "model.safetensors").items()
    }
    weights["transformer.rotary_emb.inv_freq"] = torch.ones(32)
    end = MonkeyProcessor.from_pretrained(folder).tokenizer.eod_id
    config = json.loads((folder / "config.json").read_text())
    for path in folder.iterdir():
        if path.name != "qwen.tiktoken":
            path.unlink()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    settings = {
        "config.json": {
            **config,
            "auto_map": {
                "AutoConfig": "remote.MonkeyConfig",
                "AutoModelForCausalLM": "remote.MonkeyLMHeadModel",
            },
        },
        "tokenizer_config.json": {
            "model_max_length": 8192,
            "tokenizer_class": "QWenTokenizer",
            "auto_map": {"AutoTokenizer": ["remote.QWenTokenizer", None]},
        },
        "generation_config.json": {"eos_token_id": end, "pad_token_id": end},
    }
    for name, content in settings.items():
        (folder / name).write_text(json.dumps(content))
    (folder / "remote.py").write_text("raise SystemExit('code of the checkpoint was run')\n")
    return folder


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Path:
    return write_published(tmp_path_factory.mktemp("serving") / "DIR")


@pytest.fixture(scope="session")
def adapter(checkpoint) -> Path:
    """LoRA of the language model, as `monkey finetune` would train it."""
    folder = checkpoint.parent / "adapter"
    model = load_model(checkpoint)
    torch.manual_seed(2)
    config = lora_config(
        model, r=4, train_resampler=False, train_vit_lora=False, init_lora_weights=False
    )
    MonkeyPeftModel(model, config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def answerer(checkpoint) -> Answerer:
    return Answerer.from_pretrained(checkpoint, chat=True, max_new_tokens=REPLY)


@pytest.fixture(scope="session")
def adapted(checkpoint, adapter) -> Answerer:
    model = load_peft_model(load_model(checkpoint), adapter).merge_and_unload()
    processor = MonkeyProcessor.from_pretrained(checkpoint)
    return Answerer(model, processor, chat=True, max_new_tokens=REPLY)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def serving(checkpoint: Path, *options: str) -> Iterator[str]:
    """``monkey serve``, from when it answers on; its base address."""
    port = free_port()
    monkey = Path(sys.executable).with_name("monkey")
    process = subprocess.Popen(
        [monkey, "serve", checkpoint, "--port", str(port), "--dtype", "float32", *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env={**os.environ, **SETTINGS},
    )
    assert process.stdout is not None
    log: list[str] = []
    try:
        for line in process.stdout:
            log.append(line)
            if "Application startup complete" in line:
                break
        else:
            pytest.fail(f"the server ended with {process.wait()}:\n{''.join(log[-60:])}")
        # What it prints later must not fill the pipe.
        reader = threading.Thread(target=log.extend, args=(process.stdout,), daemon=True)
        reader.start()
        yield f"http://127.0.0.1:{port}/v1"
        assert process.poll() is None, f"the server has ended:\n{''.join(log[-60:])}"
    finally:
        process.terminate()
        process.wait()
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # a worker that outlived it


@pytest.fixture(scope="session")
def server(checkpoint, adapter) -> Iterator[str]:
    with serving(
        checkpoint,
        *("--served-model-name", "monkey", "--enforce-eager", "--trust-remote-code"),
        *("--enable-lora", "--max-lora-rank", "8", "--lora-modules", f"adapter={adapter}"),
        *("--enable-prompt-tokens-details", "--trust-request-chat-template"),
    ) as address:
        yield address
