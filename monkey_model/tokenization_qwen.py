"""Upstream's tokenizer on the ``tokenizers`` library: ``QWenTokenizer``.

A checkpoint's ``qwen.tiktoken`` goes through transformers' own converter, so there is no BPE here:
only what is Monkey's, the image spans. In ids a span is ``<img>``, ``image_span`` positions and
``</img>``: one position for each byte of the path's UTF-8, whose id is the value of the byte, then
``<imgpad>``.

Which tokens of a text are special is the caller's choice, as with upstream: all of them, but for
those that ``allowed_special`` leaves out, and those that :meth:`QWenTokenizer.escape` wraps.

Source: upstream ``monkey_model/tokenization_qwen.py``.
"""

from __future__ import annotations

import base64
import os
import re
import unicodedata
from collections.abc import Collection, Sequence
from functools import lru_cache
from typing import Any

from tokenizers import Tokenizer, normalizers
from transformers import BatchEncoding
from transformers.convert_slow_tokenizer import TikTokenConverter, bytes_to_unicode
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX
from transformers.tokenization_utils_base import TruncationStrategy
from transformers.tokenization_utils_tokenizers import TokenizersBackend

from monkey_kernels.checks import check_positive_int

ENDOFTEXT, IMSTART, IMEND = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
IMAGE_START, IMAGE_END, IMAGE_PAD = "<img>", "</img>", "<imgpad>"
GROUNDING = ("<ref>", "</ref>", "<box>", "</box>", "<quad>", "</quad>")

# In the order of their ids, which follow the vocabulary's.
SPECIAL_TOKENS = (
    *(ENDOFTEXT, IMSTART, IMEND),
    *(f"<|extra_{i}|>" for i in range(205)),
    *GROUNDING,
    *(IMAGE_START, IMAGE_END, IMAGE_PAD),
)

