"""torchvision's CUDA build beside torch's CPU build: declares the operators without which it does not import.

PyPI's torchvision for Linux is built for a CUDA torch. Beside a CPU torch its compiled operators (for boxes, not used
here) do not load, and it stops at describing operators that are not there. Imported when the interpreter starts, this
declares them, without a body, as soon as torchvision is imported. Where its own operators load, nothing is declared.

scripts/setup.sh copies this file into .venv where it is needed. The tests put this folder on PYTHONPATH, for an
environment that is not from there.
"""

import importlib.abc
import sys
from importlib.machinery import ModuleSpec
from typing import Any

_OPERATORS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_LIBRARIES: list[Any] = []  # kept: an operator goes with its library


class _DeclareOperators(importlib.abc.MetaPathFinder):
    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        if name == "torchvision._meta_registrations" and not _LIBRARIES:
            self._declare()
        return None

    @staticmethod
    def _declare() -> None:
        import torch

        library = torch.library.Library("torchvision", "FRAGMENT")
        _LIBRARIES.append(library)
        for schema in _OPERATORS:
            if not hasattr(torch.ops.torchvision, schema.partition("(")[0]):
                library.define(schema)


sys.meta_path.insert(0, _DeclareOperators())
