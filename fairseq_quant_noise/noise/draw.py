"""When J is drawn: what "one forward" means.

- calling the model draws; everything until the next call sees the same J, so that a tied weight has the same noise
  in the embedding, in the adaptive softmax (which a criterion may call after the model), and in a layer that
  activation checkpointing runs again during backward;
- calling a part of the model directly (`model.decoder(...)`) draws too, once the last draw's backward has run.

A layer that runs again during backward gets the J of its own forward, even when another forward came between: the
checkpoint restores the random state, and that tells the draw.

The seed of a draw comes from torch's global generator, which training seeds at every update, so that runs repeat and
resume exactly. All ranks have the same seed, so the rank is mixed in (`ranks.seed_of_rank`): the gradient of an update
averages over an independent J of each rank. Each weight then has its own generator: its noise does not depend on the
order in which layers run, or on LayerDrop. Outside a forward, and in eval mode, `module.weight` is the stored
Parameter.

In a graph of torch.compile the seed is a tensor, and drawing and noising are operators (`operators.py`): whatever a
graph would take for a constant, such as the number of the draw, is theirs.
"""

from typing import Any

import torch
from torch import Tensor, nn

from ..kernels import in_graph
from ..utils.autograd import in_backward
from ..utils.ranks import seed_of_rank
from . import operators

_MAX_SEEDS = 1_000  # cap on remembered seeds: a forward without a backward never clears its own


def _random_state() -> int:
    """A hash of torch's random state on the CPU, which activation checkpointing puts back before a rerun."""
    return hash(bytes(torch.get_rng_state().numpy()))


class NoiseDraw:
    """When a forward starts and ends, and the seed of the J that it uses."""

    def __init__(self, root: nn.Module) -> None:
        self.root = root
        self.depth = 0  # how many watched modules are running
        self.seed: int | None = None
        self.at = 0  # the update of this seed
        self.spent = True  # the current draw's backward has run
        self.handles: list[Any] = []
        self.noised: list[nn.Module] = []  # whose weights are noised
        self.seeds: dict[int, tuple[int, int]] = {}  # random state on entering a module -> seed, update of that forward
        self.latest: tuple[int | None, int] | None = None  # what to return to after a layer has run again
        self.muted = False  # reads see the stored weight, for a measurement
        self.update = 0  # the update that schedules and intervals go by
        self.epoch = 0
        self.counts = True  # each draw is an update, until somebody says which update it is
        self.draws = 0
        self.seed_tensor = torch.zeros(1, dtype=torch.long)  # `seed` for a graph; 0 before the first draw
        self.number = operators.register(self)

    def set_num_updates(self, update: int) -> None:
        """Say which update comes, from 0; from now on draws are not counted as updates."""
        self.update, self.counts = update, False

    def begin_epoch(self, epoch: int | None = None) -> None:
        """Say that an epoch begins, the next one or `epoch`: codebooks are found anew in its first forward."""
        self.epoch = self.epoch + 1 if epoch is None else epoch

    def watch(self, module: nn.Module) -> None:
        """Count `module` as running between its call and its return."""
        self.handles.append(module.register_forward_pre_hook(self._enter))
        self.handles.append(module.register_forward_hook(self._leave, always_call=True))

    def begin(self) -> Tensor:
        """Draw the seed of a forward, (1,)."""
        if self.spent or len(self.seeds) > _MAX_SEEDS:
            self.seeds.clear()
        # Every rank takes one number from the global generator: LayerDrop draws from it too, alike on all ranks.
        self.seed = seed_of_rank(int(torch.randint(2**62, (1,))))
        self.seed_tensor = torch.tensor([self.seed])
        self.spent = False
        if self.counts:
            self.update = self.draws
        self.draws += 1
        self.at = self.update
        return self.seed_tensor

    def _enter(self, module: nn.Module, inputs: object) -> None:
        if in_graph():
            if self._is_fresh(module):
                self.seed_tensor = operators.begin(self.seed_tensor, self.number)
        elif in_backward():
            if self.depth == 0:
                self.latest = self.seed, self.at
                self.seed, self.at = self.seeds.get(_random_state(), self.latest)
        else:
            self._enter_forward(module)
        self.depth += 1

    def _enter_forward(self, module: nn.Module) -> None:
        if self._is_fresh(module):
            self.begin()
        if self.seed is not None and module.training:
            self.seeds[_random_state()] = self.seed, self.at

    def _is_fresh(self, module: nn.Module) -> bool:
        """Whether a forward begins that draws."""
        if module is self.root:
            self.depth = 0  # a forward that was interrupted has not left
        begins = module is self.root or (self.depth == 0 and self.spent)
        return begins and any(m.training for m in self.noised)

    def _leave(self, module: nn.Module, inputs: object, output: object) -> None:
        self.depth = max(self.depth - 1, 0)
        if self.depth == 0 and self.latest is not None:
            (self.seed, self.at), self.latest = self.latest, None
