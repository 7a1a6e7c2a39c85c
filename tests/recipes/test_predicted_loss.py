"""The rank correlation of predicted and measured losses."""

import json

import pytest

from fairseq_quant_noise.quantization.budget import options
from recipes.predicted_loss import main, spearman


def test_ranks_alone_count():
    assert spearman([1.0, 2.0, 3.0, 4.0], [0.1, 0.2, 50.0, 90.0]) == pytest.approx(1)
    assert spearman([1.0, 2.0, 3.0], [3.0, 2.0, 1.0]) == pytest.approx(-1)
    assert spearman([1.0, 2.0, 3.0, 4.0], [1.0, 2.0, 4.0, 3.0]) == pytest.approx(0.8)  # 1 - 6 sum d^2 / n (n^2 - 1)


def test_both_kinds_of_plans_are_measured(lab, runs, monkeypatch, capsys):
    monkeypatch.setattr(options, "BLOCK_SIZES", (4, 8))
    monkeypatch.setattr(options, "CENTROIDS", (4, 16))
    main([str(runs.stock("plain").path), str(lab.data), "--plans", "3", "--json"])
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["plans"] for line in found] == ["by size", "at random"]
    for line in found:
        predicted, measured = zip(*line["losses"], strict=True)
        assert line["spearman"] == pytest.approx(spearman(predicted, measured))
        assert len(set(predicted)) == 3
        assert all(0 < loss < 20 for loss in measured)
