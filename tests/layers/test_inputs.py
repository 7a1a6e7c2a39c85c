"""Activations in N bits: when a range is found, what is rounded, what is kept."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from toys import INPUTS_PLAN, TOKENS, Tied, adopting, by_torch, quiet, refuses, zoo

from fairseq_quant_noise import load, save
from fairseq_quant_noise.errors import DamagedFileError
from fairseq_quant_noise.layers import calibrating, input_quantizers
from fairseq_quant_noise.layers.inputs import SPARSE, InputQuantizer, quantize_input_
from fairseq_quant_noise.quantization.quantize import quantize_
from fairseq_quant_noise.scalar import Affine
from fairseq_quant_noise.scalar.ranges import histogram_range

ONES = torch.ones(1, 4)


def calibrated(low, high, bits=8):
    quantizer = InputQuantizer(bits, "tensor", 1)
    return observe(quantizer, torch.tensor([low, high])).eval()


def observe(quantizer, *inputs):
    quantizer.train()
    for x in inputs:
        assert quantizer(x) is x
    return quantizer


def linear(batches=8, kind="tensor"):
    """A model of one Linear whose input is quantized."""
    model = nn.ModuleDict({"m": nn.Linear(4, 3)})
    quantize_input_(model["m"], 8, kind, batches)
    return model


def quantized():
    return quantize_(zoo(), INPUTS_PLAN, calibration=[TOKENS], progress=quiet).eval()


@pytest.mark.parametrize("training", [True, False])
def test_a_quantizer_is_in_the_mode_of_its_module(training):
    model = zoo().train(training)
    quantize_(model, INPUTS_PLAN, calibration=[TOKENS], progress=quiet)
    assert {quantizer.training for quantizer in input_quantizers(model).values()} == {training}


# Rounding


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_evaluation_rounds_to_the_codes_of_the_range(bits):
    x = torch.linspace(-3, 3, 50).view(5, 10)
    affine = Affine.of_range(torch.tensor([-1.0]), torch.tensor([2.0]), bits)
    assert torch.equal(calibrated(-1.0, 2.0, bits)(x), by_torch(x, affine))


def test_an_uncalibrated_range_is_that_of_the_input():
    x = torch.randn(5, 6)
    low, high = x.aminmax()
    expected = by_torch(x, Affine.of_range(low.view(1), high.view(1), 8))
    assert torch.equal(InputQuantizer(8, "tensor", 1).eval()(x), expected)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("x", [TOKENS, TOKENS.bool(), TOKENS.int()], ids=lambda x: str(x.dtype))
def test_integers_pass_unseen(x, training):
    quantizer = InputQuantizer(8, "tensor", 1).train(training)
    assert quantizer(x) is x
    assert int(quantizer.seen) == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_range_stays_in_float32_and_the_input_in_its_own(dtype):
    quantizer = calibrated(-1.1, 2.3).to(dtype)
    assert quantizer.range.dtype == torch.float32
    assert torch.equal(quantizer.range, torch.tensor([-1.1, 2.3]))
    assert quantizer(torch.randn(3, dtype=dtype)).dtype == dtype


# Ranges


@pytest.mark.upstream(27)
def test_training_leaves_the_input_and_takes_the_mean_of_the_first_ranges():
    quantizer = observe(InputQuantizer(8, "tensor", 3), -ONES, 3 * ONES)
    assert quantizer.range.tolist() == [1.0, 1.0]
    assert observe(quantizer, ONES * 4).range.tolist() == [2.0, 2.0]
    assert int(quantizer.seen) == 3


def test_a_histogram_range_is_that_of_the_weights():
    x = torch.randn(1000)
    quantizer = observe(InputQuantizer(4, "histogram", 1), x)
    assert torch.equal(quantizer.range, torch.cat(histogram_range(x, 4)))
    assert quantizer.range.abs().max() < x.abs().max()


def test_later_one_training_forward_in_a_hundred_is_looked_at():
    quantizer = observe(InputQuantizer(8, "tensor", 2), *[ONES] * 2)
    changed = []
    for forward in range(2, 2 * SPARSE + 2):
        before = quantizer.range.clone()
        observe(quantizer, ONES * (forward + 5))
        if not torch.equal(quantizer.range, before):
            changed.append(forward)
    assert changed == [SPARSE, 2 * SPARSE]


def test_an_input_that_overflowed_does_not_move_the_range():
    quantizer = observe(InputQuantizer(8, "tensor", 4), ONES, ONES * float("inf"), ONES * float("nan"))
    assert quantizer.range.tolist() == [1.0, 1.0]


@pytest.mark.parametrize("kind", ["tensor", "histogram"])
@pytest.mark.parametrize("overflowed", [float("inf"), float("nan")])
def test_a_first_batch_that_overflowed_counts_for_nothing(kind, overflowed):
    """fairseq's loss scale is too high for the first batches of --fp16, as a rule."""
    x, quantizer = torch.linspace(-1, 1, 100), InputQuantizer(8, kind, 3)
    observe(quantizer, x * overflowed, x, x)
    assert torch.equal(quantizer.range, observe(InputQuantizer(8, kind, 3), x, x).range)
    assert int(quantizer.seen) == quantizer.count == 2


def test_evaluation_moves_nothing():
    quantizer = calibrated(-1.0, 2.0)
    state = copy.deepcopy(quantizer.state_dict())
    quantizer(ONES * 100)
    assert all(torch.equal(t, state[name]) for name, t in quantizer.state_dict().items())


def test_a_layer_that_runs_again_in_backward_is_seen_once():
    model = linear().train()
    checkpoint(model["m"], ONES, use_reentrant=False).sum().backward()
    assert int(input_quantizers(model)["m"].seen) == 1


# Calibration


