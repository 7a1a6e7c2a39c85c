"""The language model with noise: fairseq's names, noise on every weight, nothing written, stock in eval."""

import re

import pytest
import torch
from lm_fixture import batch, both_kinds, one_error

from fairseq_quant_noise.noise import attach_rules
from fairseq_quant_noise.noise.weight_noise import WeightNoise
from fairseq_quant_noise.plan.rules import NoiseRule
from fairseq_quant_noise.weights.discovery import find_weights

LAYER = ["self_attn.k_proj", "self_attn.v_proj", "self_attn.q_proj", "self_attn.out_proj", "fc1", "fc2"]
LAYERS = [f"decoder.layers.{i}.{name}" for i in range(2) for name in LAYER]
PLAIN = ["decoder.embed_tokens", *LAYERS]
BANDS = [f"decoder.embed_tokens.embeddings.{band}.{part}" for band in range(3) for part in range(2)]
TIED = [*BANDS, *LAYERS, "decoder.adaptive_softmax.head.class_proj"]
UNTIED = [f"decoder.adaptive_softmax.{name}" for name in ("tail.0.0", "tail.0.2", "tail.1.0", "tail.1.2")]
WEIGHTS = {"plain": PLAIN, "adaptive": TIED, "untied": [*BANDS, *LAYERS, *UNTIED, "decoder.adaptive_softmax.head"]}


def rows_of(name):
    """The rows of docs/upstream.md that a weight's noise answers."""
    marks = [pytest.mark.upstream(2)] if "self_attn" in name else []
    if "embed_tokens" in name or "softmax" in name:
        marks.append(pytest.mark.upstream(3))
    return marks


def cases():
    """Every weight of each kind of model."""
    for kind, names in WEIGHTS.items():
        for name in names:
            yield pytest.param(kind, name, id=f"{kind}-{name}", marks=rows_of(name))


def build(lab, kind, *flags):
    """A model without dropout."""
    return lab.model("--dropout", 0, *flags, kind=kind)


def loss_of(lab, model, kind):
    """fairseq's own criterion, which calls the adaptive softmax after the model."""
    return lab.criterion(kind=kind)(model, batch())[0]


@pytest.mark.upstream(3)
@both_kinds
@pytest.mark.parametrize("p", [0, 0.1])
def test_names_and_shapes_are_those_of_the_stock_model(lab, kind, p):
    ours = lab.model("--quant-noise-pq", p, kind=kind).state_dict()
    stock = lab.model(arch="transformer_lm", kind=kind).state_dict()
    assert [(name, t.shape) for name, t in ours.items()] == [(name, t.shape) for name, t in stock.items()]


@pytest.mark.upstream(3)
@pytest.mark.parametrize("kind", WEIGHTS)
def test_no_weight_is_missing_from_these_tests(lab, kind):
    assert {weight.name for weight in find_weights(build(lab, kind))} == set(WEIGHTS[kind])


@pytest.mark.parametrize(("kind", "name"), cases())
def test_every_use_of_a_weight_gets_its_noise(lab, kind, name):
    """With p = 1 the proxy noise of one weight does what the model does with zeros in its place, and only that."""
    model, zeroed = build(lab, kind).train(), build(lab, kind).train()
    untouched = loss_of(lab, model, kind)
    zeroed.get_submodule(name).weight.data.zero_()
    attach_rules(model, [NoiseRule(re.escape(name), p=1.0, block_size=4)])
    noised = loss_of(lab, model, kind)
    assert torch.equal(noised, loss_of(lab, zeroed, kind))
    assert not torch.equal(noised, untouched)


@pytest.fixture
def reads(monkeypatch):
    """What the model read: (module, stored weight, weight as seen), in order."""
    seen = []
    call = WeightNoise.__call__

    def spy(noise, module, stored):
        weight = call(noise, module, stored)
        seen.append((module, stored, weight.detach().clone()))
        return weight

    monkeypatch.setattr(WeightNoise, "__call__", spy)
    return seen


@both_kinds
def test_the_flag_noises_every_weight(lab, kind, reads):
    model = build(lab, kind, "--quant-noise-pq", 0.5).train()
    loss_of(lab, model, kind)
    for weight in find_weights(model):
        for name, holder in weight.holders:
            assert any(module is holder for module, _, _ in reads), f"{name} was not read through its noise"
    for _, stored, seen in reads:
        hit = (seen.view(-1, 8) == 0).all(1)
        assert 0.2 < hit.float().mean() < 0.8
        assert torch.equal(seen.view(-1, 8)[~hit], stored.view(-1, 8)[~hit])


