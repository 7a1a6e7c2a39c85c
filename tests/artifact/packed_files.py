"""Packed files to damage: a small model's, and forgeries whose hash is right."""

import copy
import functools
import json
from types import SimpleNamespace

from toys import ZOO_PLAN, quiet, zoo

from fairseq_quant_noise.artifact import Packed, pack, write
from fairseq_quant_noise.plan import Plan
from fairseq_quant_noise.quantize import quantize_


def quantized_afresh():
    return quantize_(zoo(), ZOO_PLAN, progress=quiet).eval()


_once = functools.cache(quantized_afresh)  # k-means takes its time


def quantized_zoo():
    return copy.deepcopy(_once())


def packed_zoo(model=None):
    return pack(model or quantized_zoo(), Plan.of(ZOO_PLAN))


def forge(path, packed, edit=None, **tensors):
    """Write `packed` with its manifest changed by `edit` and tensors replaced, the hash made right again.

    This is what a hostile file looks like: nobody needs a secret to compute the hash.
    """
    content = json.loads(packed.manifest.to_json())
    if edit is not None:
        edit(content)
    text = json.dumps(content, separators=(",", ":"))
    write(Packed({**packed.tensors, **tensors}, SimpleNamespace(to_json=lambda: text)), path)
    return path
