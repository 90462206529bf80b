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

# Around a special token that is meant as text. Unicode keeps these two for such internal use: they
# are no characters, and occur in no text.
_MARKS = ("\ufdd0", "\ufdd1")

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
def _pattern(special: tuple[str, ...], escaped: tuple[str, ...]) -> re.Pattern[str]:
    """Matches a token of ``escaped`` within marks (group 1), or one of ``special`` (group 2)."""

    def any_of(tokens: tuple[str, ...]) -> str:
        longest_first = sorted(tokens, key=len, reverse=True)
        return "|".join(map(re.escape, longest_first)) or "(?!)"

    start, end = _MARKS
    return re.compile(f"{start}({any_of(escaped)}){end}|({any_of(special)})")


def escape(text: str, tokens: tuple[str, ...]) -> str:
    """``text`` with marks around each of ``tokens``: :func:`split` takes them for plain text."""
    start, end = _MARKS
    return _pattern(tokens, ()).sub(rf"{start}\2{end}", text)


def split(name: str, text: str, special: tuple[str, ...], tokens: tuple[str, ...]) -> list[Piece]:
    """The pieces of a text, in NFC, as upstream reads it.

    Between the tags of an image every other token is part of the image's name.

    Args:
        name: of the text, in errors.
        text: the text.
        special: tokens that count as such; the others are plain text.
        tokens: all special tokens; those that :func:`escape` marked lose the marks.

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
    plain, end = "", 0  # the text since the last piece; how far the text is read
    opened: int | None = None  # where the image span begins that is open
    for match in _pattern(special, tokens).finditer(text):
        plain += text[end : match.start()]
        end = match.end()
        literal, token = match.groups()
        if literal is not None or (opened is not None and token not in (IMAGE_START, IMAGE_END)):
            plain += literal or token
        elif token == IMAGE_END:
            if opened is None:
                raise ValueError(
                    f"{name} must have an {IMAGE_START} before the {IMAGE_END} at character "
                    f"{match.start()}; got none"
                )
            pieces.append(Piece("image", plain))
            plain, opened = "", None
        elif opened is not None:
            raise ValueError(
                f"{name} must have an {IMAGE_END} between the {IMAGE_START} at character {opened} "
                f"and the next at {match.start()}; got none"
            )
        else:
            if plain:
                pieces.append(Piece("text", plain))
            plain = ""
            if token == IMAGE_START:
                opened = match.start()
            else:
                pieces.append(Piece("token", token))
    if opened is not None:
        raise ValueError(
            f"{name} must have an {IMAGE_END} after the {IMAGE_START} at character {opened}; got "
            "none"
        )
    plain += text[end:]
    return [*pieces, Piece("text", plain)] if plain else pieces


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
            prompt += "".join(f"<box>({a},{b}),({c},{d})</box>" for a, b, c, d in element["box"])
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
            parts.append({"text": plain})
        if (key := next(pieces, None)) is not None:
            parts.append({"image" if key == "img" else key: next(pieces)})
    return parts
