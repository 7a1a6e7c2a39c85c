"""When each stage of a plan starts and how long it lasts, in updates (or epochs) of a run."""

from collections.abc import Sequence

from .errors import UserError
from .plan import Plan


def stage_starts(plan: Plan, max_update: int) -> list[int]:
    """The update, counted from the first stage, at which each stage starts.

    `updates` of the rules where they are given, equal shares of `max_update` otherwise.

    Raises:
        UserError: only some stages give `updates`, or there is nothing to share.
    """
    given = [rule.updates for rule in plan.stages]
    if all(n is not None for n in given):
        return [sum(n or 0 for n in given[:i]) for i in range(len(given))]
    if any(n is not None for n in given):
        raise UserError("plan: some stages give updates and some do not; give updates in all of them or in none")
    if max_update <= 0:
        raise UserError("plan: its stages give no updates; add them, or --max-update or --max-epoch to share")
    return [max_update * i // len(given) for i in range(len(given))]


def updates_left(plan: Plan, starts: Sequence[int], stage: int, now: int, end: int | None) -> int | None:
    """How many updates are left of a stage.

    Args:
        starts: of the stages, in updates from the first one's start.
        stage: its place in the plan, from 0.
        now: updates since the first stage started.
        end: of the run, as `now`; None in a run without --max-update.
    Returns:
        At least 1; None where nothing says it: in the last stage of a run without end whose plan gives no updates.
    """
    given = plan.stages[stage].updates
    if stage + 1 < len(starts):
        end = starts[stage + 1]
    elif end is None:
        end = None if given is None else starts[stage] + given
    return None if end is None else max(end - now, 1)
