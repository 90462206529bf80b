"""A tiny vocabulary in the format of ``qwen.tiktoken``, and upstream's rules on tiktoken."""

from __future__ import annotations

import json
import re
import unicodedata
from pathlib import Path

from monkey_model.commands.demo_checkpoint import vocabulary as ranks
from monkey_model.commands.demo_checkpoint import write_vocabulary
from monkey_model.tokenization_qwen import QWenTokenizer

SPECIAL = [
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    *(f"<|extra_{i}|>" for i in range(205)),
    *("<ref>", "</ref>", "<box>", "</box>", "<quad>", "</quad>", "<img>", "</img>", "<imgpad>"),
]


SPECIAL_IDS = {token: len(ranks()) + number for number, token in enumerate(SPECIAL)}


def tiny_tokenizer(directory: Path, image_span: int = 20, **kwargs) -> QWenTokenizer:
    return QWenTokenizer(write_vocabulary(directory), image_span=image_span, **kwargs)


def write_published(directory: Path, **config: object) -> Path:
    """The tokenizer's files of a published checkpoint."""
    write_vocabulary(directory)
    (directory / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "model_max_length": 8192,
                "tokenizer_class": "QWenTokenizer",
                "auto_map": {"AutoTokenizer": ["tokenization_qwen.QWenTokenizer", None]},
                **config,
            }
        )
    )
    return directory


class Upstream:
    """Upstream's encode and decode, from its description, on tiktoken."""

    def __init__(self, image_span: int) -> None:
        import tiktoken  # needed by the tokenizer's tests alone

        self.image_span = image_span
        self.special = SPECIAL_IDS
        self.encoding = tiktoken.Encoding(
            "tiny",
            pat_str=r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
            r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
            mergeable_ranks=ranks(),
            special_tokens=self.special,
        )

    def encode(self, text: str) -> list[int]:
        """All special tokens special; no special token inside an image span."""
        ids: list[int] = []
        parts = re.split(r"<img>(.*?)</img>", unicodedata.normalize("NFC", text), flags=re.DOTALL)
        for number, part in enumerate(parts):
            if number % 2 == 0:
                ids += self.encoding.encode(part, allowed_special="all", disallowed_special=())
            else:
                path = list(part.encode())
                pads = [self.special["<imgpad>"]] * (self.image_span - len(path))
                ids += [self.special["<img>"], *path, *pads, self.special["</img>"]]
        return ids
