"""Long loops say how long they still take."""

import time

import pytest

from fairseq_quant_noise.utils.progress import now_and_then, watched


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test moves."""
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    return now


def test_a_long_loop_gives_a_line_now_and_then_with_the_time_left(clock):
    lines = []
    for _ in watched("abcdefghij", 10, "counting", lines.append, every=10):
        clock[0] += 4
    assert lines == ["counting: 3 of 10, 28 s left", "counting: 6 of 10, 16 s left", "counting: 9 of 10, 4 s left"]


def test_a_loop_of_unknown_length_says_what_is_done(clock):
    lines = []
    for _ in watched(iter("abcdefg"), None, "counting", lines.append, every=10):
        clock[0] += 4
    assert lines == ["counting: 3 done", "counting: 6 done"]


def test_a_short_loop_says_nothing_and_its_items_are_all_there(clock):
    lines = []
    assert list(watched(iter("abc"), 3, "counting", lines.append)) == ["a", "b", "c"]
    assert lines == []


def test_a_loop_that_ends_early_is_no_error(clock):
    assert list(watched([], 8, "counting", print)) == []


def test_of_many_lines_one_in_a_while_is_passed_on():
    said = []
    rarely, always = now_and_then(said.append, every=60), now_and_then(said.append, every=0)
    for line in ("first", "second"):
        rarely(line)
        always(line)
    assert said == ["first", "second"]
