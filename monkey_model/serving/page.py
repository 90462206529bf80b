"""Pages of HTML that need nothing else: a template, a style and script for all, data in JSON."""

from __future__ import annotations

import base64
import io
import json
from importlib.resources import files
from typing import Any

from PIL import Image

from monkey_model.inputs.images import load_image


def build_page(package: str, template: str, data: Any) -> str:
    """The page as HTML.

    Args:
        package: of monkey_model, that has the template.
        template: its file, with ``{{STYLE}}`` and ``{{SCRIPT}}`` at the beginning of a style and of
            a module element, and ``{{DATA}}`` in a script element of JSON.
        data: what JSON can hold.
    """
    folder = files("monkey_model")
    page = (folder / package / template).read_text(encoding="utf-8")
    for place, file in (("{{STYLE}}", "page.css"), ("{{SCRIPT}}", "page.js")):
        page = page.replace(place, (folder / "serving" / file).read_text(encoding="utf-8"))
    head, tail = page.split("{{DATA}}")
    # In a script element only "<" could end the data.
    return head + json.dumps(data).replace("<", "\\u003c") + tail


def data_url(image: Image.Image, kind: str, **options: Any) -> str:
    """A picture in an address.

    Args:
        image: the picture.
        kind: ``"JPEG"`` or ``"PNG"``.
        options: of Pillow's writer.
    """
    file = io.BytesIO()
    image.save(file, kind, **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"


def picture(path: str, longest: int) -> dict[str, str]:
    """A picture file for a page, or why there is none.

    Args:
        path: of the file.
        longest: side in pixels, at most.

    Returns:
        The ``"path"``, and the picture's address as ``"src"`` or an ``"error"``.
    """
    try:
        image = Image.fromarray(load_image(path).numpy())
    except (OSError, ValueError) as error:
        return {"path": path, "error": str(error)}
    image.thumbnail((longest, longest))
    return {"path": path, "src": data_url(image, "JPEG", quality=85)}
