"""Upstream's own loop over the crops of a picture, on this project's encoder.

    python examples/drop_in.py PICTURE --checkpoint DIR

Code written for the stock encoder goes on working when the import resolves here: ``encode`` gives
the crops, ``forward(crop, idx)`` the tokens of one crop position. ``encode_images`` gives the same
tokens from one pass over all crops.
"""

from __future__ import annotations

import argparse

import torch

from monkey_model import load_visual


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("picture", help="path of a picture")
    parser.add_argument("--checkpoint", required=True, help="Monkey checkpoint directory")
    options = parser.parse_args()

    encoder = load_visual(options.checkpoint)
    with torch.inference_mode():
        # As upstream's modeling_monkey.py does it: crop after crop, each with its own adapter.
        windows, images_448 = encoder.encode([options.picture])
        crops = [window for row in windows for window in row]
        tokens = [encoder(crop, idx=number) for number, crop in enumerate(crops)]
        tokens.append(encoder(images_448))
        one_by_one = torch.cat(tokens, dim=1)

        at_once = encoder.encode_images([options.picture])

    distance = (at_once - one_by_one).norm() / one_by_one.norm()
    print(f"{list(at_once.shape)}; relative distance of the two: {distance:.1e}")


if __name__ == "__main__":
    main()
