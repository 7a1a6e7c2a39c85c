"""Import onnx, or say how to install it."""

from importlib import import_module
from typing import Any

from ..errors import UserError

NEEDS = "pip install 'fairseq-quant-noise[onnx]'"


def import_onnx() -> Any:
    """The package onnx.

    Raises:
        UserError: it is not installed.
    """
    try:
        return import_module("onnx")
    except ModuleNotFoundError as error:
        raise UserError(f"an ONNX model needs {error.name}, which is not installed; run: {NEEDS}") from None
