"""Noise on weights that torch's fully_shard divides among processes."""

from unittest import mock

import pytest
import torch
import torch.distributed as dist
from forked import start
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from toys import refuses

from fairseq_quant_noise import attach_noise, detach_noise, noise_of, quantize_, save
from fairseq_quant_noise.utils import ranks

pytestmark = pytest.mark.slow

KINDS = {
    "proxy": {"kind": "proxy", "block_size": 8},
    "pq": {"kind": "pq", "block_size": 4, "n_centroids": 4},
    "int8": {"kind": "int8"},
}
STEPS = 3


class Tied(nn.Module):
    """Two layers between an embedding and a product with the same weight."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(32, 16)
        self.layers = nn.Sequential(*(nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 16)) for _ in "12"))
        self.out = nn.Linear(16, 32, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, words):
        return self.out(self.layers(self.embed(words)))


def loss(model, rank):
    words, targets = torch.randint(32, (2, 8), generator=torch.Generator().manual_seed(rank))
    return nn.functional.cross_entropy(model(words), targets)


def noised(kind):
    return {"noise": [{"match": ".*", "p": 0.3, **KINDS[kind]}]}


def divide(model):
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def of_rank(rank, folder):
    """In one of two processes: train sharded networks whose noise was attached before and after."""
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meet'}", rank=rank, world_size=2)
    found = {}
    for kind in KINDS:
        for before in (True, False):
            model = Tied()
            if before:
                attach_noise(model, noised(kind))
            divide(model)
            if not before:
                attach_noise(model, noised(kind))
            optimizer, losses = torch.optim.SGD(model.parameters(), 0.5), []
            for step in range(STEPS):
                torch.manual_seed(step)
                optimizer.zero_grad()
                now = loss(model, rank)
                now.backward()
                optimizer.step()
                losses.append(now.item())
            state = {name: t.full_tensor() for name, t in model.state_dict().items()}
            found[kind, before] = losses, state, noise_of(model).state_dict()
    torch.save(found, folder / f"rank{rank}")
    refused(model, folder)
    dist.destroy_process_group()


def refused(model, folder):
    """What needs whole weights says so; without noise the network trains on."""
    plan = {"stages": [{"match": ".*", "block_size": 8, "n_centroids": 4}]}
    cure = "divided among processes .* load the full state"
    with refuses(f"embed.weight: {cure}"):
        quantize_(model, plan)
    with refuses(f"embed.weight: {cure}"):
        save(model, folder / "file.safetensors")
    linear = nn.Linear(8, 8)
    attach_noise(linear, noised("int8"))
    fully_shard(linear, mesh=init_device_mesh("cpu", (2,)))
    for module in (model, linear):
        detach_noise(module)
        assert hasattr(module, "unshard")
    linear(torch.ones(1, 8)).sum().backward()
    assert linear.weight.grad is not None


@pytest.fixture(scope="module")
def divided(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharded")
    processes = [start(of_rank, rank, folder) for rank in range(2)]
    for process in processes:
        process.join(120)
        process.kill()
    assert [process.exitcode for process in processes] == [0, 0]
    return [torch.load(folder / f"rank{rank}") for rank in range(2)]


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_a_sharded_training_is_that_of_one_process_with_the_noise_of_both(divided, kind, before):
    model = attach_noise(Tied(), noised(kind))
    optimizer, losses = torch.optim.SGD(model.parameters(), 0.5), ([], [])
    for step in range(STEPS):
        optimizer.zero_grad()
        for rank in range(2):
            torch.manual_seed(step)
            with mock.patch.object(ranks, "rank_and_world", lambda rank=rank: (rank, 2)):
                now = loss(model, rank)
            (now / 2).backward()
            losses[rank].append(now.item())
        optimizer.step()
    for rank, found in enumerate(divided):
        seen, state, _ = found[kind, before]
        assert seen == pytest.approx(losses[rank], rel=1e-6)
        for name, tensor in model.state_dict().items():
            torch.testing.assert_close(state[name], tensor)
    assert len(set(losses[0] + losses[1])) == 2 * STEPS


def test_noise_measures_the_whole_weight_on_every_process(divided):
    first, second = (found["pq", True][2]["weights"] for found in divided)
    assert len(first) == 5
    for name, (one,) in first.items():
        (other,) = second[name]
        assert torch.equal(one["phi"]["centroids"], other["phi"]["centroids"])
