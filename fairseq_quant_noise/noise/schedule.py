"""p over the updates: how much noise at which point of the training.

constant   p
linear     start + (p - start) * t                              t = update / updates, at most 1
cosine     start + (p - start) * (1 - cos(pi t)) / 2
step       start + (p - start) * floor(t * steps) / steps
"""

import math

from ..plan.rules import Schedule


def p_at(p: float, schedule: Schedule | None, update: int) -> float:
    """The share of blocks hit at `update` (0 is the first), for a rule's `p` and `schedule`."""
    if schedule is None or schedule.kind == "constant" or update >= schedule.updates:
        return p
    t = update / schedule.updates
    if schedule.kind == "cosine":
        t = (1 - math.cos(math.pi * t)) / 2
    elif schedule.kind == "step":
        t = math.floor(t * schedule.steps) / schedule.steps
    return schedule.start + (p - schedule.start) * t
