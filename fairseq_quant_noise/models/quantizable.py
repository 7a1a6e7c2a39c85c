"""What every registered model of this package adds to fairseq's: noise when it is built, quantized weights when loaded.

The architectures themselves stay fairseq's, with fairseq's parameter names. Only its own quant-noise hooks are kept
out of the way, since they overwrite the weights that they should only disturb.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from fairseq.checkpoint_utils import prune_state_dict
from omegaconf import DictConfig, open_dict
from torch import nn

from ..cli_errors import exits_on_user_error
from ..errors import UserError
from ..layers import adopt_quantized
from ..noise import attach_rules
from ..plan import NoiseRule


@contextmanager
def _without_fairseq_noise(options: Any) -> Iterator[None]:
    """Build with fairseq's quant-noise options at zero; they are put back, since checkpoints record them."""
    names = [n for n in ("quant_noise_pq", "quant_noise_scalar") if getattr(options, n, None)]
    kept = {n: getattr(options, n) for n in names}
    try:
        _update(options, dict.fromkeys(names, 0.0))
        yield
    finally:
        _update(options, kept)


def _update(options: Any, values: Mapping[str, Any]) -> None:
    if isinstance(options, DictConfig):
        with open_dict(options):
            options.update(values)
    else:
        vars(options).update(values)


def noise_rules(options: Any) -> list[NoiseRule]:
    """The `--quant-noise-*` flags as rules: shorthand for one rule over every weight.

    Raises:
        UserError: an option out of range.
    """
    if getattr(options, "quant_noise_scalar", 0):
        raise UserError("--quant-noise-scalar: int8 noise is not part of this version; leave the option at 0")
    p = getattr(options, "quant_noise_pq", 0) or 0
    if not 0 <= p <= 1:
        raise UserError(f"--quant-noise-pq is {p}; give a probability from 0 to 1")
    return [NoiseRule(".*", p=p, block_size=options.quant_noise_pq_block_size)] if p else []


class Quantizable:
    """Mixed into a fairseq model class, before it, to make it a model of this package."""

    @classmethod
    def build_model(cls, args: Any, task: Any) -> nn.Module:
        """fairseq's model, with noise on its weights where the options ask for it."""
        with exits_on_user_error():
            rules = noise_rules(args)
            with _without_fairseq_noise(args):
                model: nn.Module = super().build_model(args, task)  # type: ignore[misc]
            _clear_uninitialised(model)
            if rules:
                attach_rules(model, rules)
        return model

    def load_state_dict(self, state_dict: Any, strict: bool = True, model_cfg: Any = None, args: Any = None) -> Any:
        """As fairseq's; weights that the checkpoint holds as codes become quantized weights first."""
        names = prune_state_dict(state_dict, _copy(model_cfg))
        with exits_on_user_error():
            adopt_quantized(self, names)  # type: ignore[arg-type]
        return super().load_state_dict(state_dict, strict, model_cfg, args)  # type: ignore[misc]


def _clear_uninitialised(model: nn.Module) -> None:
    """fairseq keeps one-number buffers for their dtype alone, never written: checkpoints would hold stray memory."""
    for name, buffer in model.named_buffers():
        if name.endswith("_float_tensor"):
            buffer.zero_()


def _copy(model_cfg: Any) -> Any:
    """A copy to prune by: `prune_state_dict` erases `*_layers_to_keep` from the configuration that it is given."""
    return model_cfg.copy() if isinstance(model_cfg, DictConfig) else None
