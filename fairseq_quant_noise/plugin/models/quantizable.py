"""Extend fairseq's models: add noise when they are built, and load quantized weights.

The architectures themselves stay fairseq's, with fairseq's parameter names. Only its own quant-noise hooks are kept
out of the way, since they overwrite the weights that they should only disturb.
"""

import copy
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from fairseq.modules.quant_noise import quant_noise
from torch import Tensor, nn

from ...checkpoints.options import EMBEDDING_LAYER, NOISE_FLAGS, find_embedding_layer
from ...checkpoints.safe_load import clear_unwritten
from ...errors import UserError
from ...layers import adopt_quantized, quantize_inputs_, quantized_weights, to_int_, warn_of_unrounded
from ...layers.quantized import row_major
from ...noise import attach_rules, detach_noise, fitted_rules, noise_of
from ...plan.rules import Activations, NoiseRule, Structure
from ...weights.discovery import find_weights
from ..exits import exits_on_user_error
from ..metrics import probe_next_forward
from .layers import Layers, layers_of, learn_rates, share, update_options
from .options import SCALAR_BITS, noise_rules

logger = logging.getLogger(__name__)

_FAIRSEQ_DEFAULTS = {"quant_noise_pq": 0.0, "quant_noise_pq_block_size": 8, "quant_noise_scalar": 0.0}


@contextmanager
def without_fairseq_noise(options: Any, embedding_layer: bool = False) -> Iterator[None]:
    """Build with fairseq's quant-noise options at zero; they are put back, since checkpoints record them.

    With `embedding_layer` they are such that fairseq builds the layer; its hooks must then be taken off the model.
    """
    meanwhile = dict.fromkeys(NOISE_FLAGS, 0.0) | (EMBEDDING_LAYER if embedding_layer else {})
    kept = {n: getattr(options, n, default) for n, default in _FAIRSEQ_DEFAULTS.items() if n in meanwhile}
    try:
        update_options(options, meanwhile)
        yield
    finally:
        update_options(options, kept)


def _take_off_fairseq_noise(model: nn.Module) -> None:
    """Remove fairseq's hooks, which overwrite the weights in training."""
    for module in model.modules():
        for key in _fairseq_noise(module):
            del module._forward_pre_hooks[key]


def _fairseq_noise(module: nn.Module) -> list[int]:
    return [key for key, hook in module._forward_pre_hooks.items() if hook.__module__ == quant_noise.__module__]


def check_noise(model: nn.Module) -> None:
    """Refuse to train a model under fairseq's own noise, which a task may have built by itself.

    Raises:
        UserError: a module of the model has fairseq's hook.
    """
    for name, module in model.named_modules():
        if _fairseq_noise(module):
            raise UserError(
                f"{name}: would train under fairseq's own noise, which overwrites the weights; leave --quant-noise-pq "
                "out, or let the task build its model by fairseq.models.build_model"
            )


