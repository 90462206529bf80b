"""Upstream's tokenizer on the ``tokenizers`` library: ``QWenTokenizer``.

A checkpoint's ``qwen.tiktoken`` goes through transformers' own converter, so there is no BPE here:
only what is Monkey's, the image spans. In ids a span is ``<img>``, ``image_span`` positions and
``</img>``: one position for each byte of the path's UTF-8, whose id is the value of the byte, then
``<imgpad>``.

Which tokens of a text are special is the caller's choice. As with upstream all of them are, but for
those that ``allowed_special`` leaves out, and those in a text of :meth:`QWenTokenizer.escape`.

Source: upstream ``monkey_model/tokenization_qwen.py``.
"""

from __future__ import annotations

import base64
import os
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from PIL.Image import Image, fromarray
from tokenizers import Tokenizer, normalizers
from transformers import AutoTokenizer, BatchEncoding
from transformers.convert_slow_tokenizer import TikTokenConverter, bytes_to_unicode
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX
from transformers.tokenization_utils_base import TruncationStrategy
from transformers.tokenization_utils_tokenizers import TokenizersBackend

from monkey_kernels.checks import check_positive_int
from monkey_model.configuration_qwen import QWenConfig
from monkey_model.crop_settings import CropSettings
from monkey_model.files import atomic
from monkey_model.inputs import prompts
from monkey_model.inputs.boxes import boxes_with_refs, draw_boxes
from monkey_model.inputs.prompts import (
    CHAT_TEMPLATE,
    ENDOFTEXT,
    GROUNDING,
    IMAGE_END,
    IMAGE_PAD,
    IMAGE_START,
    IMEND,
    IMSTART,
    SPECIAL_TOKENS,
)

# What transformers' tokenizers offer beyond one row of ids for each text.
_UNSUPPORTED = (
    "text_pair",
    "is_split_into_words",
    "return_offsets_mapping",
    "return_overflowing_tokens",
    "return_special_tokens_mask",
    "return_token_type_ids",
    "return_length",
    "disallowed_special",
)


class _Converter(TikTokenConverter):
    """transformers' converter on the file as it is now: tiktoken's loader caches by path alone."""

    @staticmethod
    def load_tiktoken_bpe(tiktoken_url: str) -> dict[bytes, int]:
        lines = Path(tiktoken_url).read_bytes().splitlines()
        pairs = (line.split() for line in lines if line)
        return {base64.b64decode(token, validate=True): int(rank) for token, rank in pairs}


def _convert(vocab_file: str) -> Tokenizer:
    """The tokenizer of a ``qwen.tiktoken``: a line for each token, its bytes in base64 and id."""
    if not os.path.isfile(vocab_file):
        raise FileNotFoundError(f"vocab_file does not exist: {vocab_file}")
    converter = _Converter(
        vocab_file, pattern=PRETOKENIZE_REGEX, extra_special_tokens=SPECIAL_TOKENS
    )
    try:
        tokenizer = converter.converted()
    except ValueError as error:
        raise ValueError(f"vocab_file {vocab_file} is no tiktoken vocabulary: {error}") from None
    vocabulary = tokenizer.get_vocab(with_added_tokens=False)
    ids = sorted(vocabulary.values())
    if ids != list(range(len(ids))) or not vocabulary.keys() >= set(bytes_to_unicode().values()):
        raise ValueError(
            f"vocab_file {vocab_file} must hold every byte, and ids from 0 on without a gap; got "
            f"{len(ids)} tokens"
        )
    tokenizer.normalizer = normalizers.NFC()
    return tokenizer


def _read(tokenizer_file: str) -> Tokenizer:
    try:
        return Tokenizer.from_file(tokenizer_file)
    except Exception as error:  # the library has no class of its own for it
        raise ValueError(f"tokenizer_file {tokenizer_file} cannot be read: {error}") from None


