"""Log the distortion of the noise, to see whether it is as large as it should be (fairseq issue 5223).

    distortion_KIND_weight, distortion_KIND_output    while training, every --quant-noise-log-interval updates

(`noise/measure.py`)
"""

import logging

from fairseq.logging import metrics
from torch import nn

from ..noise.measure import MeasuredDistortion, Probe

logger = logging.getLogger(__name__)

_DISTORTION = "distortion_"


def probe_next_forward(model: nn.Module) -> None:
    """Measure the next training forward and log what comes out."""
    Probe(model, _log_distortion)


def _log_distortion(found: dict[str, MeasuredDistortion]) -> None:
    for kind, distortion in found.items():
        for part, value in (("weight", distortion.of_weight), ("output", distortion.of_output)):
            if value is not None:
                metrics.log_scalar(f"{_DISTORTION}{kind}_{part}", value, weight=0, priority=1600, round=4)


def drop_unmeasured() -> None:
    """Remove from fairseq's log each distortion that was not measured since the log's last line; it would be None."""
    for meters in metrics.get_active_aggregators():
        gone = {name for name, meter in meters.items() if name.startswith(_DISTORTION) and meter.val is None}
        for name in gone:
            del meters[name]
        meters.priorities[:] = [entry for entry in meters.priorities if entry[-1] not in gone]
