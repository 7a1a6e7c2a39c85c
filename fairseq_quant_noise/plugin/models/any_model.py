"""Make a model of this package of any model that fairseq builds, whatever its architecture.

fairseq's programs build every model by `fairseq.models.build_model`, which is replaced here. The model is built without
fairseq's own noise, and its class becomes a subclass of the same name with `Quantizable` before it: it takes the noise
of the options, the stages of a plan, and checkpoints with codes. Its options (`--quant-noise-kind`, ...) are added to
those of whatever architecture the command line names.

A checkpoint records the options of the stock architecture alone, so that stock fairseq loads it while it is dense.
"""

import argparse
import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, make_dataclass
from typing import Any

import fairseq.models
import fairseq.options
from fairseq.dataclass import FairseqDataclass
from fairseq.dataclass.utils import gen_parser_from_dataclass
from fairseq.models import ARCH_MODEL_NAME_REGISTRY, ARCH_MODEL_REGISTRY, MODEL_DATACLASS_REGISTRY, MODEL_REGISTRY
from fairseq.models.roberta.model import RobertaLMHead
from fairseq.modules.conv_tbc import ConvTBC
from fairseq.modules.dynamic_convolution import DynamicConv_scripatable
from fairseq.modules.lightweight_convolution import LightweightConv1d, LightweightConv1dTBC
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, open_dict
from torch import Tensor, nn

from ...checkpoints.options import NOISE_FLAGS
from ...errors import UserError
from ...layers.registry import Held, weights_in
from ...weights.blocks import cover
from ..exits import exits_on_user_error
from .layers import update_options
from .options import QuantNoiseOptions, option
from .quantizable import Quantizable, add_noise, made_quantizable, without_fairseq_noise

for _type in (ConvTBC, LightweightConv1d, LightweightConv1dTBC, RobertaLMHead):
    cover(_type)

_build_model = fairseq.models.build_model
_parse_args_and_arch = fairseq.options.parse_args_and_arch
_GROUP = "Model-specific configuration"  # fairseq's title of an architecture's options in --help


@dataclass
class AnyModelOptions(QuantNoiseOptions):
    """The options of every architecture: this package's, and those of fairseq that some of its models lack."""

    quant_noise_pq: float = option(0.0, "share of the blocks of weights that are hit in each forward")
    quant_noise_pq_block_size: int = option(8, "block size; less for kernels of convolutions, where it does not divide")
    quant_noise_scalar: float = option(0.0, "int8 noise of this share, and int8 weights and activations in evaluation")


class OfAnyArchitecture(Quantizable):
    """Mixed into the class of a built model of an architecture that is not one of this package's."""

    quant_noise_stock: Any  # the options that it was built with

    def register_classification_head(self, *args: Any, **kwargs: Any) -> None:
        """fairseq's, where the model has it; the head's weights get their noise now."""
        with exits_on_user_error():
            with without_fairseq_noise(self.quant_noise_stock):
                super().register_classification_head(*args, **kwargs)  # type: ignore[misc]
            add_noise(self, self.quant_noise_stock)  # type: ignore[arg-type]

    def load_state_dict(self, state_dict: Any, strict: bool = True, model_cfg: Any = None, args: Any = None) -> Any:
        """As fairseq's; names of old checkpoints are settled before weights become quantized ones."""
        state_dict = dict(state_dict)
        self.upgrade_state_dict(state_dict)  # type: ignore[attr-defined]
        return super().load_state_dict(state_dict, strict, model_cfg, args)

    def upgrade_state_dict_named(self, state_dict: dict[str, Tensor], name: str) -> None:
        """As fairseq's, which reads and renames entries called `weight`; in codes there are none.

        A stand-in on the meta device, of the dense shape, takes the place of each meanwhile.

        Args:
            state_dict: tensors of any shape, changed in place.
            name: the prefix of the model's entries.
        """
        held = {key: held for key, held in weights_in(state_dict).items() if isinstance(held, Held)}
        stand_ins = {
            key: nn.Parameter(Tensor(), requires_grad=False).new_empty(held.shape, device="meta")
            for key, held in held.items()
            if key not in state_dict
        }
        state_dict.update(stand_ins)
        super().upgrade_state_dict_named(state_dict, name)  # type: ignore[misc]
        ours = {id(tensor) for tensor in stand_ins.values()}
        for key in [key for key, tensor in state_dict.items() if id(tensor) in ours]:
            del state_dict[key]


@functools.cache
def _of_any_architecture(model: Any) -> Any:
    """The subclass of a model's class that stands for it here."""
    contents = {"__module__": model.__module__, "__doc__": model.__doc__, "__qualname__": model.__qualname__}
    return type(model.__name__, (OfAnyArchitecture, model), contents)


_building = False


def build_model(cfg: Any, task: Any, from_checkpoint: bool = False) -> Any:
    """fairseq's function of this name; the model of any architecture is one of this package.

    Raises:
        UserError: options of the noise or the layers contradict each other, or do not fit the model (in fairseq's
            programs SystemExit, after one line).
    """
    global _building
    if _building or is_ours(model_class(cfg)):  # a part of the model that is being built is fairseq's own
        return _build_model(cfg, task, from_checkpoint)
    _building = True
    try:
        with exits_on_user_error():
            return _built(cfg, lambda: _build_model(cfg, task, from_checkpoint), from_checkpoint)
    finally:
        _building = False


