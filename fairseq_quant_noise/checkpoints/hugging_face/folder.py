"""Read the configuration and the weights in a folder that Hugging Face's `save_pretrained` wrote, running no code."""

import json
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from ...artifact.manifest import parse_json
from ...errors import DamagedFileError, UserError, is_about_a_file
from ..hint import CONFIG, is_hugging_face
from ..safe_load import safe_weights

WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # the first that is there is read
_INDEX = ".index.json"  # follows the name where the weights are in several files
_OLD_NAMES = {".gamma": ".weight", ".beta": ".bias"}  # of a layer norm, until 2019


def read_config(folder: Path) -> dict[str, Any]:
    """The options in config.json.

    Raises:
        UserError: there is no such folder or file.
        DamagedFileError: the file is not JSON.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: is no folder; give the one that save_pretrained of transformers wrote")
    if not is_hugging_face(folder):
        raise UserError(f"{folder}: has no {CONFIG}; give a folder that save_pretrained of transformers wrote")
    config = read_json(folder / CONFIG)
    if not isinstance(config, dict):
        raise DamagedFileError(f"{folder / CONFIG}: holds no options by name; download it again")
    return config


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        UserError: the file cannot be opened.
        DamagedFileError: the file is not JSON.
    """
    try:
        return parse_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        if not is_about_a_file(error):
            raise
        raise UserError(f"{path}: {error.strerror}; give a whole folder of Hugging Face's") from None
    except (ValueError, RecursionError) as error:
        raise DamagedFileError(f"{path}: is not JSON ({error}); download it again") from None


def read_weights(folder: Path) -> dict[str, Tensor]:
    """The tensors in model.safetensors or pytorch_model.bin, or in the files that its index lists.

    Returns:
        Tensors by name, in the shapes of the files.

    Raises:
        UserError: there is no such file, or it cannot be read.
        DamagedFileError: a file is not whole, or holds anything but tensors.
    """
    for name in WEIGHTS:
        if (folder / name).is_file():
            return _modern(_read(folder / name))
        if (folder / (name + _INDEX)).is_file():
            weights: dict[str, Tensor] = {}
            for part in _listed(folder / (name + _INDEX)):
                weights |= _read(folder / part)
            return _modern(weights)
    raise UserError(f"{folder}: has neither {' nor '.join(WEIGHTS)}; download the weights too")


def _listed(index: Path) -> list[str]:
    """The files that an index names, which must be beside it."""
    content = read_json(index)
    files = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(files, dict) or not all(
        isinstance(file, str) and file == Path(file).name for file in files.values()
    ):
        raise DamagedFileError(f"{index}: lists no files of weights beside it; download it again")
    return sorted(set(files.values()))


def _read(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".bin":
        return safe_weights(path)
    try:
        return safetensors.torch.load_file(path)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}; download it again") from None
    except Exception as error:  # safetensors and torch raise many kinds for a file that they cannot read
        line = (str(error).splitlines() or [type(error).__name__])[0]
        raise DamagedFileError(f"{path}: not a whole safetensors file ({line}); download it again") from None


def _modern(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    modern = {}
    for name, tensor in weights.items():
        ending = next((old for old in _OLD_NAMES if name.endswith(old)), "")
        modern[name.removesuffix(ending) + _OLD_NAMES.get(ending, "")] = tensor
    return modern


def as_json(content: Any) -> bytes:
    """The bytes of a JSON file, readable and with letters as they are."""
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()
