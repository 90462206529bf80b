"""The directory of a run: one run at a time, whole checkpoints, and whether the run is finished.

A run may die at any moment: its process is killed, its disk is full. What it leaves must never be
taken for more than it is. So a checkpoint counts only with its mark, which is written last; a run
is finished only with its own; and the lock of a run goes with its process.

On several processes the main one (rank 0) looks and decides, and tells the others.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import rotate_checkpoints

from monkey_model.files import (
    UNREADABLE_PICKLE,
    atomic,
    flush,
    list_problems,
    read_json,
    release_lock,
    take_lock,
    writing,
)
from monkey_model.training.run_settings import check_same_run

logger = logging.getLogger(__name__)

T = TypeVar("T")

#: Written into a checkpoint directory before everything else: what has neither mark is not ours. It
#: holds the settings of the run.
BEGUN = "begun"
#: Written into a checkpoint directory when everything else is in it, whose sizes it holds.
COMPLETE = "complete"
#: What a run leaves besides checkpoints.
RESULTS = ("model", "merged", "loss.png")
#: Written into the directory of a run when everything else is in it.
FINISHED = "finished.json"
#: Locked by the process that writes to the directory.
LOCK = ".lock"

_CHECKPOINT = re.compile(r"checkpoint-(\d+)$")


def checkpoints(output_dir: str | Path) -> dict[int, Path]:
    """The checkpoint directories of a run by step, rising, whole or not."""
    directory = Path(output_dir)
    entries = directory.iterdir() if directory.is_dir() else []
    found = {int(m[1]): path for path in entries if (m := _CHECKPOINT.fullmatch(path.name))}
    return dict(sorted(found.items()))


def last_complete_checkpoint(output_dir: str | Path) -> Path | None:
    """The last checkpoint of a run that was written to its end; None if there is none."""
    whole = [path for path in checkpoints(output_dir).values() if (path / COMPLETE).is_file()]
    return whole[-1] if whole else None


class CompleteCheckpoints(TrainerCallback):
    """Marks a checkpoint when all processes have written it, and only then removes old ones.

    The Trainer itself removes old checkpoints when its first process is done, and a run that is
    killed in the middle of writing leaves a directory that looks like any other.

    Args:
        limit: checkpoints to keep; None for all.
    """

    def __init__(self, limit: int | None) -> None:
        self.limit = limit

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """A resumed run logs, evaluates and saves when it is told to; transformers' as before."""
        state.compute_steps(args, state.max_steps)

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Called by every process after its part of the checkpoint."""
        PartialState().wait_for_everyone()
        if args.should_save:
            output_dir = str(args.output_dir)
            checkpoint = Path(output_dir, f"checkpoint-{state.global_step}")
            with writing(checkpoint):
                flush(checkpoint)
                with (
                    atomic(checkpoint / COMPLETE) as name,
                    open(name, "w", encoding="utf-8") as file,
                ):
                    json.dump({"sizes": _sizes(checkpoint)}, file, indent=2)
            rotate_checkpoints(
                output_dir,
                save_total_limit=self.limit,
                best_model_checkpoint=state.best_model_checkpoint,
            )


def _sizes(checkpoint: Path) -> dict[str, int]:
    """Bytes of every file of a checkpoint but its mark, by its path there."""
    return {
        str(path.relative_to(checkpoint)): path.stat().st_size
        for path in sorted(checkpoint.rglob("*"))
        if path.is_file() and path.name != COMPLETE and not path.name.startswith(".")
    }


def begin_checkpoint(checkpoint: Path, settings: Mapping[str, Any]) -> None:
    """Make the directory of a checkpoint, which a run of ``settings`` writes."""
    checkpoint.mkdir(parents=True, exist_ok=True)
    (checkpoint / BEGUN).write_text(
        json.dumps({"settings": settings}, indent=2, default=str), encoding="utf-8"
    )


def check_checkpoint(checkpoint: Path, settings: Mapping[str, Any]) -> None:
    """What a run of ``settings`` is to resume from is whole, and of the same run.

    Raises:
        OSError, ValueError: files that are missing, cut or damaged, or settings that differ; each
            named.
    """
    from_main_process(lambda: _check_checkpoint(checkpoint, settings))


def _check_checkpoint(checkpoint: Path, settings: Mapping[str, Any]) -> None:
    with resuming_from(checkpoint):
        # A mark without a list is that of an earlier version.
        mark = checkpoint / COMPLETE
        expected = read_json(mark)["sizes"] if mark.stat().st_size else {}
        found = _sizes(checkpoint)
        wrong = [
            f"{name} ({found.get(name, 'no')} bytes in place of {size})"
            for name, size in expected.items()
            if found.get(name) != size
        ]
        if wrong:
            raise ValueError(f"it is damaged: {list_problems(wrong, 5, ', ')}")
        state = read_json(checkpoint / TRAINER_STATE_NAME)
        step = _CHECKPOINT.fullmatch(checkpoint.name)
        if step is None or state.get("global_step") != int(step[1]):
            raise ValueError(
                f"{TRAINER_STATE_NAME} must be of the step in the name; got global_step "
                f"{state.get('global_step')!r}"
            )
        begun = checkpoint / BEGUN
        recorded = read_json(begun)["settings"] if begun.is_file() and begun.stat().st_size else {}
    if recorded:
        check_same_run(checkpoint, recorded, json.loads(json.dumps(settings, default=str)))


@contextmanager
def resuming_from(checkpoint: str | Path) -> Iterator[None]:
    """What a damaged file in ``checkpoint`` raises, of whatever class, names the checkpoint.

    Raises:
        ValueError: in place of it.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (
        *UNREADABLE_PICKLE, SafetensorError, OSError, LookupError, TypeError, AttributeError,
    ) as error:  # fmt: skip
        reason = " ".join(str(error).split())[:300]
        if not isinstance(error, ValueError):
            reason = f"{type(error).__name__}: {reason}"
        raise ValueError(
            f"{checkpoint} cannot be resumed from: {reason}; move it away to go on from the one "
            "before it"
        ) from error


