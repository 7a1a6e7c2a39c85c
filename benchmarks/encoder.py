"""Claim: a packed RoBERTa-base runs as fast as the best integer runtime, from a smaller file.

    python benchmarks/encoder.py [--cases 1x128 1x16 16x128] [--layers 12] [--json]

RoBERTa-base with a head of three classes and random weights, batch x tokens, fp32 activations outside of the products.
Ours are loaded from packed files. The peers are torch's dynamic int8 and onnxruntime: in fp32, in dynamic int8 by
channel and with 4-bit weights (MatMulNBits), exported from the dense network; where onnxruntime, onnx and onnx_ir are
installed. Needs 6 GB.
"""

import copy
import functools
import importlib.util
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from side_by_side import Claim, at_least, at_most, parser, positive, report, rounds
from torch import nn

from fairseq_quant_noise import load, quantize_, save
from fairseq_quant_noise.layers import quantize_weight_
from fairseq_quant_noise.networks import Roberta, RobertaConfig
from fairseq_quant_noise.weights.discovery import find_weights

HEAD = "classes"
Run = Callable[[torch.Tensor], object]
#: Ours, by the bits of an integer weight, or of the centroids.
INTEGERS, CENTROIDS = {"int8": 8, "int4": 4}, {"iPQ": 16, "iPQ + int8": 8}
#: At most so many times what onnxruntime's int8 takes, by case; 1.1 for others.
BOUNDS = {"1x16": 1.2}


def network(layers: int, words: int = 50265) -> Roberta:
    """The dense network."""
    torch.manual_seed(0)
    config = RobertaConfig(vocab_size=words, encoder_layers=layers, classification_heads={HEAD: (768, 3)})
    return Roberta(config).eval()


def with_random_codes(model: nn.Module, bits: int) -> None:
    """Quantize the weights of the encoder: blocks of 8, of 4 in attention, K = 256."""
    generator = torch.Generator().manual_seed(0)
    for weight in find_weights(model):
        if "classification" not in weight.name and "lm_head.dense" not in weight.name:
            d = 4 if "self_attn" in weight.name else 8
            codes = torch.randint(256, (weight.shape[0], weight.shape[1] // d), generator=generator)
            centroids = 0.02 * torch.randn(256, d, generator=generator)
            quantize_weight_(weight, codes.to(torch.uint8), centroids, bits)


def ours(dense: Roberta, folder: Path) -> Iterator[tuple[str, Run, int]]:
    """Each of our formats from its file: name, network, bytes."""
    for name, bits in {**INTEGERS, **CENTROIDS}.items():
        model = copy.deepcopy(dense)
        if name in INTEGERS:
            matched = r".*(embed_tokens|layers\..*)"
            quantize_(model, {"stages": [{"match": matched, "scheme": f"int{bits}", "range": "channel"}]})
        else:
            with_random_codes(model, bits)
        path = folder / "model.safetensors"
        save(model, path)
        yield name, run_torch(load(path, into=network(len(dense.encoder.sentence_encoder.layers)))), path.stat().st_size


def run_torch(model: nn.Module) -> Run:
    """A forward of the network."""

    def run(tokens: torch.Tensor) -> object:
        with torch.inference_mode():
            return model(tokens, HEAD)

    return run


class Classifier(nn.Module):
    """The network with one argument, to be exported."""

    def __init__(self, network: Roberta) -> None:
        super().__init__()
        self.network = network

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """(B, T) int64 -> (B, 3)."""
        logits: torch.Tensor = self.network(tokens, HEAD)
        return logits


def onnxruntime_runs(dense: Roberta, folder: Path, threads: int) -> Iterator[tuple[str, Run, int]]:
    """onnxruntime's forms of the dense network; none without the packages."""
    missing = [name for name in ("onnxruntime", "onnx", "onnx_ir") if importlib.util.find_spec(name) is None]
    if missing:
        print(f"{missing[0]} is not installed: onnxruntime's rows are left out", file=sys.stderr)
        return
    import onnx
    import onnxruntime
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    paths = [folder / f"{form}.onnx" for form in ("fp32", "int8", "int4")]
    names = ("onnxruntime fp32", "onnxruntime int8", "onnxruntime 4-bit")
    tokens = torch.arange(5, 133).view(1, 128)
    axes = {"tokens": {0: "batch", 1: "length"}}
    torch.onnx.export(
        Classifier(dense), (tokens,), str(paths[0]), input_names=["tokens"], output_names=["logits"],
        dynamic_axes=axes, opset_version=17, dynamo=False,
    )  # fmt: skip
    quantize_dynamic(paths[0], paths[1], weight_type=QuantType.QInt8, per_channel=True)
    narrow = MatMulNBitsQuantizer(onnx.load(paths[0]), block_size=32, is_symmetric=True, accuracy_level=4)
    narrow.process()
    narrow.model.save_model_to_file(str(paths[2]))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    for name, path in zip(names, paths, strict=True):
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        yield name, lambda tokens, session=session: session.run(None, {"tokens": tokens.numpy()}), path.stat().st_size


def case(text: str) -> tuple[int, int]:
    """BATCHxTOKENS."""
    batch, _, length = text.partition("x")
    return positive(batch), positive(length)


def measure(
    cases: list[tuple[int, int]], layers: int, repeats: int, threads: int
) -> tuple[list[Claim], dict[str, int]]:
    """The claims, and the bytes of each file."""
    dense = network(layers)
    runs: dict[str, Run] = {"dense": run_torch(dense)}
    sizes: dict[str, int] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, run, size in [*ours(dense, Path(folder)), *onnxruntime_runs(dense, Path(folder), threads)]:
            runs[name], sizes[name] = run, size
        dynamic = torch.ao.quantization.quantize_dynamic(copy.deepcopy(dense), {nn.Linear}, dtype=torch.qint8)
        runs["torch dynamic int8"] = run_torch(dynamic)
        claims = []
        for batch, length in cases:
            tokens = torch.randint(5, 50000, (batch, length))
            seconds = rounds({name: functools.partial(run, tokens) for name, run in runs.items()}, repeats, rest=0.1)
            label = f"{batch}x{length}"
            for name in [*INTEGERS, *CENTROIDS]:
                claims.append(at_least(f"{label}, {name}: against dense", seconds, name, "dense", 1.0))
            for name in ("int8", "iPQ + int8"):
                claims.append(at_most(f"{label}, {name}: against torch", seconds, name, "torch dynamic int8", 1.0))
                if "onnxruntime int8" in runs:
                    bound = BOUNDS.get(label, 1.1)
                    claims.append(at_most(f"{label}, {name}: against ONNX", seconds, name, "onnxruntime int8", bound))
            if "onnxruntime fp32" in runs:
                claims.append(at_most(f"{label}, iPQ: against ONNX", seconds, "iPQ", "onnxruntime fp32", 1.0))
                claims.append(at_most(f"{label}, int4: against ONNX", seconds, "int4", "onnxruntime 4-bit", 1.0))
    return claims, sizes


def main() -> None:
    """Measure and print."""
    options = parser(__doc__, repeats=9)
    options.add_argument("--cases", type=case, nargs="+", default=[(1, 128), (1, 16), (16, 128)], metavar="BxT")
    options.add_argument("--layers", type=positive, default=12)
    args = options.parse_args()
    torch.set_num_threads(args.threads)
    claims, sizes = measure(args.cases, args.layers, args.repeats, args.threads)
    report(claims, args.json)
    if not args.json:
        print(", ".join(f"{name} {size / 2**20:.1f} MiB" for name, size in sizes.items()))


if __name__ == "__main__":
    main()
