"""The dry run of an architecture: the options and heads that `plan` gives it, and the paper's RoBERTa by them."""

import json
from pathlib import Path

import pytest
from lm_fixture import one_error

from fairseq_quant_noise.accounting import MIB
from fairseq_quant_noise.cli.main import main
from fairseq_quant_noise.plugin.models.architectures import architecture_options

PLANS = Path(__file__).parents[3] / "configs/plans"
ROBERTA, LM = "quant_noise_roberta_base", "quant_noise_transformer_lm_small"
LAYER = "quant_noise_embedding_layer=true"


def plan(arch, *flags, vocabulary=50_265):
    name = "roberta" if "roberta" in arch else "small"
    size = ["--arch", arch, "--vocab-size", str(vocabulary)]
    main(["plan", *size, "--plan", str(PLANS / f"{name}.yaml"), "--json", *flags])


@pytest.mark.parametrize(
    ("flags", "parameters", "dense", "paper"),
    [
        (["--set", LAYER], 125_879_388, 480.19, 38.53),
        ([], 125_289_564, 477.94, 36.28),
        (["--set", LAYER, "--set", "max-positions=256"], 125_879_388 - 256 * 768, 479.44, 37.78),
    ],
    ids=["the paper's", "without the layer", "fewer positions"],
)
def test_the_papers_roberta_has_its_sizes(flags, parameters, dense, paper, capsys):
    """Table 1 of the paper: 480 MiB and 38 MiB."""
    plan(ROBERTA, "--head", "mnli=3", *flags)
    table = json.loads(capsys.readouterr().out)
    assert table["parameters"] == parameters
    assert round(table["dense_bytes"] / MIB, 2) == dense
    assert round(table["paper_bytes"] / MIB, 2) == paper
    assert "classification_heads.mnli.out_proj.weight" in [row["name"] for row in table["tensors"]]


@pytest.mark.parametrize(
    ("name", "settings", "dense", "paper"),
    [
        ("wikitext103", [], 941.98, 38.66),
        ("wikitext103", ["share_layers=2"], 557.57, 22.13),
        ("wikitext103", ["share_layers=2", "decoder_layers_to_keep=every-other"], 365.37, 13.87),
        ("wikitext103_x94", [], 365.37, None),
    ],
    ids=["16 layers", "8 unique", "4 unique", "x94"],
)
def test_the_papers_language_model_has_its_sizes(name, settings, dense, paper, capsys):
    """Table 2 of the paper: 942 / 38, 19 and 10 MB; what the last two really come to."""
    flags = [part for setting in settings for part in ("--set", setting)]
    line = ["--arch", "quant_noise_transformer_lm_wikitext103", "--vocab-size", "267744", "--json", *flags]
    main(["plan", *line, "--plan", str(PLANS / f"{name}.yaml")])
    table = json.loads(capsys.readouterr().out)
    assert round(table["dense_bytes"] / MIB, 2) == dense
    if paper:
        assert round(table["paper_bytes"] / MIB, 2) == paper
    else:
        assert table["paper_bytes"] <= 9.98 * MIB, "the header comes on top"
        assert round(table["original_bytes"] / MIB, 2) == 941.98
        assert table["original_ratio"] >= 94


def test_stock_architectures_have_fairseqs_own_layer(capsys):
    plan("roberta_base", "--head", "mnli=3", "--set", "quant_noise_pq=0.1")
    assert json.loads(capsys.readouterr().out)["parameters"] == 125_879_388


@pytest.mark.parametrize(
    ("arch", "setting", "key", "value"),
    [
        (ROBERTA, "encoder-embed-dim=64", "encoder_embed_dim", 64),
        (ROBERTA, "untie_weights_roberta=True", "untie_weights_roberta", True),
        (ROBERTA, "layernorm_embedding=false", "layernorm_embedding", False),
        (ROBERTA, "encoder_layers_to_keep=0,2", "encoder_layers", 2),
        (LM, "decoder_layers_to_keep=every-other", "decoder_layers", 2),
        (LM, "share_layers=2", "share_layers", 2),
        (ROBERTA, "activation_fn=relu", "activation_fn", "relu"),
        (LM, "decoder_embed_dim=64", "decoder_input_dim", 64),  # fairseq derives one from the other
        (LM, "max_target_positions=77", "max_target_positions", 77),
        (LM, "share_decoder_input_output_embed=false", "share_decoder_input_output_embed", False),
    ],
)
def test_an_option_has_the_type_that_fairseq_gives_it(arch, setting, key, value):
    found = architecture_options(arch, [setting])[key]
    assert (found, type(found)) == (value, type(value))


def test_heads_are_as_wide_as_the_embedding():
    options = architecture_options("quant_noise_roberta_large", heads=["mnli=3", "rte=2"])
    assert options["classification_heads"] == {"mnli": [1024, 3], "rte": [1024, 2]}


@pytest.mark.parametrize(
    ("arch", "flags", "message"),
    [
        ("quant_noise_robert", "", f"not registered; the nearest here are {ROBERTA.removesuffix('_base')}, "),
        (ROBERTA, "--set max_position=512", "no option 'max_position'; the nearest is max_positions"),
        (ROBERTA, "--set max_positions", "--set max_positions: give KEY=VALUE"),
        (ROBERTA, "--set max_positions=1.5", "--set max_positions=1.5: not a value of this option (int)"),
        (ROBERTA, "--set max_positions=-5", "these options make no network"),
        (ROBERTA, "--set encoder_attention_heads=0", "these options make no network"),
        (ROBERTA, "--set encoder_attention_heads=5", "encoder_attention_heads 5 does not divide"),
        (ROBERTA, "--set untie_weights_roberta=3", "untie_weights_roberta=3: give true or false"),
        (ROBERTA, "--set activation_fn=swoosh", "activation_fn=swoosh: give one of relu, gelu"),
        (ROBERTA, "--head mnli", "--head mnli: give NAME=CLASSES, such as mnli=3"),
        (ROBERTA, "--head mnli=0", "--head mnli=0: give NAME=CLASSES"),
        (ROBERTA, "--head a.b=2", "--head a.b=2: give NAME=CLASSES"),
        (ROBERTA, "--head keys=2", "--head keys=2: give NAME=CLASSES"),  # a ModuleDict has such an attribute
        (ROBERTA, "--head mnli=3 --head mnli=2", "--head mnli=2: there is a head 'mnli' already"),
        (LM, "--head mnli=3", f"--head mnli=3: {LM} has no classification heads"),
    ],
    ids=str,
)
def test_a_mistake_is_one_line(arch, flags, message, capsys):
    with pytest.raises(SystemExit) as end:
        plan(arch, *flags.split())
    assert end.value.code == 2
    assert message in one_error(capsys.readouterr())


@pytest.mark.parametrize("flags", [["--head", "mnli=3"], ["--set", LAYER]], ids=str)
def test_a_checkpoint_has_its_own_options(flags, capsys):
    with pytest.raises(SystemExit) as end:
        main(["plan", "--path", "some.pt", "--plan", str(PLANS / "roberta.yaml"), *flags])
    assert end.value.code == 2
    assert "--set and --head go with --arch" in one_error(capsys.readouterr())
