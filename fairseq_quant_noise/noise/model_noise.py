"""The noise of a whole model: the draw, the noise of each weight, and the state that a resumed run needs."""

import copy
from collections.abc import Mapping
from typing import Any

from torch import nn

from . import operators
from .draw import NoiseDraw
from .weight_noise import WeightNoise


class ModelNoise(NoiseDraw):
    """When a forward draws, and what it draws for.

    Attributes:
        weights: the noise of each weight, by the weight's name.
    """

    def __init__(self, root: nn.Module) -> None:
        super().__init__(root)
        self.weights: dict[str, WeightNoise] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> "ModelNoise":
        """A copy of the whole model has a noise of its own; one of a part of it (an EMA's teacher) has none."""
        if id(self.root) not in memo:
            nothing = memo[id(self)] = ModelNoise(nn.Module())
            return nothing
        twin: ModelNoise = memo.setdefault(id(self), object.__new__(ModelNoise))
        twin.__setstate__(copy.deepcopy(self.__dict__, memo))
        return twin

    def __setstate__(self, state: dict[str, Any]) -> None:
        """For `pickle` and `copy`: operators find it by a number of its own."""
        self.__dict__.update(state, number=operators.register(self))

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to go on with the same noise: plain containers and tensors."""
        weights = {name: [rule.state() for rule in noise.rules] for name, noise in self.weights.items()}
        return {"update": self.update, "draws": self.draws, "epoch": self.epoch, "weights": weights}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` gave; weights whose rules have changed start anew."""
        self.update, self.draws, self.epoch = state["update"], state["draws"], state["epoch"]
        for name, rules in state["weights"].items():
            noise = self.weights.get(name)
            if noise is not None and len(noise.rules) == len(rules):
                for rule, saved in zip(noise.rules, rules, strict=True):
                    rule.load_state(saved)
