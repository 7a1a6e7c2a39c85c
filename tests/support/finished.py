"""Whether two finished runs are the same run: what their last checkpoints hold, bit for bit."""

from lm_fixture import same, state_of

from fairseq_quant_noise.checkpoints.keys import NOISE, POSITION, STAGES

STATES = ("model", "last_optimizer_state", "task_state")
EXTRA = (NOISE, STAGES, POSITION, "train_iterator", "best", "val_loss")


def differences(one, other) -> list[str]:
    """What of two checkpoints is not the same, by name."""
    first, second = state_of(one), state_of(other)
    found = [key for key in STATES if not same(first[key], second[key])]
    found += [key for key in EXTRA if not same(first["extra_state"].get(key), second["extra_state"].get(key))]
    histories = (state["optimizer_history"][-1] for state in (first, second))  # the others are of earlier resumes
    return found if same(*histories) else [*found, "optimizer_history"]
