"""Collect the initializers and nodes of an ONNX graph; a tensor goes by its name."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .libraries import import_onnx


class Builder:
    """What has been collected so far."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.initializers: list[Any] = []
        self._names: set[str] = set()
        self._onnx = import_onnx()

    def __contains__(self, name: str) -> bool:
        """Whether there is a tensor of this name."""
        return name in self._names

    def store(self, name: str, tensor: Tensor) -> str:
        """An initializer, of any shape and of a type that numpy has; returns its name."""
        if name not in self:
            self._names.add(name)
            self.initializers.append(self._onnx.numpy_helper.from_array(tensor.contiguous().numpy(), name))
        return name

    def numbers(self, *values: int) -> str:
        """An initializer of these whole numbers, such as a shape; returns its name."""
        return self.store(".".join(("numbers", *map(str, values))), torch.tensor(values))

    def compute(self, output: str | Sequence[str], operator: str, *inputs: str, **attributes: Any) -> str:
        """A node, whose output is the tensor `output`, or several; returns that name, or the first."""
        outputs = [output] if isinstance(output, str) else [*output]
        self._names.update(outputs)
        self.nodes.append(self._onnx.helper.make_node(operator, inputs, outputs, **attributes))
        return outputs[0]

    def cast(self, output: str, given: str, to: str = "FLOAT") -> str:
        """The tensor `given` in another of ONNX's types, as the tensor `output`; returns that name."""
        return self.compute(output, "Cast", given, to=getattr(self._onnx.TensorProto, to))
