"""Turn a folder of pictures into visual tokens, a few pictures at a time.

    python examples/encode_folder.py PICTURES OUT --checkpoint DIR

``monkey encode`` does the same from the command line; this is the loop to start from when the
tokens go somewhere else.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from safetensors.torch import save_file

from monkey_model import load_visual

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pictures", type=Path, help="folder of pictures")
    parser.add_argument("out", type=Path, help="folder for NAME.safetensors")
    parser.add_argument("--checkpoint", required=True, help="Monkey checkpoint directory")
    parser.add_argument("--batch-size", type=int, default=4)
    options = parser.parse_args()

    on_gpu = torch.cuda.is_available()
    encoder = load_visual(
        options.checkpoint,
        device="cuda" if on_gpu else "cpu",
        dtype=torch.bfloat16 if on_gpu else torch.float32,
    )
    options.out.mkdir(parents=True, exist_ok=True)
    paths = [path for path in sorted(options.pictures.iterdir()) if path.suffix.lower() in SUFFIXES]
    for start in range(0, len(paths), options.batch_size):
        batch = paths[start : start + options.batch_size]
        with torch.inference_mode():
            tokens = encoder.encode_images(batch)  # [pictures, visual tokens, width]
        for path, row in zip(batch, tokens, strict=True):
            file = options.out / f"{path.name}.safetensors"
            save_file({"tokens": row.cpu().contiguous()}, file)
            print(f"{path.name}: {list(row.shape)} -> {file}")


if __name__ == "__main__":
    main()
