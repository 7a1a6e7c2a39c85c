"""recipes/codes.sh without its trainings: its plans, its list of runs and its table."""

import pytest
from test_recipes_mnli import ROOT, recipe

from fairseq_quant_noise.plan.plan import Plan


@pytest.fixture(autouse=True)
def _recipes_on_the_path(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)


def test_the_recipe_makes_the_rows_of_the_table_and_has_their_plans(tmp_path):
    from recipes.codes.table import RUNS, plans

    done = recipe("codes.sh", "--list", cwd=tmp_path)
    assert sorted(done.stdout.split()) == sorted(RUNS)
    found = {name: Plan.of(plan) for name, plan in plans().items()}
    assert {"small", *(run for run in RUNS if run.startswith(("k64", "d16", "int")) and not run.endswith("-best"))} == {
        *found
    }
    assert {rule.range for rule in found["int2-learned"].stages} == {"learned-channel"}
    assert [rule.block_size for rule in found["d16"].stages] == [16, 16, 8]


@pytest.mark.parametrize(
    ("arguments", "settings", "said"),
    [
        (["--bad"], {}, "unknown argument --bad"),
        ([], {"ONLY": "own"}, "ONLY names a run 'own'; there are: paper fixed"),
    ],
)
def test_a_mistake_is_one_line(tmp_path, arguments, settings, said):
    done = recipe("codes.sh", *arguments, cwd=tmp_path, **settings)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert said in done.stderr
