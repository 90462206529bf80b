"""The lock of a run's directory, and its marks."""

from __future__ import annotations

import errno
import fcntl
import os
import signal

import pytest

from monkey_model.training.config import FinetuneConfig
from monkey_model.training.finetune import finetune
from monkey_model.training.run_directory import (
    BEGUN,
    COMPLETE,
    FINISHED,
    LOCK,
    is_finished,
    mark_finished,
    only_run,
    starting_point,
)


@pytest.fixture
def other_run(tmp_path):
    """Another process that holds the lock; it has a child, as a run has workers. Its id."""
    ready, say_ready = os.pipe()
    until_closed, close = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(close)
        with only_run(tmp_path):
            os.fork()
            os.write(say_ready, b".")
            os.read(until_closed, 1)
        os._exit(0)
    for _ in range(2):
        assert os.read(ready, 1) == b"."
    yield pid
    os.close(close)  # the child ends


def test_one_run_at_a_time_and_a_killed_one_leaves_no_lock(other_run, tmp_path):
    with pytest.raises(ValueError, match=rf"no other run; process {other_run} on \S+ is writing"):
        only_run(tmp_path).__enter__()
    os.kill(other_run, signal.SIGKILL)
    os.waitpid(other_run, 0)
    with only_run(tmp_path):
        assert (tmp_path / LOCK).read_text().startswith(f"process {os.getpid()} on ")


def test_a_second_run_is_refused_at_its_start(other_run, tmp_path):
    (tmp_path / "checkpoint-1").mkdir()  # not whole: the other run is writing it
    data = tmp_path.parent / "data.json"
    data.touch()
    config = FinetuneConfig(
        str(tmp_path), str(data), str(tmp_path), dtype="float32", training={"use_cpu": True}
    )
    for resume in (True, False):
        with pytest.raises(ValueError, match=f"no other run; process {other_run} on"):
            finetune(config, resume=resume)
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-1", LOCK}


def test_the_lock_goes_with_the_run(tmp_path):
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt), only_run(tmp_path / "new"):
            raise KeyboardInterrupt
        assert not (tmp_path / "new").exists()  # an empty one, or a lock, says that a run is there
    pid = os.fork()
    if pid == 0:
        with only_run(tmp_path / "new"):
            os._exit(7)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7


def test_a_lock_that_its_holder_removed_is_no_lock(tmp_path, monkeypatch):
    """The holder leaves between this process's opening of the file and its lock on it."""
    lockf, other = fcntl.lockf, []

    def late(file, operation):
        if not other:
            other.append(os.stat(tmp_path / LOCK).st_ino)
            os.unlink(tmp_path / LOCK)
        lockf(file, operation)

    monkeypatch.setattr(fcntl, "lockf", late)
    with only_run(tmp_path):
        assert (tmp_path / LOCK).read_text().startswith(f"process {os.getpid()} on ")
    assert not (tmp_path / LOCK).exists()


def test_a_file_system_without_locks(tmp_path, monkeypatch, caplog):
    def lockf(file, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", lockf)
    with only_run(tmp_path):
        pass
    (message,) = caplog.messages
    assert f"{tmp_path} is on a file system without locks (No locks available)" in message


def test_finished_is_the_same_run_with_its_results(tmp_path):
    settings = {"training": {"max_steps": 3}, "unfreeze": {"schedule": {2: 1}}, "merge": False}
    (tmp_path / "model").mkdir()
    assert not is_finished(tmp_path, settings, ["model"])
    mark_finished(tmp_path, settings)
    assert is_finished(tmp_path, settings, ["model"])
    assert not is_finished(tmp_path, {**settings, "training": {"max_steps": 4}}, ["model"])
    assert not is_finished(tmp_path, settings, ["model", "merged"])
    with pytest.raises(
        ValueError, match=rf"must have no run, .*\(--resume\); .* has model, {FINISHED}$"
    ):
        starting_point(tmp_path, False)
    (tmp_path / FINISHED).write_text("{")
    with pytest.raises(ValueError, match=f"{FINISHED} must be JSON"):
        is_finished(tmp_path, settings, ["model"])


@pytest.mark.parametrize("name", ["model", "merged", "loss.png"])
def test_results_are_never_replaced_by_a_run_from_the_start(name, tmp_path):
    (tmp_path / name).mkdir()
    (tmp_path / name / "precious").touch()
    with pytest.raises(ValueError, match=rf"must have no run, .*\(--resume\); .* has {name}$"):
        starting_point(tmp_path, False)
    with pytest.raises(ValueError, match=f"has only {name}, which a new run would replace"):
        starting_point(tmp_path, True)
    assert (tmp_path / name / "precious").exists()


def test_only_what_a_run_began_is_removed(tmp_path):
    for number, mark in ((1, COMPLETE), (2, BEGUN)):
        (tmp_path / f"checkpoint-{number}").mkdir()
        (tmp_path / f"checkpoint-{number}" / mark).touch()
    (tmp_path / "checkpoint-1000").mkdir()  # another program's
    with pytest.raises(ValueError, match=r"of this command alone; .* checkpoint-1000 has no file"):
        starting_point(tmp_path, True)
    assert len(list(tmp_path.iterdir())) == 3
    (tmp_path / "checkpoint-1000").rmdir()
    assert starting_point(tmp_path, True) == tmp_path / "checkpoint-1"
    assert not (tmp_path / "checkpoint-2").exists()
