"""When codebooks and ranges are found anew, and that a resumed run makes the noise of one that went on."""

import io

import pytest
import torch
from torch import nn
from toys import Read, refuses, stored

from fairseq_quant_noise.noise import attach_rules, noise_of
from fairseq_quant_noise.noise.distortions import Codebook, Scalar
from fairseq_quant_noise.plan.rules import NoiseRule


def read(kind, p=0.5, **rule):
    torch.manual_seed(0)
    model = Read(nn.Linear(32, 16))
    attach_rules(model, [NoiseRule("part", p, kind, n_centroids=8, **rule)])
    return model.train(), noise_of(model)


@pytest.fixture
def fits(monkeypatch):
    """The fits of codebooks and ranges so far, one entry each."""
    done = []
    for cls in (Codebook, Scalar):

        def fit(self, blocks, fit=cls.fit):
            done.append(type(self))
            fit(self, blocks)

        monkeypatch.setattr(cls, "fit", fit)
    return done


def updates_with_fits(model, fits, updates):
    found = []
    for update in updates:
        before = len(fits)
        noise_of(model).set_num_updates(update)
        model()
        found += [update] * (len(fits) - before)
    return found


# Intervals


@pytest.mark.parametrize(
    ("kind", "rule", "expected"),
    [
        ("int8", {}, [0, 1, 2, 50, 99, 100, 101, 199, 200]),
        ("int4", {"range": "channel"}, [0, 1, 2, 50, 99, 100, 101, 199, 200]),
        ("int8", {"range": "histogram"}, [0, 100, 200]),
        ("int8", {"range": "histogram", "refresh": 50}, [0, 50, 100, 199]),
        ("int8", {"refresh": "epoch"}, [0]),
        ("pq", {}, [0]),
        ("pq", {"refresh": 100}, [0, 100, 200]),
        ("pq", {"refresh": 60}, [0, 99, 199]),
        (["pq", "int8"], {}, [0, 0]),
        (["pq", "int8"], {"refresh": 101}, [0, 0, 101, 101]),
        ("proxy", {"choice": "clusters"}, [0]),
        ("int8", {"choice": "clusters"}, [0, 0]),
        ("proxy", {}, []),
        ("mean", {}, []),
    ],
    ids=str,
)
def test_what_is_measured_is_measured_when_its_interval_is_over_and_only_then(fits, kind, rule, expected):
    model, _ = read(kind, **rule)
    assert updates_with_fits(model, fits, [0, 1, 2, 50, 99, 100, 101, 199, 200]) == expected


@pytest.mark.parametrize(
    ("kind", "rule"), [("pq", {}), ("int8", {"refresh": "epoch"}), ("mean", {"choice": "clusters"})]
)
def test_an_epoch_has_one_fit(fits, kind, rule):
    model, draw = read(kind, **rule)
    found = []
    for epoch in (1, 1, 2, 2, 2, 3, 5):
        draw.epoch, before = epoch, len(fits)
        model()
        found.append(len(fits) - before)
    assert found == [1, 0, 1, 0, 0, 1, 1]


def test_an_update_of_several_forwards_has_one_fit(fits):
    model, _ = read("int8")
    assert updates_with_fits(model, fits, [3, 3, 3, 4, 4]) == [3, 4]


def test_without_anyone_to_say_so_each_draw_is_an_update(fits):
    model, draw = read("pq", refresh=3)
    for _ in range(7):
        model()
    assert len(fits) == 3
    assert (draw.update, draw.draws) == (6, 7)


def test_an_update_before_the_last_fit_is_measured_anew(fits):
    """As when a run is reset and starts from update 0 again."""
    model, _ = read("pq", refresh=100)
    assert updates_with_fits(model, fits, [500, 501, 0, 1]) == [500, 0]


@pytest.mark.parametrize("rule", [{"p": 0.0}, {"p": 0.0, "choice": "clusters"}])
def test_noise_of_no_block_measures_nothing(fits, rule):
    model, _ = read("pq", **rule)
    model()
    assert fits == []


def test_eval_mode_and_muted_noise_measure_nothing(fits):
    model, draw = read("pq", refresh=1)
    model.eval()()
    draw.muted = True
    model.train()()
    assert fits == []


def test_ranges_follow_the_weight_at_their_interval():
    model, draw = read("int8", p=1.0, refresh=2)
    scales = []
    for update in range(4):
        draw.set_num_updates(update)
        model()
        scales.append(draw.weights["part"].rules[0].phi.state()["scale"].item())
        with torch.no_grad():
            stored(model.part).mul_(2)
    assert scales[1] == scales[0]
    assert scales[2:] == pytest.approx([4 * scales[0]] * 2)