@contextmanager
def only_run(output_dir: str | Path) -> Iterator[None]:
    """Hold the lock of a run's directory, which is made if it is not there.

    The main process holds it, so that a run may have any number of processes and nodes. It ends
    with that process, however it ends. Where the file system has no locks, a warning says so.

    Raises:
        OSError: the directory cannot be made or written to.
        ValueError: another process holds the lock.
    """
    directory, held = Path(output_dir), []
    made = not directory.exists()
    from_main_process(lambda: held.append(_lock(directory)))
    try:
        yield
    finally:
        for file in held:
            release_lock(directory / LOCK, file)
            if made:
                with suppress(OSError):
                    os.rmdir(directory)  # if the run has left nothing in it


def _lock(directory: Path) -> int:
    try:
        directory.mkdir(parents=True, exist_ok=True)
        return take_lock(directory / LOCK, "output_dir must have no other run", directory)
    except OSError as error:
        raise type(error)(
            f"output_dir must be a directory that can be written to; got {directory}: "
            f"{error.strerror}"
        ) from None


def starting_point(output_dir: str | Path, resume: bool) -> Path | None:
    """The checkpoint to start from, None for none, once what is not whole has been removed.

    Only a checkpoint that a run began and did not complete is removed.

    Raises:
        OSError: what is not whole cannot be removed.
        ValueError: there is a run, or its results, and ``resume`` is False; checkpoints that no
            run of this command wrote; or results, and no checkpoint to go on from.
    """
    return from_main_process(lambda: _starting_point(Path(output_dir), resume))


def _starting_point(directory: Path, resume: bool) -> Path | None:
    found = checkpoints(directory)
    results = [name for name in (*RESULTS, FINISHED) if (directory / name).exists()]
    names = [*(path.name for path in found.values()), *results]
    if names and not resume:
        raise ValueError(
            f"output_dir must have no run, or be resumed (--resume); {directory} has "
            f"{', '.join(names)}"
        )
    cut = [path for path in found.values() if not (path / COMPLETE).is_file()]
    if foreign := [path.name for path in cut if not (path / BEGUN).is_file()]:
        raise ValueError(
            f"output_dir must have checkpoints of this command alone; in {directory} "
            f"{', '.join(foreign)} has no file {BEGUN!r} or {COMPLETE!r}: move it away"
        )
    last = last_complete_checkpoint(directory)
    if results and last is None:
        raise ValueError(
            f"output_dir must have a complete checkpoint to resume from; {directory} has only "
            f"{', '.join(results)}, which a new run would replace"
        )
    for path in cut:
        shutil.rmtree(path)
    if resume:
        logger.warning("resuming from %s", last or "nothing: there is no complete checkpoint")
    return last


def mark_finished(output_dir: str | Path, settings: Mapping[str, Any]) -> None:
    """Say that the run of ``settings`` (see :func:`is_finished`) has written everything."""
    with atomic(Path(output_dir, FINISHED)) as name, open(name, "w", encoding="utf-8") as file:
        json.dump({"settings": settings}, file, indent=2, default=str)


def unmark_finished(output_dir: str | Path) -> None:
    """Take the mark back: training goes on."""
    from_main_process(lambda: Path(output_dir, FINISHED).unlink(missing_ok=True))


def is_finished(output_dir: str | Path, settings: Mapping[str, Any], results: list[str]) -> bool:
    """Whether a run of the same ``settings`` has finished, and its ``results`` are still there.

    Args:
        settings: what was asked for: with more steps, say, the run is not finished.
        results: names of files and directories in ``output_dir``.

    Raises:
        OSError, ValueError: the mark cannot be read.
    """

    def look() -> bool:
        mark = Path(output_dir, FINISHED)
        if not mark.exists() or not all(Path(output_dir, name).exists() for name in results):
            return False
        # As JSON has them: it makes strings of keys that are numbers.
        wanted = json.loads(json.dumps(settings, default=str))
        return read_json(mark).get("settings") == wanted

    return from_main_process(look)


def from_main_process(do: Callable[[], T]) -> T:
    """What ``do`` returns in the main process, or an error that all processes raise.

    Or the others would wait for the main one until they are killed.
    """
    outcome: list[Any] = [None]
    if PartialState().is_main_process:
        try:
            outcome = [do()]
        except (OSError, ValueError) as error:
            outcome = [error]
    broadcast_object_list(outcome)
    if isinstance(outcome[0], Exception):
        raise outcome[0]
    return outcome[0]
