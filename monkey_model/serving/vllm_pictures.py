"""How ``monkey serve`` reads the pictures of requests: by this package's rules, once.

vLLM's own reader decodes formats that a small file can abuse, and fetches from any host. Where it
is used all the same (``vllm serve``), the model's processor decodes again, from the same bytes.
"""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import numpy as np
from vllm.multimodal.media import MediaConnector, MediaIO, MediaWithBytes

from monkey_model.inputs.images import load_image


class _PictureIO(MediaIO):
    """Files to uint8 [H, W, 3], with the bytes that a cache knows them by."""

    def load_bytes(self, data: bytes) -> MediaWithBytes[np.ndarray]:
        return MediaWithBytes(load_image(data).numpy(), data)

    def load_base64(self, media_type: str, data: str) -> MediaWithBytes[np.ndarray]:
        return self.load_bytes(base64.b64decode(data, validate=True))

    def load_file(self, filepath: Path) -> MediaWithBytes[np.ndarray]:
        return self.load_bytes(filepath.read_bytes())


class PictureConnector(MediaConnector):
    """Data URLs; files and hosts where ``--allowed-local-media-path``, ``-media-domains`` say so.

    Raises:
        ValueError: another address, or what :func:`monkey_model.inputs.images.load_image` refuses.
    """

    def _check(self, url: str) -> None:
        for scheme, allowed, option in (
            ("http", self.allowed_media_domains, "--allowed-media-domains"),
            ("file", self.allowed_local_media_path, "--allowed-local-media-path"),
        ):
            if url[:4].lower() == scheme and not allowed:
                raise ValueError(
                    f"image_url must be a data URL, as the server has no {option}; got {url[:60]!r}"
                )

    def fetch_image(self, image_url: str, **kwargs: Any) -> Any:
        self._check(image_url)
        return self.load_from_url(image_url, _PictureIO())

    async def fetch_image_async(self, image_url: str, **kwargs: Any) -> Any:
        self._check(image_url)
        return await self.load_from_url_async(image_url, _PictureIO())
