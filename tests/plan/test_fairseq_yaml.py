"""fairseq's own quantization YAML as a plan."""

from importlib.util import find_spec
from pathlib import Path

import pytest
from torch import nn
from toys import quiet, refuses

from fairseq_quant_noise import quantize_
from fairseq_quant_noise.layers import quantized_weights
from fairseq_quant_noise.networks.registry import meta_model
from fairseq_quant_noise.plan.fairseq_yaml import is_fairseq_format, setting_by_feature
from fairseq_quant_noise.plan.plan import Plan
from fairseq_quant_noise.quantization.targets import resolve_stages

SMALL_LM = {
    "decoder_layers": 2,
    "decoder_embed_dim": 64,
    "decoder_ffn_embed_dim": 128,
    "decoder_attention_heads": 2,
    "adaptive_input": True,
    "adaptive_input_cutoff": "2000,3000",
    "adaptive_softmax_cutoff": "2000,3000",
    "adaptive_input_factor": 2,
    "adaptive_softmax_factor": 2,
    "tie_adaptive_weights": True,
    "tie_adaptive_proj": True,
}


def shipped():
    """The file that fairseq ships; finding it does not import fairseq."""
    spec = find_spec("fairseq")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("fairseq is not installed")
    path = Path(spec.submodule_search_locations[0]) / "examples/quant_noise/transformer_quantization_config.yaml"
    if not path.exists():
        pytest.skip("this fairseq ships no examples")
    return path


@pytest.mark.upstream(4)
def test_the_file_that_fairseq_ships_gives_the_papers_blocks():
    """Feed-forward 8, attention 4, embeddings 8, their projections 4; in this order of stages."""
    targets = resolve_stages(Plan.of(shipped()), meta_model("quant_noise_transformer_lm", SMALL_LM, 4000))
    found = {t.weight.name: (t.stage, t.block_size) for t in targets}
    expected = {f"decoder.layers.{i}.fc{j}": (0, 8) for i in (0, 1) for j in (1, 2)}
    expected |= {f"decoder.embed_tokens.embeddings.{i}.0": (1, 8) for i in (0, 1, 2)}
    expected |= {f"decoder.embed_tokens.embeddings.{i}.1": (1, 4) for i in (0, 1, 2)}
    expected |= {f"decoder.layers.{i}.self_attn.{p}_proj": (2, 4) for i in (0, 1) for p in ("q", "k", "v", "out")}
    assert found == expected
    assert {t.n_centroids for t in targets if t.stage != 1} == {256}


@pytest.mark.upstream(29)
def test_fairseqs_settings_for_every_layer_quantize_a_mobilenet_and_leave_its_batch_normalisation():
    """fairseq asks for sizes of BatchNorm2d, and then cannot quantize it."""
    parts = [nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3, groups=16), nn.Conv2d(16, 32, 1)]
    layers = [layer for part in parts for layer in (part, nn.BatchNorm2d(part.out_channels), nn.ReLU6())]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 8))
    kernels = {"key": "kernel_size", "value": {"(3, 3)": 9, "(1, 1)": 4}}
    plan = {
        "n_centroids": {**setting("kernel_size", {"*": 256}, "Conv2d"), **setting("in_features", {"*": 256})},
        "block_sizes": {"Conv2d": kernels, **setting("in_features", {"*": 8})},
        "layers_to_quantize": [".*"],
    }
    norms = [layer.weight for layer in layers if isinstance(layer, nn.BatchNorm2d)]
    quantize_(model, plan, progress=quiet)
    sizes = {name: weight.block_size for name, weight in quantized_weights(model).items()}
    assert sizes == {"0": 9, "3": 9, "6": 4, "11": 8}
    assert [layer.weight for layer in layers if isinstance(layer, nn.BatchNorm2d)] == norms


def setting(key, value, kind="Linear"):
    return {kind: {"key": key, "value": value}}


