"""What evaluation under torch.inference_mode leaves behind does not get into a training."""

import copy

import pytest
import torch
from toys import INPUTS_PLAN, TOKENS, ZOO_PLAN, quiet, zoo

from fairseq_quant_noise import attach_noise, load, noise_of, quantize_, save
from fairseq_quant_noise.layers import quantized_weights

PLANS = {
    "pq": {"stages": [{"match": ".*", "block_size": 4, "n_centroids": 16}]},
    "pq, int8 centroids": {
        "stages": [{"match": ".*", "block_size": 4, "n_centroids": 16}],
        "centroids": {"dtype": "int8"},
    },
    "shared": {"stages": [{"match": ".*", "block_size": 4, "n_centroids": 16, "codebook": "shared"}]},
    **{
        f"int8, {range_}": {"stages": [{"match": ".*", "scheme": "int8", "range": range_}]}
        for range_ in ("tensor", "channel", "histogram")
    },
}


def step(model, x):
    """Gradients of a training forward."""
    model.zero_grad()
    model.train()(x).square().sum().backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("batch", [1, 32])
def test_a_training_after_an_evaluation_is_as_without_it(plan, batch):
    model = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Linear(32, 16))
    quantize_(model, PLANS[plan], progress=quiet)
    x = torch.randn(batch, 64)
    untouched = copy.deepcopy(model)
    with torch.inference_mode():
        scores = model.eval()(x)
    assert not any(tensor.is_inference() for tensor in model.state_dict().values())
    for before, after in zip(step(untouched, x), step(model, x), strict=True):
        torch.testing.assert_close(before, after)
    model.eval()(x).sum().backward()  # in evaluation mode, with gradients
    with torch.no_grad():
        torch.testing.assert_close(model(x), scores)


def test_embeddings_and_convolutions_too():
    model = quantize_(zoo(), ZOO_PLAN, progress=quiet)
    with torch.inference_mode():
        for weight in quantized_weights(model.eval()).values():
            weight.decode()
    for weight in quantized_weights(model.train()).values():
        weight.decode().sum().backward()


@pytest.mark.parametrize("form", ["in training", "of a file"])
def test_inputs_in_codes_and_weights_of_a_file_too(form, tmp_path):
    model = quantize_(zoo(), INPUTS_PLAN, calibration=[TOKENS], progress=quiet)
    if form == "of a file":
        save(model, tmp_path / "file")
        model = load(tmp_path / "file", into=zoo())
    untouched = copy.deepcopy(model)
    with torch.inference_mode():
        model.eval()(TOKENS)
        model.train()(TOKENS)  # ranges are looked at in training
    untouched.train()(TOKENS)
    for before, after in zip(step(untouched, TOKENS), step(model, TOKENS), strict=True):
        torch.testing.assert_close(before, after)
    for (name, before), after in zip(untouched.state_dict().items(), model.state_dict().values(), strict=True):
        torch.testing.assert_close(before, after, msg=name)


@pytest.mark.parametrize(
    "rule",
    [{"kind": ["pq", "int8"]}, {"kind": "int4", "range": "histogram"}, {"kind": "proxy", "choice": "clusters"}],
    ids=str,
)
def test_codebooks_and_ranges_of_noise_too(rule):
    plan = {"noise": [{"match": r"fc|emb|attn\..*", "p": 0.5, "block_size": 4, "n_centroids": 8, **rule}]}
    model, twin = zoo(), zoo()
    attach_noise(model, plan)
    attach_noise(twin, plan)
    for noised, mode in ((model, torch.inference_mode), (twin, torch.no_grad)):
        torch.manual_seed(1)
        with mode():
            noised.train()(TOKENS)
    for update in (1, 1000):  # with what was measured then, and measured anew
        grads = []
        for noised in (model, twin):
            torch.manual_seed(2)
            noise_of(noised).set_num_updates(update)
            grads.append(step(noised, TOKENS))
        for before, after in zip(*grads, strict=True):
            torch.testing.assert_close(before, after)
