"""Load checkpoints without running code in them: `torch.load(weights_only=True)` and a short allow-list.

A refusal names the global and what to do; there is no unsafe fallback.
"""

import contextlib
import pickle
import pickletools
import re
import zipfile
from argparse import Namespace
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..artifact.reader import is_packed
from ..errors import DamagedFileError, UserError
from . import checksums, hint
from .dictionaries import with_dictionaries
from .keys import CHECKSUMS
from .pickled_config import allowed, check_no_placeholder, placeholder, plain_config
from .pickled_numbers import RefusedError, with_arrays

_GLOBAL = re.compile(r"GLOBAL (.+?) (?:was not an allowed|whose module)")
_MOST_GLOBALS = 100  # how many classes of fairseq one file may name
_IF_TRUSTED = (
    "if you trust it, load it once with torch.load(path, weights_only=False), keep its 'model' and 'args' or 'cfg', "
    "and save it again"
)
_FROM_PACKED = "give the checkpoint that it was made of, or make one of it with `fairseq-quant-noise to-dense`"
_OTHER_PROGRAMS = "a safetensors file of another program; give a checkpoint that fairseq-train wrote"
_AGAIN = "copy or download it again"
#: Meters of old checkpoints: objects of classes that fairseq no longer has, and that it does not read.
_METERS = ("train_meters", "valid_meters")

#: Patterns of torch's messages about a pickle that it refuses, other than for a global, and what they mean.
_MEANINGS = (
    (r"unrecognized function (.+)", "its pickle calls {0}, which could run code; " + _IF_TRUSTED),
    (r"Can only .* but got (<.+>)", "its pickle changes or makes {0}, which could run code; " + _IF_TRUSTED),
    (r"([\w.]+)`* must be imported to load", "it holds tensors of {0}; save it with ordinary ones"),
    (r"Unsupported operand (\d+)", "its pickle uses {0}; save it with torch.save and its default pickle_protocol"),
    (r"persistent", "its pickle asks for something other than the numbers of a tensor; " + _IF_TRUSTED),
)
_HTML = (b"<!doctype", b"<html", b"<?xml")
_ARCHIVES = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ")
_TAR = slice(257, 262)  # where a tar file says so


def clear_unwritten(tensors: Mapping[str, Tensor]) -> None:
    """Set to zero, in place, the uninitialized `…_float_tensor` buffers that fairseq keeps only for their dtype.

    Args:
        tensors: a model's buffers or state, of any shape. Only such buffers, each of shape (1,), are changed; on the
            meta device none is.
    """
    for name, tensor in tensors.items():
        if name.endswith("_float_tensor") and tensor.numel() == 1 and tensor.device.type != "meta":
            tensor.zero_()


def safe_load(path: str | Path) -> dict[str, Any]:
    """Load the content of a fairseq checkpoint onto the CPU.

    A configuration that was pickled as an omegaconf object comes as plain dicts and lists.

    Raises:
        UserError: the file does not exist, is of another kind, or holds codes that were averaged.
        DamagedFileError: the checkpoint is not whole, or holds anything outside the allow-list.
    """
    with _says_what_is_wrong(path, "checkpoint ", "a checkpoint"):
        _check_kind(path)
        _check_zip(path)
        state = _load(path)
    if not isinstance(state, dict) or "model" not in state:
        raise UserError(f"checkpoint {path}: has no 'model'; give a checkpoint that fairseq-train wrote")
    try:
        plain = _plain(state)
        _check_weights(plain["model"])
        clear_unwritten(plain["model"])
        _check_codes(path, plain)
        return plain
    except RefusedError as error:
        raise DamagedFileError(f"checkpoint {path}: refused, {_printable(error)}; {_IF_TRUSTED}") from None
    except (RecursionError, TypeError) as error:  # a list in itself; a list as a name
        raise DamagedFileError(f"checkpoint {path}: refused, its configuration is none ({error}); {_AGAIN}") from None


