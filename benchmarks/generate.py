"""Claim: the packed language model generates faster than the dense one, and holds little more than the file.

    python benchmarks/generate.py [--tokens 16] [--layers 16 --dim 1024 --words 267744] [--json]

The paper's language model with random weights and random codes, through the packed file; fairseq's decoder with its
incremental state, greedily, one sentence, word by word: all the log-probabilities of each next word. What is resident
is the parameters, buffers and look-up tables of the network that fairseq built from the file. Needs 3 GB.
"""

import argparse
import tempfile
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from fairseq.data import Dictionary
from fairseq.models import ARCH_CONFIG_REGISTRY, MODEL_DATACLASS_REGISTRY, MODEL_REGISTRY
from side_by_side import Claim, at_least, parser, positive, report, rounds
from torch import nn

import fairseq_quant_noise
from fairseq_quant_noise import save
from fairseq_quant_noise.artifact import read
from fairseq_quant_noise.layers import quantize_weight_
from fairseq_quant_noise.layers.pq import PQWeight
from fairseq_quant_noise.plan.plan import Plan
from fairseq_quant_noise.quantization.targets import resolve_stages

ARCH = "quant_noise_transformer_lm_wikitext103"
PLAN = Path(__file__).parents[1] / "configs/plans/wikitext103.yaml"


def build(args: argparse.Namespace) -> nn.Module:
    """The paper's language model as fairseq builds it, for evaluation."""
    sizes = {f"decoder_{kind}_dim": args.dim for kind in ("embed", "input", "output")}
    cutoffs = ",".join(str(args.words * part // 267_744) for part in (20_000, 60_000))
    options = Namespace(
        **sizes,
        decoder_ffn_embed_dim=4 * args.dim,
        decoder_layers=args.layers,
        adaptive_input_cutoff=cutoffs,
        adaptive_softmax_cutoff=cutoffs,
        max_target_positions=512,
        tokens_per_sample=512,
        add_bos_token=False,
        tpu=False,
    )
    ARCH_CONFIG_REGISTRY[ARCH](options)
    name = "quant_noise_transformer_lm"
    dictionary = Dictionary()
    for i in range(args.words - len(dictionary)):
        dictionary.add_symbol(f"w{i}")
    task = SimpleNamespace(source_dictionary=dictionary, target_dictionary=dictionary, output_dictionary=dictionary)
    torch.manual_seed(0)
    model: nn.Module = MODEL_REGISTRY[name].build_model(MODEL_DATACLASS_REGISTRY[name].from_namespace(options), task)
    return model.eval()


def write_packed(model: nn.Module, path: Path) -> None:
    """`model` with random codes in every weight of the plan, as a packed file."""
    generator = torch.Generator().manual_seed(0)
    plan = Plan.of(PLAN)
    for target in resolve_stages(plan, model):
        d, k = target.block_size or 1, target.n_centroids or 1
        rows, columns = target.weight.shape[0], target.weight.shape[1]
        codes = torch.randint(k, (rows, columns // d), generator=generator).to(torch.uint8)
        centroids = torch.randn(k, d, generator=generator) * columns**-0.5
        quantize_weight_(target.weight, codes, centroids)
    save(model, path, plan)


def from_file(args: argparse.Namespace, path: Path) -> nn.Module:
    """The network that fairseq's programs make of a packed file."""
    model = build(args)
    model.load_state_dict(read(path).state_dict())
    return model.eval()


def generating(model: Any, n_tokens: int) -> Callable[[], None]:
    """Greedy generation of `n_tokens` words after the end-of-sentence mark."""

    def run() -> None:
        state: dict[str, Any] = {}
        words = torch.full((1, 1), 2)
        with torch.no_grad():
            for _ in range(n_tokens):
                out = model.decoder(words, incremental_state=state)
                scores = model.get_normalized_probs(out, log_probs=True)
                words = torch.cat([words, scores[:, -1:].argmax(-1)], 1)

    return run


def resident_bytes(model: nn.Module) -> int:
    """Bytes of parameters and buffers, each storage once, and of what quantized weights keep for their look-ups."""
    kept = list(model.parameters()) + list(model.buffers())
    for module in model.modules():
        if isinstance(module, PQWeight):
            kept += module.kept()
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}
    return sum(storages.values())


def measure(args: argparse.Namespace) -> list[Claim]:
    """Speed against dense, and what is resident against the file."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "packed.safetensors"
        write_packed(build(args), path)
        size, ours, dense = path.stat().st_size, from_file(args, path), build(args)
    contenders = {"ours": generating(ours, args.tokens), "dense": generating(dense, args.tokens)}
    seconds = {name: [s / args.tokens for s in runs] for name, runs in rounds(contenders, args.repeats, 1).items()}
    resident = float(resident_bytes(ours))
    return [
        at_least("a generated token", seconds, "ours", "dense", 1.5),
        Claim("resident weights", resident, size, "the file", resident / size, "<= 1.2", "B", (resident / size,) * 2),
    ]


def main() -> None:
    """Measure and print."""
    options = parser(__doc__, repeats=3)
    for name, default in (("--tokens", 16), ("--layers", 16), ("--dim", 1024), ("--words", 267_744)):
        options.add_argument(name, type=positive, default=default)
    args = options.parse_args()
    torch.set_num_threads(args.threads)
    fairseq_quant_noise.register()
    report(measure(args), args.json)


if __name__ == "__main__":
    main()
