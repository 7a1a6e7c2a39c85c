"""Row scales: what every user of the weight reads, their gradients, and what a state and a file hold of them."""

import copy

import pytest
import torch
from packed_files import damaged, entry, forge, packed_zoo
from stacks import net
from torch import nn
from toys import SCALED_PLAN, TOKENS, Tied, adopting, quiet, refuses, zoo

from fairseq_quant_noise import load, quantize_, save, share_layers_
from fairseq_quant_noise.artifact import dense_state, pack, read
from fairseq_quant_noise.artifact.inspection import inspection
from fairseq_quant_noise.cli.printing import print_inspection, print_table
from fairseq_quant_noise.errors import UserError
from fairseq_quant_noise.layers import LatentPQWeight, quantized_weights
from fairseq_quant_noise.plan.plan import Plan
from fairseq_quant_noise.quantization.code_training import encode_again
from fairseq_quant_noise.quantization.table import make_table
from fairseq_quant_noise.quantization.targets import resolve_stages

STAGE = {"match": ".*", "block_size": 4, "n_centroids": 16, "row_scales": True}
PLANS = {
    "fp16 centroids": {"stages": [STAGE]},
    "int8 centroids": {"stages": [STAGE], "centroids": {"dtype": "int8"}},
    "300 centroids": {"stages": [STAGE | {"block_size": 2, "n_centroids": 300}]},
}
X = torch.randn(5, 48, generator=torch.Generator().manual_seed(1))