# Runs that go on


def step(model):
    """One forward, and a change of the weight; the noised weight."""
    seen = model().detach().clone()
    with torch.no_grad():
        stored(model.part).add_(0.05 * torch.randn(16, 32))
    return seen


def saved(state):
    """`state` as a checkpoint gives it back, without code in the file."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


RULES = [
    ("pq", {}),
    ("pq", {"refresh": 5}),
    ("int4", {"range": "histogram"}),
    ("int8", {"range": "channel", "refresh": 4}),
    ("proxy", {"choice": "clusters"}),
    (["pq", "int8"], {"choice": "clusters"}),
    ("mean", {"schedule": {"kind": "linear", "updates": 10}}),
]


@pytest.mark.parametrize(("kind", "rule"), RULES, ids=str)
@pytest.mark.parametrize("through_a_file", [True, False])
def test_a_run_that_goes_on_makes_the_noise_of_one_that_was_never_interrupted(kind, rule, through_a_file):
    model, draw = read(kind, **rule)
    draw.epoch = 3
    for _ in range(3):
        step(model)
    weights, random = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    state = saved(draw.state_dict()) if through_a_file else draw.state_dict()
    expected = [step(model) for _ in range(4)]

    resumed, draw = read(kind, **rule)
    resumed.load_state_dict(weights)
    draw.load_state_dict(state)
    torch.set_rng_state(random)
    assert (draw.update, draw.draws, draw.epoch) == (2, 3, 3)
    assert all(torch.equal(step(resumed), seen) for seen in expected)


def test_what_was_measured_is_part_of_the_noise():
    """Without the state the codebook would be another one: the test above can fail."""
    model, draw = read("pq", p=1.0)
    step(model)
    weights, expected = {k: v.clone() for k, v in model.state_dict().items()}, model().detach().clone()
    resumed, _ = read("pq", p=1.0)
    resumed.load_state_dict(weights)
    assert not torch.equal(resumed().detach(), expected)


def test_a_resumed_run_measures_when_the_other_one_would_have(fits):
    model, draw = read("pq", refresh=10)
    assert updates_with_fits(model, fits, [3, 4, 5]) == [3]
    resumed, other = read("pq", refresh=10)
    other.load_state_dict(draw.state_dict())
    assert updates_with_fits(resumed, fits, [6, 12, 13, 14]) == [13]


def test_the_state_of_another_model_is_left_aside():
    model, draw = read("pq")
    model()
    other = nn.Sequential(nn.Linear(8, 8))
    attach_rules(other.train(), [NoiseRule(".*", 0.5, "pq")])
    noise_of(other).load_state_dict(draw.state_dict())
    assert other(torch.randn(2, 8)).isfinite().all()


CHANGES = [
    (("proxy", {}), ("pq", {})),
    (("pq", {}), ("int8", {})),
    (("int8", {"range": "histogram"}), ("pq", {})),
    (("int8", {"range": "histogram"}), ("int4", {"range": "histogram"})),
    (("int8", {"range": "channel"}), ("int8", {})),
    (("pq", {}), ("pq", {"choice": "clusters"})),
    (("pq", {}), ("pq", {"block_size": 4})),
    (("pq", {}), (["pq", "int8"], {})),
]


@pytest.mark.parametrize(("before", "after"), CHANGES, ids=str)
def test_a_rule_that_has_changed_starts_anew(before, after):
    """A run that goes on with another plan."""
    model, draw = read(before[0], **before[1])
    draw.set_num_updates(0)
    model()
    changed, other = read(after[0], **after[1])
    other.load_state_dict(draw.state_dict())
    other.set_num_updates(0)
    fresh, _ = read(after[0], **after[1])
    seen = [torch.manual_seed(1) and twin() for twin in (changed, fresh)]
    assert torch.equal(*seen)


# Weights that diverge


@pytest.mark.parametrize("kind", ["pq", "int8", ("pq", "int8")], ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("good_updates", [0, 1])
def test_a_weight_that_is_no_longer_finite_is_refused_by_name(kind, value, good_updates):
    """Before the first fit, and between two."""
    model, _ = read(kind, p=1.0)
    for _ in range(good_updates):
        model()
    with torch.no_grad():
        stored(model.part)[0, 0] = value
    with refuses("^part: the weight holds NaN or infinity"):
        model()
