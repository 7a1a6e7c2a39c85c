"""quantize_: the weights of a plan to codes and centroids, in place."""

import copy

import pytest
import torch
from torch import nn
from toys import INPUTS_PLAN, INT_PLANS, TOKENS, ZOO_PLAN, Tied, noised, quiet, refuses, zoo

from fairseq_quant_noise import second_moments
from fairseq_quant_noise.layers import input_quantizers, quantized_weights
from fairseq_quant_noise.noise import detach_noise
from fairseq_quant_noise.plan.plan import Plan
from fairseq_quant_noise.quantization.quantize import quantize_


def one(match, **settings):
    return {"stages": [{"match": match, **settings}]}


def quantized(model=None, plan=ZOO_PLAN, **settings):
    return quantize_(zoo() if model is None else model, plan, progress=quiet, **settings)


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_the_same_model_comes_back_with_every_stage_done():
    model = zoo()
    assert quantized(model) is model
    names = ["emb", "attn.q_proj", "attn.k_proj", "attn.v_proj", "attn.out_proj", "fc", "conv"]
    assert list(quantized_weights(model)) == names
    assert isinstance(model.fc, nn.Linear)


def test_a_plan_can_be_a_path_a_mapping_or_a_plan(tmp_path):
    path = tmp_path / "plan.yaml"
    path.write_text("stages: [{match: fc, block_size: 4}]")
    states = [quantized(plan=p).state_dict() for p in (path, str(path), one("fc", block_size=4), Plan.of(path))]
    assert all(same(state, states[0]) for state in states)


def test_the_same_seed_gives_the_same_bits():
    assert same(quantized(seed=3).state_dict(), quantized(seed=3).state_dict())


def test_the_codes_do_not_depend_on_the_global_random_state():
    first = quantized().state_dict()
    torch.manual_seed(99)
    assert same(quantized(zoo()).state_dict(), first)


def test_a_weight_of_few_distinct_blocks_is_kept_exactly():
    model = nn.ModuleDict({"fc": nn.Linear(8, 64, bias=False)})
    model["fc"].weight.data = torch.tensor([1.0, -2.0]).repeat_interleave(4).repeat(64, 1)
    dense = model["fc"].weight.clone()
    assert torch.equal(quantized(model, one("fc", block_size=4))["fc"].weight, dense)


def test_other_weights_stay_as_they_are():
    model = zoo()
    conv = model.conv.weight
    quantized(model, one("fc", block_size=4))
    assert model.conv.weight is conv
    assert type(model.conv) is nn.Conv2d


def test_the_quantized_model_computes_with_the_decoded_weights():
    model, dense = quantized().eval(), zoo().eval()
    for name in quantized_weights(model):
        dense.get_submodule(name).weight.data.copy_(model.get_submodule(name).weight)
    assert torch.equal(model(TOKENS), dense(TOKENS))


def test_progress_has_a_line_for_each_weight():
    lines = []
    quantize_(zoo(), ZOO_PLAN, progress=lines.append)
    assert len(lines) == 7
    assert lines[0].startswith("[1/7] attn.q_proj (8, 8) d 4 K 4 relative error 0.")


def test_the_stages_run_in_the_plans_order():
    lines = []
    quantize_(zoo(), ZOO_PLAN, progress=lines.append)
    assert [line.split()[1].split(".")[0] for line in lines] == ["attn"] * 4 + ["fc", "emb", "conv"]


@pytest.mark.upstream(8)
def test_a_tied_weight_is_quantized_once_for_both():
    model = quantized(Tied(), one("emb", block_size=4))
    assert model.emb._modules["weight"] is model.out._modules["weight"]
    assert torch.equal(model.out(model.emb(torch.tensor([3]))), (model.emb.weight @ model.emb.weight[3])[None])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_centroids_have_the_dtype_of_the_weight(dtype):
    model = quantized(zoo().to(dtype), one("fc", block_size=4))
    assert model.fc.weight.dtype == dtype


def test_a_noised_model_can_be_quantized_and_the_noise_goes_with_the_weight():
    model = noised(zoo(), block_size=1)
    quantized(model)
    assert torch.equal(model(TOKENS), model(TOKENS))
    detach_noise(model)
    assert len(quantized_weights(model)) == 7


