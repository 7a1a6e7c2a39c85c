"""`activations` on layers whose inputs cannot be rounded: they are named, with the reason, and nothing else is."""

import pytest
import torch
import yaml
from torch import nn
from toys import quiet, refuses, zoo

from fairseq_quant_noise import attach_noise, load, quantize_, save
from fairseq_quant_noise.cli import planning
from fairseq_quant_noise.cli.main import main
from fairseq_quant_noise.layers import QuantizedWeight, input_quantizers
from fairseq_quant_noise.layers.inputs import unrounded

PLAN = {
    "noise": [{"match": ".*", "p": 0.5, "block_size": 4}],
    "stages": [{"match": ".*", "scheme": "int8"}],
    "activations": {"range": "tensor"},
}
ATTENTION = "torch's attention multiplies by it inside of one function"
STATES = "a recurrent layer multiplies its own states as well"
NORMED = "its module multiplies by another weight, computed from this one"


def encoder():
    return nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)


class Pair(nn.Bilinear):
    """One input for both."""

    def forward(self, x):
        return super().forward(x, x)


#: A model, the weights whose inputs stay as they are, and the modules whose inputs are rounded.
CASES = {
    "attention": (
        encoder,
        {"self_attn.in_proj_weight": ATTENTION, "self_attn.out_proj.weight": ATTENTION},
        {"linear1", "linear2"},
    ),
    "lstm": (lambda: nn.LSTM(8, 4), {"weight_ih_l0": STATES, "weight_hh_l0": STATES}, set()),
    "gru": (lambda: nn.GRU(8, 4), {"weight_ih_l0": STATES, "weight_hh_l0": STATES}, set()),
    "bilinear": (lambda: nn.Sequential(Pair(8, 8, 4)), {"0.weight": "it has two inputs"}, set()),
    "weight norm": (
        lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(8, 4)), nn.Linear(4, 4)),
        {"0.parametrizations.weight.original1": NORMED},
        {"1"},
    ),
    "layers of its own": (
        lambda: nn.Sequential(with_a_child(nn.Linear(8, 4)), nn.Linear(4, 4)),
        {"0.weight": "its module has layers of its own before the product"},
        {"1"},
    ),
    "all rounded": (lambda: nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 4)), {}, {"0", "1"}),
}
EACH = pytest.mark.parametrize("name", CASES)


def with_a_child(module):
    module.add_module("before", nn.Identity())
    return module


def warnings(caplog):
    return [r.getMessage() for r in caplog.records if r.levelname == "WARNING" and "activations" in r.getMessage()]


def said(weights):
    listed = ", ".join(f"{name} ({why})" for name, why in weights.items())
    return f"activations: the inputs of {len(weights)} weights are not rounded: {listed}; "


@EACH
def test_quantizing_names_them_in_one_warning_and_rounds_the_others(caplog, tmp_path, name):
    build, left, rounded = CASES[name]
    torch.manual_seed(0)
    x = torch.randn(3, 2, 8)
    model = quantize_(build(), PLAN, calibration=[x], progress=quiet).eval()
    assert input_quantizers(model).keys() == rounded
    assert [text.startswith(said(left)) for text in warnings(caplog)] == [True] * bool(left)
    save(model, tmp_path / "model.safetensors")
    again = load(tmp_path / "model.safetensors", into=build())
    with torch.no_grad():
        scores = first(model(x))  # a file's int8 weights also round inputs that have no range, row by row
        torch.testing.assert_close(first(again(x)), scores, atol=0.03, rtol=0)


def first(out):
    return out[0] if isinstance(out, tuple) else out


@EACH
@pytest.mark.parametrize("use", ["noise", "stages"])
def test_a_strict_caller_is_refused_before_any_work(name, use):
    build, left, _ = CASES[name]
    model = build()

    def work():
        if use == "noise":
            return attach_noise(model, PLAN, strict=True)
        return quantize_(model, PLAN, calibration=[torch.randn(3, 2, 8)], strict=True, progress=quiet)

    if left:
        with refuses(r"activations: the inputs of \d weights are not rounded: .*build these layers of nn.Linear"):
            work()
        assert not any(isinstance(module, QuantizedWeight) for module in model.modules())
    else:
        assert work() is model


def test_noise_names_them_and_only_where_the_plan_rounds_activations(caplog):
    attach_noise(encoder(), PLAN)
    (text,) = warnings(caplog)
    assert text.startswith(said(CASES["attention"][1]))
    caplog.clear()
    attach_noise(encoder(), {key: PLAN[key] for key in ("noise", "stages")})
    assert warnings(caplog) == []


def test_plan_names_them_and_with_strict_it_ends(monkeypatch, caplog, capsys, tmp_path):
    plan = tmp_path / "plan.yaml"
    plan.write_text(yaml.safe_dump(PLAN))
    monkeypatch.setattr(planning, "_network", lambda args: encoder())
    main(["plan", "--arch", "any", "--plan", str(plan), "--json"])
    assert len(warnings(caplog)) == 1
    with pytest.raises(SystemExit) as caught:
        main(["plan", "--arch", "any", "--plan", str(plan), "--strict"])
    assert caught.value.code == 2
    assert "error: activations: the inputs of 2 weights are not rounded" in capsys.readouterr().err


def test_an_embedding_has_nothing_to_round():
    assert unrounded(zoo(), ["emb", "fc", "conv", "out"]) == {}
