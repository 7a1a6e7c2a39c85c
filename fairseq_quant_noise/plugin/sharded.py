"""Train with weights, gradients and Adam's moments divided among the processes: `--ddp-backend fully_sharded`.

fairseq does it through fairscale, whose last release is of 2022: it stops on a CPU, and puts the weights where noise
cannot see that they are read. Here torch's fully_shard does it. Each layer, and what is left of the network, is whole
while it runs, so that the noise of a weight is what it would be without sharding.
The Trainer keeps its own code for fairscale's wrapper; `Sharded` answers in its place.
"""

import contextlib
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from ..errors import UserError

BACKEND = "fully_sharded"


def check(cfg: DictConfig) -> None:
    """Refuse what a sharded training cannot do.

    Raises:
        UserError: an option does not go with --ddp-backend fully_sharded.
    """
    training = cfg.distributed_training
    if training.ddp_backend != BACKEND:
        return
    given = {
        "--fp16": cfg.common.fp16,
        "--bf16": cfg.common.bf16,
        "--amp": cfg.common.amp,
        "--store-ema": cfg.ema.store_ema,
        "--use-sharded-state": training.use_sharded_state,
        "--cpu-offload": training.cpu_offload,
        "--quant-noise-scalar": getattr(cfg.model, "quant_noise_scalar", 0),
        "--quant-noise-gap-batches": getattr(cfg.model, "quant_noise_gap_batches", 0),
    }
    for option, value in given.items():
        if value:
            raise UserError(f"{option}: does not go with --ddp-backend fully_sharded; give --ddp-backend legacy_ddp")


class Sharded(nn.Module):
    """A network whose parameters are divided, with what the Trainer asks of it under this back end.

    Attributes:
        use_sharded_state: fairseq's name; a checkpoint is one file with whole tensors, as of any training.
        whole: the network's state in whole tensors, on the CPU of the first rank, between `gather` and `state_dict`.
    """

    use_sharded_state = False

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        super().__init__()
        mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
        for layer in _layers(model):
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        model._register_load_state_dict_pre_hook(self._divide)
        self.module = model
        self.whole: dict[str, Any] | None = None

    def __getattr__(self, name: str) -> Any:
        """The network's attributes, where this has none."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("module"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The network's."""
        return self.module(*args, **kwargs)

    def gather(self) -> None:
        """Collect the network's state; every rank takes part."""
        self.whole = _whole(self.module.state_dict())

    def state_dict(self, *_: Any, **__: Any) -> dict[str, Any]:  # type: ignore[override]
        """What `gather` collected: the network's state on the first rank, nothing on the others."""
        return self.whole or {}

    def load_state_dict(self, state_dict: Any, strict: bool = True, *args: Any, **kwargs: Any) -> Any:
        """Load whole tensors, which every rank has, by name."""
        return self.module.load_state_dict(state_dict, strict, *args, **kwargs)

    def _divide(self, state: dict[str, Any], *_: object) -> None:
        """Each tensor of a state as the parameter of its name is divided."""
        for name, held in self.module.state_dict().items():
            if name in state:
                state[name] = _like(held, state[name])

    def gather_full_optim_state_dict(self, optimizer: Any) -> dict[str, Any] | None:
        """The optimizer's state in whole tensors, on the first rank; every rank takes part."""
        return _whole(optimizer.state_dict())

    def get_shard_from_optim_state_dict(self, state: Any) -> Any:
        """The state as it is: `divide_moments` follows, when the optimizer has it."""
        return state

    def local_metadata_dict(self) -> None:
        """Nothing is needed to put the checkpoint together."""


def is_sharded(trainer: Any) -> bool:
    """Trainer.is_fsdp: whether it trains a `Sharded`. It asks before there is a model too, to import fairscale."""
    return isinstance(trainer.__dict__.get("_wrapped_model"), Sharded)


def gather(trainer: Any) -> None:
    """Before a checkpoint is saved, collect the network; every rank comes by here."""
    if is_sharded(trainer):
        trainer.model.gather()


def divide_moments(trainer: Any) -> None:
    """Divide the moments of a checkpoint, which the optimizer has loaded whole, as their parameters are."""
    if is_sharded(trainer):
        for parameter, entry in trainer.optimizer.optimizer.state.items():
            entry.update({name: _like(parameter, value) for name, value in entry.items()})


def clip_grad_norm(trainer: Any, clip_norm: float) -> Tensor:
    """Trainer.clip_grad_norm; a divided gradient knows the norm of the whole."""
    whole = (lambda norm: norm.full_tensor()) if is_sharded(trainer) else None
    norm: Tensor = trainer.optimizer.clip_grad_norm(clip_norm, aggregate_norm_fn=whole)
    return norm


@contextlib.contextmanager
def enable_wrap(cfg: Any) -> Iterator[None]:
    """fairseq_cli.train.fsdp_enable_wrap, without fairscale."""
    yield


def wrap(module: nn.Module, **_: Any) -> nn.Module:
    """fairseq_cli.train.fsdp_wrap: the Trainer divides the network later, when it has its noise."""
    return module


def _layers(model: nn.Module) -> list[nn.Module]:
    """The layers that are divided each by itself: of --min-params-to-wrap numbers, and with no weight of another's."""
    sizes = (getattr(getattr(module, "cfg", None), "min_params_to_wrap", None) for module in model.modules())
    least = next((size for size in sizes if size is not None), 0)
    holders = Counter(id(p) for module in model.modules() for p in module._parameters.values())
    lists = (module for name, module in model.named_modules() if name.endswith("layers"))
    found = [layer for layers in lists if isinstance(layers, nn.ModuleList) for layer in layers]
    return [
        layer
        for layer in dict.fromkeys(found)
        if sum(p.numel() for p in layer.parameters()) >= least and all(holders[id(p)] == 1 for p in layer.parameters())
    ]


def _like(held: Any, value: Any) -> Any:
    """A whole tensor (…) divided as `held` is; anything else as it is."""
    is_whole = isinstance(value, Tensor) and not isinstance(value, DTensor)
    if not isinstance(held, DTensor) or not is_whole or value.shape != held.shape:
        return value
    return distribute_tensor(value.to(held.device), held.device_mesh, held.placements, src_data_rank=None)


def _whole(state: Any) -> Any:
    """A state with every divided tensor whole, on the CPU; None on all ranks but the first, to save memory."""
    if isinstance(state, DTensor):
        full = state.full_tensor()
        return full.cpu() if torch.distributed.get_rank() == 0 else None
    if isinstance(state, dict):
        return {name: _whole(value) for name, value in state.items()}
    if isinstance(state, list):
        return [_whole(value) for value in state]
    return state
