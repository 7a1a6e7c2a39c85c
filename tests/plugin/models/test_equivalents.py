"""fairseq's own architectures under the plugin: what stands for them here, and no noise of fairseq's unnoticed."""

from argparse import Namespace

import pytest
from fairseq import options
from fairseq.models import ARCH_CONFIG_REGISTRY, ARCH_MODEL_REGISTRY
from lm_fixture import FFN, USER_DIR
from toys import refuses

from fairseq_quant_noise.plugin.models.equivalents import check_noise, check_task, cure
from fairseq_quant_noise.plugin.models.quantizable import Quantizable

OURS = ("transformer_lm_gbw", "transformer_lm_gpt2_small", "transformer_wmt_en_de", "roberta_large", "xlm")
NONE_HERE = ("bart_base", "nonautoregressive_transformer", "hf_gpt2", "transformer_align", "fconv")


@pytest.mark.parametrize("name", OURS)
def test_an_architecture_of_fairseqs_is_here_with_its_options(name):
    model, ours, theirs = ARCH_MODEL_REGISTRY[f"quant_noise_{name}"], Namespace(), Namespace()
    assert issubclass(model, Quantizable)
    assert issubclass(model, ARCH_MODEL_REGISTRY[name])
    ARCH_CONFIG_REGISTRY[f"quant_noise_{name}"](ours)
    ARCH_CONFIG_REGISTRY[name](theirs)
    assert ours == theirs


def test_every_architecture_that_a_message_names_exists():
    named = [cure(name) for name in ARCH_MODEL_REGISTRY if not name.startswith("quant_noise_")]
    found = [text.split("--arch ")[1].split(",")[0] for text in named if "--arch" in text]
    assert {f"quant_noise_{name}" for name in OURS} <= {*found} <= {*ARCH_MODEL_REGISTRY}
    for name in NONE_HERE:
        assert "has no model for it" in cure(name)


@pytest.mark.parametrize("option", ["quant_noise_pq", "quant_noise_scalar"])
def test_fairseqs_own_noise_is_refused_for_every_model(option):
    for name in (*OURS, *NONE_HERE):
        with refuses(f"--{option.replace('_', '-')}: {name} would train under fairseq's own noise, .*; "):
            check_noise(Namespace(_name=name, **{option: 0.1}))
        with refuses(f"--{option.replace('_', '-')}: {name} "):
            check_noise(Namespace(arch=name, **{option: 0.1}))
        check_noise(Namespace(_name=name, **{option: 0.0}))
    for name in OURS:
        check_noise(Namespace(_name=f"quant_noise_{name}", **{option: 0.1}))
    check_noise(None)  # a program that does not train


@pytest.mark.upstream(38)
@pytest.mark.parametrize("flags", [("--quant-noise-pq", 0.1), ("--quant-noise-scalar", 0.5)], ids=str)
def test_a_training_whose_prefix_was_forgotten_ends_in_a_line(lab, capsys, flags):
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        lab.train(*flags, arch="transformer_lm_gbw", kind="untied")
    assert end.value.code == 2
    assert "train with --arch quant_noise_transformer_lm_gbw" in last_error(capsys)


@pytest.mark.upstream(37)
@pytest.mark.parametrize("flag", ["--quant-noise-scalar", "--quant-noise-pq"])
def test_noise_for_hf_gpt2_is_refused(lab, capsys, flag):
    line = [str(lab.data), "--user-dir", USER_DIR, "--task", "language_modeling", "--arch", "hf_gpt2", flag, "0.5"]
    with pytest.raises(SystemExit) as end:
        options.parse_args_and_arch(options.get_training_parser(), line)
    assert end.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].endswith(f"error: unrecognized arguments: {flag} 0.5")
    named = Namespace(_name="hf_gpt2", **{flag[2:].replace("-", "_"): 0.5})  # as a configuration for Hydra can
    with refuses(f"{flag}: hf_gpt2 would train .*; this package has no model for it"):
        check_noise(named)


def test_a_task_of_many_models_is_refused():
    task = Namespace(_name="multilingual_translation")
    for name in ("quant_noise_transformer", "quant_noise_transformer_small"):
        with refuses("--task multilingual_translation: .*give --task translation_multi_simple_epoch"):
            check_task(Namespace(_name=name), task)
    check_task(Namespace(_name="multilingual_transformer"), task)
    check_task(Namespace(_name="quant_noise_transformer"), Namespace(_name="translation"))
    check_task(None, task)


def last_error(capsys):
    """Of a run that Hydra may have warned of before."""
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("error: ")
    return line


def test_stages_of_another_model_name_what_there_is(lab, capsys):
    capsys.readouterr()
    with pytest.raises(SystemExit):
        lab.train("--quantization-config-path", lab.plan({"stages": [FFN]}), arch="transformer_lm_gbw", kind="untied")
    assert "train with --arch quant_noise_transformer_lm_gbw" in last_error(capsys)


def test_the_equivalent_of_an_architecture_trains(lab):
    run = lab.train("--quant-noise-pq", 0.1, arch="quant_noise_transformer_lm_gbw", kind="untied", updates=2)
    assert run.trainer.get_num_updates() == 2
    assert run.model.decoder.layer_norm is None  # --no-decoder-final-norm
