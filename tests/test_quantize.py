"""quantize_: the weights of a plan to codes and centroids, in place."""

import pytest
import torch
from torch import nn
from toys import TOKENS, ZOO_PLAN, Tied, noised, quiet, refuses, zoo

from fairseq_quant_noise.layers import quantized_weights
from fairseq_quant_noise.noise import detach_noise
from fairseq_quant_noise.plan import Plan
from fairseq_quant_noise.quantize import quantize_


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


# Mistakes


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