def test_training_after_it_moves_the_centroids_and_not_the_codes():
    model = quantized().train()
    codes = [w.codes.clone() for w in quantized_weights(model).values()]
    model(TOKENS).square().sum().backward()
    weights = quantized_weights(model).values()
    assert all(w.centroids.grad.any() for w in weights)
    assert all(not w.codes.requires_grad and torch.equal(w.codes, c) for w, c in zip(weights, codes, strict=True))


def test_a_model_that_is_one_layer_can_be_quantized():
    model = quantized(nn.Linear(8, 64), one(".*", block_size=4))
    assert set(model.state_dict()) == {"bias", "weight.codes", "weight.centroids"}


# Other schemes


@pytest.mark.parametrize("name", INT_PLANS)
def test_every_scheme_computes_with_the_weights_that_it_decodes(name):
    model, dense = quantized(plan=INT_PLANS[name]).eval(), zoo().eval()
    for module in quantized_weights(model):
        dense.get_submodule(module).weight.data.copy_(model.get_submodule(module).weight)
    assert len(quantized_weights(model)) == 7
    torch.testing.assert_close(model(TOKENS), dense(TOKENS))


def test_each_weight_has_the_scheme_of_its_stage():
    weights = quantized_weights(quantized(plan=INT_PLANS["mixed"]))
    assert [weights[name].scheme for name in ("attn.q_proj", "emb", "fc")] == ["pq", "int8", "int4"]
    assert weights["attn.q_proj"].bits == 8


def test_progress_says_the_error_of_n_bits():
    lines = []
    quantize_(zoo(), one("fc", scheme="int4", range="channel"), progress=lines.append)
    assert lines[0].startswith("[1/1] fc (8, 8) int4 range channel relative error 0.0")


@pytest.mark.upstream(8)
def test_a_tied_weight_in_n_bits_is_trained_once_for_both():
    model = quantized(Tied(), one("emb", scheme="int8")).train()
    assert len(list(model.parameters())) == 1
    model(torch.tensor([[3]])).sum().backward()
    assert model.emb._modules["weight"].latent.grad.any(1).all()


def test_a_noised_model_in_n_bits_has_lost_its_noise():
    model = quantized(noised(zoo(), block_size=1), INT_PLANS["int8"]).train()
    assert torch.equal(model(TOKENS), model(TOKENS))


# Activations


@pytest.mark.parametrize(
    "calibration",
    [[TOKENS] * 2, [(TOKENS,)], iter([{"tokens": TOKENS}]), lambda model: model(TOKENS)],
    ids=["tensors", "arguments", "keywords", "a function"],
)
def test_calibration_is_batches_or_a_function(calibration):
    found = input_quantizers(quantized(plan=INPUTS_PLAN, calibration=calibration))
    expected = input_quantizers(quantized(plan=INPUTS_PLAN, calibration=[TOKENS]))
    assert list(found) == ["fc", "conv", "out"]
    assert all(torch.equal(found[name].range, expected[name].range) for name in found)


def test_as_many_batches_are_read_as_the_plan_says():
    plan = INPUTS_PLAN | {"activations": {"calibration_batches": 3}}
    batches = iter([TOKENS] * 5)
    found = input_quantizers(quantized(plan=plan, calibration=batches))
    assert len(list(batches)) == 2
    assert int(found["fc"].seen) == 3


def test_a_plan_with_activations_and_no_calibration_is_refused_before_any_work():
    model = zoo()
    with refuses("the plan quantizes activations, whose ranges need data; give calibration inputs"):
        quantized(model, INPUTS_PLAN)
    assert not quantized_weights(model)


def test_a_calibration_that_misses_a_module_is_refused_by_name():
    with refuses("^fc: no finite calibration input reached it"):
        quantized(plan=INPUTS_PLAN, calibration=[])


# Mistakes


@pytest.mark.parametrize("name", INT_PLANS)
def test_quantizing_twice_in_any_scheme_is_refused(name):
    model = quantized(plan=INT_PLANS[name])
    state = {key: t.clone() for key, t in model.state_dict().items()}
    with refuses("is quantized already; start from a dense model"):
        quantized(model)
    assert same(model.state_dict(), state)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", INT_PLANS)
