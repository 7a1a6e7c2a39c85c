"""Claims: what a step costs that fine-tunes a quantized network.

Centroids alone: at most 10 % more than a dense step. Codes too, all encoded again in each step: at most 30 % more than
centroids alone.

    python benchmarks/finetune.py [--layers 6 --dim 512 --words 10000 --tokens 2048] [--json]

The same network is run in turn dense, with all weights quantized by ours (blocks of 8, K = 256), with codes fixed or
trained, and with fairseq's own PQLinear and PQEmbedding on the same sizes. One step is forward, cross entropy, backward
and Adam.
"""

import torch
from fairseq.modules.quantization.pq.modules import PQEmbedding, PQLinear
from lm import OURS, STOCK, build, device, step
from side_by_side import Claim, at_least, at_most, parser, positive, report, rounds
from torch import Tensor, nn

from fairseq_quant_noise.layers import LatentPQWeight, quantize_weight_
from fairseq_quant_noise.plan.rules import Codes
from fairseq_quant_noise.quantization.code_training import encode_in_training
from fairseq_quant_noise.weights.discovery import find_weights

D, K = 8, 256


def codes_and_centroids(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Random ones, for the time of a step does not depend on them."""
    generator = torch.Generator().manual_seed(weight.numel())
    codes = torch.randint(K, (weight.shape[0], weight.shape[1] // D), generator=generator)
    return codes.to(device()), (torch.randn(K, D, generator=generator) * weight.shape[1] ** -0.5).to(device())


def by_ours(model: nn.Module) -> nn.Module:
    """Every weight of `model` in codes."""
    for weight in find_weights(model):
        codes, centroids = codes_and_centroids(weight.stored)  # type: ignore[arg-type]
        quantize_weight_(weight, codes.to(torch.uint8), centroids)
    return model


def by_ours_with_codes(model: nn.Module) -> nn.Module:
    """The same, with codes that train."""
    for weight in find_weights(model):
        latent: Tensor = weight.stored  # type: ignore[assignment]
        codes, centroids = codes_and_centroids(latent)
        quantize_weight_(weight, codes.to(torch.uint8), centroids, kind=LatentPQWeight).set_latent(latent, 0.5)
    encode_in_training(model, Codes(kind="train"))
    return model


def by_fairseq(model: nn.Module) -> nn.Module:
    """Every Linear and Embedding of `model` as fairseq's quantized counterpart; a tie is lost, as there."""
    for name, module in list(model.named_modules()):
        if not isinstance(module, nn.Linear | nn.Embedding):
            continue
        codes, centroids = codes_and_centroids(module.weight.detach())
        flat = codes.t().flatten()  # fairseq's order of blocks
        if isinstance(module, nn.Linear):
            bias = module.bias.detach() if module.bias is not None else None
            made: nn.Module = PQLinear(centroids, flat, bias, module.in_features, module.out_features)
        else:
            sizes = module.num_embeddings, module.embedding_dim
            made = PQEmbedding(centroids, flat, *sizes, module.padding_idx, None, 2.0, False, False, None)
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, made)
    return model


def measure(layers: int, dim: int, words: int, tokens: int, repeats: int) -> list[Claim]:
    """The claims."""
    sizes = {"layers": layers, "dim": dim, "words": words}
    contenders = {
        "ours": step(by_ours(build(OURS, **sizes)), tokens),
        "a dense step": step(build(STOCK, **sizes), tokens),
        "with codes that train": step(by_ours_with_codes(build(OURS, **sizes)), tokens),
        "fairseq's": step(by_fairseq(build(STOCK, **sizes)), tokens),
    }
    seconds = rounds(contenders, repeats)
    return [
        at_most("a step of fine-tuning centroids", seconds, "ours", "a dense step", 1.10),
        at_most("a step with codes that train", seconds, "with codes that train", "ours", 1.30),
        at_least("faster than fairseq's PQLinear and PQEmbedding", seconds, "ours", "fairseq's", 1.0),
        at_most("fairseq's own, for comparison", seconds, "fairseq's", "a dense step", 1.10),
    ]


def main() -> None:
    """Measure and print."""
    options = parser(__doc__, repeats=7)
    for name, default in (("layers", 6), ("dim", 512), ("words", 10_000), ("tokens", 2048)):
        options.add_argument(f"--{name}", type=positive, default=default)
    args = options.parse_args()
    torch.set_num_threads(args.threads)
    report(measure(args.layers, args.dim, args.words, args.tokens, args.repeats), args.json)


if __name__ == "__main__":
    main()
