"""``monkey demo-checkpoint``: a small checkpoint of random weights, to try the commands on."""

from __future__ import annotations

import base64
import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from monkey_model.commands.console import (
    err_console,
    one_error,
    say,
)
from monkey_model.files import make_public, writing
from monkey_model.inputs.fetch import shown

if TYPE_CHECKING:
    from monkey_model.configuration_monkey import MonkeyConfig

# Beside all bytes: enough for tokens of several letters, of accents and of whole characters.
_WORDS = "the| the|image| image|Answer| Answer:|user|assistant|system|<|>|<|im|_start|图|é|ing|\n\n"


def vocabulary() -> dict[bytes, int]:
    """The bytes, in the order of the real vocabulary (not that of their values), and some words."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    tokens = [bytes([byte]) for byte in bytes_to_unicode()]
    for word in _WORDS.split("|"):
        data = word.encode()
        tokens += [data[:end] for end in range(2, len(data) + 1)]
    return {token: rank for rank, token in enumerate(dict.fromkeys(tokens))}


def write_vocabulary(directory: Path) -> Path:
    """``qwen.tiktoken`` in ``directory``: a line for each token, its bytes in base64 and its id."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "qwen.tiktoken"
    tokens = vocabulary().items()
    path.write_text("".join(f"{base64.b64encode(token).decode()} {id}\n" for token, id in tokens))
    return path


def demo_config(**settings: Any) -> MonkeyConfig:
    """A model of few weights that reads images as the real one does: 1280 tokens for each."""
    from monkey_model.configuration_monkey import MonkeyConfig
    from monkey_model.inputs.prompts import IMAGE_START, SPECIAL_TOKENS

    words = len(vocabulary())
    visual = {
        "image_size": 896,
        "patch_size": 14,
        "width": 32,
        "layers": 2,
        "heads": 2,
        "mlp_ratio": 2.0,
        "output_dim": 128,
        "image_start_id": words + SPECIAL_TOKENS.index(IMAGE_START),
    }
    defaults: dict[str, Any] = {
        "vocab_size": words + len(SPECIAL_TOKENS),
        "hidden_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "kv_channels": 64,
        "intermediate_size": 256,
        "seq_length": 2048,
        "visual": visual,
    }
    return MonkeyConfig(**{**defaults, **settings})


@contextlib.contextmanager
def _made(directory: Path) -> Iterator[str]:
    """A folder in ``directory``, which goes again if it was made for nothing."""
    made = not directory.exists()
    directory.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(dir=directory, prefix=".monkey-") as place:
            yield place
    except BaseException:
        if made:
            shutil.rmtree(directory, ignore_errors=True)  # files may have been moved into it
        raise


def write_demo_checkpoint(directory: str | Path, config: MonkeyConfig | None = None) -> None:
    """A checkpoint in the published layout: weights of seed 0, vocabulary, tokenizer, processor.

    Args:
        directory: is made; may be there, if it is empty.
        config: of the model; by default :func:`demo_config`'s.

    Raises:
        OSError: it cannot be written.
        ValueError: ``directory`` is a file, or has files in it.
    """
    import torch

    from monkey_model.modeling_monkey import MonkeyLMHeadModel
    from monkey_model.processing_monkey import MonkeyProcessor

    directory = Path(directory)
    if directory.exists() and not (directory.is_dir() and not any(directory.iterdir())):
        raise ValueError(f"DIRECTORY must not exist yet, or be empty; got {directory}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = MonkeyLMHeadModel(demo_config() if config is None else config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("lora_b.weight"):  # zero otherwise: an adapter that does nothing
                    parameter.normal_(std=0.05)
    with writing(directory), _made(directory) as place:
        model.save_pretrained(place)
        write_vocabulary(Path(place))
        MonkeyProcessor.from_pretrained(place).save_pretrained(place)
        # The config last: without one it is no checkpoint.
        for file in sorted(Path(place).iterdir(), key=lambda file: file.name == "config.json"):
            make_public(file)
            os.replace(file, directory / file.name)


def demo_checkpoint(
    directory: Annotated[Path, typer.Argument(help="Where to; must not exist yet, or be empty.")],
) -> None:
    """Write a small checkpoint of random weights, to try encode, ask, finetune and merge on."""
    with one_error():
        write_demo_checkpoint(directory)
    say(err_console, f"random weights, whose answers carry no meaning -> {shown(str(directory))}")
