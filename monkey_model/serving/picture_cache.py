"""Pictures that several questions name are encoded once."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future

from torch import Tensor

from monkey_model.inputs.picture_files import picture_digest

#: Of crops and tokens that are kept for questions to come: at real size, some 50 pictures.
CACHE_BYTES = 2**30


class Shown:
    """A picture that was read: its crops, until it has visual tokens.

    Args:
        key: of its content.
    """

    def __init__(self, key: str) -> None:
        self.key = key
        self.crops: Future[Tensor] = Future()
        self.tokens: Tensor | None = None
        self.bytes = 0


class PictureCache:
    """Visual tokens by the content of picture files, the least recently named ones dropped first.

    Args:
        read: the crops of a picture, by its path.
        encode: the visual tokens of pictures, by their crops.
        most_bytes: of what is kept. What questions in work hold comes on top.
    """

    def __init__(
        self,
        read: Callable[[str], Tensor],
        encode: Callable[[Sequence[Tensor]], Sequence[Tensor]],
        most_bytes: int = CACHE_BYTES,
    ) -> None:
        self._read, self._encode, self._most = read, encode, most_bytes
        self._kept: OrderedDict[str, Shown] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def read(self, path: str) -> Shown:
        """A picture with its crops or its tokens; in any thread.

        Raises:
            OSError, ValueError: it cannot be read.
        """
        key = picture_digest(path)
        with self._lock:
            shown = self._kept.get(key)
            if first := shown is None:
                shown = self._kept[key] = Shown(key)
            self._kept.move_to_end(key)
        if first:
            try:
                shown.crops.set_result(self._read(path))
            except BaseException as error:
                shown.crops.set_exception(error)
                with self._lock:
                    self._drop(shown)
                raise
        elif shown.crops.exception() is not None:  # once the thread that reads it is through
            shown = Shown(key)
            shown.crops.set_result(self._read(path))  # fails, too, and names this path
        with self._lock:
            self._weigh(shown)
        return shown

    def tokens(self, pictures: Sequence[Shown]) -> list[Tensor]:
        """The visual tokens of each; those that have none are encoded, together. In one thread."""
        new = list({id(shown): shown for shown in pictures if shown.tokens is None}.values())
        if new:
            made = self._encode([shown.crops.result() for shown in new])
            for shown, tokens in zip(new, made, strict=True):
                with self._lock:
                    shown.tokens, shown.crops = tokens, Future()
                    shown.crops.set_result(tokens[:0])
                    self._weigh(shown)
        return [shown.tokens for shown in pictures if shown.tokens is not None]

    def _weigh(self, shown: Shown) -> None:
        """Count what a picture takes now, and drop others for it."""
        if self._kept.get(shown.key) is shown:
            content = shown.crops.result() if shown.tokens is None else shown.tokens
            self._bytes += content.nbytes - shown.bytes
            shown.bytes = content.nbytes
        while self._bytes > self._most:
            self._drop(next(iter(self._kept.values())))

    def _drop(self, shown: Shown) -> None:
        if self._kept.get(shown.key) is shown:
            del self._kept[shown.key]
            self._bytes -= shown.bytes
