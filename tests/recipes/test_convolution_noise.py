"""The measurement behind the warning of proxy noise on convolutions: its table, its lines, what follows from them."""

import json
from pathlib import Path
from statistics import mean

import torch

from fairseq_quant_noise import attach_noise, noise_of
from recipes.convolution_noise import MobileNet, measure, noise_of_setting, settings, table

DOCS = Path(__file__).parents[2] / "docs"
LINES = DOCS / "convolution_noise.jsonl"


def test_the_page_has_the_table_of_the_lines():
    assert table(LINES) in (DOCS / "noise.md").read_text()


def test_pq_noise_costs_less_than_proxy_noise_at_either_depth():
    """What the warning of `noise/attach.py` says."""
    lines = [json.loads(line) for line in LINES.read_text().splitlines()]
    for repeats in (1, 3):
        of = [line for line in lines if line["repeats"] == repeats and line["layers"] == "all" and line["p"] == 0.1]
        dense = {kind: mean(line["dense"] for line in of if line["kind"] == kind) for kind in ("proxy", "pq")}
        assert dense["pq"] > dense["proxy"]


def test_each_setting_is_another_and_fits_the_network():
    grid = list(settings())
    assert len(set(grid)) == len(grid)
    for setting in grid:
        if setting.p:
            model = attach_noise(MobileNet(setting.repeats), {"noise": noise_of_setting(setting)})
            weights = sum(p.dim() > 1 for p in model.parameters())
            assert (len(noise_of(model).weights) == weights) == (setting.layers == "all")


def test_a_setting_gives_a_line():
    images, classes = torch.randn(128, 3, 16, 16), torch.arange(128) % 10
    setting = next(setting for setting in settings() if setting.kind == "pq")
    line = measure(setting, (images, classes), (images, classes))
    assert {"kind", "p", "dense", "ipq"} <= line.keys()
    assert 0 <= line["ipq"] <= 100
