"""Plans that come with the package, by their names."""

from pathlib import Path

import pytest
from toys import refuses

from fairseq_quant_noise import Plan
from fairseq_quant_noise.plan.shipped import shipped_plans
from fairseq_quant_noise.plugin.training.stages import StageController

FOLDER = Path(__file__).parents[2] / "configs/plans"
OTHER = "stages: [{match: fc, block_size: 2}]"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_every_plan_in_configs_is_found_by_its_name():
    assert shipped_plans() == {path.stem: path for path in FOLDER.glob("*.yaml")}
    for name, path in shipped_plans().items():
        assert Plan.of(name) == Plan.of(path)
        assert Plan.of(Path(name)) == Plan.of(path)


def test_fairseqs_option_takes_a_name():
    assert StageController("wikitext103", 0, 13500).plan == Plan.of(FOLDER / "wikitext103.yaml")


def test_a_file_of_that_path_comes_first(tmp_path):
    (tmp_path / "small").write_text(OTHER)
    assert Plan.of("small").stages[0].block_size == 2


def test_a_folder_of_that_name_is_no_plan(tmp_path):
    (tmp_path / "small").mkdir()
    assert Plan.of("small") == Plan.of(FOLDER / "small.yaml")


def test_a_name_of_neither_lists_the_names_there_are():
    known = ", ".join(sorted(path.stem for path in FOLDER.glob("*.yaml")))
    with refuses(f"^plan smal: no such file, and no shipped plan has this name; there are {known}$"):
        Plan.of("smal")


@pytest.mark.parametrize("path", ["smal.yaml", "./small", "configs/plans/none.yaml", "x" * 300 + ".yaml"])
def test_a_path_is_read_as_a_path(path):
    with refuses("give the path of a YAML file$"):
        Plan.of(path)
