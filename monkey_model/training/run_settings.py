"""What a run was told, kept with its checkpoints: resumed, it has to be the same run.

A checkpoint holds the states of an optimizer and a schedule. With other data, another model or
another learning rate they would be loaded all the same, and mean something else.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from monkey_model.files import list_problems, sha256_of
from monkey_model.training.config import RECIPE, FinetuneConfig, launch_arguments

if TYPE_CHECKING:
    from transformers import TrainingArguments

#: Settings that a resumed run may change: they decide what is written and shown, and where the work
#: is done, not what is learned. ``launch`` counts through the arguments that it stands for.
FREE = (
    "output_dir", "eval_data", "sample_data", "sample_tokens", "gradient_checkpointing", "launch",
    "merge", "allow_pickle", "cache_visual_tokens",
)  # fmt: skip
#: Beginnings of the names of ``TrainingArguments`` for which the same holds.
FREE_TRAINING = (
    "save_", "logging_", "log_", "eval_", "per_device_eval_", "prediction_", "report_to",
    "run_name", "project", "disable_tqdm", "use_cpu", "skip_memory_metrics", "torch_empty_cache_",
    "dataloader_num_workers", "dataloader_p", "load_best_", "metric_for_", "greater_is_",
    "ddp_timeout", "ddp_backend",
)  # fmt: skip
#: What more of is a longer run, and less of a run that has already gone too far.
GROWING = ("training.max_steps", "training.num_train_epochs")

_SAMPLE = 2**20  # bytes of each end of a weights file that identify it


def run_settings(config: FinetuneConfig, arguments: TrainingArguments) -> dict[str, Any]:
    """The settings of a run; a file or directory that it reads is a path and a digest.

    Raises:
        OSError: one of them cannot be read.
    """
    settings = {key: value for key, value in asdict(config).items() if key not in FREE[:1]}
    settings["training"] = {**RECIPE, **launch_arguments(config.launch), **config.training}
    settings["processes"] = arguments.world_size
    for name in ("checkpoint", "data", "eval_data", "sample_data", "image_root"):
        if settings[name] is not None:  # the same run, however its paths are spelled
            settings[name] = {"path": os.path.realpath(settings[name])}
    settings["checkpoint"]["sha256"] = _digest_of_directory(Path(config.checkpoint))
    for name, path in (("data", config.data), ("eval_data", config.eval_data)):
        if path is not None:
            with open(path, "rb") as file:
                settings[name]["sha256"] = sha256_of(file)
    return settings


def _digest_of_directory(directory: Path) -> str:
    """Of a checkpoint's config and weights: of these the names, the sizes and both ends."""
    digest = hashlib.sha256()
    for path in sorted(directory.iterdir()):
        if path.suffix not in (".safetensors", ".bin") and path.name != "config.json":
            continue
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            digest.update(f"{path.name} {size}\0".encode())
            digest.update(file.read(_SAMPLE))
            file.seek(max(0, size - _SAMPLE))
            digest.update(file.read(_SAMPLE))
    return digest.hexdigest()


def check_same_run(checkpoint: Path, recorded: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Raise a ValueError that lists what differs, if ``given`` is not the run of ``checkpoint``."""
    before, now = _flat(recorded), _flat(given)
    problems = []
    for key in dict.fromkeys([*before, *now]):
        old, new = before.get(key), now.get(key)
        if _identity(old) == _identity(new):
            continue
        if key in GROWING and not _less(new, old):
            continue
        problems.append(f"{key} was {_shown(old)}, and is {_shown(new)}")
    if problems:
        raise ValueError(
            f"--resume must go on with the run of {checkpoint}; {list_problems(problems)}"
        )


def _flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What has to stay the same, a key for each entry of a section."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if key in FREE:
            continue
        if isinstance(value, dict) and "path" not in value:
            names = [n for n in value if not (key == "training" and n.startswith(FREE_TRAINING))]
            flat.update({f"{key}.{name}": value[name] for name in names})
        else:
            flat[key] = value
    return flat


def _identity(value: Any) -> Any:
    """Of a file its content, wherever it has moved to."""
    return value.get("sha256", value) if isinstance(value, dict) else value


def _shown(value: Any) -> str:
    if isinstance(value, dict) and "sha256" in value:
        return f"{value['path']} (sha256 {value['sha256'][:8]})"
    return "not set" if value is None else repr(value)


def _less(new: Any, old: Any) -> bool:
    """A number of steps that is not positive, or not set, asks for no end of its own."""
    return new is not None and 0 < new < (old or 0)
