"""Compute when each stage of a plan starts and how long it lasts, in a run with --max-update or --max-epoch."""

from typing import Any

from ...errors import UserError
from ...plan.plan import Plan

UPDATE, EPOCH = "update", "epoch"


def stage_starts(plan: Plan, max_update: int) -> list[int]:
    """Compute the update, counted from the first stage, at which each stage starts.

    `updates` of the rules where they are given, equal shares of `max_update` otherwise; all 0 where stages are joint.

    Raises:
        UserError: only some stages give `updates`, or there is nothing to share.
    """
    given = [rule.updates for rule in plan.stages]
    if plan.tuning.joint:
        return [0] * len(given)
    if all(n is not None for n in given):
        return [sum(n or 0 for n in given[:i]) for i in range(len(given))]
    if any(n is not None for n in given):
        raise UserError("plan: some stages give updates and some do not; give updates in all of them or in none")
    if max_update <= 0:
        raise UserError("plan: its stages give no updates; add them, or --max-update or --max-epoch to share")
    return [max_update * i // len(given) for i in range(len(given))]


class StageTimes:
    """Hold the starts of a plan's stages in one run.

    Args:
        plan: with its stages.
        max_epoch, max_update: of the run; 0 without the option.

    Raises:
        UserError: as `stage_starts`.
    """

    def __init__(self, plan: Plan, max_epoch: int, max_update: int) -> None:
        self.plan = plan
        self.ends = {EPOCH: max_epoch, UPDATE: max_update}
        by_epoch = not max_update > 0 and max_epoch > 0 and not any(rule.updates for rule in plan.stages)
        self.unit = EPOCH if by_epoch else UPDATE  # in which the stages are counted
        self.starts = stage_starts(plan, self.end)  # from the first stage's
        self.origin: int | None = None  # the update (or epoch, from 0) at which the first stage starts

    @property
    def end(self) -> int:
        """Return the update (or epoch) at which the run ends; 0 where no option says it."""
        return self.ends[self.unit]

    def begin(self, now: int) -> None:
        """Start the first stage at `now`; a run that goes on from a dense checkpoint shares what is left.

        Raises:
            UserError: nothing is left.
        """
        if 0 < self.end <= now and self.plan.stages:
            raise UserError(
                f"--max-{self.unit} {self.end}: the checkpoint is at {self.unit} {now}, and none is left for the "
                "stages; give more, or give the checkpoint to --finetune-from-model, which counts from 0"
            )
        self.origin, self.starts = now, stage_starts(self.plan, self.end - now)

    def due(self, now: int) -> int:
        """Count the stages that have started by the update (or epoch) `now`; 0 before `begin`."""
        return 0 if self.origin is None else sum(self.origin + start <= now for start in self.starts)

    def left(self, stage: int, now: int | None = None) -> int | None:
        """Count the updates left of a stage at update `now`, all of them without `now`; None where epochs end it.

        None too in the last stage of a run without --max-update whose plan gives no updates.
        """
        origin, given = self.origin or 0, self._given(stage)
        if self.unit == EPOCH:
            return None
        if stage + 1 < len(self.starts):
            end = origin + self.starts[stage + 1]
        elif self.end > 0:
            end = self.end
        elif given is not None:
            end = origin + self.starts[stage] + given
        else:
            return None
        return end - (origin + self.starts[stage] if now is None else now)

    def _given(self, stage: int) -> int | None:
        """The updates that the plan gives a stage; joint stages have those of all."""
        if not self.plan.tuning.joint:
            return self.plan.stages[stage].updates
        given = [rule.updates for rule in self.plan.stages]
        return None if None in given else sum(n or 0 for n in given)

    def check(self, done: int, warmup: int) -> None:
        """Refuse options that the stages to come contradict.

        Args:
            done: stages that have started.
            warmup: updates of --warmup-updates.

        Raises:
            UserError: the run ends before a stage starts, or a stage that restarts the schedule is all warm-up; it
                names the stage and the cure.
        """
        for stage in range(done, len(self.starts)):
            name, start = f"stage {stage + 1} of {len(self.starts)}", (self.origin or 0) + self.starts[stage]
            if 0 < self.end <= start:
                fewer = "" if self.plan.stages[0].updates is None else ", or the plan's stages fewer updates"
                raise UserError(
                    f"{name} starts after {self.unit} {start}, and --max-{self.unit} {self.end} ends the run before; "
                    f"give more than {(self.origin or 0) + self.starts[-1]}{fewer}"
                )
            length = self.left(stage) if self.plan.tuning.restarts else None
            if length is not None and 0 < length <= warmup:
                raise UserError(
                    f"tuning: schedule is restart, and {name} has {length} updates, all of them --warmup-updates "
                    f"({warmup}); give fewer warm-up updates"
                )

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs."""
        return {"origin": self.origin, "starts": self.starts, "unit": self.unit}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave: a new --max-update does not move stages that are under way."""
        self.origin, self.starts, self.unit = state["origin"], state["starts"], state.get("unit", self.unit)
