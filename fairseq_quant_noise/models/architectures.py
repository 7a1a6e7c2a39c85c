"""The options of a registered architecture, for the dry run."""

from argparse import Namespace
from typing import Any

from fairseq.models import ARCH_CONFIG_REGISTRY, ARCH_MODEL_NAME_REGISTRY, MODEL_DATACLASS_REGISTRY

from ..errors import UserError


def architecture_options(architecture: str) -> dict[str, Any]:
    """fairseq's `cfg.model` for `--arch architecture` and no other option.

    Raises:
        UserError: no such architecture is registered.
    """
    if architecture not in ARCH_CONFIG_REGISTRY:
        known = ", ".join(a for a in ARCH_CONFIG_REGISTRY if a.startswith("quant_noise_"))
        raise UserError(f"--arch {architecture}: not registered; this package has {known}, and fairseq's own")
    model = ARCH_MODEL_NAME_REGISTRY[architecture]
    options = Namespace()
    ARCH_CONFIG_REGISTRY[architecture](options)
    dataclass = MODEL_DATACLASS_REGISTRY.get(model)
    defaults = {
        name: field.default
        for name, field in getattr(dataclass, "__dataclass_fields__", {}).items()
        if not str(field.default).startswith("${")
    }
    return {**defaults, **vars(options), "_name": model}