def test_calibrating_forgets_the_range_and_takes_the_mean_over_the_batches():
    model = linear()
    model["m"](ONES * 1000)
    with calibrating(model):
        assert not model["m"].training
        for k in (1, 2, 6):
            model["m"](torch.tensor([[-k, 0, 0, 2.0 * k]]))
    assert input_quantizers(model)["m"].range.tolist() == [-3.0, 6.0]


def test_a_module_that_no_input_reaches_may_keep_its_range():
    model = nn.ModuleDict({"m": nn.Linear(4, 3), "other": nn.Linear(4, 3)})
    for module in model.values():
        quantize_input_(module, 8, "tensor", 2)
        module(ONES * 3)
    with calibrating(model, required=False):
        model["m"](ONES)
    ranges = {name: quantizer.range.tolist() for name, quantizer in input_quantizers(model).items()}
    assert ranges == {"m": [1.0, 1.0], "other": [3.0, 3.0]}
    assert input_quantizers(model)["other"].count == 1


def test_calibrating_runs_the_model_on_inputs_as_they_are():
    model, x = linear().eval(), torch.randn(2, 4)
    with calibrating(model):
        assert torch.equal(model["m"](x), torch.nn.functional.linear(x, model["m"].weight, model["m"].bias))


def test_calibrating_restores_the_mode_of_every_module_also_after_an_error():
    model = zoo().train()
    quantize_input_(model.fc, 8, "tensor", 8)
    model.norm.eval()
    with calibrating(model):
        model(TOKENS)
    with pytest.raises(KeyError), calibrating(model):
        raise KeyError
    assert model.training
    assert model.fc.training
    assert not model.norm.training
    assert not input_quantizers(model)["fc"].calibrating


def test_a_module_that_no_input_reached_is_named():
    with (
        refuses("^m: no finite calibration input reached it; give batches"),
        calibrating(linear()),
    ):
        pass


# In a model


def test_a_tied_projection_gets_a_quantizer_and_the_embedding_none():
    model = quantize_(
        Tied(),
        {"stages": [{"match": "emb", "scheme": "int8"}], "activations": {}},
        calibration=[TOKENS.clamp(max=11)],
        progress=quiet,
    )
    assert list(input_quantizers(model)) == ["out"]
    assert "out.input_quantizer.range" in model.state_dict()


def test_the_model_computes_with_rounded_inputs():
    model = linear().eval()
    with calibrating(model):
        model["m"](torch.tensor([[-1.0, 0, 0, 2]]))
    x, module = torch.randn(5, 4), model["m"]
    assert torch.equal(module(x), torch.nn.functional.linear(calibrated(-1.0, 2.0)(x), module.weight, module.bias))


def test_a_module_called_by_keyword_computes_with_rounded_inputs():
    model = linear().train()
    model["m"](torch.randn(5, 4))
    x = torch.randn(5, 4)
    assert torch.equal(model.eval()["m"](input=x), model["m"](x))


def test_a_second_quantizer_changes_nothing():
    model = linear()
    first = input_quantizers(model)["m"]
    quantize_input_(model["m"], 4, "histogram", 2)
    model["m"].train()(ONES)
    assert input_quantizers(model)["m"] is first
    assert int(first.seen) == 1


# States


def test_ranges_survive_the_file_exactly(tmp_path):
    model = quantized()
    save(model, tmp_path / "file")
    loaded = load(tmp_path / "file", into=zoo(1))
    ours, theirs = input_quantizers(model), input_quantizers(loaded)
    assert list(ours) == list(theirs) == ["fc", "conv", "out"]
    assert all(torch.equal(ours[name].range, theirs[name].range) for name in ours)
    assert torch.equal(loaded(TOKENS), model(TOKENS))


def test_ranges_of_a_model_that_is_one_layer_survive_the_file(tmp_path):
    plan = {"stages": [{"match": ".*", "scheme": "int8"}], "activations": {}}
    model = quantize_(nn.Linear(8, 16), plan, calibration=[torch.randn(4, 8)], progress=quiet).eval()
    save(model, tmp_path / "file")
    x = torch.randn(3, 8)
    assert torch.equal(load(tmp_path / "file", into=nn.Linear(8, 16))(x), model(x))


def test_a_dense_model_adopts_the_ranges_of_a_checkpoint():
    model = quantized()
    found = adopting(zoo(1), model.state_dict()).eval()
    assert torch.equal(found(TOKENS), model(TOKENS))


@pytest.mark.parametrize("spec", [[8, 200, 8], [0, 0, 8], [8, 0], 8])
def test_a_damaged_entry_of_bits_and_range_is_named(spec):
    state = {**quantized().state_dict(), "conv.input_quantizer.spec": torch.tensor(spec, dtype=torch.uint8)}
    with refuses(r"^conv\.input_quantizer\.spec: damaged, it holds .*; give an earlier checkpoint", DamagedFileError):
        adopting(zoo(1), state)


def test_a_checkpoint_from_before_loads_and_leaves_the_ranges():
    model = quantized()
    before = input_quantizers(model)["fc"].range.clone()
    model.load_state_dict({k: v for k, v in model.state_dict().items() if "input_quantizer" not in k})
    assert torch.equal(input_quantizers(model)["fc"].range, before)


def test_a_run_that_goes_on_from_a_checkpoint_finds_the_same_ranges():
    torch.manual_seed(0)
    model = linear(batches=4)
    observe(model["m"]._modules["input_quantizer"], torch.randn(3), torch.randn(3))
    twin = adopting(nn.ModuleDict({"m": nn.Linear(4, 3)}), copy.deepcopy(model.state_dict()))
    later = [torch.randn(3) for _ in range(4)]
    ranges = [observe(input_quantizers(m)["m"], *later).range for m in (model, twin)]
    assert torch.equal(*ranges)