class QWenTokenizer(TokenizersBackend):
    """Upstream's tokenizer: the same ids, and the same text back.

    A call takes a text or a list of texts, and transformers' padding (by default on the left, with
    ``<|endoftext|>``), truncation and ``return_tensors``. Beside those:

    - ``allowed_special``: ``"all"`` (as upstream), or a collection of the special tokens that count
      as such; the others are plain text. ``split_special_tokens=True`` is the same as none.
    - Texts are brought to NFC first, paths included, as upstream does. The noncharacter U+FDD0 is
      left out: see :meth:`escape`.
    - Between ``<img>`` and ``</img>`` every other special token is part of the path.
    - An image span is never truncated: that is an error.

    Args:
        vocab_file: ``qwen.tiktoken``.
        tokenizer_file: ``tokenizer.json``, as :meth:`save_pretrained` writes it. It outranks
            vocab_file, which has to be converted.
        image_span: positions of an image, crops_per_image * n_queries.
        kwargs: transformers' own: padding_side, model_max_length, chat_template, ...

    Raises:
        FileNotFoundError: no such vocab_file.
        TypeError: image_span, or a text, of another type.
        ValueError: no file given, or a broken one; image_span is not positive. In a call: ``<img>``
            and ``</img>`` that do not pair or are nested, a path of more bytes than positions, a
            truncation that meets an image span, an ``allowed_special`` that is no special token,
            an option that is not supported (pairs, pretokenized words, offsets, overflow).

    Source: upstream ``monkey_model/tokenization_qwen.py``. There a lone ``</img>`` passes, and
    fails in the model; a special token in a path fails.
    """

    vocab_files_names = {"vocab_file": "qwen.tiktoken", "tokenizer_file": "tokenizer.json"}  # noqa: RUF012
    model_input_names = ["input_ids", "attention_mask"]  # noqa: RUF012

    # Upstream's names.
    image_start_tag, image_end_tag, image_pad_tag = IMAGE_START, IMAGE_END, IMAGE_PAD
    ref_start_tag, ref_end_tag, box_start_tag, box_end_tag, quad_start_tag, quad_end_tag = GROUNDING
    IMAGE_ST = (*GROUNDING, IMAGE_START, IMAGE_END, IMAGE_PAD)

    def __init__(
        self,
        vocab_file: str | os.PathLike[str] | None = None,
        tokenizer_file: str | os.PathLike[str] | None = None,
        image_span: int = CropSettings().image_span,
        **kwargs: Any,
    ) -> None:
        if tokenizer_file is not None:
            self._tokenizer = _read(str(tokenizer_file))
        elif vocab_file is not None:
            self._tokenizer = _convert(str(vocab_file))
        else:
            raise ValueError(
                "vocab_file (qwen.tiktoken) or tokenizer_file (tokenizer.json) must be given, or "
                f"be in the directory; got neither: {kwargs.get('name_or_path')}"
            )
        kwargs.pop("auto_map", None)  # a published checkpoint's own names upstream's code
        defaults = {
            "pad_token": ENDOFTEXT,
            "eos_token": ENDOFTEXT,
            "padding_side": "left",
            "chat_template": CHAT_TEMPLATE,
        }
        super().__init__(image_span=image_span, **{**defaults, **kwargs})
        self.image_span = image_span
        ids = self._special_ids()
        self.special_tokens = {token: ids[token] for token in SPECIAL_TOKENS}
        self.eod_id, self.im_start_id, self.im_end_id = (
            ids[token] for token in (ENDOFTEXT, IMSTART, IMEND)
        )
        self.ref_start_id, self.ref_end_id, self.box_start_id, self.box_end_id = (
            ids[token] for token in GROUNDING[:4]
        )
        self.quad_start_id, self.quad_end_id = (ids[token] for token in GROUNDING[4:])
        self.img_start_id, self.img_end_id, self.img_pad_id = (
            ids[token] for token in (IMAGE_START, IMAGE_END, IMAGE_PAD)
        )

    @classmethod
    def convert_to_native_format(cls, trust_remote_code: bool = False, **kwargs: Any) -> dict:
        """The files that ``from_pretrained`` found, as they are: ``__init__`` reads them."""
        return kwargs

    @property
    def image_span(self) -> int:
        """Positions between ``<img>`` and ``</img>``; ``IMG_TOKEN_SPAN`` is upstream's name."""
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

    def _special_ids(self) -> dict[str, int]:
        added = self.backend_tokenizer.get_added_tokens_decoder()
        return {token.content: id_ for id_, token in added.items() if token.special}

    # ---- text to ids ------------------------------------------------------------------------

    def escape(self, text: str, keep: Collection[str] = ()) -> str:
        """``text`` as this tokenizer has to be given it to read it as plain text.

        What a user wrote goes through it before it becomes part of a prompt::

            f"<img>{tokenizer.escape(path)}</img> {tokenizer.escape(question)} Answer: "

        The noncharacter U+FDD0 after each character that a special token starts with (``<``) keeps
        it from being one, in whatever the text is put. It is not encoded.

        Args:
            text: any text.
            keep: tokens that stay special.
        """
        return prompts.escape(text, tuple(self._special_ids()), tuple(keep))

    def _encode_plus(  # type: ignore[override]
        self,
        text: str | Sequence[str],
        *,
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
        """What every way to encode ends in, in transformers."""
        for option in _UNSUPPORTED:
            if kwargs.get(option):
                raise ValueError(f"{option} is not supported; got {kwargs[option]!r}")
        if split_special_tokens or (split_special_tokens is None and self.split_special_tokens):
            allowed_special = ()
        if not isinstance(text, (str, list, tuple)):
            raise TypeError(f"text must be a string or a list of them; got {type(text).__name__}")
        batched = not isinstance(text, str)
        named: dict[str, Any] = {"text": text}
        if batched:
            named = {f"text[{number}]": one for number, one in enumerate(text)}
        rows = self._encode_texts(named, allowed_special)
        if truncation_strategy != TruncationStrategy.DO_NOT_TRUNCATE and max_length is not None:
            rows = [
                self._truncate(name, ids, max_length) for name, ids in zip(named, rows, strict=True)
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
        self, named: dict[str, str], allowed_special: str | Collection[str]
    ) -> list[list[int]]:
        ids = self._special_ids()
        special = prompts.check_special(allowed_special, tuple(ids))
        rows = {name: prompts.split(name, text, special) for name, text in named.items()}
        plain = [text for pieces in rows.values() for kind, text in pieces if kind == "text"]
        encoded = iter(self._encode_plain(plain))
        encoded_rows = []
        for name, pieces in rows.items():
            row: list[int] = []
            for kind, text in pieces:
                if kind == "text":
                    row += next(encoded)
                elif kind == "token":
                    row.append(ids[text])
                else:
                    row += self._encode_image(name, text)
            encoded_rows.append(row)
        return encoded_rows

    def _encode_plain(self, texts: list[str]) -> list[list[int]]:
        """The ids of texts in which nothing is special."""
        # The library's switch for that, encode_special_tokens, is shared by all threads. This
        # tokenizer shares the model alone, and has no special tokens to look for.
        plain = Tokenizer(self.backend_tokenizer.model)
        plain.pre_tokenizer = self.backend_tokenizer.pre_tokenizer
        return [encoding.ids for encoding in plain.encode_batch(texts)]

    def _encode_image(self, name: str, path: str) -> list[int]:
        data = path.encode()
        free = self.image_span - len(data)
        if free < 0:
            raise ValueError(
                f"{name} must have image paths of at most {self.image_span} bytes, the positions "
                f"of an image; got {len(data)} bytes: {path[:60]!r}..."
            )
        return [self.img_start_id, *data, *[self.img_pad_id] * free, self.img_end_id]

    def _truncate(self, name: str, ids: list[int], length: int) -> list[int]:
        if len(ids) <= length:
            return ids
        kept = ids[:length] if self.truncation_side == "right" else ids[len(ids) - length :]
        if any(kept.count(tag) != ids.count(tag) for tag in (self.img_start_id, self.img_end_id)):
            raise ValueError(
                f"{name} must keep its image spans whole in max_length = {length} tokens; got "
                f"{len(ids)} tokens, of which the {self.truncation_side} end would be cut"
            )
        return kept

    def tokenize(
        self, text: str, pair: str | None = None, add_special_tokens: bool = False, **kwargs: Any
    ) -> list[str]:
        """The tokens of :meth:`encode`, in the vocabulary's spelling of bytes."""
        ids = self._encode_plus(text, text_pair=pair, **kwargs)["input_ids"]
        return list(self.convert_ids_to_tokens(ids))

    # ---- ids to text ------------------------------------------------------------------------

    def _decode(self, token_ids: int | list[int], *args: Any, **kwargs: Any) -> str:
        ids = [token_ids] if isinstance(token_ids, int) else token_ids
        return super()._decode(self._spell_paths(ids), *args, **kwargs)

    def _spell_paths(self, ids: list[int]) -> list[int]:
        """``ids`` with the path's tokens in place of each image span's positions."""
        spelled: list[int] = []
        end = 0
        while self.img_start_id in ids[end:]:
            first = ids.index(self.img_start_id, end) + 1
            last = first + self.image_span
            spelled += ids[end:first]
            end = first
            path = ids[first:last]
            if self.img_pad_id in path:
                path = path[: path.index(self.img_pad_id)]
            # What a model wrote after <img> need not be a span: that is decoded as it is.
            if ids[last : last + 1] == [self.img_end_id] and all(id_ < 256 for id_ in path):
                spelled += self._encode_plain([bytes(path).decode("utf-8", "replace")])[0]
                end = last
        return spelled + ids[end:]

    # ---- chat and list formats --------------------------------------------------------------

    def apply_chat_template(
        self, conversation: Any, *args: Any, sanitize_control_tokens: bool = True, **kwargs: Any
    ) -> Any:
        """ChatML. An image is a part ``{"type": "image"}`` of a message's content.

        Args:
            conversation: messages, or a list of conversations.
            args: transformers' own, as are kwargs.
            sanitize_control_tokens: whether special tokens in the messages are plain text, all but
                ``<ref>``, ``<box>`` and ``<quad>``, which upstream's chat takes for special too. In
                what ``tokenize=False`` returns they are broken as by :meth:`escape`.
        """
        if sanitize_control_tokens:
            conversation = self.escape_messages(conversation)
        return super().apply_chat_template(conversation, *args, **kwargs)

    def escape_messages(self, conversation: Any) -> Any:
        """A copy of messages in whose texts only the tokens of grounding are special."""
        return prompts.escape_messages(conversation, lambda text: self.escape(text, GROUNDING))

    def from_list_format(self, list_format: Sequence[dict[str, Any]]) -> str:
        """A prompt of elements ``{"image": path}``, ``{"text": ...}``, ``{"box": [...]}``.

        Images are numbered, ``Picture 1:<img>path</img>``, as upstream does. Boxes are
        (x1, y1, x2, y2), in thousandths of the image's sides; ``"ref"`` beside them says what is in
        them.

        Raises:
            ValueError: an element of another kind.
        """
        return prompts.from_list_format(list_format, self.escape)

    def to_list_format(self, text: str) -> list[dict[str, str]]:
        """The parts of a text: ``image``, ``ref``, ``box``, ``quad``, and ``text`` between them.

        Raises:
            ValueError: a tag that is not closed.
        """
        return prompts.to_list_format(text)

    def _fetch_latest_picture(
        self, response: str, history: Sequence[tuple[str, str | None]] | None
    ) -> str | None:
        """The path of the last picture in ``response`` and the queries of a history, or None."""
        for text in (response, *(query for query, _ in reversed(history or ()))):
            for part in reversed(self.to_list_format(text)):
                if "image" in part:
                    return part["image"]
        return None

    def _fetch_all_box_with_ref(self, text: str) -> list[dict[str, Any]]:
        """See :func:`monkey_model.inputs.boxes.boxes_with_refs`."""
        return boxes_with_refs(self.to_list_format(text))

    def draw_bbox_on_latest_picture(
        self,
        response: str,
        history: Sequence[tuple[str, str | None]] | None = None,
        *,
        image_root: str | os.PathLike[str] | None = None,
        allow_urls: bool = False,
        font: str | os.PathLike[str] | None = None,
    ) -> Image | None:
        """The last picture of a talk with the boxes of a reply on it; None if it lacks either.

        Args:
            response: the reply, or a text that holds prompt and reply.
            history: queries and replies before it.
            image_root: directory that the picture's path is relative to and may not leave; None for
                the working directory and no limit. A reply may name a picture too: give what
                ``model.transformer.image_root`` is where you do not trust the talk.
            allow_urls: whether an http(s) address is fetched.
            font: file of a font for the refs; by default Pillow's own, which has Latin letters.

        Returns:
            An RGB picture, upright.

        Raises:
            ValueError: a tag that is not closed, a box that does not read ``(x1,y1),(x2,y2)``, or
                the errors of :func:`monkey_model.inputs.images.load_image`.
            OSError: the picture, or ``font``, cannot be read.

        Source: upstream ``QWenTokenizer.draw_bbox_on_latest_picture``, whose ``VisImage`` has the
        method ``save`` too, and whose colours are random.
        """
        boxes = self._fetch_all_box_with_ref(response)
        path = self._fetch_latest_picture(response, history)
        if path is None or not boxes:
            return None
        from monkey_model.inputs.images import load_image  # ids alone need no kernels
        from monkey_model.inputs.spans import locate

        pixels = load_image(locate(path, image_root), allow_urls=allow_urls)
        return draw_boxes(fromarray(pixels.numpy()), boxes, font)

    # ---- files ------------------------------------------------------------------------------

    def save_vocabulary(
        self, save_directory: str | os.PathLike[str], filename_prefix: str | None = None
    ) -> tuple[str]:
        """Write ``qwen.tiktoken``, which upstream's own code reads."""
        prefix = f"{filename_prefix}-" if filename_prefix else ""
        path = os.path.join(save_directory, prefix + self.vocab_files_names["vocab_file"])
        byte_of = {character: byte for byte, character in bytes_to_unicode().items()}
        vocabulary = self.backend_tokenizer.get_vocab(with_added_tokens=False)
        with atomic(Path(path)) as name, open(name, "w", encoding="ascii") as file:
            for token, id_ in sorted(vocabulary.items(), key=lambda item: item[1]):
                data = base64.b64encode(bytes(byte_of[character] for character in token))
                file.write(f"{data.decode()} {id_}\n")
        return (path,)

    def _save_pretrained(
        self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any
    ) -> tuple[str, ...]:
        files = super()._save_pretrained(save_directory, *args, **kwargs)
        return files + self.save_vocabulary(save_directory, kwargs.get("filename_prefix"))


# Not for MonkeyConfig: there trust_remote_code=True would take a published checkpoint's own code,
# which fails on transformers 5. Of a config without an entry AutoTokenizer takes the registered
# class that tokenizer_config.json names, or else config.tokenizer_class, with the flag or without.
AutoTokenizer.register(QWenConfig, QWenTokenizer)
