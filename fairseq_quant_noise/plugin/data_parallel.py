"""`--ddp-backend pytorch_ddp`, fairseq's default, where it cannot work.

Its DistributedDataParallel is given the number of a GPU, on a CPU too, and ends in a traceback there. And it waits for
the gradient of every parameter, which the layers that LayerDrop leaves out do not have.
"""

import copy
import logging
from typing import Any

import fairseq.models
import torch
from fairseq.modules import LayerDropModuleList
from omegaconf import open_dict
from torch import nn

from ..errors import UserError
from .exits import exits_on_user_error

logger = logging.getLogger(__name__)

_BACKENDS = ("c10d", "pytorch_ddp")  # its old name and its new one
_wrap = fairseq.models.DistributedFairseqModel


def distributed_fairseq_model(args: Any, model: nn.Module, process_group: Any, device: torch.device) -> nn.Module:
    """fairseq's function of this name, which wraps a model for a training on several processes.

    Args:
        args: the section distributed_training.
        model: what is trained.
        process_group, device: as fairseq has them.
    Raises:
        UserError: LayerDrop, on GPUs, without --find-unused-parameters.
    """
    if args.ddp_backend in _BACKENDS:
        if device.type == "cpu":
            logger.info(f"--ddp-backend {args.ddp_backend} is fairseq's for GPUs; on a CPU legacy_ddp takes its place")
            args = copy.deepcopy(args)
            with open_dict(args):
                args.ddp_backend = "legacy_ddp"
        elif not args.find_unused_parameters:
            with exits_on_user_error():
                _check_layerdrop(args.ddp_backend, model)
    wrapped: nn.Module = _wrap(args, model, process_group, device)
    return wrapped


def _check_layerdrop(backend: str, model: nn.Module) -> None:
    """Raise UserError where layers are left out, whose gradients the back end would wait for."""
    for name, module in model.named_modules():
        if isinstance(module, LayerDropModuleList) and module.p > 0:
            side = name.partition(".")[0]
            raise UserError(
                f"--{side}-layerdrop {module.p}: the layers that it leaves out have no gradient, which --ddp-backend "
                f"{backend} stops at; give --ddp-backend legacy_ddp or --find-unused-parameters"
            )
