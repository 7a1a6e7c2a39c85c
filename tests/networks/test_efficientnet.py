"""EfficientNet without fairseq: timm's network, under names that structure/ understands."""

import sys

import pytest
import safetensors.torch
import timm
import torch
from toys import refuses

from fairseq_quant_noise.networks import EfficientNet, EfficientNetConfig
from fairseq_quant_noise.networks.efficientnet import seen_in_weights
from fairseq_quant_noise.networks.registry import build
from fairseq_quant_noise.networks.timm_weights import load_timm_weights, our_names, timm_names
from fairseq_quant_noise.plugin.models.architectures import architecture_options

SHAPES = {
    "efficientnet_b0": ("b0", 5_288_548),
    "efficientnet_b3": ("b3", 12_233_232),
    "tf_efficientnet_lite0": ("lite0", 4_652_008),
    "tf_efficientnet_lite1": ("lite1", 5_416_680),
    "tf_efficientnet_lite2": ("lite2", 6_092_072),
    "tf_efficientnet_lite3": ("lite3", 8_197_096),
    "tf_efficientnet_lite4": ("lite4", 13_006_568),
}
TINY = EfficientNetConfig(num_classes=3, width=0.1, depth=0.6, dropout=0.0, drop_path=0.0)


def tiny(seed=0, config=TINY):
    torch.manual_seed(seed)
    return EfficientNet(config)


@pytest.mark.parametrize("name", SHAPES)
def test_tensors_and_parameters_are_those_of_timm(name):
    architecture, parameters = SHAPES[name]
    options = architecture_options(f"quant_noise_efficientnet_{architecture}", [])
    with torch.device("meta"):
        ours = build("quant_noise_efficientnet", options, 0)
        theirs = timm.create_model(name)
    renamed = timm_names(ours.state_dict())
    assert {k: t.shape for k, t in renamed.items()} == {k: t.shape for k, t in theirs.state_dict().items()}
    assert sum(p.numel() for p in ours.parameters()) == parameters
    assert our_names(renamed).keys() == ours.state_dict().keys()


@pytest.fixture(scope="module")
def theirs():
    torch.manual_seed(1)
    return timm.create_model("efficientnet_b0", num_classes=4).eval()


@pytest.mark.parametrize("form", ["pth", "safetensors", "state_dict"])
def test_timm_weights_load_from_a_file_and_give_the_same_logits(theirs, form, tmp_path):
    path = tmp_path / f"b0.{'safetensors' if form == 'safetensors' else 'pth'}"
    if form == "safetensors":
        safetensors.torch.save_file(theirs.state_dict(), path)
    else:
        torch.save(theirs.state_dict() if form == "pth" else {"epoch": 3, "state_dict": theirs.state_dict()}, path)
    ours = EfficientNet(EfficientNetConfig(num_classes=4)).eval()
    load_timm_weights(ours, path)
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(ours(images), theirs(images.contiguous(memory_format=torch.channels_last)))


def package_names(state):
    """A state with timm's names of a Lite0 as efficientnet-pytorch writes it: blocks numbered through, other words."""
    separable = {"conv_dw": "depthwise_conv", "bn1": "bn1", "conv_pw": "project_conv", "bn2": "bn2"}
    inverted = {"conv_pw": "expand_conv", "conv_dw": "depthwise_conv", "conv_pwl": "project_conv"}
    inverted |= {"bn1": "bn0", "bn2": "bn1", "bn3": "bn2"}
    outside = {"conv_stem": "_conv_stem", "bn1": "_bn0", "conv_head": "_conv_head", "bn2": "_bn1", "classifier": "_fc"}
    firsts = [0, 1, 3, 5, 8, 11, 15]
    renamed = {}
    for name, tensor in state.items():
        first, *rest = name.split(".")
        if first == "blocks":
            stage, block, part, entry = rest
            words = inverted if int(stage) else separable
            renamed[f"_blocks.{firsts[int(stage)] + int(block)}._{words[part]}.{entry}"] = tensor
        else:
            renamed[".".join([outside[first], *rest])] = tensor
    return renamed


