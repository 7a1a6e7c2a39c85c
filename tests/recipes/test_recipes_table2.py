"""recipes/table2.sh: the language model's rows for real on a corpus of minutes, RoBERTa's from logs."""

import json
import random

import pytest
import torch
from test_recipes_mnli import recipe, sources  # noqa: F401 (a fixture)

from fairseq_quant_noise.networks.registry import build


@pytest.fixture(autouse=True)
def _recipes_on_the_path(monkeypatch):
    from test_recipes_mnli import ROOT

    monkeypatch.syspath_prepend(ROOT)


def write_text(folder):
    """More words than the last cutoff of the recipe's adaptive softmax, each once and then some again."""
    folder.mkdir()
    draw = random.Random(0)
    words = [f"w{i}" for i in range(10_400)]
    (folder / "wiki.train.tokens").write_text(
        "\n".join(" ".join(words[i : i + 20]) for i in range(0, len(words), 20)) + "\n"
    )
    lines = [" ".join(draw.choices(words[:500], k=20)) for _ in range(12)]
    (folder / "wiki.valid.tokens").write_text("\n".join(lines) + "\n")
    return folder


def test_the_rows_of_the_language_model(tmp_path):
    text = write_text(tmp_path / "text")
    settings = {"UPDATES": "3", "IPQ_UPDATES": "3", "JOBS": "2"}
    done = recipe("table2.sh", "out", "--wikitext", text, cwd=tmp_path, **settings)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    rows = [json.loads(line) for line in (tmp_path / "out/table2.jsonl").read_text().splitlines()]
    assert [row["row"] for row in rows] == [
        *("original", "+ sharing", "+ pruning", "iPQ", "+ Quant-Noise", "+ sharing", "+ pruning"),
        "  with larger blocks (x94 plan)",
    ]
    sizes = [row["bytes"] for row in rows]
    assert sizes == sorted(sizes, reverse=True) or sizes[3] == pytest.approx(sizes[4], rel=0.01)
    assert sizes[0] > sizes[1] > sizes[2] > sizes[3]
    assert sizes[4] > sizes[5] > sizes[6] > sizes[7]
    assert all(row["score"] > 1 for row in rows)
    again = recipe("table2.sh", "out", "--wikitext", text, cwd=tmp_path, **settings)
    assert again.returncode == 0
    assert "[step]" not in (tmp_path / "out/lm/none/log").read_text().rpartition("[skip] train")[2]


def test_robertas_rows_are_read_from_the_logs(tmp_path):
    from recipes.table2.table import LINES, MNLI, result

    for line in LINES[:7]:
        run = tmp_path / line.run
        (run / "dense").mkdir(parents=True, exist_ok=True)
        options = {"_name": "roberta", "encoder_layers": 0, "encoder_embed_dim": 8, "encoder_attention_heads": 2}
        write_checkpoint(run / "dense/checkpoint_best.pt", options)
        (run / "ipq.safetensors").write_bytes(bytes(100))
        for name in ("dense", "ipq"):
            (run / f"eval-{name}.log").write_text("x | valid on 'valid' subset | loss 1 | accuracy 41.5 | x\n")
    found = [result(MNLI, tmp_path, line) for line in LINES[:7]]
    assert result(MNLI, tmp_path, LINES[7]) is None, "of the language model alone"
    assert [row["score"] for row in found] == [41.5] * 7
    assert [row["bytes"] for row in found][3:] == [100] * 4
    assert found[3]["ratio"] == found[0]["bytes"] / 100


def write_checkpoint(path, options):
    """A RoBERTa of ten words with random weights."""
    model = build("roberta", {**options, "max_positions": 4}, 10)
    torch.save({"model": model.state_dict(), "cfg": {"model": options, "task": {}, "criterion": {}}}, path)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["OUT"], "give OUT_DIR --wikitext DIR"),
        (["OUT", "--wikitext", "text", "--jobs", "2"], "unknown option --jobs"),
        (["OUT", "OTHER", "--wikitext", "text"], "two output folders given"),
    ],
)
def test_a_mistake_is_one_line(sources, arguments, said):  # noqa: F811
    done = recipe("table2.sh", *arguments, cwd=sources)
    assert done.returncode == 2
    assert said in done.stderr
    assert done.stderr.count("\n") == 1
