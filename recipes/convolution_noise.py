"""Measure which noise a network of convolutions bears: a narrow MobileNetV2 on CIFAR-10 at 16 x 16 pixels.

    python -m recipes.imagenet.cifar10 SOURCE DATA --train 500
    python -m recipes.convolution_noise run DATA OUT
    python -m recipes.convolution_noise table docs/convolution_noise.jsonl

A network of inverted residuals (arXiv 1801.04381) is trained through `attach_noise`, without fairseq, then quantized
with iPQ at one go, its batch statistics estimated anew. A run that is in OUT/runs.jsonl is not done again; it takes
half a minute of one core, one of the deep network a minute.
"""

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from fairseq_quant_noise import attach_noise, detach_noise, noise_of, quantize_
from recipes import grid
from recipes.table1.table import markdown

SIDE, EPOCHS, BATCH, RATE = 16, 5, 64, 4e-3
CALIBRATION = 2048  # training images, for the batch statistics of the quantized network
#: (expansion, channels, stride) of each block.
BLOCKS = ((1, 16, 1), (4, 16, 1), (4, 24, 2), (4, 24, 1), (4, 40, 2), (4, 40, 1))
HEAD = 128
HEADER = ("blocks", "kind", "p", "layers", "d", "dense", "iPQ, one-shot")
LAYERS = ("depthwise", "pointwise")
DEPTHWISE, POINTWISE, STEM = r".*\.depthwise", r".*\.(expand|project)|head|classifier", "stem"
STAGES = (
    {"match": POINTWISE, "block_size": 4, "n_centroids": 256},
    {"match": f"{DEPTHWISE}|{STEM}", "block_size": 9, "n_centroids": 256},
)


@dataclass(frozen=True)
class Setting:
    """One training."""

    kind: str = "none"  # of a plan's noise
    p: float = 0.0
    layers: str = "all"  # all, depthwise, pointwise
    depthwise: int = 9  # block sizes
    pointwise: int = 4
    repeats: int = 1  # of each block but the first: depth
    seed: int = 1


def settings() -> Iterator[Setting]:
    """The grid, what matters most first."""
    kinds = ("proxy", "mean", "pq", "int8")
    at_most = [Setting(), *(Setting(kind, 0.1) for kind in kinds)]
    by_layer = [Setting("proxy", 0.1, layers) for layers in ("depthwise", "pointwise")]
    deep = [Setting(repeats=3), Setting("proxy", 0.1, repeats=3), Setting("pq", 0.1, repeats=3)]
    at_least = [Setting(kind, 0.05) for kind in kinds]
    by_block = [Setting("proxy", 0.1, "depthwise", depthwise=3), Setting("proxy", 0.1, "pointwise", pointwise=8)]
    yield from [*at_most, *by_layer, *deep]
    yield from (replace(setting, seed=2) for setting in [*at_most, *by_layer])
    yield from at_least
    yield from by_block
    yield from (replace(setting, seed=seed) for seed in (2, 3) for setting in [*deep, *at_least, *by_block])


class Block(nn.Module):
    """An inverted residual: 1x1 up, depthwise 3x3, 1x1 down without activation."""

    def __init__(self, inputs: int, expansion: int, outputs: int, stride: int) -> None:
        super().__init__()
        wide = inputs * expansion
        self.residual = stride == 1 and inputs == outputs
        self.expand, self.norm1 = nn.Conv2d(inputs, wide, 1, bias=False), nn.BatchNorm2d(wide)
        self.depthwise = nn.Conv2d(wide, wide, 3, stride, 1, groups=wide, bias=False)
        self.norm2 = nn.BatchNorm2d(wide)
        self.project, self.norm3 = nn.Conv2d(wide, outputs, 1, bias=False), nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        """(N, inputs, H, W) to (N, outputs, H / stride, W / stride)."""
        y = F.relu6(self.norm1(self.expand(x)))
        y = F.relu6(self.norm2(self.depthwise(y)))
        y = self.norm3(self.project(y))
        return x + y if self.residual else y


