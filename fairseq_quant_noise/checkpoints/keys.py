"""Name every entry that this package adds to fairseq's checkpoints."""

from typing import Any

# In `extra_state`.
STAGES = "quant_noise_stages"  # the plan, how many of its stages are done, and where each begins
IMPORTANCE = "quant_noise_importance"  # second moments of the dense weights, where the optimizer no longer has them
CHECKSUMS = "quant_noise_checksums"  # checksums of the codes, by the tensor's name
SHAPES = "quant_noise_shapes"  # shape of each weight in codes that is no plain matrix, and whether it is turned
NOISE = "quant_noise"  # what the noise has drawn and measured
POSITION = "quant_noise_position"  # where the run is in its data
EMA_COUNTER = "quant_noise_ema"  # updates since the last step of the average, with --ema-update-freq

# In the state of a half-precision optimizer.
FP32_COPIES = "quant_noise_fp32_params"  # the fp32 copy of each parameter
SCALER = "quant_noise_scaler"  # the loss scaler's whole state

# In the state of the learning-rate scheduler.
STAGE_BEGAN = "quant_noise_stage"  # the update and the epoch at which the stage in progress began, and its length


def no_training() -> dict[str, Any]:
    """The training state that fairseq expects in a checkpoint, as before the first update."""
    return {
        "optimizer_history": [{"criterion_name": "", "optimizer_name": "", "lr_scheduler_state": {}, "num_updates": 0}],
        "extra_state": {"train_iterator": {"epoch": 1, "iterations_in_epoch": 0}},
    }