# Around a special token that is meant as text. Unicode reserves these two for such internal use:
# they are no characters, and occur in no text.
_LITERAL_START, _LITERAL_END = "\ufdd0", "\ufdd1"

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
                {{- raise_exception("content must be of type text or image; got " + part.type) -}}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
    {{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""

_LIST_FORMAT = re.compile(r"<(img|ref|box|quad)>(.*?)</\1>", re.DOTALL)


def _convert(vocab_file: str) -> Tokenizer:
    """The tokenizer of a ``qwen.tiktoken``: a line for each token, its bytes in base64 and id."""
    converter = TikTokenConverter(
        vocab_file, pattern=PRETOKENIZE_REGEX, extra_special_tokens=SPECIAL_TOKENS
    )
    try:
        tokenizer = converter.converted()
    except FileNotFoundError:
        raise FileNotFoundError(f"vocab_file does not exist: {vocab_file}") from None
    except ValueError as error:
        raise ValueError(f"vocab_file {vocab_file} is no tiktoken vocabulary: {error}") from None
    ids = sorted(tokenizer.get_vocab(with_added_tokens=False).values())
    if ids != list(range(len(ids))) or len(ids) < 256:
        raise ValueError(
            f"vocab_file {vocab_file} must number its tokens from 0 on and hold all 256 bytes; got "
            f"{len(ids)} tokens"
        )
    tokenizer.normalizer = normalizers.NFC()
    return tokenizer


@lru_cache(maxsize=32)
def _pattern(special: tuple[str, ...], literal: tuple[str, ...]) -> re.Pattern[str]:
    """Matches an escaped token (group 1) of ``literal``, or a token (group 2) of ``special``."""

    def any_of(tokens: tuple[str, ...]) -> str:
        longest_first = sorted(tokens, key=len, reverse=True)
        return "|".join(map(re.escape, longest_first)) or "(?!)"

    return re.compile(f"{_LITERAL_START}({any_of(literal)}){_LITERAL_END}|({any_of(special)})")


class QWenTokenizer(TokenizersBackend):
    """Upstream's tokenizer: the same ids, and the same text back.

    Calls take what transformers' tokenizers take for one text or a list of texts: padding (on the
    left by default, with ``<|endoftext|>``), truncation, ``return_tensors``. Beside that:

    - ``allowed_special``: ``"all"`` (default, as upstream), or the special tokens that count as
      such; the others are read as text. ``split_special_tokens=True`` is the same as none.
    - Text is brought to NFC first, paths included, as upstream does.
    - In a path every special token but the two tags is part of the path's name.
    - A span is never truncated: that is an error.

    Args:
        vocab_file: ``qwen.tiktoken``.
        tokenizer_file: ``tokenizer.json``, as :meth:`save_pretrained` writes it. It outranks
            vocab_file, which takes longer to convert.
        image_span: positions of an image, crops_per_image * n_queries.
        kwargs: transformers' own: padding_side, pad_token, model_max_length, chat_template, ...

    Raises:
        FileNotFoundError: no such vocabulary.
        TypeError: a text that is no string.
        ValueError: neither file given, or a broken one; in a call: an ``<img>`` without ``</img>``
            or within another, an ``</img>`` without ``<img>``, a path of more bytes than
            positions, an image span that does not survive truncation, an ``allowed_special`` that
            is no special token, an option that needs offsets or more than one text per row.

    Source: upstream ``monkey_model/tokenization_qwen.py``. There a lone ``</img>`` passes, and
    fails in the model.
    """

    vocab_files_names = {"vocab_file": "qwen.tiktoken", "tokenizer_file": "tokenizer.json"}  # noqa: RUF012
    model_input_names = ["input_ids", "attention_mask"]  # noqa: RUF012

    image_start_tag, image_end_tag, image_pad_tag = IMAGE_START, IMAGE_END, IMAGE_PAD
    ref_start_tag, ref_end_tag = GROUNDING[:2]
    box_start_tag, box_end_tag = GROUNDING[2:4]
    quad_start_tag, quad_end_tag = GROUNDING[4:]
    IMAGE_ST = (*GROUNDING, IMAGE_START, IMAGE_END, IMAGE_PAD)

    def __init__(
        self,
        vocab_file: str | None = None,
        tokenizer_file: str | None = None,
        image_span: int = 1280,
        **kwargs: Any,
    ) -> None:
        # Names upstream's code; what is saved from here is loaded by this class.
        kwargs.pop("auto_map", None)
        if tokenizer_file is not None:
            self._tokenizer = Tokenizer.from_file(str(tokenizer_file))
        elif vocab_file is not None:
            self._tokenizer = _convert(str(vocab_file))
        else:
            raise ValueError("vocab_file (qwen.tiktoken) or tokenizer_file must be given; got none")
        defaults = {
            "pad_token": ENDOFTEXT,
            "eos_token": ENDOFTEXT,
            "padding_side": "left",
            "chat_template": CHAT_TEMPLATE,
        }
        super().__init__(image_span=image_span, **{**defaults, **kwargs})
        self.image_span = image_span
        self.special_tokens = {
            token: self._tokenizer.token_to_id(token) for token in SPECIAL_TOKENS
        }
        self.eod_id = self.special_tokens[ENDOFTEXT]
        self.im_start_id = self.special_tokens[IMSTART]
        self.im_end_id = self.special_tokens[IMEND]
        self.img_start_id = self.special_tokens[IMAGE_START]
        self.img_end_id = self.special_tokens[IMAGE_END]
        self.img_pad_id = self.special_tokens[IMAGE_PAD]
        self.ref_start_id, self.ref_end_id = (self.special_tokens[t] for t in GROUNDING[:2])
        self.box_start_id, self.box_end_id = (self.special_tokens[t] for t in GROUNDING[2:4])
        self.quad_start_id, self.quad_end_id = (self.special_tokens[t] for t in GROUNDING[4:])

    @classmethod
    def convert_to_native_format(cls, trust_remote_code: bool = False, **kwargs: Any) -> dict:
        """What ``from_pretrained`` found, as it is: ``__init__`` reads the files itself."""
        return kwargs

    @property
    def image_span(self) -> int:
        """Positions between ``<img>`` and ``</img>``. Upstream's name for it works too."""
        return self._image_span

    @image_span.setter
    def image_span(self, positions: int) -> None:
        check_positive_int("image_span", positions)
        self._image_span = positions

    IMG_TOKEN_SPAN = image_span

    @property
    def vocab_size(self) -> int:
        """All tokens, special ones included, as upstream counts them."""
        return len(self)

    # ---- text to ids ------------------------------------------------------------------------

    def escape(self, text: str, keep: Collection[str] = ()) -> str:
        """Mark the special tokens in ``text``, so that this tokenizer reads them as plain text.

        Put what a user wrote through it before it becomes part of a prompt::

            f"<img>{tokenizer.escape(path)}</img> {tokenizer.escape(question)} Answer:"

        The marks are the noncharacters U+FDD0 and U+FDD1, around each special token. They are not
        encoded.

        Args:
            text: any text.
            keep: special tokens that stay special.
        """
        tokens = tuple(token for token in self._all_special() if token not in keep)
        return _pattern(tokens, ()).sub(f"{_LITERAL_START}\\2{_LITERAL_END}", text)

    def _all_special(self) -> tuple[str, ...]:
        added = self._tokenizer.get_added_tokens_decoder().values()
        return tuple(token.content for token in added if token.special)

    def _encode_plus(
        self,
        text: str | Sequence[str],
        text_pair: Any = None,
        allowed_special: str | Collection[str] = "all",
        split_special_tokens: bool | None = None,
        padding_strategy: Any = False,
        truncation_strategy: Any = TruncationStrategy.DO_NOT_TRUNCATE,
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
        padding_side: str | None = None,
        return_tensors: Any = None,
        return_attention_mask: bool | None = None,
        **kwargs: Any,
    ) -> BatchEncoding:
        for name in (
            "is_split_into_words",
            "return_offsets_mapping",
            "return_overflowing_tokens",
            "return_special_tokens_mask",
            "return_token_type_ids",
            "return_length",
            "disallowed_special",
        ):
            if kwargs.get(name):
                raise ValueError(f"{name} is not supported; got {kwargs[name]!r}")
        if text_pair is not None:
            raise ValueError("text_pair is not supported; join the two texts")
        batched = isinstance(text, (list, tuple))
        named = [(f"text[{n}]", t) for n, t in enumerate(text)] if batched else [("text", text)]

        if split_special_tokens or (split_special_tokens is None and self.split_special_tokens):
            allowed_special = ()
        rows = self._encode_texts(named, allowed_special)
        if TruncationStrategy(truncation_strategy) != TruncationStrategy.DO_NOT_TRUNCATE:
            rows = [
                self._truncate(name, ids, max_length)
                for (name, _), ids in zip(named, rows, strict=True)
            ]
        encoding = self.pad(
            {"input_ids": rows},
            padding=padding_strategy,
            max_length=max_length,
            pad_to_multiple_of=pad_to_multiple_of,
            padding_side=padding_side,
            return_attention_mask=return_attention_mask,
            return_tensors=return_tensors,
        )
        if batched or return_tensors is not None:
            return encoding
        return BatchEncoding({name: value[0] for name, value in encoding.items()})

    def _encode_texts(
        self, named: Sequence[tuple[str, str]], allowed_special: str | Collection[str]
    ) -> list[list[int]]:
        special = self._all_special()
        if allowed_special == "all":
            pattern = _pattern(special, special)
        else:
            unknown = sorted(set(allowed_special) - set(special))
            if isinstance(allowed_special, str) or unknown:
                raise ValueError(
                    "allowed_special must be 'all' or a collection of special tokens; got "
                    f"{allowed_special if isinstance(allowed_special, str) else unknown!r}"
                )
            allowed = tuple(token for token in special if token in allowed_special)
            pattern = _pattern(allowed, special)
        split = [self._split(name, text, pattern) for name, text in named]
        plain = [piece for pieces in split for piece in pieces if isinstance(piece, str)]
        encoded = iter(self._encode_plain(plain))
        return [
            [
                id_
                for piece in pieces
                for id_ in (next(encoded) if isinstance(piece, str) else piece)
            ]
            for pieces in split
        ]

    def _encode_plain(self, texts: list[str]) -> list[list[int]]:
        """The ids of texts in which nothing is special."""
        # The library's own switch for that, encode_special_tokens, would be shared by all threads.
        # This tokenizer shares the model, and has no special tokens to look for.
        backend = Tokenizer(self._tokenizer.model)
        backend.pre_tokenizer = self._tokenizer.pre_tokenizer
        return [encoding.ids for encoding in backend.encode_batch(texts)]

    def _split(self, name: str, text: str, pattern: re.Pattern[str]) -> list[str | list[int]]:
        """``text`` as plain text and, between it, the ids of special tokens and image spans."""
        if not isinstance(text, str):
            raise TypeError(f"{name} must be a string; got {type(text).__name__}")
        text = unicodedata.normalize("NFC", text)
        # Lone surrogates become U+FFFD, as with tiktoken.
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        pieces: list[str | list[int]] = []
        plain, end = "", 0  # the text since the last piece; how far the text is read
        opened: int | None = None  # where the image span that is open begins
        for match in pattern.finditer(text):
            plain += text[end : match.start()]
            end = match.end()
            literal, token = match.groups()
            if literal is not None:
                plain += literal
            elif token == IMAGE_END:
                if opened is None:
                    raise ValueError(
                        f"{name} has an {IMAGE_END} at character {match.start()} without an "
                        f"{IMAGE_START} before it"
                    )
                pieces.append(self._image_span_ids(name, plain))
                plain, opened = "", None
            elif opened is not None:
                if token == IMAGE_START:
                    raise ValueError(
                        f"{name} has an {IMAGE_START} at character {match.start()} within the "
                        f"image span of character {opened}"
                    )
                plain += token
            else:
                if plain:
                    pieces.append(plain)
                plain = ""
                if token == IMAGE_START:
                    opened = match.start()
                else:
                    pieces.append([self._tokenizer.token_to_id(token)])
        if opened is not None:
            raise ValueError(
                f"{name} has an {IMAGE_START} at character {opened} without an {IMAGE_END} after it"
            )
        plain += text[end:]
        return [*pieces, plain] if plain else pieces

    def _image_span_ids(self, name: str, path: str) -> list[int]:
        data = path.encode()
        free = self.image_span - len(data)
        if free < 0:
            raise ValueError(
                f"{name} has an image path of {len(data)} bytes of UTF-8; it must fit the "
                f"{self.image_span} positions of an image; got {path[:60]!r}..."
            )
        return [self.img_start_id, *data, *[self.img_pad_id] * free, self.img_end_id]

    def _truncate(self, name: str, ids: list[int], length: int | None) -> list[int]:
        if length is None or len(ids) <= length:
            return ids
        kept = ids[:length] if self.truncation_side == "right" else ids[len(ids) - length :]
        if any(kept.count(tag) != ids.count(tag) for tag in (self.img_start_id, self.img_end_id)):
            raise ValueError(
                f"{name} has {len(ids)} tokens, and truncation to max_length {length} would cut an "
                "image span"
            )
        return kept

    def tokenize(self, text: str, pair: Any = None, **kwargs: Any) -> list[str]:
        """The tokens of :meth:`encode`, in the vocabulary's spelling of bytes."""
        return self.convert_ids_to_tokens(self._encode_plus(text, pair, **kwargs)["input_ids"])

    # ---- ids to text ------------------------------------------------------------------------

    def _decode(self, token_ids: int | list[int], *args: Any, **kwargs: Any) -> str:
        ids = [token_ids] if isinstance(token_ids, int) else list(token_ids)
        return super()._decode(self._spell_paths(ids), *args, **kwargs)

    def _spell_paths(self, ids: list[int]) -> list[int]:
        """``ids`` with the tokens of its path in place of each image span's positions."""
        spelled: list[int] = []
        end = 0
        while self.img_start_id in ids[end:]:
            start = ids.index(self.img_start_id, end)
            spelled += ids[end : start + 1]
            end = start + 1
            positions = ids[end : end + self.image_span]
            path = positions[: (*positions, self.img_pad_id).index(self.img_pad_id)]
            # What a model wrote need not be a span. It is decoded token by token.
            is_span = ids[end + self.image_span : end + self.image_span + 1] == [self.img_end_id]
            if is_span and all(byte < 256 for byte in path):
                spelled += self._encode_plain([bytes(path).decode("utf-8", "replace")])[0]
                end += self.image_span
        return spelled + ids[end:]

    # ---- chat and list formats --------------------------------------------------------------

    def apply_chat_template(
        self, conversation: Any, *args: Any, sanitize_control_tokens: bool = True, **kwargs: Any
    ) -> Any:
        """ChatML; an image is a part ``{"type": "image"}`` of a message's content.

        Args:
            conversation: messages, or a list of conversations.
            args: transformers' own, as are kwargs.
            sanitize_control_tokens: whether special tokens in the messages are plain text, but for
                ``<ref>``, ``<box>`` and ``<quad>``, which upstream's chat takes as special too. In
                text that is not tokenized (``tokenize=False``) they are marked: :meth:`escape`.
        """
        if sanitize_control_tokens:
            conversation = self.escape_messages(conversation)
        return super().apply_chat_template(conversation, *args, **kwargs)

    def escape_messages(self, messages: Any) -> Any:
        """A copy of chat messages whose texts hold no special tokens but those of grounding."""
        messages = getattr(messages, "messages", messages)
        if isinstance(messages, str):
            return self.escape(messages, keep=GROUNDING)
        if isinstance(messages, (list, tuple)):
            return [self.escape_messages(message) for message in messages]
        if isinstance(messages, dict):
            texts = {"role", "content", "text"}
            return {k: self.escape_messages(v) if k in texts else v for k, v in messages.items()}
        return messages

    def from_list_format(self, list_format: Sequence[dict[str, Any]]) -> str:
        """A prompt of ``{"image": path}``, ``{"text": ...}`` and ``{"box": [...], "ref": ...}``.

        A box is (x1, y1, x2, y2). Images are numbered: ``Picture 1: <img>path</img>``, as upstream
        writes them.

        Raises:
            ValueError: an element of another kind.
        """
        prompt, images = "", 0
        for element in list_format:
            if "image" in element:
                images += 1
                path = self.escape(element["image"])
                prompt += f"Picture {images}:{IMAGE_START}{path}{IMAGE_END}\n"
            elif "text" in element:
                prompt += element["text"]
            elif "box" in element:
                if "ref" in element:
                    prompt += f"{self.ref_start_tag}{element['ref']}{self.ref_end_tag}"
                for x1, y1, x2, y2 in element["box"]:
                    prompt += f"{self.box_start_tag}({x1},{y1}),({x2},{y2}){self.box_end_tag}"
            else:
                raise ValueError(
                    f"list_format must hold elements with image, text or box; got {element!r}"
                )
        return prompt

    def to_list_format(self, text: str) -> list[dict[str, str]]:
        """The parts of a text: ``image``, ``ref``, ``box``, ``quad``, and ``text`` between them.

        Raises:
            ValueError: a tag that is not closed.
        """
        parts: list[dict[str, str]] = []
        # The split gives text, tag, content, text, tag, content, ..., text.
        pieces = _LIST_FORMAT.split(unicodedata.normalize("NFC", text))
        for index, piece in enumerate(pieces):
            if index % 3 == 0 and piece:
                if tag := re.search("<(img|ref|box|quad)>", piece):
                    raise ValueError(f"text has a {tag[0]} that is not closed: {piece[:60]!r}")
                parts.append({"text": piece})
            elif index % 3 == 2:
                tag_name = pieces[index - 1]
                parts.append({"image" if tag_name == "img" else tag_name: piece})
        return parts

    # ---- files ------------------------------------------------------------------------------

    def save_vocabulary(
        self, save_directory: str | os.PathLike[str], filename_prefix: str | None = None
    ) -> tuple[str, ...]:
        """Write ``qwen.tiktoken``, which upstream's own code reads."""
        name = self.vocab_files_names["vocab_file"]
        path = os.path.join(
            save_directory, f"{filename_prefix}-{name}" if filename_prefix else name
        )
        byte_of = {character: byte for byte, character in bytes_to_unicode().items()}
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=False)
        with open(f"{path}.tmp", "w", encoding="ascii") as file:
            for token, index in sorted(vocabulary.items(), key=lambda item: item[1]):
                data = bytes(byte_of[character] for character in token)
                file.write(f"{base64.b64encode(data).decode()} {index}\n")
        os.replace(f"{path}.tmp", path)
        return (path,)

    def _save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        file_names: tuple[str, ...],
        legacy_format: bool | None = None,
        filename_prefix: str | None = None,
    ) -> tuple[str, ...]:
        files = super()._save_pretrained(save_directory, file_names, legacy_format, filename_prefix)
        return files + self.save_vocabulary(save_directory, filename_prefix)
