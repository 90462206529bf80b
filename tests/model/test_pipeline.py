"""What runs before and behind a device: order, memory, errors, interruptions."""

from __future__ import annotations

import threading

import pytest
import torch
from PIL import Image

from monkey_model.inputs.images import load_image
from monkey_model.serving.pipeline import Device, in_batches, read_ahead, write_behind
from tests.helpers.pictures import RGB, encoded


def results(rows):
    return [future.exception() or future.result() for _, future in rows]


def test_order_is_kept_whoever_ends_first():
    done = [threading.Event() for _ in range(5)]

    def read(number, reserve):
        """Each waits for the one after it."""
        if number + 1 < len(done):
            done[number + 1].wait()
        done[number].set()
        return number

    assert results(read_ahead(range(5), read, workers=5, most=5)) == list(range(5))


def test_an_error_costs_its_item_alone():
    def read(number, reserve):
        if number % 2:
            raise ValueError(f"{number} is odd")
        return number

    rows = results(read_ahead(range(5), read, workers=2))
    assert [str(row) for row in rows] == ["0", "1 is odd", "2", "3 is odd", "4"]


def test_no_more_is_read_than_was_said():
    started = []
    rows = read_ahead(range(100), lambda number, _: started.append(number), workers=2, most=3)
    for number in range(10):
        assert next(rows)[0] == number
        assert len(started) <= number + 1 + 3
    rows.close()
    assert len(started) <= 10 + 3


class Meter:
    """What the items hold that are not handed out."""

    def __init__(self):
        self.lock = threading.Lock()
        self.held, self.most = {}, 0

    def hold(self, number, size):
        with self.lock:
            self.held[number] = size
            self.most = max(self.most, sum(self.held.values()))

    def drop(self, number):
        with self.lock:
            del self.held[number]


def test_bytes_are_bounded_and_the_first_is_never_held_up():
    meter = Meter()
    sizes = [40, 90, 10, 500, 30, 30, 70, 100, 5]  # one is larger than the budget

    def read(number, reserve):
        reserve(sizes[number])
        meter.hold(number, sizes[number])
        return number

    for number, future in read_ahead(range(9), read, workers=4, most=9, most_bytes=100):
        meter.drop(number)
        assert future.result() == number
    # Everything within the budget, or beside the one that everyone waited for.
    assert meter.most <= 100 + 500


def test_a_smaller_claim_makes_room():
    """A decoder's peak is not what its result keeps."""
    shrunk = threading.Event()

    def read(number, reserve):
        if number == 1:
            shrunk.wait()
        reserve(100)
        if number == 0:
            reserve(0)
            shrunk.set()
            second_done.wait()  # still the first: the second found room before it was handed out
        else:
            second_done.set()

    second_done = threading.Event()
    assert len(results(read_ahead(range(2), read, workers=2, most_bytes=100))) == 2


def test_whoever_stops_early_leaves_no_thread_behind():
    held = threading.Event()

    def read(number, reserve):
        if number == 1:
            held.wait()
        reserve(100)

    rows = read_ahead(range(50), read, workers=4, most=8, most_bytes=100)
    next(rows)
    held.set()
    rows.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("monkey-read")]


def test_the_writer_gets_everything_in_order():
    written = []
    with write_behind(written.extend, 1) as put:
        for number in range(20):
            put(number)
    assert written == list(range(20))


def test_a_writer_that_fails_stops_who_feeds_it():
    def write(items):
        next(items)
        raise OSError("the disk is full")

    with pytest.raises(OSError, match="the disk is full"), write_behind(write, 1) as put:
        for number in range(1_000_000):
            put(number)


@pytest.mark.parametrize("taken", [0, 1])
def test_a_writer_that_fails_at_the_end_is_heard_too(taken):
    def write(items):
        for _ in items if taken else ():
            pass
        raise OSError("the disk is full")

    with pytest.raises(OSError, match="the disk is full"), write_behind(write, 1) as put:
        put(0)


def test_what_is_interrupted_is_not_finished():
    events = []

    def write(items):
        try:
            for item in items:
                events.append(item)
            events.append("finished")
        finally:
            events.append("left")

    with pytest.raises(KeyboardInterrupt), write_behind(write, 5) as put:
        put(0)
        put(1)
        raise KeyboardInterrupt
    assert events == [0, 1, "left"]


def test_batches_count_the_good_ones():
    batches = in_batches([1, 0, 1, 1, 0, 0, 1, 0], 2, bool)
    assert list(batches) == [[1, 0, 1], [1, 0, 0, 1], [0]]
    assert list(in_batches([], 2, bool)) == []


def test_the_time_a_device_waits_is_between_its_batches(monkeypatch):
    now = iter([0, 3, 4, 5, 7, 8])  # made; two batches; asked
    monkeypatch.setattr("time.perf_counter", lambda: float(next(now)))
    device = Device(torch.device("cpu"))
    for start, end in [(device.mark(), device.mark()), (device.mark(), device.mark())]:
        device.reach(start, end)
    assert device.share_waited() == pytest.approx((3 + 1) / 8)


def test_a_picture_says_what_decoding_takes_before_it_does():
    claims = []
    load_image(encoded(Image.fromarray(RGB)), reserve=claims.append)
    height, width = RGB.shape[:2]
    assert claims == [7 * height * width]
    with pytest.raises(ValueError, match="not a readable image"):
        load_image(b"nothing", reserve=claims.append)
    assert len(claims) == 1