def _built(cfg: Any, build: Callable[[], Any], from_checkpoint: bool) -> Any:
    def of_this_package() -> Any:
        with _known_options(cfg):
            model = build()
        _fill_unread_biases(model)
        if not isinstance(model, Quantizable):
            kind: Any = type(model)
            model.__class__ = _of_any_architecture(kind)
            model.quant_noise_stock = cfg
        return model

    _check_sections(cfg)
    # A checkpoint of this package has noise 0 in its options: this one is of stock fairseq, which had added the layer.
    has_layer = (
        from_checkpoint and bool(getattr(cfg, "quant_noise_pq", 0)) and not getattr(cfg, "adaptive_input", False)
    )
    return made_quantizable(of_this_package, cfg, has_layer)


def _fill_unread_biases(model: nn.Module) -> None:
    """Set to 0 what fairseq's dynamic convolutions never write nor read; checkpoints would hold stray memory."""
    for module in model.modules():
        if isinstance(module, DynamicConv_scripatable) and not module.has_conv_bias:
            nn.init.zeros_(module.conv_bias)


def _check_sections(cfg: Any, path: str = "model") -> None:
    """Refuse fairseq's noise in a section of its own, as Hydra can set it, which would not act and say nothing."""
    entries: Any = cfg.items_ex(resolve=False) if isinstance(cfg, DictConfig) else ()
    for key, value in entries:
        if key == "quant_noise" and isinstance(value, DictConfig) and (value.get("pq") or value.get("scalar")):
            raise UserError(f"{path}.quant_noise: is fairseq's own noise; give +model.quant_noise_pq=P instead")
        if isinstance(value, DictConfig):
            _check_sections(value, f"{path}.{key}")


def model_class(cfg: Any) -> Any:
    """The class of the model that `cfg.model` is of, or None."""
    name = getattr(cfg, "_name", None) or getattr(cfg, "arch", None) or ""
    return ARCH_MODEL_REGISTRY.get(name) or MODEL_REGISTRY.get(name)


def is_ours(model: Any) -> bool:
    """Whether a class is of this package."""
    return model is not None and issubclass(model, Quantizable)


@contextmanager
def _known_options(cfg: Any) -> Iterator[None]:
    """Take out of `cfg` the options that the model's dataclass does not have, which fairseq would refuse."""
    name = getattr(cfg, "_name", None) or ""
    known = MODEL_DATACLASS_REGISTRY.get(ARCH_MODEL_NAME_REGISTRY.get(name, name))
    added: dict[str, Any] = {}
    if isinstance(cfg, DictConfig) and known is not None:
        has = {field.name for field in fields(known)}
        added = {f.name: cfg[f.name] for f in fields(AnyModelOptions) if f.name in cfg and f.name not in has}
    _remove(cfg, added)
    try:
        yield
    finally:
        if added:
            update_options(cfg, added)


def _remove(cfg: Any, names: Mapping[str, Any]) -> None:
    if isinstance(cfg, DictConfig):
        with open_dict(cfg):
            for name in names:
                del cfg[name]
    else:
        for name in names:
            del vars(cfg)[name]


def parse_args_and_arch(
    parser: argparse.ArgumentParser,
    input_args: Any = None,
    parse_known: bool = False,
    suppress_defaults: bool = False,
    modify_parser: Any = None,
) -> Any:
    """fairseq's function of this name; every architecture has the options of the noise."""

    def modify(parser: argparse.ArgumentParser) -> None:
        if modify_parser is not None:
            modify_parser(parser)
        groups = [group for group in parser._action_groups if group.title == _GROUP]
        if groups:  # fairseq has added the options of the architecture
            add_options(groups[-1], parser.parse_known_args(input_args)[0].arch)

    return _parse_args_and_arch(parser, input_args, parse_known, suppress_defaults, modify)


def add_options(group: Any, architecture: str) -> None:
    """Add the options of the noise to an architecture's, where it lacks them."""
    model = ARCH_MODEL_REGISTRY.get(architecture) or MODEL_REGISTRY.get(architecture)
    if is_ours(model):
        return
    there = group._option_string_actions
    missing = [f for f in fields(AnyModelOptions) if f"--{f.name.replace('_', '-')}" not in there]
    added = make_dataclass("Added", [(f.name, f.type, f) for f in missing], bases=(FairseqDataclass,))
    gen_parser_from_dataclass(group, added(), delete_default=True)
    known = getattr(model, "__dataclass", None)
    if known is not None and not issubclass(known, AnyModelOptions):
        _extend(ARCH_MODEL_NAME_REGISTRY.get(architecture, architecture), model, known)


def _extend(name: str, model: Any, known: Any) -> None:
    """Give a model's dataclass the options, so that fairseq carries them from the command line into `cfg.model`."""
    extended: Any = dataclass(type(known.__name__, (known, AnyModelOptions), {"__module__": known.__module__}))
    setattr(model, "__dataclass", extended)
    MODEL_DATACLASS_REGISTRY[name] = extended
    node: Any = extended()
    node._name = name
    ConfigStore.instance().store(name=name, group="model", node=node, provider="fairseq")


@contextmanager
def saved_as_stock(model: Any, options: Any) -> Iterator[None]:
    """While a checkpoint is saved: the options of an architecture of fairseq's are those that stock fairseq knows.

    Its noise is 0 there: stock fairseq would build another network for evaluation, with a layer after the embedding.
    """
    if not isinstance(model, OfAnyArchitecture):
        yield
        return
    ours = [f.name for f in fields(QuantNoiseOptions)]
    kept = {name: getattr(options, name) for name in (*ours, *NOISE_FLAGS) if hasattr(options, name)}
    _remove(options, {name: None for name in ours if name in kept})
    embedding_layer = kept.get("quant_noise_embedding_layer", False)
    if not embedding_layer:
        update_options(options, {name: 0.0 for name in NOISE_FLAGS if name in kept})
    try:
        yield
    finally:
        update_options(options, kept)
