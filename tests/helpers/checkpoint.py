"""A checkpoint directory small enough to train in a test, and pictures to train it on."""

from __future__ import annotations

import json
from pathlib import Path

from PIL import Image

from monkey_model.commands.demo_checkpoint import write_demo_checkpoint
from monkey_model.image_processing_monkey import MonkeyImageProcessor
from monkey_model.processing_monkey import MonkeyProcessor
from tests.helpers.tiny import QUERIES, SIDE, SPAN, tiny_config
from tests.helpers.vocabulary import tiny_tokenizer

COLOURS = ("red", "green", "blue", "white")


def tiny_processor(folder: Path) -> MonkeyProcessor:
    """Writes the tokenizer's vocabulary to ``folder``."""
    return MonkeyProcessor(
        MonkeyImageProcessor(crop_size=SIDE, n_queries=QUERIES), tiny_tokenizer(folder, SPAN)
    )


def write_checkpoint(folder: Path, **settings) -> Path:
    """The public command's, in the size of the tests."""
    write_demo_checkpoint(folder, tiny_config(**{"seq_length": 256, **settings}))
    return folder


def write_data(folder: Path, records: int = 16, name: str = "data.json") -> Path:
    """Conversations: a picture of one colour, its name."""
    folder.mkdir(parents=True, exist_ok=True)
    for colour in COLOURS:
        Image.new("RGB", (60, 40), colour).save(folder / f"{colour}.png")
    conversations = [
        {
            "id": f"r{number}",
            "conversations": [
                {"from": "user", "value": f"<img>{colour}.png</img> Colour? Answer: "},
                {"from": "assistant", "value": colour},
            ],
        }
        for number in range(records)
        for colour in [COLOURS[number % len(COLOURS)]]
    ]
    (folder / name).write_text(json.dumps(conversations))
    return folder / name
