"""Packed files to damage: a small model's, and forgeries whose hash is right."""

import copy
import functools
import json
from types import SimpleNamespace

from toys import INPUTS_PLAN, INT_PLANS, SHARED_PLAN, TOKENS, ZOO_PLAN, quiet, refuses, zoo

from fairseq_quant_noise.artifact import Packed, pack
from fairseq_quant_noise.artifact.writer import serialize
from fairseq_quant_noise.errors import DamagedFileError
from fairseq_quant_noise.plan.plan import Plan
from fairseq_quant_noise.quantization.quantize import quantize_

PLANS = INT_PLANS | {"pq": ZOO_PLAN, "shared codebooks": SHARED_PLAN, "inputs": INPUTS_PLAN}
PLANS["dense in fp16"] = ZOO_PLAN | {"dense": "fp16"}


def quantized_afresh(plan="pq"):
    return quantize_(zoo(), PLANS[plan], calibration=[TOKENS], progress=quiet).eval()


_once = functools.cache(quantized_afresh)  # k-means takes its time


def quantized_zoo(plan="pq"):
    return copy.deepcopy(_once(plan))


def packed_zoo(model=None, plan="pq"):
    return pack(model or quantized_zoo(plan), Plan.of(PLANS[plan]))


def entry(**changes):
    """An edit of what the manifest says of fc's weight."""
    return lambda m: m["tensors"]["fc.weight"].update(changes)


def damaged(match="model.safetensors: "):
    return refuses(match, DamagedFileError)


def forge(path, packed, edit=None, **tensors):
    """Write `packed` with its manifest changed by `edit` and tensors replaced, the hash made right again.

    This is what a hostile file looks like: nobody needs a secret to compute the hash.
    """
    content = json.loads(packed.manifest.to_json())
    if edit is not None:
        edit(content)
    text = json.dumps(content, separators=(",", ":"))
    forgery = Packed({**packed.tensors, **tensors}, SimpleNamespace(to_json=lambda: text))
    path.write_bytes(serialize(forgery))  # `write` refuses some of it
    return path