class MobileNet(nn.Module):
    """A narrow MobileNetV2 of 10 classes."""

    def __init__(self, repeats: int) -> None:
        super().__init__()
        inputs = BLOCKS[0][1]
        self.stem, self.norm1 = nn.Conv2d(3, inputs, 3, 2, 1, bias=False), nn.BatchNorm2d(inputs)
        self.blocks = nn.Sequential()
        for expansion, outputs, stride in BLOCKS:
            for repeat in range(repeats if expansion > 1 else 1):
                self.blocks.append(Block(inputs, expansion, outputs, 1 if repeat else stride))
                inputs = outputs
        self.head, self.norm2 = nn.Conv2d(inputs, HEAD, 1, bias=False), nn.BatchNorm2d(HEAD)
        self.classifier = nn.Linear(HEAD, 10)

    def forward(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) to (N, 10) logits."""
        x = self.blocks(F.relu6(self.norm1(self.stem(images))))
        return self.classifier(F.relu6(self.norm2(self.head(x))).mean((2, 3)))


def images_of(data: Path, split: str) -> tuple[Tensor, Tensor]:
    """The tree data/split/CLASS/IMAGE: (N, 3, SIDE, SIDE) of about mean 0 and variance 1, and (N,) classes."""
    pixels, classes = [], []
    for label, folder in enumerate(sorted((data / split).iterdir())):
        for path in sorted(folder.iterdir()):
            pixels.append(np.asarray(Image.open(path).convert("RGB").resize((SIDE, SIDE), Image.Resampling.BOX)))
            classes.append(label)
    return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float() / 64 - 2, torch.tensor(classes)


def noise_of_setting(setting: Setting) -> list[dict[str, Any]]:
    """The `noise` rules of a plan."""
    d = {"depthwise": setting.depthwise, "pointwise": setting.pointwise, "stem": 9}
    match = {"depthwise": DEPTHWISE, "pointwise": POINTWISE, "stem": STEM}
    names = list(d) if setting.layers == "all" else [setting.layers]
    rule = {"kind": setting.kind, "p": setting.p}
    return [{"match": match[n], "block_size": 1 if setting.kind == "int8" else d[n], **rule} for n in names]


def train(model: nn.Module, setting: Setting, images: Tensor, classes: Tensor) -> None:
    """EPOCHS of Adam under a linear warm-up and decay, images mirrored at random."""
    if setting.p:
        attach_noise(model, {"noise": noise_of_setting(setting)})
    steps = EPOCHS * (len(images) // BATCH)
    optimizer = torch.optim.Adam(model.parameters(), RATE, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, steps, pct_start=0.2, cycle_momentum=False)
    model.train()
    for _ in range(EPOCHS):
        if noise := noise_of(model):
            noise.begin_epoch()
        for index in torch.randperm(len(images)).split(BATCH)[: len(images) // BATCH]:
            batch = images[index]
            batch = torch.where((torch.rand(len(batch)) < 0.5)[:, None, None, None], batch.flip(3), batch)
            optimizer.zero_grad()
            F.cross_entropy(model(batch), classes[index]).backward()
            optimizer.step()
            schedule.step()
    detach_noise(model)
    model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, classes: Tensor) -> float:
    """In percent."""
    predicted = torch.cat([model(part).argmax(1) for part in images.split(500)])
    return round(100 * (predicted == classes).float().mean().item(), 2)


def measure(setting: Setting, train_set: tuple[Tensor, Tensor], val_set: tuple[Tensor, Tensor]) -> dict[str, Any]:
    """Train one network; its accuracy dense and after iPQ at one go, in percent."""
    torch.manual_seed(setting.seed)
    model = MobileNet(setting.repeats)
    train(model, setting, *train_set)
    dense = accuracy(model, *val_set)
    calibration = train_set[0][torch.randperm(len(train_set[0]))[:CALIBRATION]].split(2 * BATCH)
    quantize_(model, {"stages": list(STAGES)}, calibration=calibration, seed=setting.seed)
    return {**asdict(setting), "dense": dense, "ipq": accuracy(model, *val_set)}


def run(data: Path, out: Path) -> None:
    """Every setting that has no line yet."""
    torch.set_num_threads(1)
    train_set, val_set = images_of(data, "train"), images_of(data, "val")
    out.mkdir(parents=True, exist_ok=True)
    lines = out / "runs.jsonl"
    for setting in grid.missing(settings(), lines):
        began = time.process_time()
        line = measure(setting, train_set, val_set)
        grid.add({**line, "seconds": round(time.process_time() - began)}, lines)


def table(lines: Path) -> str:
    """A row a setting: the mean over its seeds, and each of them."""
    rows: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for line in map(json.loads, lines.read_text().splitlines()):
        blocks = {"all": f"{line['depthwise']} / {line['pointwise']}", **{n: f"{line[n]}" for n in LAYERS}}
        noise = (line["layers"], "1" if line["kind"] == "int8" else blocks[line["layers"]]) if line["p"] else ("", "")
        depth = str(1 + line["repeats"] * (len(BLOCKS) - 1))
        rows.setdefault((depth, line["kind"], f"{line['p']:g}", *noise), []).append(line)
    cells = [
        (*key, *(_mean_of(runs, score) for score in ("dense", "ipq")))
        for key, runs in sorted(rows.items(), key=lambda row: int(row[0][0]))
    ]
    return "\n".join(markdown(HEADER, cells))


def _mean_of(runs: list[dict[str, Any]], score: str) -> str:
    scores = [line[score] for line in runs]
    of_seeds = f" ({', '.join(f'{s:.1f}' for s in scores)})" if len(scores) > 1 else ""
    return f"{mean(scores):.1f}{of_seeds}"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    actions = parser.add_subparsers(dest="action", required=True)
    to_run, to_print = actions.add_parser("run"), actions.add_parser("table")
    to_run.add_argument("data", type=Path)
    to_run.add_argument("out", type=Path)
    to_print.add_argument("lines", type=Path)
    given = parser.parse_args()
    if given.action == "run":
        run(given.data, given.out)
    else:
        print(table(given.lines))


if __name__ == "__main__":
    main()
