"""The size of a model as it is now is that of the dry run, of its file, and of the network that the file gives."""

import math

import pytest
from toys import INPUTS_PLAN, INT_PLANS, TOKENS, ZOO_PLAN, quiet, zoo

from fairseq_quant_noise import load, save
from fairseq_quant_noise.artifact import read
from fairseq_quant_noise.plan.plan import Plan
from fairseq_quant_noise.quantization.quantize import quantize_, quantize_targets
from fairseq_quant_noise.quantization.table import make_table, model_bytes
from fairseq_quant_noise.quantization.targets import resolve_stages

PLANS = INT_PLANS | {"pq": ZOO_PLAN, "a part": INPUTS_PLAN}


@pytest.mark.parametrize("name", PLANS)
def test_a_model_has_the_size_of_the_dry_run_before_and_after_its_file(name, tmp_path):
    plan = Plan.of(PLANS[name])
    model = zoo()
    table = make_table(model, resolve_stages(plan, model))
    quantize_(model, plan, calibration=[TOKENS], progress=quiet)
    assert model_bytes(model) == pytest.approx((table.paper_bytes, table.dense_bytes))
    save(model, tmp_path / "file", plan)
    assert model_bytes(load(tmp_path / "file", into=zoo())) == pytest.approx((table.paper_bytes, table.dense_bytes))


@pytest.mark.parametrize("name", PLANS)
def test_an_entry_of_the_file_has_the_size_of_its_row(name, tmp_path):
    plan = Plan.of(PLANS[name])
    rows = {r.name: r.bytes for r in make_table(zoo(), resolve_stages(plan, zoo())).rows}
    save(quantize_(zoo(), plan, calibration=[TOKENS], progress=quiet), tmp_path / "file", plan)
    entries = read(tmp_path / "file").manifest.tensors
    assert {n: entry.paper_bytes for n, entry in entries.items()} == {n: rows[n] for n in entries}


def test_while_the_stages_run_the_weights_still_dense_count_in_fp32():
    model = zoo()
    targets = resolve_stages(Plan.of(INT_PLANS["int8"]), model)
    dense = model_bytes(model)[0]
    for done, target in enumerate(targets, 1):
        quantize_targets([target], seed=0, progress=quiet)
        saved = 3 * sum(math.prod(t.weight.shape) for t in targets[:done])
        assert done == len(targets) or model_bytes(model)[0] == dense - saved
    assert model_bytes(model)[0] == dense / 4
