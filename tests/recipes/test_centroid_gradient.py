"""The measurement behind the scale of a centroid's gradient: its table and its lines, and what follows from them."""

import json
from pathlib import Path

from fairseq_quant_noise.layers.lookup import GRADIENT_POWER
from recipes.centroid_gradient import POWERS, flags_of, settings, table

DOCS = Path(__file__).parents[2] / "docs"
LINES = DOCS / "centroid_gradient.jsonl"


def test_the_page_has_the_table_of_the_lines():
    assert table(LINES) in (DOCS / "how_it_works.md").read_text()


def test_the_published_rate_is_within_5_percent_of_the_best_found_with_the_scale_that_is_built_in():
    scale = next(name for name, power in POWERS.items() if power == GRADIENT_POWER)
    lines = [json.loads(line) for line in LINES.read_text().splitlines()]
    for clusters in {line["clusters"] for line in lines}:
        for optimizer, rate in {"nag": 0.05, "adam": 1e-3}.items():
            of = [line for line in lines if (line["clusters"], line["optimizer"]) == (clusters, optimizer)]
            ours = [
                line["ppl"] for line in of if (line["scale"], line["lr"], line["schedule"]) == (scale, rate, "constant")
            ]
            assert not of or min(ours) <= 1.05 * min(line["ppl"] for line in of), (clusters, optimizer)


def test_each_setting_is_another_command(tmp_path):
    commands = [tuple(flags_of(setting, tmp_path, tmp_path / setting.clusters)) for setting in settings()]
    scales = [setting.scale for setting in settings()]
    assert len({*zip(commands, scales, strict=True)}) == len(commands)
