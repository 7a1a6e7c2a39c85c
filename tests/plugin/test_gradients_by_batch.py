"""Squared gradients of networks with batch normalisation, which goes by each batch meanwhile."""

import torch
from torch import nn
from toys import refuses

from fairseq_quant_noise.plugin.gradients import squared_gradients


def test_squared_gradients_go_by_the_statistics_of_each_batch():
    """A kernel of one number only scales its channel, which batch normalisation takes away."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 1), nn.BatchNorm2d(4, eps=1e-12), nn.Flatten(), nn.Linear(36, 2)).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    x, y = torch.randn(16, 1, 3, 3), torch.randint(2, (16,))

    def criterion(model, sample):
        return nn.functional.cross_entropy(model(sample), y, reduction="sum"), len(y), {}

    found = squared_gradients(model, criterion, [x])
    assert found["3.weight"].max() > 1e-4
    assert found.get("0.weight", torch.zeros(1)).max() < 1e-8
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model[1].training


def test_a_batch_with_one_value_a_channel_has_no_statistics():
    model = nn.Sequential(nn.Conv2d(1, 4, 1), nn.BatchNorm2d(4))
    with refuses("batch statistics: a batch has one value a channel"):
        squared_gradients(model, lambda model, x: (model(x).sum(), 1, {}), [torch.ones(1, 1, 1, 1)])
    assert model[1].num_batches_tracked == 0
