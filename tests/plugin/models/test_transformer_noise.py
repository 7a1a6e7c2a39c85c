"""The model for translation with noise: fairseq's names, noise on every weight, nothing written, stock in eval."""

import re

import pytest
import torch
from toys import refuses
from translation_fixture import (
    OWN,
    SHARED,
    WEIGHTS,
    both_kinds,
    pairs,
    translation,  # noqa: F401
)

from fairseq_quant_noise.noise import attach_rules
from fairseq_quant_noise.noise.weight_noise import WeightNoise
from fairseq_quant_noise.plan.rules import NoiseRule
from fairseq_quant_noise.weights.discovery import find_weights


def cases():
    """Every weight of each kind of model, with the rows of docs/upstream.md that its noise answers."""
    for kind, names in WEIGHTS.items():
        for name in names:
            marks = [pytest.mark.upstream(2)] if "attn" in name else []
            marks += [pytest.mark.upstream(3)] if "embed" in name else []
            yield pytest.param(kind, name, id=f"{kind}-{name}", marks=marks)


def loss_of(lab, model, kind):
    """fairseq's label-smoothed cross entropy."""
    return lab.criterion(kind)(model, pairs())[0]


@pytest.mark.upstream(3)
@both_kinds
@pytest.mark.parametrize("p", [0, 0.1])
def test_names_and_shapes_are_those_of_the_stock_model(translation, kind, p):  # noqa: F811
    ours = translation.model("--quant-noise-pq", p, kind=kind).state_dict()
    stock = translation.model(arch="transformer", kind=kind).state_dict()
    assert [(name, t.shape) for name, t in ours.items()] == [(name, t.shape) for name, t in stock.items()]


@both_kinds
def test_no_weight_is_missing_from_these_tests(translation, kind):  # noqa: F811
    assert [weight.name for weight in find_weights(translation.model(kind=kind))] == WEIGHTS[kind]


@pytest.mark.parametrize(("kind", "name"), cases())
def test_every_use_of_a_weight_gets_its_noise(translation, kind, name):  # noqa: F811
    """With p = 1 the proxy noise of one weight does what the model does with zeros in its place, and only that."""
    model, zeroed = (translation.model("--dropout", 0.0, kind=kind).train() for _ in range(2))
    untouched = loss_of(translation, model, kind)
    zeroed.get_submodule(name).weight.data.zero_()
    attach_rules(model, [NoiseRule(re.escape(name), p=1.0, block_size=4)])
    noised = loss_of(translation, model, kind)
    assert torch.equal(noised, loss_of(translation, zeroed, kind))
    assert not torch.equal(noised, untouched)


@pytest.mark.upstream(1)
@both_kinds
def test_noise_on_all_weights_leaves_what_is_stored_alone(translation, kind, monkeypatch):  # noqa: F811
    model = translation.model("--quant-noise-pq", 0.5, kind=kind).train()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    seen, call = {}, WeightNoise.__call__

    def spy(noise, module, stored):
        seen.setdefault(id(stored), []).append(call(noise, module, stored).detach().clone())
        return call(noise, module, stored)

    monkeypatch.setattr(WeightNoise, "__call__", spy)
    for _ in range(20):
        loss_of(translation, model, kind)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert len(seen) == len(WEIGHTS[kind])
    hit = torch.stack([(w.view(-1, 8) == 0).all(1).float().mean() for weights in seen.values() for w in weights])
    assert 0.45 < float(hit.mean()) < 0.55  # and not growing, as fairseq's own does


@pytest.mark.upstream(8)
def test_one_embedding_has_the_same_noise_as_source_target_and_output(translation, monkeypatch):  # noqa: F811
    model = translation.model("--quant-noise-pq", 0.5).train()
    (words,) = [weight for weight in find_weights(model) if weight.aliases]
    reads, call = [], WeightNoise.__call__

    def spy(noise, module, stored):
        reads.append((stored, call(noise, module, stored)))
        return reads[-1][1]

    monkeypatch.setattr(WeightNoise, "__call__", spy)
    loss_of(translation, model, SHARED)
    seen = [weight for stored, weight in reads if stored is words.stored]
    assert len(seen) == 3
    assert all(torch.equal(weight, seen[0]) for weight in seen)


@both_kinds
def test_in_eval_the_model_is_the_stock_one_bit_for_bit(translation, kind):  # noqa: F811
    stock = translation.model(arch="transformer", kind=kind, seed=1).eval()
    ours = translation.model("--quant-noise-pq", 0.5, kind=kind, seed=2).eval()
    ours.load_state_dict(stock.state_dict())
    assert torch.equal(loss_of(translation, ours, kind), loss_of(translation, stock, kind))


@pytest.mark.parametrize(
    "flags",
    [
        ["--bf16"],
        pytest.param(["--update-freq", 2], marks=pytest.mark.upstream(1)),
        ["--encoder-layerdrop", 0.2, "--decoder-layerdrop", 0.2],
    ],
    ids=lambda flags: flags[0],
)
def test_training_with_noise_lowers_the_loss(translation, flags):  # noqa: F811
    run = translation.train("--quant-noise-pq", 0.2, *flags, "--lr", 0.01, updates=20)
    losses = [float(log["loss"]) for log in run.updates]
    assert sum(losses[-3:]) < sum(losses[:3]) - 1


@pytest.mark.parametrize(
    ("flags", "names"),
    [
        (["--no-cross-attention"], ["--no-cross-attention", "--arch transformer"]),
        (["--cross-self-attention"], ["--cross-self-attention"]),
        (["--share-all-embeddings"], ["--share-all-embeddings", "--joined-dictionary"]),
        (["--quant-noise-pq", 1.5], ["--quant-noise-pq", "1.5"]),
        (
            ["--quant-noise-pq", 0.1, "--quant-noise-pq-block-size", 5],
            ["encoder.embed_tokens", "blocks of 5", "(60, 32)"],
        ),
        (["--share-layers", 3], ["encoder.layers: chunks of 3 layers do not divide its 2 layers"]),
        (["--decoder-layers-to-keep", "0,2"], ["--decoder-layers-to-keep names layer 2", "the decoder has 2 layers"]),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_wrong_option_ends_in_one_line(translation, flags, names):  # noqa: F811
    with refuses(".*") as caught:
        translation.model(*flags, kind=OWN)
    assert all(name in str(caught.value) for name in names), caught.value
