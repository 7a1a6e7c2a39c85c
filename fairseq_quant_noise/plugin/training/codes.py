"""Encode again in fairseq's Trainer, for plans with `codes: train`: after every so many updates, on every rank.

All ranks hold the same latent weights and centroids, and so find the same codes; each checkpoint checks it by hash.

    ipq_codes_changed    in the log: per cent of all codes that the encodings since the last line changed, each
    ipq_distortion       ||W_hat - latent|| / ||latent|| over all weights whose codes train, at the line's update
"""

from typing import Any

from fairseq.logging import metrics
from torch import nn

from ...plan.rules import Codes
from ...quantization.code_training import encode_again, latent_error, trained_weights
from ...utils.ranks import check_same
from ..exits import exits_on_user_error

CHANGED, DISTORTION = "ipq_codes_changed", "ipq_distortion"


def encode_after_update(model: nn.Module, codes: Codes, update: int, log_interval: int) -> None:
    """Encode again where it is due, and log how many codes it changed.

    Args:
        model: as it is after the update.
        codes: of the plan.
        update: how many updates are done.
        log_interval: updates between two lines of the log, for each of which the distortion is measured.
    """
    if update % codes.every == 0:
        changed = encode_again(model, codes.share)
        metrics.log_scalar(CHANGED, 100 * changed, weight=1, priority=192, round=3)
    if log_interval > 0 and update % log_interval == 0:
        error = latent_error(model)
        if error is not None:
            metrics.log_scalar(DISTORTION, error, weight=1, priority=193, round=4)


def check_codes(trainer: Any) -> None:
    """Check that all ranks hold the same codes where they train.

    Raises:
        UserError: they do not (in fairseq's programs SystemExit, after one line).
    """
    codes = {f"{name}.codes": weight.codes for name, weight in trained_weights(trainer.get_model()).items()}
    with exits_on_user_error():
        check_same(codes, f"after update {trainer.get_num_updates()}")
