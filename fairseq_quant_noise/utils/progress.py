"""Report how far a long loop is and how long it still takes."""

import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")

EVERY = 10.0  # seconds between lines: a loop that is shorter says nothing


def watched(
    items: Iterable[T], total: int | None, what: str, progress: Callable[[str], None], every: float = EVERY
) -> Iterator[T]:
    """The items, with a line now and then: `WHAT: 3 of 20, 85 s left`, or `WHAT: 3 done` where nobody knows the total.

    Args:
        items: what the loop goes over.
        total: how many there are, at most, if that is known.
        what: is done with them.
        progress: called with a line, at most once in `every` seconds.
        every: seconds.
    """
    began = said = time.perf_counter()
    for i, item in enumerate(items):
        now = time.perf_counter()
        if i and now - said >= every:
            said = now
            left = "done" if total is None else f"of {total}, {(now - began) / i * (total - i):.0f} s left"
            progress(f"{what}: {i} {left}")
        yield item


def now_and_then(progress: Callable[[str], None], every: float = EVERY) -> Callable[[str], None]:
    """Wrap `progress` so that it gets at most one line in `every` seconds; the others are dropped."""
    said = time.perf_counter()

    def say(line: str) -> None:
        nonlocal said
        if time.perf_counter() - said >= every:
            said = time.perf_counter()
            progress(line)

    return say
