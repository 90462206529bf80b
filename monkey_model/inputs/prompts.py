"""What stands in a prompt's text: special tokens, image spans, and text that is only text.

Nothing here knows ids: :mod:`monkey_model.tokenization_qwen` turns the pieces into those.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Collection, Sequence
from functools import lru_cache
from typing import Any, Literal, NamedTuple

ENDOFTEXT, IMSTART, IMEND = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
GROUNDING = ("<ref>", "</ref>", "<box>", "</box>", "<quad>", "</quad>")
IMAGE_START, IMAGE_END, IMAGE_PAD = "<img>", "</img>", "<imgpad>"

# In the order of their ids, which follow the vocabulary's.
SPECIAL_TOKENS = (
    *(ENDOFTEXT, IMSTART, IMEND),
    *(f"<|extra_{i}|>" for i in range(205)),
    *GROUNDING,
    *(IMAGE_START, IMAGE_END, IMAGE_PAD),
)

# Keeps two characters apart and is not encoded: a special token with it inside is plain text.
# Unicode keeps U+FDD0 for such internal use: it is no character, and occurs in no text.
_BREAK = "\ufdd0"

# ChatML, with upstream's default system message.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
    {%- if loop.first and message.role != 'system' -%}
        {{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' -}}
    {%- endif -%}
    {{- '<|im_start|>' + message.role + '\\n' -}}
    {%- if message.content is string -%}
        {{- message.content -}}
    {%- else -%}
        {%- for part in message.content -%}
            {%- if part.type == 'image' -%}
                {{- '<img></img>' -}}
            {%- elif part.type == 'text' -%}
                {{- part.text -}}
            {%- else -%}
                {{- raise_exception("content must have parts of type text or image; got "
                                    + part.type|string) -}}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
    {{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""


class Piece(NamedTuple):
    """Plain text, a special token, or what stands between ``<img>`` and ``</img>``."""

    kind: Literal["text", "token", "image"]
    text: str


@lru_cache(maxsize=32)
def _any_of(tokens: tuple[str, ...]) -> re.Pattern[str]:
    longest_first = sorted(tokens, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")


@lru_cache(maxsize=32)
def _start_of(tokens: tuple[str, ...], keep: tuple[str, ...]) -> re.Pattern[str]:
    """Any character that one of ``tokens`` starts with, but where one of ``keep`` stands."""
    first = "".join(sorted({re.escape(token[0]) for token in tokens}))
    return re.compile(f"(?!{_any_of(keep).pattern})[{first}]")


def escape(text: str, tokens: tuple[str, ...], keep: tuple[str, ...] = ()) -> str:
    """``text`` with a break in each of ``tokens``, whole or in parts, but those in ``keep``.

    Nothing special comes of it, whatever stands before or after it, and no special token before it
    is lost, as NFC would have it where a text starts with a combining character.
    """
    text = unicodedata.normalize("NFC", text)
    start = _BREAK if text and unicodedata.combining(text[0]) else ""
    return start + _start_of(tokens, keep).sub(rf"\g<0>{_BREAK}", text)


def split(name: str, text: str, special: tuple[str, ...]) -> list[Piece]:
    """The pieces of a text, in NFC, as upstream reads it; those of plain text may be empty.

    Between the tags of an image every other token is part of the image's name.

    Args:
        name: of the text, in errors.
        text: the text.
        special: tokens that count as such; the others are plain text.

    Raises:
        TypeError: the text is no string.
        ValueError: ``<img>`` and ``</img>`` do not pair, or are nested.
    """
    if not isinstance(text, str):
        raise TypeError(f"{name} must be a string; got {type(text).__name__}")
    text = unicodedata.normalize("NFC", text)
    # Lone surrogates become U+FFFD, as with tiktoken.
    text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    pieces: list[Piece] = []
    start = 0  # of the next piece
    opened: int | None = None  # where the image span begins that is open

    def add(kind: Literal["text", "image"], stop: int) -> None:
        pieces.append(Piece(kind, text[start:stop].replace(_BREAK, "")))

    for match in _any_of(special).finditer(text):
        token = match[0]
        if opened is not None and token not in (IMAGE_START, IMAGE_END):
            continue
        if token == IMAGE_END:
            if opened is None:
                raise ValueError(
                    f"{name} must have an {IMAGE_START} before the {IMAGE_END} at character "
                    f"{match.start()}; got none"
                )
            add("image", match.start())
            opened = None
        elif opened is not None:
            raise ValueError(
                f"{name} must have an {IMAGE_END} between the {IMAGE_START} at character {opened} "
                f"and the next at {match.start()}; got none"
            )
        else:
            add("text", match.start())
            if token == IMAGE_START:
                opened = match.start()
            else:
                pieces.append(Piece("token", token))
        start = match.end()
    if opened is not None:
        raise ValueError(
            f"{name} must have an {IMAGE_END} after the {IMAGE_START} at character {opened}; got "
            "none"
        )
    add("text", len(text))
    return pieces


def check_no_surrogates(name: str, text: str) -> None:
    """Raise a ValueError, which calls ``text`` by ``name``, where JSON gave half of a character."""
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError(f"{name} must be text; got half of a surrogate pair")


def escape_messages(messages: Any, escape: Callable[[str], str]) -> Any:
    """A copy of chat messages, or of conversations, with ``escape`` applied to their texts."""
    messages = getattr(messages, "messages", messages)
    if isinstance(messages, str):
        return escape(messages)
    if isinstance(messages, (list, tuple)):
        return [escape_messages(message, escape) for message in messages]
    if isinstance(messages, dict):
        return {
            key: escape_messages(value, escape) if key in ("role", "content", "text") else value
            for key, value in messages.items()
        }
    return messages


def check_special(allowed: str | Collection[str], tokens: tuple[str, ...]) -> tuple[str, ...]:
    """``allowed``, upstream's ``allowed_special``, as a tuple of tokens."""
    if isinstance(allowed, str):
        if allowed != "all":
            raise ValueError(
                f"allowed_special must be 'all' or a collection of special tokens; got {allowed!r}"
            )
        return tokens
    if unknown := sorted(set(allowed) - set(tokens)):
        raise ValueError(f"allowed_special must hold special tokens; got {', '.join(unknown)}")
    return tuple(token for token in tokens if token in allowed)