def network(bias=True):
    """(..., 48) to (..., 40); rows of any size."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(48, 64, bias=bias), nn.ReLU(), nn.Linear(64, 40, bias=bias))
    for layer in (model[0], model[2]):
        layer.weight.data *= torch.logspace(-0.5, 0.5, len(layer.weight))[:, None]
    return model


def quantized(plan="fp16 centroids", bias=True, **more):
    return quantize_(network(bias), PLANS[plan] | more, progress=quiet).eval()


def first(model):
    return next(iter(quantized_weights(model).values()))


def by_hand(weight):
    """The dense weight, from centroids and scales as a file holds them."""
    rows = weight.stored_centroids().detach()[weight.codes.flatten().long()].view(len(weight.codes), -1)
    return (rows * weight.scales.detach().half().float()[:, None]).view(weight.shape)


def latent_weight(share=1.0, bits=16):
    dtype = {16: "fp16", 8: "int8"}[bits]
    plan = {"stages": [STAGE], "codes": {"kind": "train", "share": share}, "centroids": {"dtype": dtype}}
    weight = first(quantize_(network(), plan, progress=quiet).train())
    assert type(weight) is LatentPQWeight
    return weight


# What is read


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("bias", [True, False])
def test_a_product_is_that_with_the_decoded_weight(plan, bias):
    model = quantized(plan, bias)
    weight = first(model)
    with torch.no_grad():
        assert torch.equal(weight.decode(), by_hand(weight))
        expected = nn.functional.linear(X, by_hand(weight), model[0].bias)
        assert weight.multiplies(X)
        assert torch.allclose(model[0](X), expected, atol=2e-2 if weight.bits == 8 else 1e-5)
    assert torch.equal(model[0].weight, by_hand(weight))  # with gradients
    with torch.inference_mode():
        assert torch.allclose(model[0](X), expected, atol=2e-2 if weight.bits == 8 else 1e-5)


def test_a_product_in_whole_numbers_is_scaled_too(monkeypatch):
    monkeypatch.setattr("fairseq_quant_noise.layers.pq.takes_integers", lambda x: True)
    model = quantized("int8 centroids")
    with torch.no_grad():
        assert first(model).in_integers(X)
        torch.testing.assert_close(model(X), nn.Sequential(*network_of(model))(X), atol=5e-2, rtol=5e-2)


def network_of(model):
    """The same network with dense weights."""
    state, dense = dense_state(model.state_dict()), network()
    dense.load_state_dict(state)
    return dense


def test_an_embedding_and_its_tied_projection_read_the_same_rows():
    torch.manual_seed(0)
    model = quantize_(Tied(), {"stages": [STAGE | {"n_centroids": 4}]}, progress=quiet).eval()
    weight, tokens = first(model), torch.tensor([[0, 3], [11, 3]])
    with torch.no_grad():
        assert torch.equal(model.emb(tokens), by_hand(weight)[tokens])
        torch.testing.assert_close(model(tokens), by_hand(weight)[tokens] @ by_hand(weight).t())
    assert len(list(model.parameters())) == 2  # centroids and scales


@pytest.mark.parametrize("layer", [nn.Conv2d(4, 6, 2), nn.ConvTranspose2d(4, 6, 2)])
def test_a_convolution_has_a_scale_for_each_output(layer):
    dense = copy.deepcopy(layer)
    with torch.no_grad():
        weight = dense.weight if isinstance(layer, nn.Conv2d) else dense.weight.transpose(0, 1)
        weight.mul_(torch.arange(1.0, 7).view(-1, 1, 1, 1))
        model = quantize_(copy.deepcopy(dense), {"stages": [STAGE | {"match": "", "n_centroids": 4}]}, progress=quiet)
        assert first(model).scales.shape == (6,)
        assert (model.eval().weight - dense.weight).norm() < 0.8 * dense.weight.norm()
        x = torch.randn(2, 4, 5, 5)
        assert torch.equal(model(x), type(layer).forward(_with(dense, model.weight), x))


def _with(module, weight):
    module.weight.data = weight.clone()
    return module


@pytest.mark.parametrize("plan", PLANS)
def test_a_compiled_and_an_exported_network_gives_the_same(plan):
    model = quantized(plan)
    with torch.no_grad():
        expected = model(X)
        tolerance = {"atol": 2e-2, "rtol": 2e-2} if plan == "int8 centroids" else {}
        torch._dynamo.reset()
        torch.testing.assert_close(torch.compile(model, backend="eager", fullgraph=True)(X), expected, **tolerance)
        torch.testing.assert_close(torch.export.export(model, (X,)).module()(X), expected, **tolerance)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_stays_half(dtype):
    model = quantized().to(dtype)
    weight = first(model)
    assert weight.scales.dtype == weight.decode().dtype == weight.train().decode().dtype == dtype


# Training


@pytest.mark.parametrize("bits", [16, 8])
def test_the_gradients_are_those_of_the_product_of_scale_and_centroid(bits):
    weight = latent_weight(bits=bits)
    upstream = torch.randn(weight.shape, generator=torch.Generator().manual_seed(2))
    weight.decode().backward(upstream)
    centroids = weight.stored_centroids().detach() if bits == 8 else weight.centroids.detach()
    centroids.requires_grad_()
    scales = weight.scales.detach().clone().requires_grad_()
    codes = weight.codes.flatten().long()
    (centroids[codes].view(weight.shape) * scales[:, None]).backward(upstream)
    count = codes.bincount(minlength=len(centroids)).clamp(min=1)[:, None]
    torch.testing.assert_close(weight.centroids.grad, centroids.grad / count**0.5)
    torch.testing.assert_close(weight.scales.grad, scales.grad)
    assert torch.equal(weight.latent_weight.grad, upstream)


@pytest.mark.parametrize("share", [1.0, 0.25])
def test_encoding_again_finds_the_codes_of_least_error_of_the_weight(share):
    weight = latent_weight(share)
    with torch.no_grad():
        weight.latent_weight.copy_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(3)))
        weight.scales.mul_(torch.linspace(-1, 2, len(weight.scales)))  # one of either sign, and any size
    before = weight.codes.clone()
    assert weight.encode_again(share) > 0
    blocks = weight.blocks().view(len(weight.codes), -1, 1, 4)
    offered = weight.scales.detach().half().float().view(-1, 1, 1, 1) * weight.stored_centroids().detach()
    best = (blocks - offered).double().square().sum(-1)  # (rows, blocks a row, K)
    moved = weight.codes != before
    chosen = best.gather(2, weight.codes.long()[..., None])[..., 0]
    assert torch.allclose(chosen[moved], best.min(2).values[moved])
    assert share < 1 or torch.allclose(chosen, best.min(2).values)
    if share < 1:
        assert torch.allclose(weight.distances.view_as(chosen)[moved], chosen[moved].float(), rtol=1e-4)
    away, whole = weight.error().tolist()
    assert away == pytest.approx(float((weight.blocks().view(weight.shape) - by_hand(weight)).square().sum()), rel=1e-4)
    assert whole == pytest.approx(float(weight.blocks().square().sum()))


def test_a_scale_of_zero_is_no_end():
    weight = latent_weight()
    with torch.no_grad():
        weight.scales[0] = 0
    weight.encode_again()
    weight.decode().sum().backward()
    assert weight.scales.grad.isfinite().all()
    assert weight.decode()[0].eq(0).all()


def test_training_learns_them_and_lowers_the_loss():
    for codes in ("fixed", "train"):
        model = quantized(codes=codes).train()
        target = network()(X).detach()
        steps = torch.optim.Adam(model.parameters(), 1e-2)
        before = first(model).scales.detach().clone()
        losses = []
        for _ in range(30):
            loss = (model(X) - target).square().mean()
            steps.zero_grad()
            loss.backward()
            steps.step()
            losses.append(loss.item())
        assert losses[-1] < 0.3 * losses[0]
        assert not torch.equal(first(model).scales, before)


def test_a_state_goes_on_with_the_same_bits():
    model = quantized(codes="train").train()
    resumed = adopting(network(), copy.deepcopy(model.state_dict())).train()
    outputs = []
    for of in (model, resumed):
        steps = torch.optim.SGD(of.parameters(), 1e-2)
        for _ in range(3):
            of.zero_grad()
            of(X).square().mean().backward()
            steps.step()
            encode_again(of)
        outputs.append(of.state_dict())
    assert {name for name in outputs[0] if name.endswith("scales")} == {"0.weight.scales", "2.weight.scales"}
    assert all(torch.equal(tensor, outputs[1][name]) for name, tensor in outputs[0].items())


def test_a_state_with_or_without_scales_loads_into_either():
    scaled, plain = quantized(), quantize_(network(), {"stages": [STAGE | {"row_scales": False}]}, progress=quiet)
    for state, into in ((scaled, plain), (plain, scaled)):
        back = adopting(copy.deepcopy(into), state.state_dict()).eval()
        assert torch.equal(back(X), state.eval()(X))
    state = scaled.state_dict()
    state["0.weight.scales"] = torch.ones(3)
    with refuses(r"0: row scales of shape \(3,\) do not fit a weight of shape \(64, 48\)", UserError):
        adopting(network(), state)


# The file


@pytest.mark.parametrize("plan", PLANS)
def test_a_file_gives_the_same_scores_and_the_sizes_that_were_planned(plan, tmp_path):
    model, path = quantized(plan), tmp_path / "model.safetensors"
    save(model, path, PLANS[plan])
    with torch.no_grad():
        assert torch.equal(load(path, into=network())(X), model(X))
        dense = dense_state(read(path).state_dict())
        assert torch.equal(dense["0.weight"], by_hand(first(model)))
    packed = read(path)
    found = inspection(path, packed)
    assert found["format_version"] == 7
    rows = [row for row in found["tensors"] if row["scheme"] == "pq"]
    assert [row["row_scales"] for row in rows] == [True, True]
    weight = first(model)
    code_bits, (k, d) = packed.manifest.tensors["0.weight"].code_bits, weight.centroids.shape
    of_centroids = 2 * k * d if weight.bits == 16 else k * d + 8
    assert packed.tensor_bytes("0.weight") == weight.codes.numel() * code_bits // 8 + of_centroids + 2 * 64
    planned = make_table(network(), resolve_stages(Plan.of(PLANS[plan]), network()))
    assert planned.paper_bytes == pytest.approx(found["paper_bytes"]) == pytest.approx(made_bytes(model))


def test_the_dry_run_and_the_inspection_say_which_rows_have_scales(tmp_path, capsys):
    plan, path = (
        Plan.of({"stages": [STAGE | {"match": "0"}, STAGE | {"match": "2", "row_scales": False}]}),
        tmp_path / "f",
    )
    save(quantize_(network(), plan, progress=quiet), path)
    print_table(make_table(network(), resolve_stages(plan, network())))
    print_inspection(path, read(path))
    said = [line.split() for line in capsys.readouterr().out.splitlines()]
    scaled = ["0.weight", "pq,", "row", "scales", "64x48", "4", "16"]
    assert [line[:7] for line in said if line[0] == "0.weight"] == [scaled, scaled]
    assert [line[:3] for line in said if line[0] == "2.weight"] == [["2.weight", "pq", "40x64"]] * 2


def made_bytes(model):
    inside = {id(p) for weight in quantized_weights(model).values() for p in weight.parameters()}
    dense = sum(p.numel() for p in model.parameters() if id(p) not in inside)
    return 4 * dense + sum(weight.paper_bytes for weight in quantized_weights(model).values())


def test_a_shared_codebook_is_stored_once_and_each_weight_has_its_scales(tmp_path):
    model, path = quantize_(zoo(), SCALED_PLAN, progress=quiet).eval(), tmp_path / "model.safetensors"
    save(model, path)
    tensors = read(path).tensors
    owners = [name for name in tensors if name.endswith(".centroids")]
    scaled = [name for name in tensors if name.endswith(".scales")]
    assert (len(owners), len(scaled)) == (3, 7)
    with torch.no_grad():
        assert torch.equal(load(path, into=zoo())(TOKENS), model(TOKENS))


def test_one_weight_of_a_shared_codebook_may_have_scales_and_another_not(tmp_path):
    """As no plan makes it, and the format has it."""
    model = quantize_(zoo(), SCALED_PLAN, progress=quiet).eval()
    model.attn._modules["q_proj"]._modules["weight"].scales = None
    with torch.no_grad():
        save(model, tmp_path / "model.safetensors")
        assert torch.equal(load(tmp_path / "model.safetensors", into=zoo())(TOKENS), model(TOKENS))


def test_layers_that_share_their_weights_share_the_scales(tmp_path):
    plan = {"stages": [{"match": r"layers\.\d+\.fc", "block_size": 4, "row_scales": True}]}
    model = quantize_(share_layers_(net(), 2), plan, progress=quiet)
    save(model, tmp_path / "model.safetensors")
    packed = read(tmp_path / "model.safetensors")
    assert len([name for name in packed.tensors if name.endswith(".scales")]) == 2
    assert torch.equal(packed.state_dict()["layers.1.fc.weight.scales"], packed.tensors["layers.0.fc.weight.scales"])


def test_a_file_without_scales_keeps_its_version():
    assert packed_zoo().manifest.format_version == 3
    assert pack(quantized()).manifest.format_version == 7


SCALES = {
    "of another length": (torch.ones(7).half(), "row scales' shape"),
    "in two dimensions": (torch.ones(8, 1).half(), "row scales' shape"),
    "with NaN": (torch.tensor([torch.nan] * 8).half(), "a row scale that is not finite"),
    "with infinity": (torch.tensor([torch.inf] * 8).half(), "a row scale that is not finite"),
    "of another type": (torch.ones(8), "its parts are not codes .*, scales .*float16"),
}


@pytest.mark.parametrize("name", SCALES)
def test_hostile_scales_are_refused(name, tmp_path):
    scales, why = SCALES[name]
    path = forge(tmp_path / "model.safetensors", packed_zoo(plan="row scales"), **{"fc.weight.scales": scales})
    with damaged(rf"tensor fc\.weight: damaged .{why}"):
        read(path)


def test_scales_that_the_manifest_omits_or_that_are_missing_are_refused(tmp_path):
    path, packed = tmp_path / "model.safetensors", packed_zoo(plan="row scales")
    forge(path, packed, entry(row_scales=False))
    with damaged(r"tensor fc\.weight: damaged .its parts are not"):
        read(path)
    del packed.tensors["fc.weight.scales"]
    forge(path, packed)
    with damaged(r"tensor fc\.weight: damaged .its parts are not"):
        read(path)
    for strange in (1, "true", None, [True]):
        forge(path, packed, entry(row_scales=strange))
        with damaged("its manifest is damaged"):
            read(path)
    forge(path, packed_zoo(plan="int8"), entry(row_scales=True))
    with damaged("its manifest is damaged"):
        read(path)


def test_a_file_of_an_older_version_has_none(tmp_path):
    path = tmp_path / "model.safetensors"
    forge(path, packed_zoo(plan="row scales"), lambda m: m.update(format_version=6))
    with damaged("version 6, which such a file does not have"):
        read(path)


# The plan


def test_a_plan_says_it_by_true_or_false_and_for_pq_alone():
    plan = Plan.of({"stages": [STAGE]})
    assert Plan.of(plan.to_dict()) == plan
    assert plan.to_dict()["stages"][0]["row_scales"] is True
    with refuses(r"stage '\.\*': row_scales is 1; give true or false"):
        Plan.of({"stages": [STAGE | {"row_scales": 1}]})
    with refuses(r"stage '\.\*': row_scales is for scheme pq; for int8 give range: channel"):
        Plan.of({"stages": [{"match": ".*", "scheme": "int8", "row_scales": True}]})


@pytest.mark.parametrize("shared", [False, True])
def test_error_feedback_goes_on_with_them(shared):
    """Outputs are nearer than by k-means, and the scales are those of least output error."""
    x = torch.randn(256, 48, generator=torch.Generator().manual_seed(4)) @ torch.randn(48, 48)
    stage = STAGE | {"codebook": "shared"} if shared else STAGE
    dense, errors = network()(x).detach(), []
    for kind in ("plain", "feedback"):
        plan = {"stages": [stage], "encode": kind}
        model = quantize_(network(), plan, calibration=[x], progress=quiet).eval()
        with torch.no_grad():
            errors.append(float((model(x) - dense).square().sum()))
    assert errors[1] < 0.7 * errors[0]
    assert first(model).scales.isfinite().all()