def test_the_format_is_told_by_any_of_its_keys():
    assert is_fairseq_format({"layers_to_quantize": []})
    assert is_fairseq_format({"block_sizes": {}})
    assert not is_fairseq_format({"stages": []})


def test_names_match_from_their_start_as_in_fairseq():
    plan = Plan.of({"layers_to_quantize": ["fc|attn"]})
    model = nn.ModuleDict({"fc1": nn.Linear(8, 8), "attn_q": nn.Linear(8, 8), "other_fc": nn.Linear(8, 8)})
    assert [(t.weight.name, t.block_size) for t in resolve_stages(plan, model)] == [("fc1", 8), ("attn_q", 4)]


def test_fuzzy_name_takes_the_first_part_that_the_name_holds():
    value = {"attn": 4, "fc": 8, "*": 2}
    sizes = [setting_by_feature(setting("fuzzy_name", value), n, nn.Linear(8, 8)) for n in ("a.fc", "attn.fc", "b")]
    assert sizes == [8, 4, 2]


def test_another_key_is_an_attribute_of_the_module():
    value = {"(3, 3)": 9, "(1, 1)": 4}
    sizes = [setting_by_feature(setting("kernel_size", value, "Conv2d"), "c", nn.Conv2d(8, 8, k)) for k in (1, 3)]
    assert sizes == [4, 9]


def test_our_own_form_is_left_to_the_plan():
    assert setting_by_feature({"default": 8}, "fc", nn.Linear(8, 8)) is None


WRONG = [
    ({"layers_to_quantize": ["fc"], "block_size": 8}, "unknown key 'block_size'; known keys: n_centroids"),
    ({"n_centroids": {}}, "layers_to_quantize must list a regular expression for each stage"),
    ({"layers_to_quantize": []}, "layers_to_quantize must list"),
    ({"layers_to_quantize": "fc"}, "layers_to_quantize must list"),
    ({"layers_to_quantize": ["("]}, "not a regular expression"),
    ({"layers_to_quantize": ["fc"], "n_centroids": "256"}, "n_centroids is '256'"),
]


@pytest.mark.parametrize(("source", "message"), WRONG, ids=lambda x: str(x)[:50])
def test_a_mistake_is_refused_in_one_line(source, message):
    with refuses(message):
        Plan.of(source)


NO_VALUE = [
    ({"block_sizes": setting("fuzzy_name", {"emb": 8}, "Embedding")}, r"nothing for Linear \(fc\); add an entry"),
    ({"block_sizes": {"Linear": {"key": "fuzzy_name"}}}, "nothing for Linear"),
    ({"block_sizes": setting("fuzzy_name", {"attn": 8})}, r"no value for fc under Linear; add one, or '\*'"),
    ({"block_sizes": setting("fuzzy_name", {"fc": "8"})}, "no value for fc"),
    ({"block_sizes": setting("fuzzy_name", {1: 8})}, "fc"),
    ({"block_sizes": setting("fuzzy_name", {"fc": 0})}, "block_size for fc is 0; give a whole number"),
    ({"n_centroids": setting("in_features", {"16": 256})}, "no value for fc"),
    (
        {"n_centroids": setting("in_features", {"*": 5000})},
        "n_centroids is 5000 for the weight of module .fc.; give at most 4096",
    ),
    ({"n_centroids": setting("in_features", {"*": 0})}, "n_centroids for fc is 0"),
    ({"n_centroids": setting("in_features", {"*": -8})}, "n_centroids for fc is -8"),
]


@pytest.mark.parametrize(("change", "message"), NO_VALUE, ids=lambda x: str(x)[:70])
def test_a_module_without_a_sound_value_is_refused_in_the_dry_run(change, message):
    with refuses(message):
        resolve_stages(Plan.of({"layers_to_quantize": ["fc"]} | change), nn.ModuleDict({"fc": nn.Linear(8, 8)}))
