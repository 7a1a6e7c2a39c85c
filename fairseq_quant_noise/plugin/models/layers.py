"""Read from fairseq's options and a plan which layers of a model are in use, and which share their weights.

fairseq prunes while it loads a checkpoint (`--decoder-layers-to-keep`). It checks no index, loses the layers of the
other side where only one is pruned, and records a number of layers that its own evaluation then misses (upstream 22).
So its options are taken over here: they are checked when the model is built and applied when weights are loaded.
"""

import logging
from collections.abc import Mapping
from typing import Any

from omegaconf import DictConfig, open_dict
from torch import Tensor, nn

from ...checkpoints.options import LEARN
from ...checkpoints.structure import layer_options
from ...errors import UserError
from ...networks.efficientnet_config import LAYER_OPTIONS
from ...plan.rules import Structure
from ...quantization.structure import apply_structure
from ...structure.layer_map import START, Keep, kept_layers, parse_keep, side_of
from ...structure.learned_rates import LearnedLayerStack, learn_layerdrop_
from ...structure.modules import SCORES, find_stacks, keep_by_stack, share_layers_
from ...structure.state import keep_state, share_state, stack_sizes
from ..exits import exits_on_user_error

logger = logging.getLogger(__name__)

SIDES = ("encoder", "decoder", *(option.removesuffix("_layers") for option in LAYER_OPTIONS))