def safe_weights(path: str | Path) -> dict[str, Tensor]:
    """Load a file of weights alone, such as pytorch_model.bin, onto the CPU.

    Returns:
        Tensors by name, in the shapes of the file.

    Raises:
        UserError: the file cannot be opened, or is of another kind.
        DamagedFileError: the file is not whole, or holds anything but tensors by name.
    """
    with _says_what_is_wrong(path, "", "a file of weights"):
        _check_zip(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
        _check_weights(state, "it")
        return dict(state)


@contextlib.contextmanager
def _says_what_is_wrong(path: str | Path, prefix: str, wanted: str) -> Iterator[None]:
    """Inside, any error in reading a file becomes one that names it, with `prefix` before, and the cure."""
    try:
        yield
    except UserError:
        raise
    except RefusedError as error:
        raise DamagedFileError(f"{prefix}{path}: refused, {_printable(error)}; {_IF_TRUSTED}") from None
    except (FileNotFoundError, PermissionError, IsADirectoryError) as error:
        raise UserError(f"{prefix}{path}: {error.strerror}; give the path of {wanted}") from None
    except Exception as error:  # torch raises UnpicklingError, RuntimeError, EOFError, ... for a file it cannot read
        raise _refusal(path, error) from None


def saved_options(path: str | Path) -> dict[str, Any]:
    """Read from a checkpoint the options of its model alone, which takes little time however large it is.

    Returns:
        The section `model` of its configuration; empty where the file cannot be read, which loading it will tell.
    """
    try:
        _check_kind(path)
        _check_zip(path)
        options = plain_config(_load(path, mmap=True)["cfg"])["model"]
    except Exception:  # as in safe_load; the weights are not looked at here, so that nothing is refused for them
        return {}
    return options if isinstance(options, dict) else {}


def _load(path: str | Path, mmap: bool = False) -> Any:
    """Load with a placeholder for each of fairseq's classes; which ones appear depends on the checkpoint."""
    known = allowed()
    for _ in range(_MOST_GLOBALS):
        try:
            with torch.serialization.safe_globals(known):  # type: ignore[arg-type]
                return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
        except pickle.UnpicklingError as error:
            found = _GLOBAL.search(str(error))
            if found is None or not found[1].startswith("fairseq."):
                raise
            known.append((placeholder(found[1]), found[1]))
    raise pickle.UnpicklingError("more classes than fairseq has")


def _check_kind(path: str | Path) -> None:
    """Refuse files that torch.load would read though they are no checkpoint, and pipes, on which it never ends."""
    if Path(path).is_dir():
        raise UserError(f"checkpoint {path}: {hint.of_folder(path)}")
    if Path(path).exists() and not Path(path).is_file():
        raise UserError(f"checkpoint {path}: is a device or a pipe; copy it to a file first")
    with open(path, "rb") as file:
        head = file.read(4096)
    if not head:
        raise DamagedFileError(f"checkpoint {path}: is empty; {_AGAIN}")
    if head[8:10] == b'{"':
        kind = f"a packed file; {_FROM_PACKED}" if is_packed(path) else _other_kind(path)
        other = b"fairseq_quant_noise" not in head and b"__metadata__" not in head
        if other and hint.is_hugging_face(Path(path).parent):
            kind = f"weights of a Hugging Face folder; make a checkpoint of it: {hint.command(Path(path).parent)}"
        elif other:
            kind = _OTHER_PROGRAMS
        raise UserError(f"checkpoint {path}: {kind}")


def _check_zip(path: str | Path) -> None:
    """Refuse a compressed zip file, which may unfold into more than memory holds; torch.save compresses nothing."""
    with contextlib.suppress(zipfile.BadZipFile), zipfile.ZipFile(path) as archive:
        unfolded, size = sum(entry.file_size for entry in archive.infolist()), Path(path).stat().st_size
        if unfolded > size:
            raise DamagedFileError(
                f"checkpoint {path}: refused, it unfolds from {size:,} to {unfolded:,} bytes; save it with torch.save"
            )


def _check_weights(model: object, where: str = "its 'model'") -> None:
    """Check that the model is dense tensors by name, each backed by storage: an expanded view could need terabytes."""
    if not isinstance(model, dict):
        raise RefusedError(f"{where} is a {type(model).__name__}, not weights by name")
    for name, tensor in model.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise RefusedError(f"{where} holds {name!r}: a {type(tensor).__name__}, not a tensor")
        if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
            raise RefusedError(f"tensor {name} is not an ordinary dense one")
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise RefusedError(f"tensor {name} has {tensor.numel():,} numbers, more than the file stores for it")


def _check_codes(path: str | Path, state: Mapping[str, Any]) -> None:
    """Refuse codes that have been changed since they were written, as by averaging checkpoints. Raises UserError."""
    name = checksums.changed(state["model"], (state.get("extra_state") or {}).get(CHECKSUMS))
    if name is not None:
        raise UserError(
            f"checkpoint {path}: {name} is not as it was written, as after averaging, which adds codes and overflows; "
            "average checkpoints from before the first stage, or give one of these as it is"
        )


def _plain(state: dict[str, Any]) -> dict[str, Any]:
    kinds: dict[str, type] = {"cfg": dict, "args": Namespace}
    for name, kind in kinds.items():
        if state.get(name) is not None:
            state[name] = plain_config(state[name])
            if not isinstance(state[name], kind):
                raise RefusedError(f"its {name!r} is a {type(state[name]).__name__}")
    options = (state.get("cfg") or {}).get("model")
    if not isinstance(options, dict | Namespace | None):
        raise RefusedError(f"its configuration of the model is a {type(options).__name__}")
    extra = state.get("extra_state")
    if not isinstance(extra, dict | None):
        raise RefusedError(f"its 'extra_state' is a {type(extra).__name__}")
    if extra is not None:
        state["extra_state"] = {name: value for name, value in extra.items() if name not in _METERS}
    for name in state.keys() - kinds.keys() - {"model"}:
        state[name] = with_arrays(state[name])
    if isinstance(state.get("task_state"), dict):
        state["task_state"] = with_dictionaries(state["task_state"])
    check_no_placeholder(value for name, value in state.items() if name not in kinds)
    return state


def _refusal(path: str | Path, error: Exception) -> UserError:
    """The error to raise instead of torch's, which is a page long and recommends weights_only=False."""
    message = str(error)
    found = _GLOBAL.search(message)
    if found:
        name = _printable(found[1])
        reason = f"refused, its pickle calls for {name}, which could run code; {_IF_TRUSTED}"
        return DamagedFileError(f"checkpoint {path}: {reason}")
    other = _other_kind(path)
    if other:
        return UserError(f"checkpoint {path}: {other}")
    for pattern, meaning in _MEANINGS if _is_pickle(path) else ():
        found = re.search(pattern, message)
        if found:
            what = _operation(found[1]) if pattern.startswith("Unsupported") else "".join(found.groups())
            return DamagedFileError(f"checkpoint {path}: refused, {meaning.format(_printable(what))}")
    return DamagedFileError(f"checkpoint {path}: not a whole PyTorch checkpoint; {_AGAIN}")


def _is_pickle(path: str | Path) -> bool:
    """Whether the file holds a pickle; torch also speaks of one when it reads a cut file or a text."""
    with open(path, "rb") as file:
        return file.read(1) == pickle.PROTO or bool(_names_in_zip(path))


def _names_in_zip(path: str | Path) -> set[str]:
    """The names of the files in a zip file, without folders; empty for any other file or a cut zip file."""
    try:
        with zipfile.ZipFile(path) as archive:
            return {Path(name).name for name in archive.namelist()}
    except zipfile.BadZipFile:
        return set()


def _other_kind(path: str | Path) -> str | None:
    """Tell by its first bytes what kind of file this is, and the cure; None for an unknown kind."""
    with open(path, "rb") as file:
        head = file.read(512)
    names = _names_in_zip(path)
    if "constants.pkl" in names:
        return "a TorchScript program, which holds no configuration; give the checkpoint that fairseq-train wrote"
    if head.startswith(_ARCHIVES) or head[_TAR] == b"ustar" or (names and "data.pkl" not in names):
        return "an archive, as .tar.gz and .zip files are; unpack it and give the .pt file in it"
    if head.lstrip().lower().startswith(_HTML):
        return "a web page, not a checkpoint; download it with the address of the file itself"
    if head.startswith(b"version https://git-lfs"):
        return "a pointer of Git LFS, not the checkpoint; run git lfs pull"
    if head[8:10] == b'{"':
        return "a packed file; its name must end in .safetensors"
    return None


def _operation(code: str) -> str:
    """The name of a pickle's operation."""
    known = pickletools.code2op.get(chr(int(code)))  # type: ignore[attr-defined]
    return f"the operation {known.name}" if known else f"an unknown operation, {code}"


def _printable(text: object) -> str:
    """Replace control characters: a name from an untrusted file must not control the terminal."""
    return "".join(letter if letter.isprintable() else "?" for letter in str(text))
