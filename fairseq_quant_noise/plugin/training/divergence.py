"""End a run whose loss is NaN or infinite with one line that names the first such tensor.

fairseq runs such an update again under its NanDetector, with another dropout and noise than the first time, and ends
in a traceback. Here the update is run again with the same random numbers, and watched tensor by tensor.
"""

from typing import Any, NoReturn

import fairseq.trainer
import torch.distributed as dist
from torch import Tensor, nn

from ...errors import UserError
from ..exits import exits_on_user_error

_train_step = fairseq.trainer.Trainer.train_step


class Diverged(Exception):  # noqa: N818 (it carries no message; it leaves fairseq's handler)
    """Stop an update where fairseq would start its NanDetector."""


def leave(model: nn.Module) -> NoReturn:
    """Stand in for the NanDetector; `train_step` below searches instead.

    Raises:
        Diverged: always.
    """
    raise Diverged


def train_step(trainer: Any, samples: Any, raise_oom: bool = False) -> Any:
    """Take Trainer.train_step, and end the run where gradients are not finite.

    Raises:
        UserError: the loss or the gradients are not finite; the message names the first such tensor (in fairseq's
            programs SystemExit, after one line).
        Exception: fairseq's own error, if no tensor is at fault, such as gradients that differ between ranks.
    """
    try:
        return _train_step(trainer, samples, raise_oom)
    except Diverged as left:
        reason = left.__context__
    with exits_on_user_error():
        first = first_bad(trainer, samples)
        if first is None and isinstance(reason, Exception):  # such as gradients that differ between ranks
            raise reason
        raise UserError(
            f"update {trainer.get_num_updates() + 1}: the loss is not finite any more; {first}. The same command would "
            "come here again: go on from the last checkpoint with a lower --lr, --clip-norm, or without fp16"
        )


def first_bad(trainer: Any, samples: Any) -> str | None:
    """Run an update again without taking it, and say which tensor was the first to hold NaN or infinity."""
    for name, parameter in trainer.get_model().named_parameters():  # the same on every rank: all leave here, or none
        if _bad(parameter):
            return f"{name} itself holds {_bad(parameter)}"
    trainer.zero_grad()
    trainer._set_seed()
    with Watch(trainer.get_model()) as watch:
        for sample in samples:
            sample, ignored = trainer._prepare_sample(sample)
            loss, *_ = trainer.task.train_step(
                sample, trainer.model, trainer.criterion, trainer.optimizer, trainer.get_num_updates(), ignored
            )
            watch.see(f"the loss of criterion {trainer.cfg.criterion._name}", loss)
    return watch.verdict() or _in_gradients(trainer.get_model()) or _elsewhere()


class Watch:
    """Watch the output of each module in forwards, and the output's gradient in backwards."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.first: dict[str, str] = {}  # NaN, infinity -> where it was seen first
        self.handles: list[Any] = []

    def __enter__(self) -> "Watch":
        for name, module in self.model.named_modules():
            self.handles.append(module.register_forward_hook(self._hook(name or "the model")))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()

    def _hook(self, name: str) -> Any:
        return lambda module, inputs, output: self._see_all(name, output)

    def _see_all(self, name: str, output: Any) -> None:
        if isinstance(output, dict):
            output = list(output.values())
        if isinstance(output, list | tuple):
            for part in output:
                self._see_all(name, part)
        elif isinstance(output, Tensor) and output.is_floating_point():
            self.see(f"the output of {name}", output)
            if output.requires_grad:
                output.register_hook(lambda gradient: self.see(f"the gradient of the output of {name}", gradient))

    def see(self, where: str, tensor: Tensor) -> None:
        """Remember the first tensor that holds NaN, and the first that holds infinity.

        Args:
            where: what the tensor is, for the message.
            tensor: of any shape, () for a loss.
        """
        found = _bad(tensor)
        if found is not None:
            self.first.setdefault(found, f"{where} {tuple(tensor.shape)}")

    def verdict(self) -> str | None:
        """Describe the tensor that was first; None if all were finite."""
        if "NaN" not in self.first:
            return f"the first tensor that held infinity is {self.first['infinity']}" if self.first else None
        said = f"the first tensor that held NaN is {self.first['NaN']}"
        earlier = next(iter(self.first)) == "infinity"
        return f"{said}, after infinity in {self.first['infinity']}" if earlier else said


def _bad(tensor: Tensor) -> str | None:
    if not tensor.is_floating_point() or bool(tensor.isfinite().all()):
        return None
    return "NaN" if bool(tensor.isnan().any()) else "infinity"


def _in_gradients(model: nn.Module) -> str | None:
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and _bad(parameter.grad):
            return f"the first tensor that held {_bad(parameter.grad)} is the gradient of {name}"
    return None


def _elsewhere() -> str | None:
    """Point to the other ranks: all of them stop, and only some have the tensor. Returns None in a single process."""
    return "no tensor of this rank held one: see the other ranks" if dist.is_initialized() else None
