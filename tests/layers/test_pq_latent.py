"""Codes that train: the gradient of the latent weight, encoding again, and what a checkpoint and a file hold of it."""

import copy

import pytest
import torch
from stacks import net
from toys import SHARED_PLAN, TOKENS, ZOO_PLAN, adopting, quiet, stored, weight_of, zoo

from fairseq_quant_noise import attach_noise, load, quantize_, save, share_layers_
from fairseq_quant_noise.artifact import pack
from fairseq_quant_noise.layers import LatentPQWeight, PQWeight, quantized_weights
from fairseq_quant_noise.layers.registry import weights_in
from fairseq_quant_noise.pq.encode import nearest
from fairseq_quant_noise.quantization.code_training import encode_again, latent_error, trained_weights


def linear(share=1.0, factor=0.5, bits=16, rows=16, columns=12):
    """A Linear of blocks of 4 and 8 centroids, whose codes train; in training mode."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(columns, rows, bias=False))
    codes = {"kind": "train", "share": share, "learning_rate": factor}
    plan = {"stages": [{"match": "0", "block_size": 4, "n_centroids": 8}], "codes": codes}
    return quantize_(model, {**plan, "centroids": {"dtype": {16: "fp16", 8: "int8"}[bits]}}, progress=quiet).train()


def only(model):
    (weight,) = quantized_weights(model).values()
    assert type(weight) is LatentPQWeight
    return weight


def latent(weight):
    """The latent weight itself."""
    return weight.latent_weight.detach() * weight.latent_factor


def by_hand(weight, blocks):
    """The codes of (n, d) blocks, by all distances."""
    centroids = weight.stored_centroids().detach()
    return torch.cdist(blocks.double(), centroids.double()).argmin(1)


def test_the_latent_weight_starts_from_the_dense_one():
    torch.manual_seed(0)
    dense = torch.nn.Linear(12, 16, bias=False).weight
    assert torch.allclose(latent(only(linear(factor=0.3))), dense)


@pytest.mark.parametrize("bits", [16, 8])
def test_its_gradient_is_that_of_the_weight_and_the_centroids_learn_as_with_fixed_codes(bits):
    weight = only(linear(bits=bits))
    fixed = PQWeight(weight.codes, weight.centroids.detach().clone(), tuple(weight.shape), bits).train()
    upstream = torch.randn(16, 12)
    weight.decode().backward(upstream)
    fixed.decode().backward(upstream)
    assert torch.equal(weight.latent_weight.grad, upstream)
    assert torch.equal(weight.centroids.grad, fixed.centroids.grad)


@pytest.mark.parametrize("factor", [0.25, 1.0, 3.0])
def test_the_latent_weight_trains_at_its_own_learning_rate_with_any_optimizer(factor):
    for optimizer in (torch.optim.SGD, torch.optim.Adam):
        weight = only(linear(factor=factor))
        before, upstream = latent(weight).clone(), torch.randn(16, 12)
        steps = optimizer(weight.parameters(), lr=0.01)
        weight.decode().backward(upstream)
        steps.step()
        step = upstream if optimizer is torch.optim.SGD else upstream.sign()  # Adam's first step is the rate
        assert torch.allclose(latent(weight), before - factor * 0.01 * step, atol=1e-6)


@pytest.mark.parametrize("bits", [16, 8])
def test_encoding_again_finds_the_nearest_centroid_of_each_block(bits):
    weight = only(linear(bits=bits))
    before = weight.codes.clone()
    with torch.no_grad():
        weight.latent_weight.add_(torch.randn(16, 12))
    changed = weight.encode_again()
    assert torch.equal(weight.codes.flatten().long(), by_hand(weight, latent(weight).view(-1, 4)))
    assert int(changed) == int((weight.codes != before).sum()) > 0
    assert weight.encode_again() == 0


def test_a_share_of_the_blocks_is_those_that_moved_away_most():
    model = linear(share=0.25)  # 12 of 48 blocks
    weight = only(model)
    before, blocks = weight.codes.flatten().clone(), latent(weight).view(-1, 4).clone()
    moved = torch.arange(0, 48, 5)  # 10 of them
    with torch.no_grad():
        weight.latent_weight.view(-1, 4)[moved] -= 3 * blocks[moved] / weight.factor
    weight.encode_again(0.25)
    after = weight.codes.flatten()
    expected = by_hand(weight, latent(weight).view(-1, 4))
    assert torch.equal(after[moved].long(), expected[moved])
    others = [i for i in range(48) if i not in moved.tolist()]
    assert torch.equal(after[others], before[others])  # nearest before, and still
    kept = latent(weight).view(-1, 4)
    seen = weight.stored_centroids().detach()[after.long()]
    assert torch.allclose(weight.distances[moved], (kept - seen).square().sum(1)[moved], atol=1e-5)


def test_a_block_that_is_far_and_does_not_move_keeps_no_other_from_its_turn():
    """By distance alone the outliers would be encoded again and again."""
    weight = only(linear(share=1 / 48))
    with torch.no_grad():
        weight.latent_weight.view(-1, 4)[0] += 100
    weight.encode_again(1 / 48)
    with torch.no_grad():
        weight.latent_weight.view(-1, 4)[7] *= -2
    before = weight.codes.clone()
    weight.encode_again(1 / 48)
    assert (weight.codes != before).flatten().nonzero().tolist() == [[7]]


@pytest.mark.parametrize("plan", [ZOO_PLAN, SHARED_PLAN, ZOO_PLAN | {"centroids": {"dtype": "int8"}}])
def test_every_kind_of_weight_trains_its_codes(plan):
    """Tied embedding, attention, convolution, one codebook of several weights, 8-bit centroids."""
    model = quantize_(zoo(), plan | {"codes": "train"}, progress=quiet).train()
    weights = trained_weights(model)
    assert weights.keys() == quantized_weights(model).keys()
    before = {name: weight.codes.clone() for name, weight in weights.items()}
    optimizer = torch.optim.Adam(model.parameters(), 0.5)
    for _ in range(4):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(TOKENS).flatten(0, 1), TOKENS.flatten()).backward()
        assert all(weight.latent_weight.grad.abs().sum() > 0 for weight in weights.values())
        optimizer.step()
    last = {name: weight.codes.clone() for name, weight in weights.items()}
    share = encode_again(model)
    changed = sum(int((weight.codes != last[name]).sum()) for name, weight in weights.items())
    assert share * sum(codes.numel() for codes in last.values()) == pytest.approx(changed)
    assert changed > 0
    for name, weight in weights.items():
        assert not torch.equal(weight.codes, before[name]), name
        blocks = latent(weight).reshape(-1, weight.block_size)
        assert torch.equal(weight.codes.flatten().long(), nearest(blocks, weight.stored_centroids().detach()))
    assert model.emb._modules["weight"] is model.out._modules["weight"]


def test_a_weight_with_its_inputs_first_trains_its_codes_too_and_its_latent_weight_lies_as_its_blocks():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.ConvTranspose1d(8, 6, 1))
    dense, x = model[0].weight.detach().clone(), torch.randn(2, 8, 3)
    plan = {"stages": [{"match": "0", "block_size": 4, "n_centroids": 2}], "codes": {"kind": "train", "share": 0.5}}
    weight = only(quantize_(model, plan, progress=quiet).train())
    assert torch.equal(weight.latent_weight, dense.transpose(0, 1))
    assert weight.latent_weight.is_contiguous()
    model(x).square().sum().backward()
    twin = torch.nn.ConvTranspose1d(8, 6, 1)
    twin.load_state_dict({"weight": model.eval()[0].weight.detach(), "bias": model[0].bias.detach()})
    twin(x).square().sum().backward()
    assert torch.allclose(weight.latent_weight.grad, twin.weight.grad.transpose(0, 1), rtol=1e-2, atol=1e-2)  # fp16
    before = weight.codes.clone()
    with torch.no_grad():
        weight.latent_weight.mul_(-1)
    assert weight.encode_again() > 0
    assert weight.codes.shape == before.shape


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_a_checkpoint_brings_back_all_that_trains(share):
    plan = SHARED_PLAN | {"codes": {"kind": "train", "share": share, "learning_rate": 0.3}}
    model = quantize_(zoo(), plan, progress=quiet)
    with torch.no_grad():
        for weight in trained_weights(model).values():
            weight.latent_weight.mul_(1.5)
    state = copy.deepcopy(model.state_dict())
    for target in (zoo(1), quantize_(zoo(1), SHARED_PLAN, progress=quiet), quantize_(zoo(1), plan, progress=quiet)):
        twin = adopting(target, state)
        assert all(torch.equal(tensor, twin.state_dict()[name]) for name, tensor in state.items())
        for name, weight in trained_weights(twin).items():
            assert weight.factor == trained_weights(model)[name].factor
        encode_again(twin, share)
        expected = copy.deepcopy(model)
        encode_again(expected, share)
        assert all(torch.equal(t, twin.state_dict()[name]) for name, t in expected.state_dict().items())
        assert twin.fc._modules["weight"].centroids is twin.attn.q_proj._modules["weight"].centroids


def test_a_state_of_fixed_codes_takes_the_place_of_codes_that_train_and_the_other_way_round():
    trained = quantize_(zoo(), ZOO_PLAN | {"codes": "train"}, progress=quiet)
    fixed = quantize_(zoo(1), ZOO_PLAN, progress=quiet)
    assert not trained_weights(adopting(copy.deepcopy(trained), fixed.state_dict()))
    assert (
        trained_weights(adopting(copy.deepcopy(fixed), trained.state_dict())).keys() == trained_weights(trained).keys()
    )


@pytest.mark.parametrize("plan", [ZOO_PLAN, SHARED_PLAN])
def test_the_file_is_that_of_fixed_codes_byte_for_byte(tmp_path, plan):
    save(quantize_(zoo(), plan, progress=quiet), tmp_path / "fixed")
    model = quantize_(zoo(), plan | {"codes": "train"}, progress=quiet)
    save(model, tmp_path / "train")
    assert (tmp_path / "fixed").read_bytes() == (tmp_path / "train").read_bytes()
    loaded = load(tmp_path / "train", into=zoo(1))
    assert torch.equal(loaded(TOKENS), model.eval()(TOKENS))
    assert not trained_weights(loaded)
    assert pack(model).state_dict().keys() == pack(loaded).state_dict().keys()


def test_a_dense_model_of_a_checkpoint_is_the_one_in_codes():
    model = linear()
    with torch.no_grad():
        only(model).latent_weight.mul_(-1)
    held = weights_in(model.state_dict())["0.weight"]
    assert held.format is LatentPQWeight
    assert torch.equal(held.dense(), weight_of(model.eval()[0]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_in_half_precision_the_latent_weight_is_half_and_its_factor_is_not(dtype):
    weight = only(linear(share=0.5, factor=0.3).to(dtype))
    assert weight.latent_weight.dtype == dtype
    assert weight.latent_factor.dtype == weight.distances.dtype == torch.float32
    weight.decode().backward(torch.ones(16, 12, dtype=dtype))
    assert weight.latent_weight.grad.dtype == dtype
    weight.encode_again()
    assert torch.equal(weight.codes.flatten().long(), by_hand(weight, latent(weight).float().view(-1, 4)))


def test_layers_that_are_shared_have_one_latent_weight():
    model = share_layers_(net(4), 2)
    plan = {"stages": [{"match": ".*", "block_size": 4, "n_centroids": 8}], "codes": "train"}
    quantize_(model, plan, progress=quiet)
    weights = [w for w in model.modules() if isinstance(w, LatentPQWeight)]
    assert len(weights) == len(trained_weights(model))


def test_the_latent_error_is_that_of_all_weights():
    model = quantize_(zoo(), ZOO_PLAN | {"codes": "train"}, progress=quiet)
    pairs = [(latent(w), w.eval().decode().detach()) for w in trained_weights(model).values()]
    away = sum((dense - seen).square().sum() for dense, seen in pairs)
    assert latent_error(model) == pytest.approx(
        float((away / sum(d.square().sum() for d, _ in pairs)).sqrt()), rel=1e-3
    )
    assert latent_error(zoo()) is None


# Training in plain PyTorch


def encodings(model, monkeypatch):
    """The list of the shares of all encodings to come."""
    seen = []
    real = LatentPQWeight.encode_again
    monkeypatch.setattr(LatentPQWeight, "encode_again", lambda self, share=1.0: seen.append(share) or real(self, share))
    return seen


def test_training_forwards_encode_again_every_so_many(monkeypatch):
    codes = {"kind": "train", "every": 3, "share": 0.5}
    model = quantize_(
        torch.nn.Sequential(torch.nn.Linear(8, 8)), {"stages": [{"match": "0"}], "codes": codes}, progress=quiet
    )
    seen = encodings(model, monkeypatch)
    counts = []
    for _ in range(8):
        model.train()(torch.ones(1, 8)).sum().backward()
        model.eval()(torch.ones(1, 8))
        with torch.no_grad():
            model.train()(torch.ones(1, 8))
        counts.append(len(seen))
    assert counts == [0, 0, 0, 1, 1, 1, 2, 2]
    assert set(seen) == {0.5}


def test_a_copy_of_the_model_encodes_its_own_weights(monkeypatch):
    model = linear()
    model(torch.ones(1, 12))
    twin = copy.deepcopy(model)
    with torch.no_grad():
        only(twin).latent_weight.mul_(-1)
    before = only(model).codes.clone()
    twin(torch.ones(1, 12))
    assert torch.equal(only(model).codes, before)
    assert not torch.equal(only(twin).codes, before)


def test_noise_goes_on_on_what_is_dense():
    noise = [{"match": r"fc|attn\..*", "p": 0.5}]
    plan = {"stages": [{"match": "fc", "block_size": 4}], "codes": "train", "noise": noise}
    model = attach_noise(zoo(), plan)
    quantize_(model, plan, progress=quiet).train()
    model(TOKENS).sum().backward()
    assert model.fc._modules["weight"].latent_weight.grad is not None
    assert "_weight_noise" in model.attn.q_proj.__dict__
    assert "_weight_noise" not in model.fc.__dict__
    assert stored(model.attn.q_proj).grad is not None
