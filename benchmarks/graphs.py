"""Claim: the ONNX model of a packed file runs as fast as onnxruntime's own integers, from a smaller file.

    python benchmarks/graphs.py [--cases 1x128 1x16] [--layers 12] [--json]

RoBERTa-base with a head of three classes and random weights, batch x tokens, all in onnxruntime. Ours are written by
`export-onnx --products`; the peers are the dense network's fp32 model, and what onnxruntime makes of it: dynamic int8
by channel and 4-bit weights (MatMulNBits). Needs onnxruntime, onnx and onnx_ir, and 6 GB.
"""

import argparse
import copy
import functools
import importlib.util
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from encoder import HEAD, Run, case, network, onnxruntime_runs, with_random_codes
from side_by_side import Claim, at_most, parser, positive, report, rounds
from torch import nn

from fairseq_quant_noise import quantize_, save
from fairseq_quant_noise.artifact import read
from fairseq_quant_noise.deployment import onnx_model
from fairseq_quant_noise.networks import Roberta

MATCHED = r".*(embed_tokens|layers\..*)"
#: Ours: the file's form and the products of the model.
FORMS = {
    "iPQ": ("iPQ", "float"),
    "int8": ("int8", "int8"),
    "int8, rounded inputs": ("int8 rounded", "int8"),
    "iPQ + int8": ("iPQ + int8", "int8"),
    "int4 as int8": ("int4", "int8"),
    "int4": ("int4", "int4"),
}


def need_onnxruntime(options: argparse.ArgumentParser) -> None:
    """End the program where a package is missing."""
    missing = [name for name in ("onnxruntime", "onnx", "onnx_ir") if importlib.util.find_spec(name) is None]
    if missing:
        options.exit(2, f"error: {missing[0]} is not installed; run: pip install onnxruntime onnx onnx_ir\n")


def quantized(dense: nn.Module, form: str) -> nn.Module:
    """A copy of the network in a form that a packed file has."""
    model = copy.deepcopy(dense)
    if form.startswith("iPQ"):
        with_random_codes(model, 8 if "int8" in form else 16)
        return model
    plan = {"stages": [{"match": MATCHED, "scheme": form.split()[0], "range": "channel"}]}
    if "rounded" not in form:
        return quantize_(model, plan)
    words = dense.config.vocab_size
    batches = [torch.randint(5, words, (2, 64), generator=torch.Generator().manual_seed(i)) for i in range(2)]
    return quantize_(model, plan | {"activations": {"range": "tensor"}}, calibration=batches)


def ours(dense: Roberta, layers: int, folder: Path, threads: int) -> Iterator[tuple[str, Run, int]]:
    """Each of our forms: name, model, bytes."""
    import onnxruntime

    options = {"encoder_layers": layers, "classification_heads": {HEAD: [768, 3]}}
    described = {
        "architecture": "roberta",
        "cfg": {"model": options},
        "vocab_size": dense.config.vocab_size,
        "padding_idx": 1,
    }
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = threads
    for name, (form, products) in FORMS.items():
        path = folder / f"{form}.safetensors"
        if not path.exists():
            save(quantized(dense, form), path, {"stages": []}, described)
        content = onnx_model(path, read(path), HEAD, products)
        session = onnxruntime.InferenceSession(content, settings, providers=["CPUExecutionProvider"])
        yield name, lambda tokens, session=session: session.run(None, {"tokens": tokens.numpy()}), len(content)


def measure(
    cases: list[tuple[int, int]], layers: int, words: int, repeats: int, threads: int
) -> tuple[list[Claim], dict[str, int]]:
    """The claims, and the bytes of each model."""
    dense = network(layers, words)
    runs: dict[str, Run] = {}
    sizes: dict[str, int] = {}
    with tempfile.TemporaryDirectory() as folder:
        made = [*ours(dense, layers, Path(folder), threads), *onnxruntime_runs(dense, Path(folder), threads)]
    for name, run, size in made:
        runs[name], sizes[name] = run, size
    claims = []
    for batch, length in cases:
        tokens = torch.randint(5, words, (batch, length))
        seconds = rounds({name: functools.partial(run, tokens) for name, run in runs.items()}, repeats, rest=0.1)
        for name, (_, products) in FORMS.items():
            label = f"{batch}x{length}, {name}"
            claims.append(at_most(f"{label}: against fp32", seconds, name, "onnxruntime fp32", 1.0))
            if products != "float":
                peer = "onnxruntime 4-bit" if name == "int4" else "onnxruntime int8"
                claims.append(at_most(f"{label}: against its integers", seconds, name, peer, 1.1))
    return claims, sizes


def main() -> None:
    """Measure and print."""
    options = parser(__doc__, repeats=9)
    options.add_argument("--cases", type=case, nargs="+", default=[(1, 128), (1, 16)], metavar="BxT")
    options.add_argument("--layers", type=positive, default=12)
    options.add_argument("--words", type=positive, default=50265)
    args = options.parse_args()
    need_onnxruntime(options)
    torch.set_num_threads(args.threads)
    claims, sizes = measure(args.cases, args.layers, args.words, args.repeats, args.threads)
    report(claims, args.json)
    if not args.json:
        print(", ".join(f"{name} {size / 2**20:.1f} MiB" for name, size in sizes.items()))


if __name__ == "__main__":
    main()