class Layers:
    """Says which layers of a checkpoint a model takes over, and how."""

    def __init__(self, chunk: int = 1, start: str = START[0]) -> None:
        self.chunk, self.start = chunk, start  # adjacent layers that share, and what they start from
        self.keep: dict[str, tuple[str, Keep]] = {}  # by stack or side: the option that says so, and the layers
        self.own_checkpoint = False  # what is loaded was saved by this run, after pruning

    def taken(self, model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Select the weights of `state` that the model takes over, and give them the model's own names.

        Args:
            model: the network that will load them.
            state: tensors of any shape, of dense or quantized weights; those of layers that will share must have equal
                shapes, such as (out, in) for each `fc1.weight`.

        Raises:
            UserError: a layer to keep does not exist, only part of a chunk is kept, or layers of a chunk cannot share.
        """
        kept, ours = {}, find_stacks(model)
        for stack, n in stack_sizes(state).items() if self.keep else ():
            where, keep = self.keep.get(stack) or self.keep.get(side_of(stack)) or ("", ())
            pruned = self.own_checkpoint and stack in ours and n == len(ours[stack])
            if keep and not pruned:
                kept[stack] = kept_layers(where, keep, stack, n, self.chunk)
        taken = _with_scores(model, keep_state(state, kept) if kept else dict(state))
        if self.chunk == 1:
            return taken
        taken, changed = share_state(taken, self.chunk, self.start)
        if changed:
            how = "their first layer" if self.start == "first" else "the mean over their layers"
            logger.info(f"{', '.join(changed)}: chunks of {self.chunk} layers share their weights, starting from {how}")
        return taken

    def restructure(self, model: nn.Module, structure: Structure) -> None:
        """Apply a plan's `structure` to a model without noise; weights that it loads later are taken over accordingly.

        Raises:
            UserError: it contradicts the options, or does not fit the model.
        """
        if structure.share_layers > 1 and self.chunk not in (1, structure.share_layers):
            raise UserError(
                f"--share-layers {self.chunk} and the plan's share_layers {structure.share_layers} differ; give one"
            )
        if structure.keep_layers is not None and self.keep:
            option = next(iter(self.keep.values()))[0]
            raise UserError(f"{option} and the plan's keep_layers both prune; give one of them")
        apply_structure(model, structure)
        if structure.share_layers > 1:
            self.chunk, self.start = structure.share_layers, structure.share_from
        if structure.keep_layers is not None:
            where = "structure: keep_layers"
            by_stack = keep_by_stack(where, structure.keep_layers, list(find_stacks(model)))
            self.keep = {stack: (where, keep) for stack, keep in by_stack.items()}


def layers_of(options: Any) -> Layers:
    """Read the options of a model about its layers; `*_layers_to_keep` turn into the number of layers.

    Args:
        options: fairseq's `cfg.model`, changed in place.

    Raises:
        UserError: `share_layers` or `share_from` is not valid, or the layers to keep are no list, named twice, out of
            range or only part of a chunk.
    """
    chunk, start = getattr(options, "share_layers", 1) or 1, getattr(options, "share_from", None) or START[0]
    if type(chunk) is not int or chunk < 1:
        raise UserError(f"--share-layers is {chunk}; give how many adjacent layers share, from 1 up")
    if start not in START:
        raise UserError(f"--share-from is {start!r}; give {' or '.join(START)}")
    layers = Layers(chunk, start)
    for side in SIDES:
        given, n = getattr(options, f"{side}_layers_to_keep", None), getattr(options, f"{side}_layers", None)
        if given is None:
            continue
        where = f"--{side.replace('_', '-')}-layers-to-keep"
        keep = parse_keep(where, given)
        if n is None:
            raise UserError(
                f"{where} {given}: how many layers there are is not known; give {where[: -len('-to-keep')]} too"
            )
        update_options(options, layer_options({side: len(kept_layers(where, keep, f"the {side}", n, chunk))}))
        layers.keep[side] = where, keep
    return layers


def share(model: nn.Module, layers: Layers) -> None:
    """Tie the layers of a model that was just built, as its options say.

    Raises:
        UserError: the number of layers that share does not divide a stack.
    """
    if layers.chunk > 1:
        share_layers_(model, layers.chunk)


def learn_rates(model: nn.Module, options: Any) -> None:
    """Let the stacks of a model that was just built, and shared, learn their rates where the options ask for it.

    Raises:
        UserError: the options ask for it, and no stack is trained with LayerDrop.
    """
    if getattr(options, LEARN, False):
        learn_layerdrop_(model)
        if not any(isinstance(stack, LearnedLayerStack) for stack in find_stacks(model).values()):
            raise UserError("--learn-layerdrop: give --encoder-layerdrop P or --decoder-layerdrop P too")


def _with_scores(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state with scores of layers for the stacks of `model` that learn, its own where the state has none."""
    ours = {f"{name}.{SCORES}": stack._parameters.get(SCORES) for name, stack in find_stacks(model).items()}
    own = {name: scores.detach() for name, scores in ours.items() if scores is not None}
    kept = {}
    for name, tensor in state.items():  # in their order, by which moments of Adam are found
        if name.rpartition(".")[2] != SCORES:
            kept[name] = tensor
        elif name in own:
            kept[name] = tensor if tensor.shape == own[name].shape else own[name]
    return kept | {name: scores for name, scores in own.items() if name not in kept}


def record_layers(model: Any, options: Any) -> None:
    """Record in `options`, which go into a checkpoint, how many layers the model has now, and which share."""
    layers = getattr(model, "quant_noise_layers", None)
    if layers is None or (layers.chunk == 1 and not layers.keep):
        return
    counts = {side_of(stack): len(stack_of) for stack, stack_of in find_stacks(model).items()}
    update_options(options, {**layer_options(counts), "share_layers": layers.chunk})


def prune_state_dict(state_dict: Mapping[str, Tensor], model_cfg: Any) -> Mapping[str, Tensor]:
    """Prune a state as fairseq's function of this name does, but keep the layers of a side that is not pruned.

    Args:
        state_dict: a checkpoint's weights, tensors of any shape such as (out, in); passed on, not copied.
        model_cfg: `cfg.model`, or None; its `*_layers_to_keep` become None once they have been applied.

    Raises:
        UserError: the layers to keep are no list, named twice or out of range; in fairseq's programs SystemExit.
    """
    given = {side: keep for side in SIDES if (keep := getattr(model_cfg, f"{side}_layers_to_keep", None))}
    if not given:
        return state_dict
    kept = {}
    with exits_on_user_error():
        for stack, n in stack_sizes(state_dict).items():
            if (side := side_of(stack)) in given:
                where = f"--{side}-layers-to-keep"
                kept[stack] = kept_layers(where, parse_keep(where, given[side]), stack, n)
    update_options(model_cfg, {f"{side}_layers_to_keep": None for side in given})
    return keep_state(state_dict, kept)


def update_options(options: Any, values: Mapping[str, Any]) -> None:
    """Set options of a model, in a DictConfig or a Namespace."""
    if isinstance(options, DictConfig):
        with open_dict(options):
            options.update(values)
    else:
        vars(options).update(values)