@pytest.mark.upstream(1)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@both_kinds
def test_a_hundred_forwards_leave_the_stored_weights_alone(lab, kind, dtype):
    model = build(lab, kind, "--quant-noise-pq", 0.5).to(dtype).train()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    sample = batch(rows=2, length=4)
    for _ in range(100):
        model(**sample["net_input"])
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.upstream(8)
@both_kinds
def test_tied_weights_have_the_same_noise_in_embedding_and_softmax(lab, kind, reads):
    model = build(lab, kind, "--quant-noise-pq", 0.5).train()
    forwards = []
    for _ in range(2):
        reads.clear()
        loss_of(lab, model, kind).backward()
        forwards.append(list(reads))
    tied = [weight for weight in find_weights(model) if weight.aliases]
    assert len(tied) == (5 if kind == "adaptive" else 1)  # three bands and two projections
    for weight in tied:
        first, second = ([read for read in reads if read[1] is weight.stored] for reads in forwards)
        assert {id(module) for module, _, _ in first} == {id(module) for _, module in weight.holders}
        assert all(torch.equal(seen, first[0][2]) for _, _, seen in first)
        assert not torch.equal(first[0][2], second[0][2]), "the next forward draws anew"


@both_kinds
def test_in_eval_the_model_is_the_stock_one_bit_for_bit(lab, kind):
    stock = lab.model(arch="transformer_lm", kind=kind, seed=1).eval()
    ours = lab.model("--quant-noise-pq", 0.5, kind=kind, seed=2).eval()
    ours.load_state_dict(stock.state_dict())
    sample = batch()
    features = ours(**sample["net_input"])
    assert torch.equal(features[0], stock(**sample["net_input"])[0])
    probabilities = ours.get_normalized_probs(features, log_probs=True, sample=sample)
    assert torch.equal(probabilities, stock.get_normalized_probs(features, log_probs=True, sample=sample))
    assert torch.equal(loss_of(lab, ours, kind), loss_of(lab, stock, kind))


@both_kinds
def test_checkpointed_activations_give_the_same_gradients(lab, kind):
    flags = ["--quant-noise-pq", 0.3, "--decoder-layerdrop", 0.3, "--dropout", 0.2]
    models = [lab.model(*flags, *more, kind=kind).train() for more in ([], ["--checkpoint-activations"])]
    for seed in range(3):
        losses = []
        for model in models:
            torch.manual_seed(seed)
            model.zero_grad()
            losses.append(loss_of(lab, model, kind))
            losses[-1].backward()
        assert torch.equal(*losses)
        for (name, one), (_, other) in zip(*(model.named_parameters() for model in models), strict=True):
            assert (one.grad is None) == (other.grad is None), name  # LayerDrop
            assert one.grad is None or torch.equal(one.grad, other.grad), name


@pytest.mark.parametrize(
    "flags",
    [
        "",
        "--amp",
        "--bf16",
        pytest.param("--update-freq 4", marks=pytest.mark.upstream(1)),
        "--decoder-layerdrop 0.2",
        "--store-ema",
        "--checkpoint-activations",
    ],
)
def test_training_with_noise_lowers_the_loss(lab, flags):
    run = lab.train("--quant-noise-pq", 0.2, *flags.split(), "--lr", 0.02, updates=12)
    losses = [float(log["loss"]) for log in run.updates]
    assert sum(losses[-3:]) < sum(losses[:3]) - 1
    assert run.ppl < 110  # the size of the vocabulary


@pytest.mark.parametrize(
    ("flags", "names"),
    [
        ("--quant-noise-pq 1.5", ["--quant-noise-pq", "1.5"]),
        ("--quant-noise-pq -0.1", ["--quant-noise-pq", "-0.1"]),
        ("--quant-noise-scalar 1.5", ["--quant-noise-scalar", "1.5"]),
        ("--quant-noise-pq 0.1 --quant-noise-kind int9", ["int9", "int8"]),
        ("--quant-noise-pq 0.1 --quant-noise-schedule linear", ["--quant-noise-schedule linear", "linear:0:1000"]),
        ("--quant-noise-pq 0.1 --quant-noise-pq-block-size 5", ["decoder.embed_tokens", "blocks of 5", "(110, 32)"]),
        ("--quant-noise-pq 0.1 --quant-noise-pq-block-size 0", ["block"]),
    ],
)
def test_a_wrong_option_ends_in_one_line(lab, flags, names, capsys):
    with pytest.raises(SystemExit) as end:
        lab.train(*flags.split())
    assert end.value.code == 2
    message = one_error(capsys.readouterr())
    assert all(name in message for name in names), message
