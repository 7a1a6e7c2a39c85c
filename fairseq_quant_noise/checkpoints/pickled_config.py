"""Turn configurations that fairseq pickled as omegaconf objects into plain containers. Needs no omegaconf.

Each global that such a pickle calls for is answered by a placeholder, which keeps what it is given and does nothing:
no code of omegaconf, typing, numpy or fairseq runs while an untrusted file is read.
"""

import functools
import re
from argparse import Namespace
from collections.abc import Iterable
from typing import Any, TypeGuard

from . import pickled_numbers
from .pickled_numbers import NumberType, PickledArray, RefusedError

_MODULES = {
    "omegaconf.dictconfig": "DictConfig",
    "omegaconf.listconfig": "ListConfig",
    "omegaconf.base": "Metadata ContainerMetadata UnionNode",
    "omegaconf.nodes": "AnyNode StringNode IntegerNode FloatNode BooleanNode BytesNode PathNode",
    "typing": "Any Dict List Tuple Union Optional",
    "builtins": "dict list tuple str int float bool bytes object type",  # the types of options
    "operator": "getitem",  # List[str] is pickled as getitem(List, str)
    "_operator": "getitem",
}
_MAPPINGS_AND_LISTS = ("omegaconf.dictconfig.DictConfig", "omegaconf.listconfig.ListConfig", "omegaconf.base.UnionNode")
_ITEMS = 100_000  # more than any configuration holds; a few shared lists can stand for more than memory holds
_REFERENCE = re.compile(r"\$\{([\w.-]+)\}")
_RESOLVER = re.compile(r"\$\{.*:", re.DOTALL)


class Placeholder:
    """An instance of a class of the pickle, or what one of its functions returned: the state, and no behaviour."""

    name = ""  # the global it stands for
    state: Any = None  # what the pickle says of the instance

    def __init__(self, *args: object) -> None:
        """Accept any arguments and ignore them."""

    def __new__(cls, *args: object) -> "Placeholder":
        """Accept any arguments, as `__init__` does."""
        return object.__new__(cls)

    def __setstate__(self, state: object) -> None:
        self.state = state


@functools.cache
def placeholder(name: str) -> type[Placeholder]:
    """The class that stands for the global of this name."""
    return type("Placeholder", (Placeholder,), {"name": name})


def _empty_dict(*_: object) -> dict[object, object]:
    return {}


def allowed() -> list[tuple[Any, str]]:
    """The allowed globals of configurations and numbers, in the form that `torch.serialization.safe_globals` takes."""
    names = [f"{module}.{name}" for module, names in _MODULES.items() for name in names.split()]
    others = [(_empty_dict, "collections.defaultdict"), (Namespace, "argparse.Namespace")]
    return [*((placeholder(name), name) for name in names), *pickled_numbers.allowed(), *others]


def plain_config(config: object) -> Any:
    """Convert a configuration to dicts, lists, Namespaces and plain values, and resolve references between options.

    Args:
        config: as unpickled: a placeholder for a DictConfig, a dict, a Namespace, or None.

    Raises:
        RefusedError: it is no configuration, or an option says ${resolver:...}, which omegaconf would run.
    """
    root = _Reader().plain(config)
    return _followed(root, root) if isinstance(config, Placeholder) else root


class _Reader:
    """One walk over a configuration, which stops after more items than any real configuration has."""

    def __init__(self) -> None:
        self.left = _ITEMS

    def plain(self, value: object) -> Any:
        """`value` in dicts, lists, tuples, sets, Namespaces and plain values, with placeholders replaced.

        Raises:
            RefusedError: more than 100,000 items in all, text with ${resolver:...}, an array or type of numpy, or an
                object that is no option.
        """
        self.left -= 1
        if self.left < 0:
            raise RefusedError("its configuration has no end")
        if isinstance(value, dict):
            return {self.plain(key): self.plain(item) for key, item in value.items()}
        if isinstance(value, list | tuple | set):
            return type(value)(map(self.plain, value))
        if isinstance(value, Namespace):
            copy = Namespace()
            vars(copy).update(self.plain(vars(value)))
            return copy
        if isinstance(value, str | bytes):
            _check_text(value)
        if isinstance(value, PickledArray | NumberType):
            raise RefusedError("its configuration holds an array or a type of numpy, which is no value")
        return self._content(value) if _is_placeholder(value) else value

    def _content(self, node: Placeholder) -> Any:
        key = "_content" if node.name in _MAPPINGS_AND_LISTS else "_val"
        if not node.name.startswith("omegaconf.") or not isinstance(node.state, dict) or key not in node.state:
            raise RefusedError(f"its configuration holds {node.name}, which is no value")
        return self.plain(node.state[key])


def _check_text(text: str | bytes) -> None:
    found = _RESOLVER.search(text if isinstance(text, str) else text.decode("latin-1"))
    if found:
        raise RefusedError(f"its configuration says {found[0]}...}}, which would run when it is read")


def _followed(value: object, root: object) -> object:
    if isinstance(value, dict):
        return {key: _followed(item, root) for key, item in value.items()}
    if isinstance(value, list):
        return [_followed(item, root) for item in value]
    return _target(value, root)


def _target(value: object, root: object) -> object:
    """The plain value that the text ${section.option} refers to; omegaconf reports a reference to nothing."""
    target, seen = value, set()
    while isinstance(target, str) and (found := _REFERENCE.fullmatch(target)) and target not in seen:
        seen.add(target)
        target = root
        for key in found[1].split("."):
            target = target.get(key, value) if isinstance(target, dict) else value
    return value if isinstance(target, dict | list) else target


def _is_placeholder(value: object) -> TypeGuard[Placeholder]:
    return isinstance(value, Placeholder) or (isinstance(value, type) and issubclass(value, Placeholder))


def check_no_placeholder(values: Iterable[object]) -> None:
    """Refuse placeholders outside of a configuration, the only place where their classes are allowed.

    Args:
        values: as unpickled, searched to any depth.

    Raises:
        RefusedError: there is a placeholder among them; the message names what it stands for.
    """
    left, seen = list(values), set()
    while left:
        value = left.pop()
        if _is_placeholder(value):
            raise RefusedError(f"its pickle calls for {value.name}, which could run code")
        if isinstance(value, Namespace):
            value = vars(value)
        if isinstance(value, dict | list | tuple | set) and id(value) not in seen:
            seen.add(id(value))
            left += [*value, *value.values()] if isinstance(value, dict) else value
