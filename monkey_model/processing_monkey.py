"""Prompts and images in memory to the model's inputs: ``MonkeyProcessor``."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoProcessor
from transformers.image_processing_utils import BatchFeature
from transformers.processing_utils import ProcessorMixin

from monkey_model.configuration_monkey import MonkeyConfig
from monkey_model.image_processing_monkey import (
    MonkeyImageProcessor,
    MonkeyImagesKwargs,
    flatten_images,
)
from monkey_model.inputs.images import ImageSource
from monkey_model.tokenization_qwen import QWenTokenizer


class MonkeyProcessor(ProcessorMixin):
    """A :class:`MonkeyImageProcessor` and a :class:`QWenTokenizer`.

    Args:
        image_processor: cuts the images.
        tokenizer: its image_span must be that of image_processor.
        chat_template: of :meth:`apply_chat_template`; by default the tokenizer's.

    Raises:
        TypeError: an argument of another class.
        ValueError: the two disagree about the positions of an image.
    """

    def __init__(
        self,
        image_processor: MonkeyImageProcessor,
        tokenizer: QWenTokenizer,
        chat_template: str | None = None,
    ) -> None:
        super().__init__(image_processor, tokenizer)
        self.chat_template = chat_template or tokenizer.chat_template
        settings = image_processor.crop_settings
        if tokenizer.image_span != settings.image_span:
            raise ValueError(
                "tokenizer.image_span must be crops_per_image * n_queries of image_processor, "
                f"{settings.crops_per_image} * {settings.n_queries}; got {tokenizer.image_span}"
            )

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any
    ) -> MonkeyProcessor:
        """Load what :meth:`save_pretrained` wrote, or a published checkpoint.

        The latter has a vocabulary, and a ``config.json`` whose ``visual`` describes the images.

        Args:
            pretrained_model_name_or_path: directory, or name on the hub.
            kwargs: of the image processor, or transformers' own.

        Raises:
            OSError, ValueError: files that are missing or broken.
        """
        name = pretrained_model_name_or_path
        try:
            image_processor = MonkeyImageProcessor.from_pretrained(name, **kwargs)
            for setting in MonkeyImagesKwargs.__annotations__:
                kwargs.pop(setting, None)
            tokenizer = QWenTokenizer.from_pretrained(
                name, **kwargs, image_span=image_processor.crop_settings.image_span
            )
        except json.JSONDecodeError as error:  # transformers names no file
            raise ValueError(f"a settings file in {name} must be JSON: {error}") from None
        return cls(image_processor, tokenizer)

    def __call__(
        self,
        images: ImageSource | Sequence[Any] | None = None,
        text: str | Sequence[str] | None = None,
        videos: None = None,
        audio: None = None,
        *,
        allow_urls: bool = False,
        device: str | torch.device = "cpu",
        return_tensors: str | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """The model's inputs for a prompt or a batch of prompts.

        In a prompt an image is a span ``<img>...</img>``. With ``images``, spans and images pair in
        order, and what a span holds is a name for it, or nothing. Without, a span holds the path of
        a file, which the model opens (upstream's route).

        Args:
            images: an image; a list of images; or a list of such lists, one for each text.
            text: a prompt or a list of prompts. What users wrote in it goes through
                :meth:`QWenTokenizer.escape` first: all special tokens are special here.
            videos: not supported.
            audio: not supported.
            allow_urls: whether ``images`` may be http(s) locations.
            device: where the crops are cut, and stay. Ids are on the CPU.
            return_tensors: ``"pt"`` or ``"np"``; by default ids are lists.
            kwargs: of the tokenizer: padding, truncation, max_length, allowed_special, ...

        Returns:
            ``input_ids`` and ``attention_mask`` [texts, length], if there is a text;
            ``pixel_values`` [images, crops_per_image, 3, crop_size, crop_size], if there is an
            image: those of the first text first, in the order of its spans.

        Raises:
            ValueError: neither text nor images; an empty text; as many images as spans are not
                there, in all or for a text; a span without a path where there are no images; and
                the errors of :class:`QWenTokenizer` and of :meth:`MonkeyImageProcessor.preprocess`.
        """
        if videos is not None or audio is not None:
            raise ValueError("videos and audio must be None: the model reads images and text")
        if text is None and images is None:
            raise ValueError("text or images must be given; got neither")
        inputs: dict[str, Any] = {}
        if text is not None:
            texts = [text] if isinstance(text, str) else text
            if not texts or "" in texts:
                raise ValueError("text must hold a prompt or more, none of them empty")
            inputs.update(self.tokenizer(texts, **kwargs))
            self._check_spans(inputs["input_ids"], images)
        if images is not None and (flat := flatten_images(images)):
            inputs.update(self.image_processor(flat, allow_urls=allow_urls, device=device))
        return BatchFeature(inputs, tensor_type=return_tensors)

    def _check_spans(self, rows: Sequence[Sequence[int]], images: Any) -> None:
        """There is an image, or at least a path, for each span of each text."""
        start, pad = self.tokenizer.img_start_id, self.tokenizer.img_pad_id
        spans = [row.count(start) for row in rows]
        if images is None:
            for number, row in enumerate(rows):
                if any(pair == (start, pad) for pair in itertools.pairwise(row)):
                    raise ValueError(
                        f"text[{number}] has an image span without a path, and images is None"
                    )
        elif isinstance(images, (list, tuple)) and any(
            isinstance(part, (list, tuple)) for part in images
        ):
            if len(images) != len(rows):
                raise ValueError(
                    f"images must have a list for each of {len(rows)} texts; got {len(images)}"
                )
            for number, part in enumerate(images):
                count = len(flatten_images(part))
                if count != spans[number]:
                    raise ValueError(
                        f"text[{number}] must have an image span for each image of "
                        f"images[{number}]; got {spans[number]} spans and {count} images"
                    )
        elif len(flatten_images(images)) != sum(spans):
            raise ValueError(
                "text must have an image span for each image; got "
                f"{sum(spans)} spans ({', '.join(map(str, spans))} by text) and "
                f"{len(flatten_images(images))} images"
            )

    def apply_chat_template(
        self, conversation: Any, *args: Any, sanitize_control_tokens: bool = True, **kwargs: Any
    ) -> Any:
        """ChatML, as :meth:`QWenTokenizer.apply_chat_template` writes it, and its images' crops.

        A part ``{"type": "image", "image": ...}`` of a message is a span, and its image (or
        ``"path"``, or ``"url"``) is read with ``tokenize=True``.
        """
        if sanitize_control_tokens:
            conversation = self.tokenizer.escape_messages(conversation)
        return super().apply_chat_template(conversation, *args, **kwargs)


AutoProcessor.register(MonkeyConfig, MonkeyProcessor)
