"""Evaluate options as literals: fairseq gives options such as `adaptive_softmax_cutoff` to Python's eval.

On a command line that is the user's own text. In a checkpoint it is the text of whoever wrote the file, and would run.
So every module of fairseq gets an `eval` of its own, which reads numbers, texts, lists and sums of them, and nothing
else.
"""

import ast
import operator
from collections.abc import Callable
from typing import Any

from ..errors import UserError
from .exits import exits_on_user_error

_MOST = 10_000  # items that a list may come to: [(512, 3, 2)] * 4 is what fairseq's convolutions look like
_SUMS: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


def literal(text: str) -> Any:
    """Evaluate the text of an option.

    Args:
        text: a Python literal, or a sum or product of such.

    Raises:
        UserError: `text` is anything else.
        TypeError: it is not a string, as eval raises.
    """
    if not isinstance(text, str):
        raise TypeError("eval() arg 1 must be a string, bytes or code object")
    try:
        return _value(ast.parse(text.strip(), mode="eval").body)
    except (ArithmeticError, KeyError, MemoryError, RecursionError, SyntaxError, TypeError, ValueError):
        cure = "give numbers, texts, or lists of them"
        raise UserError(f"an option is {text!r}, which fairseq would run as code; {cure}") from None


def _value(node: ast.expr) -> Any:
    if isinstance(node, ast.List | ast.Tuple):
        return (list if isinstance(node, ast.List) else tuple)(map(_value, node.elts))
    if not isinstance(node, ast.BinOp):
        return ast.literal_eval(node)
    left, right = _value(node.left), _value(node.right)
    for sequence, times in ((left, right), (right, left)):
        if isinstance(sequence, list | tuple | str) and isinstance(times, int) and len(sequence) * times > _MOST:
            raise ValueError("too long")
    return _SUMS[type(node.op)](left, right)


def evaluate(text: str) -> Any:
    """`literal` in the place of Python's eval: a UserError ends fairseq's programs in one line, as everywhere."""
    with exits_on_user_error():
        return literal(text)
