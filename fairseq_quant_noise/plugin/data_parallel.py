"""Train with several processes where fairseq fails: torchrun and SLURM on a CPU, and the default `--ddp-backend`.

fairseq counts GPUs to know how many processes train together, and gives each task of a SLURM job a GPU, also where
there is none (upstream 25). And its default back end, `pytorch_ddp`,
ends in a traceback in two places: its DistributedDataParallel is given the number of a GPU, on a CPU too; and it waits
for the gradient of every parameter, which the layers that LayerDrop leaves out do not have.
"""

import copy
import logging
import os
import subprocess
from typing import Any

import fairseq.models
import torch
from fairseq.modules import LayerDropModuleList
from omegaconf import DictConfig, open_dict
from torch import nn

from ..errors import UserError
from ..structure.modules import LayerStack
from . import sharded
from .exits import exits_on_user_error

logger = logging.getLogger(__name__)

_BACKENDS = ("c10d", "pytorch_ddp")  # its old name and its new one
_wrap = fairseq.models.DistributedFairseqModel


def distributed_fairseq_model(args: Any, model: nn.Module, process_group: Any, device: torch.device) -> nn.Module:
    """fairseq's function of this name, which wraps a model for a training on several processes.

    Args:
        args: the section distributed_training.
        model: what is trained.
        process_group: fairseq's.
        device: where the model is.

    Raises:
        UserError: LayerDrop, on GPUs, without --find-unused-parameters.
    """
    if args.ddp_backend == sharded.BACKEND:
        return sharded.Sharded(model.to(device), device)
    if args.ddp_backend in _BACKENDS:
        if device.type == "cpu":
            logger.info(f"--ddp-backend {args.ddp_backend} is fairseq's for GPUs; on a CPU legacy_ddp takes its place")
            args = copy.deepcopy(args)
            with open_dict(args):
                args.ddp_backend = "legacy_ddp"
        elif not args.find_unused_parameters:
            with exits_on_user_error():
                _check_layerdrop(
                    model,
                    f"the layers that it leaves out have no gradient, which --ddp-backend {args.ddp_backend} stops at",
                    " or --find-unused-parameters",
                )
    wrapped: nn.Module = _wrap(args, model, process_group, device)
    return wrapped


def join_processes(cfg: DictConfig) -> None:
    """On a CPU, let the processes that torchrun or srun started train together, over gloo.

    Without GPUs fairseq takes each process of torchrun for a training of its own, and all of them write to one
    --save-dir; where --distributed-world-size is given, it divides by the number of GPUs. For a task of a SLURM job it
    sets a GPU. An evaluation stays as it is: each process would report the score of its share of the data.

    Args:
        cfg: of a program of fairseq's; changed where torchrun, or srun with several tasks and a --distributed-port,
            started a training on a CPU without --distributed-init-method.

    Raises:
        SystemExit: the job has another number of tasks than --distributed-world-size, or there are too few GPUs for it.
    """
    training, trains = cfg.distributed_training, getattr(cfg, "model", None) is not None
    if cfg.common.tpu or training.distributed_init_method is not None:
        return
    with exits_on_user_error():
        _check_gpus(training)
    if not trains or (torch.cuda.is_available() and not cfg.common.cpu):
        return
    if torch.distributed.is_torchelastic_launched():
        _join(cfg, "env://", int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"]))
    elif training.distributed_port > 0 and training.distributed_world_size > 1 and "SLURM_STEP_NODELIST" in os.environ:
        tasks = int(os.environ["SLURM_NTASKS"])
        with exits_on_user_error():
            if tasks != training.distributed_world_size:
                raise UserError(
                    f"--distributed-world-size {training.distributed_world_size}: the SLURM job has {tasks} tasks; on "
                    "CPUs each is one process, so give the same number"
                )
        names = ["scontrol", "show", "hostnames", os.environ["SLURM_STEP_NODELIST"]]
        first = subprocess.check_output(names, text=True).split()[0]
        _join(cfg, f"tcp://{first}:{training.distributed_port}", tasks, int(os.environ["SLURM_PROCID"]))


def _join(cfg: DictConfig, method: str, world_size: int, rank: int) -> None:
    training = cfg.distributed_training
    with open_dict(cfg):
        training.distributed_init_method = method
        training.distributed_world_size = world_size
        training.distributed_rank = rank
        training.distributed_no_spawn = True
        training.distributed_backend = "gloo"


def _check_gpus(training: DictConfig) -> None:
    """Raise UserError where fairseq would start more processes on this machine than there are GPUs."""
    gpus, wanted = torch.cuda.device_count(), training.distributed_world_size
    launched = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    if not launched and training.distributed_port <= 0 and wanted > max(gpus, 1):
        raise UserError(
            f"--distributed-world-size {wanted}: fairseq starts one for each GPU, and this machine has {gpus}; give "
            f"that number, or start the processes with torchrun --nproc_per_node {wanted}, which works on CPUs too"
        )


def _check_layerdrop(model: nn.Module, why: str, other_cure: str = "") -> None:
    """Raise UserError where layers are left out, which the back end cannot do for this reason."""
    for name, module in model.named_modules():
        if isinstance(module, LayerDropModuleList | LayerStack) and module.p > 0:
            side = name.partition(".")[0]
            raise UserError(f"--{side}-layerdrop {module.p}: {why}; give --ddp-backend legacy_ddp{other_cure}")