_TAGS = re.compile(r"<(img|ref|box|quad)>(.*?)</\1>", re.DOTALL)
_OPEN_TAG = re.compile("<(img|ref|box|quad)>")


def from_list_format(elements: Sequence[dict[str, Any]], escape: Callable[[str], str]) -> str:
    """See :meth:`monkey_model.tokenization_qwen.QWenTokenizer.from_list_format`."""
    prompt, images = "", 0
    for element in elements:
        if "image" in element:
            images += 1
            prompt += f"Picture {images}:<img>{escape(element['image'])}</img>\n"
        elif "text" in element:
            prompt += element["text"]
        elif "box" in element:
            prompt += f"<ref>{element['ref']}</ref>" if "ref" in element else ""
            for x1, y1, x2, y2 in (map(int, box) for box in element["box"]):
                prompt += f"<box>({x1},{y1}),({x2},{y2})</box>"
        else:
            raise ValueError(
                f"list_format must hold elements with image, text or box; got {element!r}"
            )
    return prompt


def to_list_format(text: str) -> list[dict[str, str]]:
    """See :meth:`monkey_model.tokenization_qwen.QWenTokenizer.to_list_format`."""
    parts: list[dict[str, str]] = []
    # The split gives text, tag, content, text, tag, content, ..., text.
    pieces = iter(_TAGS.split(unicodedata.normalize("NFC", text)))
    for plain in pieces:
        if tag := _OPEN_TAG.search(plain):
            raise ValueError(f"text must close its {tag[0]}; got {plain[tag.start() :][:60]!r}")
        if plain:
            parts.append({"text": plain.replace(_BREAK, "")})
        if (key := next(pieces, None)) is not None:
            parts.append({"image" if key == "img" else key: next(pieces).replace(_BREAK, "")})
    return parts
