"""Fine-tune on ten pictures that this script draws, then ask about one of them.

    python examples/finetune_ten_pictures.py OUT --checkpoint DIR

With a published checkpoint it wants a GPU. ``monkey demo-checkpoint DIR`` makes a tiny random one,
on which it runs on a CPU in a minute and learns nothing worth having: it shows the steps.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from PIL import Image, ImageDraw

from monkey_model.serving.answer import Answerer, Question
from monkey_model.training.config import FinetuneConfig
from monkey_model.training.finetune import finetune

COLOURS = ("red", "green", "blue", "orange", "purple")
SHAPES = ("circle", "square")


def draw_pictures(folder: Path) -> Path:
    """Ten pictures and the conversations about them, in upstream's format."""
    folder.mkdir(parents=True, exist_ok=True)
    conversations = []
    for colour in COLOURS:
        for shape in SHAPES:
            picture = Image.new("RGB", (320, 240), "white")
            draw = ImageDraw.Draw(picture)
            (draw.ellipse if shape == "circle" else draw.rectangle)((90, 50, 230, 190), colour)
            name = f"{colour}-{shape}.png"
            picture.save(folder / name)
            conversations.append(
                {
                    "id": name,
                    "conversations": [
                        {"from": "user", "value": f"<img>{name}</img> What is this? Answer: "},
                        {"from": "assistant", "value": f"A {colour} {shape}."},
                    ],
                }
            )
    file = folder / "conversations.json"
    file.write_text(json.dumps(conversations, indent=1))
    return file


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="folder for pictures and results")
    parser.add_argument("--checkpoint", required=True, help="Monkey checkpoint directory")
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args()

    on_gpu = torch.cuda.is_available()
    data = draw_pictures(options.out / "pictures")
    config = FinetuneConfig(
        checkpoint=options.checkpoint,
        data=str(data),
        output_dir=str(options.out / "run"),
        dtype="bfloat16" if on_gpu else "float32",
        training={
            "max_steps": options.steps,
            "learning_rate": 1e-4,
            "gradient_accumulation_steps": 1,
            "dataloader_num_workers": 0,  # ten pictures need no processes of their own
            "logging_steps": 1,
            "use_cpu": not on_gpu,
        },
    )
    finetune(config)  # prints what trains

    answerer = Answerer.from_pretrained(
        options.out / "run" / "model", device="cuda" if on_gpu else "cpu", max_new_tokens=16
    )
    picture = str(data.parent / "red-circle.png")
    print(answerer.answer([Question("What is this?", (picture,))])[0])


if __name__ == "__main__":
    main()
