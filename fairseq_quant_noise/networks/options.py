"""Read and check those of fairseq's options that several networks share."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..errors import UserError
from ..structure.layer_map import EVERY_OTHER, kept_layers, parse_keep
from .attention import ACTIVATIONS


def given_options(options: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """The options among `names` that have a value.

    Raises:
        UserError: a value is an unresolved reference to another option, `${…}`.
    """
    given = {name: options[name] for name in names if options.get(name) is not None}
    for name, value in given.items():
        if isinstance(value, str) and "${" in value:
            cure = "resolve it first, with OmegaConf.to_container(cfg, resolve=True)"
            raise UserError(f"option {name} is {value!r}, a reference to another option; {cure}")
    return given


def number_of_layers(options: Mapping[str, Any], side: str, n_layers: int) -> int:
    """Number of layers in use: `n_layers`, or those that fairseq's `*_layers_to_keep` leaves.

    Args:
        options: fairseq's options by name.
        side: encoder or decoder.
        n_layers: number of layers without pruning.

    Raises:
        UserError: `*_layers_to_keep` is no list of layers.
    """
    name = f"{side}_layers_to_keep"
    given = options.get(name)
    if not given:
        return n_layers
    keep = parse_keep(name, given.strip("[]() ") if isinstance(given, str) else given)
    chunk = int(options.get("share_layers") or 1)
    return len(kept_layers(name, keep, side, n_layers, chunk)) if keep == EVERY_OTHER else len(keep)


def has_embedding_layer(options: Mapping[str, Any]) -> bool:
    """Whether there is a bias-free C x C Linear after the embedding: in stock fairseq with its noise, here if asked."""
    if is_ours(options):
        return bool(options.get("quant_noise_embedding_layer"))
    return given_options(options, ["quant_noise_pq"]).get("quant_noise_pq", 0) > 0


def is_ours(options: Mapping[str, Any]) -> bool:
    """Whether the options are of a model of this package, rather than of fairseq's."""
    name = options.get("_name") or options.get("arch") or ""
    return str(name).startswith("quant_noise_")


def refuse_options(options: Mapping[str, Any], names: Sequence[str], cure: str) -> None:
    """Refuse options that change what a network computes and are not implemented here.

    Raises:
        UserError: an option among `names` is set, or fairseq's own int8 is.
    """
    for name in names:
        if options.get(name):
            raise UserError(f"option {name}={options[name]!r} is not implemented without fairseq; {cure}")
    refuse_stock_int8(options, cure)


def refuse_stock_int8(options: Mapping[str, Any], cure: str) -> None:
    """Refuse `--quant-noise-scalar` of fairseq's own models.

    Raises:
        UserError: the option is set, and the model is not one of this package.
    """
    if options.get("quant_noise_scalar") and not is_ours(options):
        raise UserError(
            f"option quant_noise_scalar={options['quant_noise_scalar']!r}: stock fairseq rounds weights and "
            f"activations to int8 in evaluation too, which is not implemented without fairseq; {cure}, "
            "or set it to 0 to evaluate the weights as they are stored"
        )


def check_activation(name: str, value: str, cure: str) -> None:
    """Check the name of a nonlinearity.

    Raises:
        UserError: `value` is not in ACTIVATIONS.
    """
    if value not in ACTIVATIONS:
        known = ", ".join(ACTIVATIONS)
        raise UserError(f"{name} {value!r} is not implemented without fairseq (only {known}); {cure}")


def check_heads(side: str, dim: int, n_heads: int) -> None:
    """Check that the number of attention heads divides the width; `side` is encoder or decoder.

    Raises:
        UserError: it does not.
    """
    if dim % n_heads:
        raise UserError(
            f"{side}_attention_heads {n_heads} does not divide {side}_embed_dim {dim}; "
            "choose a number of heads that does"
        )


def integers(name: str, value: str | int | Iterable[str | int] | None) -> tuple[int, ...]:
    """Parse '20000,60000', a list, one number or None as a tuple, without fairseq's eval() of the string.

    Raises:
        UserError: `value` holds anything but integers.
    """
    parts = value.strip("[]() ").split(",") if isinstance(value, str) else value
    if parts is None:
        return ()
    try:
        return tuple(int(part) for part in ([parts] if isinstance(parts, int) else parts) if part != "")
    except (TypeError, ValueError):
        raise UserError(f"option {name} is {value!r}; give integers separated by commas") from None
