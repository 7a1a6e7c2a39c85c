"""Draw the loss of plans against the bytes of their files."""

from collections.abc import Sequence
from pathlib import Path

from ..accounting import MIB
from ..errors import UserError
from .pictures import COLORS, MARKERS, figure_and_axes, image, legend, plain_sizes, settings, short

SUFFIXES = (".svg", ".png")


def check_picture(out: str | None) -> None:
    """Before any work: that `out`, if it is given, names a picture that can be drawn.

    Raises:
        UserError: it has another suffix than SUFFIXES, or matplotlib is not installed.
    """
    if out is None:
        return
    if Path(out).suffix not in SUFFIXES:
        raise UserError(f"--out {out}: a frontier is a picture; give a name that ends in {' or '.join(SUFFIXES)}")
    with settings():
        pass


def frontier_picture(
    points: Sequence[tuple[str, int, float]], best: str, what: str, dense: float | None, suffix: str
) -> bytes:
    """The picture, in the format of `suffix`.

    Args:
        points: name, bytes and loss of each plan.
        best: the name of those that are joined by a line.
        what: the losses are.
        dense: the dense network's loss, drawn as a line.
        suffix: one of SUFFIXES.

    Raises:
        UserError: matplotlib is not installed.
    """
    with settings():
        figure, axes = figure_and_axes(4.6)
        line = [(size / MIB, loss) for name, size, loss in points if name == best]
        axes.plot(*zip(*line, strict=True), "o-", color=COLORS[0], ms=4, label="plan --budget")
        for i, (name, size, loss) in enumerate(point for point in points if point[0] != best):
            style = {"color": COLORS[(i + 1) % len(COLORS)], "ms": 7, "mec": "white", "ls": "", "zorder": 3}
            axes.plot([size / MIB], [loss], MARKERS[(i + 1) % len(MARKERS)], label=short(name), **style)
        if dense is not None:
            axes.axhline(dense, color="#999999", ls="--", lw=1, zorder=0, label="the dense network")
        axes.set_xscale("log")
        if dense is None:
            axes.set_yscale("log")
        axes.set_xlabel("MiB on disk")
        axes.set_ylabel(what)
        plain_sizes(axes)
        legend(figure, axes)
        return image(figure, suffix.removeprefix("."))
