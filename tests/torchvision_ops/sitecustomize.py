"""torchvision's CUDA build beside torch's CPU build: declares the operators without which it does not import.

PyPI's torchvision for Linux is built for a CUDA torch. Beside a CPU torch its compiled operators (for boxes, not used
here) do not load, and it stops at describing operators that are not there. With this folder on PYTHONPATH they are
declared, without a body, when torchvision is first imported. Where its own operators load, nothing is declared.
"""

import importlib.abc
import sys

_OPERATORS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_LIBRARIES = []  # kept: an operator goes with its library


class _DeclareOperators(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):  # noqa: ANN001, ANN201
        if name != "torchvision._meta_registrations" or _LIBRARIES:
            return
        import torch

        library = torch.library.Library("torchvision", "FRAGMENT")
        _LIBRARIES.append(library)
        for schema in _OPERATORS:
            if not hasattr(torch.ops.torchvision, schema.partition("(")[0]):
                library.define(schema)


sys.meta_path.insert(0, _DeclareOperators())
