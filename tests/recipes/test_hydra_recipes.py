"""The recipes and the configurations in configs/ give the same settings, key by key."""

import functools

import pytest
from hydra_fixture import NAMES, composed, filled
from recipe_commands import commands, parsed

pytestmark = pytest.mark.slow

TASKS = ("wikitext", "roberta", "translation", "imagenet")
RUN = {task: f'bash "$REPO/recipes/{task}/run.sh" data out' for task in TASKS}
RUN["mnli"] = 'bash "$REPO/recipes/mnli/run.sh" data out pre.pt'
QUICKSTART = """
. "$REPO/recipes/lib.sh"
DATA=data UPDATES=2000 IPQ_UPDATES=400 SEED=1 # of quickstart.sh
lm_flags
lm_train out/dense --quant-noise-pq 0.05 --quant-noise-pq-block-size 8
lm_ipq out/dense "$REPO/configs/plans/small.yaml" out/ipq --quant-noise-pq 0.05
"""
CPU = {"SIZE": "cpu"}
#: For each configuration the recipe, its environment, and which of its trainings.
RECIPES = {
    "language_modeling/small": (QUICKSTART, {}, 0),
    "language_modeling/small_ipq": (QUICKSTART, {}, 1),
    "language_modeling/wikitext103": (RUN["wikitext"], {}, 0),
    "language_modeling/wikitext103_ipq": (RUN["wikitext"], {}, 1),
    "language_modeling/wikitext2": (RUN["wikitext"], CPU, 0),
    "language_modeling/wikitext2_ipq": (RUN["wikitext"], CPU, 1),
    "masked_lm/roberta_base": (RUN["roberta"], {}, 0),
    "masked_lm/roberta_small": (RUN["roberta"], CPU, 0),
    "sentence_prediction/mnli_base": (RUN["mnli"], {}, 0),
    "sentence_prediction/mnli_base_ipq": (RUN["mnli"], {}, 1),
    "sentence_prediction/mnli_small": (RUN["mnli"], CPU, 0),
    "sentence_prediction/mnli_small_ipq": (RUN["mnli"], CPU, 1),
    "translation/iwslt14": (RUN["translation"], {}, 0),
    "translation/iwslt14_ipq": (RUN["translation"], {}, 1),
    "translation/small": (RUN["translation"], CPU, 0),
    "translation/small_ipq": (RUN["translation"], CPU, 1),
    "image_classification/cifar10_small": (RUN["imagenet"], CPU, 0),
    "image_classification/cifar10_small_ipq": (RUN["imagenet"], CPU, 1),
    "image_classification/imagenet_b3": (RUN["imagenet"], {}, 0),
    "image_classification/imagenet_b3_ipq": (RUN["imagenet"], {}, 1),
}
#: What the user gives, in both.
PLACES = {
    *("common.user_dir", "task.data", "checkpoint.save_dir", "checkpoint.finetune_from_model"),
    "criterion.ipq_teacher",
}
#: Where they differ, and why.
DIFFERENCES = {
    "common.cpu": "recipes with SIZE=cpu stay on the CPU; a configuration takes a GPU where there is one",
    "common.no_progress_bar": "both print plain lines; a configuration says log_format: simple",
    "common.log_format": "as above",
    "model._name": "recipes name an architecture; a configuration writes its values out",
    "model.base_shuffle": "of BASE layers, which there are none of; fairseq's architectures turn it off",
    "model.relu_dropout": "an old name of activation_dropout",
    "scoring": "fairseq's command line always makes a scorer, scoring.*; nothing here generates",
}
OF_ONE = {
    "language_modeling/small": {"distributed_training.ddp_backend": "the recipe trains in one process"},
    "language_modeling/small_ipq": {"distributed_training.ddp_backend": "the recipe trains in one process"},
    "image_classification/cifar10_small": {"distributed_training.ddp_backend": "the recipe trains in one process"},
    "image_classification/cifar10_small_ipq": {"distributed_training.ddp_backend": "the recipe trains in one process"},
    "sentence_prediction/mnli_base_ipq": {"checkpoint.save_interval_updates": "a third, which is a stage"},
}


@pytest.fixture(scope="module")
def trainings(tmp_path_factory):
    """recipe, environment -> the command lines of its trainings, each recipe run once."""

    @functools.cache
    def run(script, *environment):
        return commands(tmp_path_factory.mktemp("recipe"), script, **dict(environment))

    return run


def flat(cfg):
    """section.key -> value."""
    nested = {name: node for name, node in cfg.items() if isinstance(node, dict)}
    alone = {name: node for name, node in cfg.items() if not isinstance(node, dict)}
    return {f"{name}.{key}": value for name, node in nested.items() for key, value in node.items()} | alone


def test_every_configuration_has_a_recipe():
    assert set(NAMES) == set(RECIPES)


@pytest.mark.parametrize("name", RECIPES)
def test_a_configuration_and_its_recipe_have_the_same_settings(name, trainings):
    script, environment, which = RECIPES[name]
    recipe, config = flat(parsed(trainings(script, *environment.items())[which])), flat(filled(composed(name)))
    allowed = PLACES | DIFFERENCES.keys() | OF_ONE.get(name, {}).keys()
    differ = {key for key in recipe | config if recipe.get(key) != config.get(key)}
    differ = {key for key in differ if key not in allowed and not key.startswith("scoring.")}
    assert {key: (recipe.get(key), config.get(key)) for key in differ} == {}
