"""fairseq's own architectures under the plugin: what stands for them here."""

from argparse import Namespace

import pytest
from fairseq.models import ARCH_CONFIG_REGISTRY, ARCH_MODEL_REGISTRY
from fairseq.models.roberta import RobertaModel
from fairseq.models.transformer import TransformerModel
from fairseq.models.transformer_lm import TransformerLanguageModel
from fairseq.modules.quant_noise import quant_noise
from torch import nn
from toys import refuses

from fairseq_quant_noise.plugin.models.equivalents import check_task, cure
from fairseq_quant_noise.plugin.models.quantizable import Quantizable, check_noise

OURS = ("transformer_lm_gbw", "transformer_lm_gpt2_small", "transformer_wmt_en_de", "roberta_large", "xlm")


@pytest.mark.parametrize("name", OURS)
def test_an_architecture_of_fairseqs_is_here_with_its_options(name):
    model, ours, theirs = ARCH_MODEL_REGISTRY[f"quant_noise_{name}"], Namespace(), Namespace()
    assert issubclass(model, Quantizable)
    assert issubclass(model, ARCH_MODEL_REGISTRY[name])
    ARCH_CONFIG_REGISTRY[f"quant_noise_{name}"](ours)
    ARCH_CONFIG_REGISTRY[name](theirs)
    assert ours == theirs


def test_every_language_model_and_translation_model_of_fairseqs_has_its_counterpart():
    families = (TransformerLanguageModel, TransformerModel, RobertaModel)
    theirs = [name for name, model in ARCH_MODEL_REGISTRY.items() if model in families]
    assert len(theirs) > 30
    assert all(f"quant_noise_{name}" in ARCH_MODEL_REGISTRY for name in theirs)


def test_a_model_that_its_task_builds_by_itself_is_told_what_to_do():
    assert cure("transformer_lm_gbw").startswith("train with --arch quant_noise_transformer_lm_gbw, ")
    assert cure("dummy_model") == "let its task build it by fairseq.models.build_model"


def test_fairseqs_own_noise_is_refused_where_a_task_has_built_it():
    noised = nn.Sequential(nn.Identity(), quant_noise(nn.Linear(8, 8), 0.1, 8))
    with refuses("^1: would train under fairseq's own noise, .*leave --quant-noise-pq out"):
        check_noise(noised)
    check_noise(noised[0])


def test_a_task_of_many_models_is_refused():
    task = Namespace(_name="multilingual_translation")
    for name in ("quant_noise_transformer", "quant_noise_transformer_small"):
        with refuses("--task multilingual_translation: .*give --arch multilingual_transformer, or .*_simple_epoch"):
            check_task(Namespace(_name=name), task)
    check_task(Namespace(_name="multilingual_transformer"), task)
    check_task(Namespace(_name="quant_noise_transformer"), Namespace(_name="translation"))
    check_task(None, task)


def test_the_equivalent_of_an_architecture_trains(lab):
    run = lab.train("--quant-noise-pq", 0.1, arch="quant_noise_transformer_lm_gbw", kind="untied", updates=2)
    assert run.trainer.get_num_updates() == 2
    assert run.model.decoder.layer_norm is None  # --no-decoder-final-norm
