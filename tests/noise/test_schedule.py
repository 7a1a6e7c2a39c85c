"""p over the updates."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint
from toys import Read, hits

from fairseq_quant_noise.noise import attach_rules, noise_of
from fairseq_quant_noise.noise.schedule import p_at
from fairseq_quant_noise.plan.rules import NoiseRule, Schedule


@pytest.mark.parametrize(
    ("kind", "shares"),
    [
        ("constant", [1, 1, 1, 1, 1, 1]),
        ("linear", [0, 0.25, 0.5, 0.75, 1, 1]),
        ("cosine", [0, (1 - math.sqrt(0.5)) / 2, 0.5, (1 + math.sqrt(0.5)) / 2, 1, 1]),
        ("step", [0, 0, 0.5, 0.5, 1, 1]),
    ],
)
@pytest.mark.parametrize(("start", "p"), [(0.0, 0.4), (0.1, 0.5), (1.0, 0.2)])
def test_p_goes_from_its_start_to_the_rules_p_and_stays_there(kind, shares, start, p):
    schedule = Schedule(kind, start, updates=100, steps=2)
    found = [p_at(p, schedule, update) for update in (0, 25, 50, 75, 100, 10_000)]
    assert found == pytest.approx([start + (p - start) * share for share in shares])
    assert found[-1] == p


def test_without_a_schedule_p_is_the_rules():
    assert [p_at(0.3, None, update) for update in (0, 1000)] == [0.3, 0.3]


@given(
    st.sampled_from(["linear", "cosine", "step"]),
    st.floats(0, 1),
    st.floats(0, 1),
    st.integers(1, 1000),
    st.integers(1, 20),
)
@settings(max_examples=40, deadline=None)
def test_p_never_turns_back_and_is_always_a_probability(kind, start, p, updates, steps):
    schedule = Schedule(kind, start, updates, steps)
    found = [p_at(p, schedule, update) for update in range(0, updates + 2, max(updates // 50, 1))]
    assert found[0] == start
    assert all(min(start, p) - 1e-9 <= share <= max(start, p) + 1e-9 for share in found)
    assert all((b - a) * (p - start) >= -1e-9 for a, b in zip(found, found[1:], strict=False))
    if kind == "step":
        assert len({round(share, 9) for share in found}) <= steps + 1


def scheduled(p=1.0, **schedule):
    torch.manual_seed(0)
    model = Read(nn.Linear(128, 128))
    attach_rules(model, [NoiseRule("part", p, block_size=4, schedule=schedule)])
    return model.train()


def share(model):
    return float(hits(model(), 4).float().mean())


def near(p):
    n = 128 * 128 // 4
    return pytest.approx(p, abs=5 * math.sqrt(p * (1 - p) / n))


@pytest.mark.parametrize("schedule", [{"from": 0.0}, {"from": 0.8}], ids=str)
def test_the_share_of_noised_blocks_follows(schedule):
    model = scheduled(p=0.4, kind="linear", updates=100, **schedule)
    for update in (0, 10, 50, 99, 100, 500):
        noise_of(model).set_num_updates(update)
        expected = schedule["from"] + (0.4 - schedule["from"]) * min(update / 100, 1)
        assert share(model) == near(expected)


def test_draws_count_as_updates_until_somebody_says_which_it_is():
    model = scheduled(kind="linear", updates=4)
    assert [share(model) for _ in range(2)] == [near(0.0), near(0.25)]
    model.eval()()  # no draw
    assert [share(model.train()) for _ in range(3)] == [near(0.5), near(0.75), near(1.0)]
    noise_of(model).set_num_updates(1)
    assert [share(model) for _ in range(3)] == [near(0.25)] * 3


def test_rules_on_one_weight_have_schedules_of_their_own():
    model = Read(nn.Linear(128, 128))
    late = {"kind": "step", "updates": 10, "steps": 1}
    attach_rules(
        model.train(), [NoiseRule("part", 0.5, block_size=4), NoiseRule("part", 0.5, "proxy", 4, schedule=late)]
    )
    found = []
    for update in (9, 10):
        noise_of(model).set_num_updates(update)
        found.append(share(model))
    assert found == [near(0.5), near(0.75)]


class Stack(nn.Module):
    """Two layers, each run again during backward if `again`."""

    def __init__(self, again):
        super().__init__()
        torch.manual_seed(0)
        self.layers, self.again = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)]), again

    def forward(self, x):
        for layer in self.layers:
            x = x + torch.tanh(checkpoint(layer, x, use_reentrant=False) if self.again else layer(x))
        return x


def gradients_of_two_forwards(again):
    model = Stack(again).train()
    attach_rules(model, [NoiseRule(".*", 1.0, block_size=1, schedule={"kind": "linear", "from": 0.2, "updates": 2})])
    torch.manual_seed(3)
    x = torch.randn(5, 8)
    (model(x).square().sum() + model(2 * x).square().sum()).backward()
    return [p.grad for p in model.parameters()]


def test_a_layer_that_runs_again_has_the_p_of_its_own_forward():
    torch.testing.assert_close(gradients_of_two_forwards(True), gradients_of_two_forwards(False))
