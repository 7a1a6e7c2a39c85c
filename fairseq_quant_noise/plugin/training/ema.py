"""Support `--store-ema`, the moving average of the weights (fairseq's `models/ema`), for networks with noise.

    a <- decay * a + (1 - decay) * w        for the weights w and the average a, after each update

fairseq copies the model and averages all that its state holds. What is different here:

- the copy has no noise: it is there to be evaluated;
- codes, ranges and counts of quantized weights and inputs, and all whole numbers, are copied, not averaged;
- a weight that several modules hold is averaged once; under two names fairseq averages it twice, so that it decays
  by decay^2;
- the average is put back as it is. fairseq loads it as it loads an old checkpoint, without the `version` it leaves
  out, and so takes the last layer norm off a decoder, and refuses an adaptive softmax;
- a checkpoint without an average starts one from its weights; fairseq ends in a traceback.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from fairseq.models.ema import EMA
from torch import Tensor, nn

from ...checkpoints.keys import EMA_COUNTER
from ...layers.inputs import InputQuantizer
from ...layers.quantized import QuantizedWeight
from ...noise import detach_noise

KEY, FP32 = "ema", "ema_fp32_params"  # fairseq's, in a checkpoint's extra_state


class Average(EMA):
    """Average as fairseq's EMA does, for a model that may have noise, int8 weights or tied weights."""

    def __init__(self, model: nn.Module, config: Any, device: torch.device | None = None) -> None:
        super().__init__(model, config, device)
        detach_noise(self.model)
        self.copied = {
            f"{name}.{buffer}"
            for name, module in self.model.named_modules(remove_duplicate=False)
            if isinstance(module, QuantizedWeight | InputQuantizer)
            for buffer in module._buffers
        }

    @torch.no_grad()
    def _step_internal(self, new_model: nn.Module, updates: int | None = None) -> None:
        """Move the average one step towards the weights of `new_model`."""
        kept: dict[str, Any] = self.fp32_params if self.config.ema_fp32 else self.model.state_dict()
        done: set[int] = set()  # by address: one of the names of a tied weight
        for name, value in new_model.state_dict().items():
            average = kept.get(name)
            if not isinstance(average, Tensor) or average.data_ptr() in done:
                continue
            done.add(average.data_ptr())
            if average.is_floating_point() and name not in self.copied and not name.endswith("version"):
                average.mul_(self.decay).add_(value.to(average.dtype), alpha=1 - self.decay)
            else:
                average.copy_(value)
        nn.Module.load_state_dict(self.model, kept, strict=False)


def build_ema(model: nn.Module, cfg: Any, device: torch.device) -> Average:
    """Build an `Average`; this replaces fairseq's function of the same name."""
    return Average(model, cfg, device)


def state(trainer: Any) -> dict[str, Any]:
    """Return what a checkpoint keeps besides the average."""
    return {EMA_COUNTER: trainer.ema.update_freq_counter} if trainer.cfg.ema.store_ema else {}


@contextmanager
def left_out(trainer: Any) -> Iterator[None]:
    """Keep fairseq from loading an average inside: it looks for weights that it has thrown away."""
    options = trainer.cfg.ema
    options.store_ema, kept = False, options.store_ema
    try:
        yield
    finally:
        options.store_ema = kept


def load(trainer: Any, extra_state: dict[str, Any] | None) -> None:
    """With --store-ema, take the average of a checkpoint that has been loaded; without one, start at the weights."""
    trainer._ema = None  # built from the model when it is asked for
    if not trainer.cfg.ema.store_ema or extra_state is None or KEY not in extra_state:
        return
    trainer.ema.restore(extra_state[KEY])
    trainer.ema.update_freq_counter = extra_state.get(EMA_COUNTER, 0)
    if trainer.cfg.ema.ema_fp32:
        trainer.ema.build_fp32_params(extra_state.get(FP32))