class Quantizable:
    """Make a fairseq model class one of this package, as its first base class."""

    quant_noise_options: Mapping[str, int] = {}  # how often the noise is measured
    quant_noise_layers: Layers
    _probed = -1  # the last update measured

    @classmethod
    def build_model(cls, args: Any, task: Any) -> nn.Module:
        """Build fairseq's model, with noise on its weights where the options ask for it.

        Raises:
            UserError: the options contradict each other, or do not fit the model (in fairseq's programs SystemExit,
                after one line).
        """
        with exits_on_user_error():
            build: Callable[..., nn.Module] = super().build_model  # type: ignore[misc]
            return made_quantizable(lambda: build(args, task), args)

    def restructure(self, structure: Structure, options: Any) -> None:
        """Apply a plan's `structure` before training; the noise that `options` ask for is put on anew.

        Raises:
            UserError: it contradicts the options, or does not fit the model.
        """
        noised = noise_of(self) is not None  # type: ignore[arg-type]
        detach_noise(self)  # type: ignore[arg-type]
        self.quant_noise_layers.restructure(self, structure)  # type: ignore[arg-type]
        if noised:
            add_noise(self, options)  # type: ignore[arg-type]

    def set_num_updates(self, num_updates: int) -> None:
        """Tell the noise which update comes, as fairseq says before each; schedules and intervals go by it."""
        super().set_num_updates(num_updates)  # type: ignore[misc]
        noise = noise_of(self)  # type: ignore[arg-type]
        if noise is not None:
            noise.set_num_updates(num_updates)
            every = self.quant_noise_options.get("quant_noise_log_interval", 0)
            if every > 0 and num_updates % every == 0 and num_updates != self._probed:
                self._probed = num_updates  # fairseq says it again for each part of an update
                probe_next_forward(self)  # type: ignore[arg-type]

    def __prepare_scriptable__(self) -> nn.Module:
        """Give `torch.jit.script` fairseq's own model with the same weights, because TorchScript cannot compile noise.

        Raises:
            UserError: weights in codes or seen through them, which it cannot express.
        """
        if quantized_weights(self):  # type: ignore[arg-type]
            raise UserError(
                "torch.jit.script: cannot express quantized weights; make an ordinary checkpoint with "
                "`fairseq-quant-noise to-dense FILE --out CKPT` and script that"
            )
        model: Any = copy.deepcopy(self) if noise_of(self) is not None else copy.copy(self)  # type: ignore[arg-type]
        detach_noise(model)
        for name in ("quant_noise_layers", "quant_noise_options", "quant_noise_stock", "_probed"):
            vars(model).pop(name, None)
        kind = type(self)
        model.__class__ = next(base for base in kind.__mro__[1:] if not issubclass(base, Quantizable))
        scriptable: nn.Module = model
        return scriptable

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Return the state with codes contiguous: fairseq sends a checkpoint to other ranks as it lies in memory."""
        state = super().state_dict(*args, **kwargs)  # type: ignore[misc]
        row_major(state)
        return state

    def load_state_dict(self, state_dict: Any, strict: bool = True, model_cfg: Any = None, args: Any = None) -> Any:
        """Load as fairseq does, after pruning and sharing; weights in codes become quantized weights first."""
        with exits_on_user_error():
            taken = self.quant_noise_layers.taken(self, state_dict)  # type: ignore[arg-type]
            if strict:
                _check_embedding_layer(self, taken)  # type: ignore[arg-type]
            _check_ties(self, taken)  # type: ignore[arg-type]
            adopt_quantized(self, taken)  # type: ignore[arg-type]
        return super().load_state_dict(taken, strict)  # type: ignore[misc]


def made_quantizable(build: Callable[[], Any], options: Any, embedding_layer: bool = False) -> Any:
    """Build a Quantizable with the noise and the shared layers that `options` ask for, and without fairseq's noise.

    Args:
        build: makes the model, fairseq's own or one with fairseq's noise; the options say that there is none.
        options: fairseq's `cfg.model`, changed in place (see `layers_of`).
        embedding_layer: whether the model has the layer after the embedding, in any case.

    Raises:
        UserError: the options contradict each other, or do not fit the model.
    """
    noise_rules(options)  # a mistake stops the run before the model is built
    layers = layers_of(options)
    embedding_layer = embedding_layer or getattr(options, "quant_noise_embedding_layer", False)
    if embedding_layer and getattr(options, "adaptive_input", False):
        raise UserError("--quant-noise-embedding-layer: fairseq has none with --adaptive-input; leave the option out")
    with without_fairseq_noise(options, embedding_layer):
        model = build()
    _take_off_fairseq_noise(model)
    clear_unwritten(dict(model.named_buffers()))
    share(model, layers)
    learn_rates(model, options)
    model.quant_noise_layers = layers
    model.quant_noise_options = _measurements(options)
    add_noise(model, options)
    return model


def _check_embedding_layer(model: nn.Module, state: Mapping[str, Any]) -> None:
    """Raise UserError where only one of model and state has the layer after the embedding."""
    here, there = find_embedding_layer(model.state_dict()), find_embedding_layer(state)
    if there and not here:
        raise UserError(
            f"{there}: the checkpoint has this layer, which fairseq's own --quant-noise-pq adds after the embedding, "
            "and the model has not; give --quant-noise-embedding-layer"
        )
    if here and not there:
        raise UserError(
            f"{here}: --quant-noise-embedding-layer adds this layer, and the checkpoint has none; leave the option out"
        )


def _check_ties(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Raise UserError where the state has two values for one weight of the model: loading would keep the last one."""
    first: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name in state:
            other = first.setdefault(id(parameter), name)
            one, two = state[other], state[name]
            if one.shape == two.shape and one.data_ptr() != two.data_ptr() and not torch.equal(one, two):
                raise UserError(
                    f"{other} and {name}: are one weight in this model and two in the checkpoint; give the options "
                    "it was trained with (--untie-weights-roberta, or no --share-… or --tie-… option)"
                )


def _measurements(args: Any) -> dict[str, int]:
    return {name: int(getattr(args, name, 0) or 0) for name in ("quant_noise_log_interval", "quant_noise_gap_batches")}


def add_noise(model: nn.Module, options: Any) -> None:
    """Put noise on every weight of `model` where the options ask for it; call it again when layers have been added.

    Raises:
        UserError: the options contradict each other, or do not fit the model.
    """
    rules = noise_rules(options)
    if rules:
        detach_noise(model)
        attach_and_say(model, fitted_rules(model, rules))
        if getattr(options, "quant_noise_scalar", 0):
            _evaluate_as_int8(model, rules[0])


def attach_and_say(model: nn.Module, rules: Sequence[NoiseRule]) -> None:
    """Call `attach_rules`, and log in one line which noise acts on how many weights.

    Raises:
        UserError: as `attach_rules`.
    """
    noised = attach_rules(model, rules)
    numbers, all_numbers = sum(math.prod(w.shape) for w in noised), sum(p.numel() for p in model.parameters())
    kinds = dict.fromkeys(f"{'+'.join(rule.kinds)} with p = {rule.p:g}" for rule in rules)
    logger.info(
        f"Quant-Noise: {', '.join(kinds)} on {len(noised)} weights ({numbers / all_numbers:.1%} of the parameters); "
        "fairseq's own noise is off"
    )


def _evaluate_as_int8(model: nn.Module, rule: NoiseRule) -> None:
    """Let evaluation use int8 weights and activations, as fairseq documents `--quant-noise-scalar P`.

    Ranges of the activations follow the training and are in the checkpoint.
    """
    weights = find_weights(model)
    for weight in weights:
        if not isinstance(weight.stored, nn.Module):
            to_int_(weight, SCALAR_BITS, rule.range, noise=True)
    activations = Activations(bits=SCALAR_BITS)
    names = [weight.name for weight in weights]
    warn_of_unrounded(model, names)
    quantize_inputs_(model, names, activations.bits, activations.range, activations.calibration_batches)
