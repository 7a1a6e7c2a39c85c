"""What evaluation under torch.inference_mode leaves behind does not get into a training."""

import copy

import pytest
import torch
from toys import ZOO_PLAN, quiet, zoo

from fairseq_quant_noise import quantize_
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