def test_a_weight_that_diverged_is_refused_by_name_before_any_is_changed(name, value):
    model = zoo()
    model.conv.weight.data[0, 0, 0, 0] = value
    with refuses("^conv: .*NaN or infinity"):
        quantized(model, INT_PLANS[name])
    assert not quantized_weights(model)


def test_quantizing_twice_is_refused():
    model = quantized()
    state = {name: t.clone() for name, t in model.state_dict().items()}
    with refuses("is quantized already; start from a dense model"):
        quantized(model)
    assert same(model.state_dict(), state)


@pytest.mark.parametrize("plan", [one("fc9"), one("fc", block_size=3), one(".*", block_size=4)])
def test_a_plan_that_does_not_fit_leaves_the_model_as_it_was(plan):
    model = zoo()
    with refuses("matches no weight|do not divide"):
        quantized(model, plan)
    assert same(model.state_dict(), zoo().state_dict())


@pytest.mark.parametrize(("value", "message"), [(float("nan"), "NaN or infinity"), (1e5, "does not fit fp16")])
def test_a_weight_that_cannot_be_encoded_is_refused_by_name_before_any_is_changed(value, message):
    model = zoo()
    model.conv.weight.data[0, 0, 0, 0] = value
    with refuses(f"^conv: .*{message}"):
        quantized(model)
    assert not quantized_weights(model)


@pytest.mark.upstream(26)
def test_the_inputs_of_a_layer_count():
    """A squared gradient of a Linear holds the square of its input: what large inputs multiply is kept best."""
    torch.manual_seed(0)
    inputs = torch.randn(64, 16, 32) * torch.logspace(-1, 1, 32)  # each of another size
    dense = torch.nn.Linear(32, 64, bias=False)
    optimizer = torch.optim.Adam(dense.parameters(), lr=0)
    for batch_of in inputs:
        optimizer.zero_grad()
        (dense(batch_of) * torch.randn(16, 64)).sum().backward()
        optimizer.step()
    errors, plan = [], one(".*", block_size=4, n_centroids=64)
    for importance in (second_moments(dense, optimizer), None):
        model = quantized(copy.deepcopy(dense), plan, importance=importance)
        errors.append((model(inputs) - dense(inputs)).square().mean().item())
    with_inputs, by_weights_alone = errors
    assert with_inputs < 0.6 * by_weights_alone, errors


def test_a_stage_says_by_name_which_codebooks_are_shared_and_which_have_8_bits():
    model = nn.ModuleList([nn.Linear(16, 32, bias=False) for _ in range(4)])
    rule = {"match": ".*", "block_size": 4, "n_centroids": 8, "codebook": {"default": "own", "[01]": "shared"}}
    quantize_(model, {"stages": [rule | {"centroids": {"default": "fp16", "[03]": "int8"}}]}, progress=quiet)
    first, second, third, fourth = quantized_weights(model).values()
    assert [weight.bits for weight in (first, second, third, fourth)] == [8, 16, 16, 8]
    assert first.centroids is not second.centroids  # centroids of 8 bits are not those of 16
    same = nn.ModuleList([nn.Linear(16, 32, bias=False) for _ in range(4)])
    quantize_(same, {"stages": [rule | {"centroids": "int8"}]}, progress=quiet)
    first, second, third, fourth = quantized_weights(same).values()
    assert first.centroids is second.centroids
    assert third.centroids is not fourth.centroids


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("centroids", "fp8", "stage 'x': unknown centroids 'fp8'; known: fp16, int8"),
        ("centroids", {"x": 8}, "stage 'x': centroids: unknown word for 'x', 8; known: fp16, int8"),
        ("codebook", {"(": "own"}, "not a regular expression"),
        ("codebook", {"y": "shared"}, "stage 'x': codebook gives no value for x"),
    ],
)
def test_a_wrong_word_for_a_codebook_is_refused(key, value, said):
    model = nn.ModuleDict({"x": nn.Linear(16, 32)})
    with refuses(said):
        quantize_(model, {"stages": [{"match": "x", "block_size": 4, key: value}]}, progress=quiet)
