"""Draws an example picture of ``monkey demo``: ``python -m docs.samples``."""

from __future__ import annotations

from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

OUT = Path(__file__).parents[1] / "monkey_model" / "samples" / "market.png"

_FRUIT = (
    ("Apples", "2.40", "#c0392b", 7),
    ("Plums", "3.15", "#6c3483", 9),
    ("Lemons", "0.60", "#f1c40f", 5),
    ("Limes", "0.55", "#58a63c", 6),
)


def draw() -> Image.Image:
    """A stall: fruit to count, prices to read, at 1024x768."""
    picture = Image.new("RGB", (1024, 768), "#dfe9ee")
    pen = ImageDraw.Draw(picture)
    for number in range(16):  # the awning
        left = number * 64
        pen.rectangle((left, 60, left + 63, 150), fill=("#b03a2e", "#fdfefe")[number % 2])
        pen.pieslice((left, 118, left + 63, 182), 0, 180, fill=("#b03a2e", "#fdfefe")[number % 2])
    pen.text((512, 30), "MARIA'S MARKET STALL", "#1b2631", ImageFont.load_default(36), anchor="mm")
    for number, (name, price, colour, count) in enumerate(_FRUIT):
        left = 24 + number * 250
        pen.rectangle((left, 360, left + 226, 600), fill="#a9744f", outline="#6e4a30", width=6)
        for fruit in range(count):
            row, column = divmod(fruit, 3)
            x, y = left + 20 + column * 64, 380 + row * 66
            pen.ellipse((x, y, x + 58, y + 58), fill=colour, outline="#4d2c1d", width=2)
        pen.rectangle((left + 33, 210, left + 193, 340), fill="#1e3d2f", outline="#c8a165", width=6)
        middle = left + 113
        pen.text((middle, 250), name, "white", ImageFont.load_default(30), anchor="mm")
        pen.text((middle, 302), f"{price} / kg", "#f7dc6f", ImageFont.load_default(24), anchor="mm")
    pen.rectangle((0, 600, 1024, 768), fill="#7b5537")
    small = ImageFont.load_default(15)
    pen.text((1000, 745), "Open Tue to Sat, 7 to 13. Cash only.", "#f5e6d3", small, anchor="rm")
    return picture


if __name__ == "__main__":
    draw().quantize(64, dither=Image.Dither.NONE).save(OUT, optimize=True)
