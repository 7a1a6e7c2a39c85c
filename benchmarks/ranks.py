"""How the cost of noise and of stages grows with processes, parameters and tokens: seconds of CPU, and bytes sent.

    python benchmarks/ranks.py [--ranks 1 2 4] [--layers 4 8] [--tokens 256 1024] [--dim 512] [--json]

Processes train a stack of feed-forward layers together, over gloo on this machine: a step with DDP, with and without
proxy noise, and then a stage of iPQ over all weights. Bytes are those that rank 0 writes to its sockets, by Linux's
count of what a process writes. Seconds are of CPU time, since processes may outnumber the cores: the most that a rank
takes, of the k-means of its share and of the check by hash that all hold the same.
"""

import json
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from side_by_side import machine, parser, positive
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fairseq_quant_noise import attach_noise, quantize_
from fairseq_quant_noise.utils.ranks import check_same

PLAN = {"noise": [{"match": ".*", "p": 0.1}], "stages": [{"match": ".*", "block_size": 8, "n_centroids": 256}]}


def sent() -> int:
    """Bytes that this process has written so far, to sockets for the most part."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("wchar"))


def cost(run: Callable[[], object]) -> tuple[float, int]:
    """Seconds of CPU, and bytes sent."""
    dist.barrier()
    began, before = time.process_time(), sent()
    run()
    return time.process_time() - began, sent() - before


def network(layers: int, dim: int) -> nn.Sequential:
    """A stack of feed-forward layers: 8 d^2 numbers each."""
    torch.manual_seed(0)
    return nn.Sequential(
        *(m for _ in range(layers) for m in (nn.Linear(dim, 4 * dim), nn.ReLU(), nn.Linear(4 * dim, dim)))
    )


def of_rank(rank: int, world: int, meet: str, case: dict[str, int], repeats: int, out: Any) -> None:
    """In a process of its own: measure, and put what was found into `out`."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meet}", rank=rank, world_size=world)
    inputs = torch.randn(case["tokens"], case["dim"])
    found: dict[str, float] = {}
    for name in ("plain", "noised"):
        model = network(case["layers"], case["dim"])
        if name == "noised":
            attach_noise(model, PLAN)
        together = DistributedDataParallel(model)
        steps = [cost(lambda t=together: t(inputs).square().mean().backward()) for _ in range(repeats + 2)][2:]
        found[f"{name} seconds"] = statistics.median(seconds for seconds, _ in steps)
        found[f"{name} bytes"] = statistics.median(number for _, number in steps)
    model = network(case["layers"], case["dim"])
    weights = {key: tensor for key, tensor in model.state_dict().items() if tensor.dim() > 1}
    found["hash seconds"], found["hash bytes"] = cost(lambda: check_same(weights, "before the stage"))
    stage, found["stage bytes"] = cost(lambda: quantize_(model, PLAN, progress=lambda line: None))
    found["k-means seconds"] = stage - found["hash seconds"]
    out.put((rank, found))
    dist.barrier()
    dist.destroy_process_group()


def row(world: int, case: dict[str, int], repeats: int) -> dict[str, Any]:
    """What `world` processes take: of seconds the most of a rank, of bytes those of rank 0."""
    context = multiprocessing.get_context("fork")  # this process has run nothing of torch that a fork would break
    out = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        arguments = (world, f"{folder}/meet", case, repeats, out)
        processes = [context.Process(target=of_rank, args=(rank, *arguments)) for rank in range(world)]
        for process in processes:
            process.start()
        found = dict(out.get(timeout=600) for _ in processes)
        for process in processes:
            process.join()
    most = {name: max(of[name] for of in found.values()) for name in found[0] if name.endswith("seconds")}
    numbers = 8 * case["layers"] * case["dim"] ** 2
    return {"ranks": world, "numbers": numbers, "tokens": case["tokens"], **found[0], **most}


def table(rows: list[dict[str, Any]]) -> None:
    """Print the rows."""
    print(machine())
    units = "step, s | noise, s | step, bytes | noise, bytes | k-means, s | hash, s | stage, bytes"
    print(f"| ranks | numbers | tokens | {units} |")
    print("|" + "---|" * 10)
    for r in rows:
        noise, bytes_of_noise = (r[f"noised {unit}"] - r[f"plain {unit}"] for unit in ("seconds", "bytes"))
        print(
            f"| {r['ranks']} | {r['numbers']:,} | {r['tokens']} | {r['plain seconds']:.3f} | {noise:.3f} | "
            f"{r['plain bytes']:,.0f} | {bytes_of_noise:,.0f} | {r['k-means seconds']:.2f} | {r['hash seconds']:.3f} | "
            f"{r['stage bytes']:,.0f} |"
        )


def main() -> None:
    """Measure and print."""
    options = parser(__doc__, repeats=5)
    options.add_argument("--ranks", type=positive, nargs="*", default=[1, 2, 4], help="numbers of processes")
    options.add_argument("--layers", type=positive, nargs="*", default=[4, 8], help="numbers of layers")
    options.add_argument("--tokens", type=positive, nargs="*", default=[256, 1024], help="tokens of a rank in a step")
    options.add_argument("--dim", type=positive, default=512, help="d of the layers")
    args = options.parse_args()
    cases = [{"layers": n, "tokens": args.tokens[0], "dim": args.dim} for n in args.layers]
    cases += [{"layers": args.layers[0], "tokens": n, "dim": args.dim} for n in args.tokens[1:]]
    rows = [row(world, case, args.repeats) for case in cases for world in args.ranks]
    print(json.dumps(rows)) if args.json else table(rows)


if __name__ == "__main__":
    main()
