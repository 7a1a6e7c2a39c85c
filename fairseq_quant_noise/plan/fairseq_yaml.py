"""Read fairseq's own quantization YAML as a plan.

    n_centroids:        {Linear: {key: in_features, value: {"*": 256}}, Embedding: {...}}
    block_sizes:        {Linear: {key: fuzzy_name, value: {fc: 8, attn: 4, emb: 4}}, Embedding: {...}}
    layers_to_quantize: [regex of stage 0, regex of stage 1, ...]

Two differences are handled here. The file that fairseq ships doubles its backslashes, so that its rules match nothing
(fairseq issue 3595); no module name holds a backslash, so a doubled one is read as one. And fairseq matches only the
start of a name, where a plan matches the whole name.
"""

from collections.abc import Mapping
from typing import Any

from torch import nn

from ..errors import UserError

_KEYS = ("n_centroids", "block_sizes", "layers_to_quantize")
_DEFAULTS: dict[str, Any] = {  # fairseq's own, for keys that the file leaves out
    "n_centroids": {
        "Linear": {"key": "in_features", "value": {"*": 256}},
        "Embedding": {"key": "embedding_dim", "value": {"*": 256}},
    },
    "block_sizes": {
        "Linear": {"key": "fuzzy_name", "value": {"fc": 8, "attn": 4, "emb": 4}},
        "Embedding": {"key": "fuzzy_name", "value": {"emb": 8}},
    },
}


def is_fairseq_format(source: Mapping[str, Any]) -> bool:
    """Whether the mapping is fairseq's format: it has one of fairseq's keys."""
    return any(key in source for key in _KEYS)


def stages_of(source: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The stages of a plan, as plain dicts, one for each entry of `layers_to_quantize`.

    Raises:
        UserError: a key is unknown, or `layers_to_quantize` is no list or empty.
    """
    unknown = [key for key in source if key not in _KEYS]
    if unknown:
        raise UserError(f"plan in fairseq's format: unknown key '{unknown[0]}'; known keys: {', '.join(_KEYS)}")
    patterns = source.get("layers_to_quantize")
    if not isinstance(patterns, list) or not patterns:
        raise UserError("plan in fairseq's format: layers_to_quantize must list a regular expression for each stage")
    return [
        {
            "match": "(?:" + str(pattern).replace("\\\\", "\\") + ").*",
            "block_size": source.get("block_sizes", _DEFAULTS["block_sizes"]),
            "n_centroids": source.get("n_centroids", _DEFAULTS["n_centroids"]),
        }
        for pattern in patterns
    ]


def setting_by_feature(setting: Mapping[str, Any], name: str, module: nn.Module) -> int | None:
    """The value that fairseq's form of a setting gives to a module, or None if it is not in fairseq's form.

    `fuzzy_name` takes the first entry that is part of the module's name; any other key is an attribute of the module
    (`in_features`, `kernel_size`), looked up as a string; `*` is the default.

    Raises:
        UserError: the setting is in fairseq's form but gives no value for this module.
    """
    by_type = next((t for t in ("Linear", "Embedding", "Conv2d") if isinstance(module, getattr(nn, t))), "")
    if not any(isinstance(value, Mapping) for value in setting.values()):
        return None
    rule = setting.get(by_type)
    if not isinstance(rule, Mapping) or not isinstance(rule.get("value"), Mapping):
        raise UserError(f"plan in fairseq's format: nothing for {by_type} ({name}); add an entry '{by_type}'")
    values: Mapping[str, Any] = rule["value"]
    if rule.get("key") == "fuzzy_name":
        found = next((v for part, v in values.items() if str(part) in name), values.get("*"))
    else:
        found = values.get(str(getattr(module, str(rule.get("key")), None)), values.get("*"))
    if not isinstance(found, int):
        raise UserError(f"plan in fairseq's format: no value for {name} under {by_type}; add one, or '*'")
    return found
