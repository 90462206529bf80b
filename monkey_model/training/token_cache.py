"""Visual tokens on disk, for runs in which nothing in the encoder trains.

A picture's tokens are then the same at each of its steps: they are computed once, before training,
and read by the data loader's workers in place of the picture. A file is named by the content of the
picture, in a directory named by everything else that decides on the tokens: the encoder's weights
and their dtype, how pictures are cut, and the precision of the arithmetic.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers.utils.logging import tqdm

from monkey_model.files import atomic
from monkey_model.inputs.picture_files import picture_digest
from monkey_model.parameter_names import is_frozen_twin
from monkey_model.training.conversations import Conversation
from monkey_model.training.run_directory import from_main_process
from monkey_model.visual import VisionTransformer

_TENSOR = "visual_tokens"


class TokenCache:
    """The files of one encoder.

    Args:
        directory: holds one directory for each encoder.
        encoder: digest of :func:`encoder_digest`.
        shape: tokens of an image and their width.
        pictures: the digest of each picture by its path.
    """

    def __init__(
        self,
        directory: Path,
        encoder: str,
        shape: tuple[int, int],
        pictures: Mapping[str, str] | None = None,
    ) -> None:
        self.directory = directory / encoder[:32]
        self.encoder = encoder
        self.shape = shape
        self.pictures = dict(pictures or {})

    def _place(self, digest: str) -> Path:
        return self.directory / f"{digest}.safetensors"

    def holds(self, digest: str) -> bool:
        """Whether there is a whole file of this encoder for a picture; others are written anew."""
        try:
            with safe_open(self._place(digest), "pt") as file:  # its length is checked
                return (
                    file.metadata() == self._metadata(digest)
                    and list(file.keys()) == [_TENSOR]
                    and tuple(file.get_slice(_TENSOR).get_shape()) == self.shape
                )
        except (OSError, SafetensorError):
            return False

    def _metadata(self, digest: str) -> dict[str, str]:
        return {"encoder": self.encoder, "picture": digest}

    def write(self, digest: str, tokens: Tensor) -> None:
        """Keep the tokens of a picture.

        Raises:
            WriteError: they cannot be written. No half of them is left.
        """
        with atomic(self._place(digest)) as name:
            save_file({_TENSOR: tokens.detach().cpu().contiguous()}, name, self._metadata(digest))

    def read(self, path: str) -> Tensor:
        """The tokens of a picture, [tokens of an image, width].

        Raises:
            ValueError: its file has gone, or been damaged, since the run began.
        """
        digest = self.pictures[path]
        place = self._place(digest)
        try:
            if self.holds(digest):
                return load_file(place)[_TENSOR]
            reason = "it is not there, damaged, or another encoder's"
        except (OSError, SafetensorError) as error:
            reason = str(error)
        raise ValueError(
            f"image {path!r}: its visual tokens cannot be read from {place}: {reason}; start again "
            "with --resume, which encodes what is missing"
        )


def encoder_digest(visual: nn.Module, settings: Mapping[str, Any]) -> str:
    """SHA-256 of an encoder's weights, by upstream's names, and of ``settings``."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    weights = {
        name.replace(".modules_to_save.default.", ".").replace(".base_layer.", "."): value
        for name, value in visual.state_dict().items()
        if isinstance(value, Tensor) and not is_frozen_twin(f".{name}")
    }
    for name, value in sorted(weights.items()):
        digest.update(f"{name} {value.dtype} {list(value.shape)}\0".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def fill_cache(
    directory: Path,
    visual: VisionTransformer,
    conversations: Iterable[Conversation],
    image_processor: Any,
    accelerator: Accelerator,
    *,
    workers: int,
    show_progress: bool = True,
) -> TokenCache:
    """Encode what ``directory`` lacks of the conversations' pictures, each process its share.

    It runs as a training step does, so that the tokens are those of an uncached run, to the bit
    where the arithmetic does not depend on how many crops a batch has.

    Args:
        directory: of all encoders.
        visual: in which nothing trains.
        conversations: all that the run reads.
        image_processor: of the model.
        accelerator: of the Trainer.
        workers: of the data loader that decodes.
        show_progress: a bar, in the main process.

    Raises:
        OSError, ValueError: a picture that cannot be read, with its record; no room on the disk.
    """
    settings = visual.crop_settings
    first_use: dict[str, str] = {}
    for conversation in conversations:
        for image in conversation.images:
            first_use.setdefault(image, conversation.where)
    paths = sorted(first_use)[accelerator.process_index :: accelerator.num_processes]
    with _whole(visual, accelerator.device):
        described = {
            "crops": image_processor.to_dict(),
            "dtype": visual.transformer.get_cast_dtype(),
            "autocast": accelerator.mixed_precision if accelerator.native_amp else None,
            "version": 1,
        }
        encoder = from_main_process(lambda: encoder_digest(visual, described))
        cache = TokenCache(directory, encoder, (settings.image_span, visual.output_dim))
        digests: dict[str, str] = {}
        missing: dict[str, str] = {}  # one path for each content
        for path in paths:
            try:
                digests[path] = picture_digest(path)
            except (OSError, ValueError) as error:
                raise ValueError(f"{first_use[path]}: image {path!r}: {error}") from error
            if digests[path] not in missing and not cache.holds(digests[path]):
                missing[digests[path]] = path
        _check_room(directory, cache, len(missing) * accelerator.num_processes)
        loader: DataLoader[Any] = DataLoader(
            cast("Dataset[Any]", _Pictures(list(missing.values()), first_use, image_processor)),
            batch_size=None,
            num_workers=workers,
        )
        bar = tqdm(
            zip(missing, loader, strict=True) if missing else (),
            "encoding pictures",
            total=len(missing),
            disable=not (show_progress and missing and accelerator.is_local_main_process),
        )
        for digest, pixels in bar:
            if isinstance(pixels, str):
                raise ValueError(pixels)
            crops = pixels.flatten(0, 1).to(accelerator.device)
            # As a training step: with gradients on, the encoder takes its plain form.
            with torch.enable_grad(), accelerator.autocast():
                tokens = visual.encode_crops(crops, crop_chunk=len(crops))
            cache.write(digest, tokens.flatten(0, 1))
    cache.pictures = dict(gather_object(list(digests.items())))
    _check_shared(cache)
    return cache


def _check_shared(cache: TokenCache) -> None:
    """Raise a ValueError where what another node has written is not seen."""
    everyones = sorted(set(cache.pictures.values()))
    if unseen := [d for d in everyones[:: 1 + len(everyones) // 100] if not cache.holds(d)]:
        raise ValueError(
            "cache_visual_tokens must be a directory that all processes share; "
            f"{cache.directory} lacks {unseen[0]}.safetensors, which another one has written"
        )


def _check_room(directory: Path, cache: TokenCache, count: int) -> None:
    """Raise a ValueError if the disk has no room for the tokens of ``count`` images, at 16 bits."""
    directory.mkdir(parents=True, exist_ok=True)
    wanted = 2 * count * cache.shape[0] * cache.shape[1]
    free = shutil.disk_usage(directory).free
    if wanted > free:
        raise ValueError(
            f"cache_visual_tokens needs {wanted / 2**30:,.1f} GiB in {directory} for {count} "
            f"images; {free / 2**30:,.1f} are free there"
        )


@contextmanager
def _whole(visual: VisionTransformer, device: torch.device) -> Iterator[None]:
    """``visual`` in eval mode on ``device``, unsharded; afterwards where it was."""
    parameters = list(visual.parameters())
    training, visual_device = visual.training, parameters[0].device
    visual.eval()
    if any(hasattr(parameter, "ds_id") for parameter in parameters):
        import deepspeed

        with deepspeed.zero.GatheredParameters(parameters):
            yield
    else:
        visual.to(device)
        yield
        visual.to(visual_device)
    visual.train(training)


class _Pictures(Dataset[Any]):
    """Crops of pictures, or why there are none."""

    def __init__(
        self, paths: Sequence[str], first_use: Mapping[str, str], image_processor: Any
    ) -> None:
        self.paths = paths
        self.first_use = first_use
        self.image_processor = image_processor

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor | str:
        path = self.paths[index]
        try:
            return self.image_processor([path])["pixel_values"]
        except (OSError, ValueError) as error:
            return f"{self.first_use[path]}: {error}"