def test_a_lite_loads_the_weights_of_the_package_that_publishes_them(tmp_path):
    torch.manual_seed(2)
    theirs = timm.create_model("tf_efficientnet_lite0", num_classes=4).eval()
    torch.save(package_names(theirs.state_dict()), tmp_path / "lite0.pth")
    ours = EfficientNet(EfficientNetConfig(num_classes=4, lite=True)).eval()
    load_timm_weights(ours, tmp_path / "lite0.pth")
    images = torch.randn(2, 3, 45, 64)  # an odd height: TensorFlow's padding adds more on one side
    assert torch.equal(ours(images), theirs(images.contiguous(memory_format=torch.channels_last)))


def test_a_package_file_with_blocks_that_the_network_lacks_names_the_first(tmp_path):
    theirs = timm.create_model("tf_efficientnet_lite0", num_classes=3)
    torch.save(package_names(theirs.state_dict()), tmp_path / "lite0.pth")
    shallow = EfficientNet(EfficientNetConfig(num_classes=3, lite=True, blocks_5_layers=1))
    with refuses("lite0.pth: .*_blocks.14"):
        load_timm_weights(shallow, tmp_path / "lite0.pth")


def test_a_classifier_for_other_classes_stays_as_it_was(tmp_path):
    torch.save(timm_names(tiny(seed=4).state_dict()), tmp_path / "w.pth")
    ours = tiny(config=EfficientNetConfig(num_classes=7, width=0.1, depth=0.6))
    before = ours.classifier.weight.clone()
    load_timm_weights(ours, tmp_path / "w.pth")
    assert torch.equal(ours.classifier.weight, before)
    assert torch.equal(ours.conv_head.weight, tiny(seed=4).conv_head.weight)


class Harmful:
    def __reduce__(self):
        return print, ("harm",)


def without(state, name):
    return {key: tensor for key, tensor in state.items() if key != name}


WRONG = [
    (lambda s: without(s, "blocks.3.1.conv_dw.weight"), "lacks blocks.3.1.conv_dw.weight"),
    (lambda s: {**s, "blocks.6.1.conv_pw.weight": torch.zeros(1)}, "has blocks.6.1.conv_pw.weight, which"),
    (lambda s: {**s, "conv_stem.weight": torch.zeros(9, 3, 3, 3)}, r"conv_stem.weight is \(9, 3, 3, 3\)"),
    (lambda s: {**s, "note": Harmful()}, "not a file of weights"),
    (lambda s: [1, 2], "holds no state dict"),
]


@pytest.mark.parametrize(("change", "message"), WRONG, ids=["lacks", "has", "shape", "pickle", "list"])
def test_a_file_that_does_not_fit_is_refused_by_the_tensor(change, message, tmp_path, capsys):
    torch.save(change(timm_names(tiny().state_dict())), tmp_path / "w.pth")
    model = tiny(seed=1)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with refuses(message):
        load_timm_weights(model, tmp_path / "w.pth")
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert capsys.readouterr().out == ""


def test_a_file_that_is_not_there_is_named():
    with refuses("nowhere.pth: No such file"):
        load_timm_weights(tiny(), "nowhere.pth")


BAD = [
    {"width": 0},
    {"depth": 1e9},
    {"num_classes": 2.5},
    {"stem_stride": 3},
    {"blocks_2_layers": -1},
    {"width": "1"},
    {"lite": 1},
]


@pytest.mark.parametrize("options", BAD, ids=str)
def test_an_option_out_of_range_is_refused_by_name(options):
    with refuses(f"option {next(iter(options))} is"):
        build("quant_noise_efficientnet", options, 0)


def test_the_options_are_seen_in_the_weights():
    options = {"num_classes": 3, "width": 0.1, "depth": 1.0, "blocks_5_layers": 1}
    model = build("quant_noise_efficientnet", options, 0)
    seen = seen_in_weights(model.state_dict())
    assert seen["num_classes"] == 3
    assert [seen[f"blocks_{i}_layers"] for i in range(7)] == [0, 1, 1, 2, 2, 1, 0]


def test_stochastic_depth_drops_blocks_in_training_only():
    config = EfficientNetConfig(num_classes=3, width=0.1, depth=1.0, dropout=0.0, drop_path=0.9)
    model, images = tiny(config=config), torch.randn(2, 3, 32, 32)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 0.0  # so that running a training forward changes nothing else
    assert not torch.equal(model(images), model(images))
    model.eval()
    assert torch.equal(model(images), model(images))


def test_without_timm_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm.models._efficientnet_builder", None)
    with refuses(r"images need .*; run: pip install 'fairseq-quant-noise\[vision\]'"):
        tiny()
