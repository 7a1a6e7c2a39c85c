"""Codebooks of 257 to 4,096 centroids, whose codes take 9 to 12 bits: from k-means to the file, and back."""

import copy

import pytest
import torch
from toys import Read, adopting, quiet, refuses
from wide import WIDE_PLAN, wide_net

from fairseq_quant_noise import attach_noise, load, quantize_, save
from fairseq_quant_noise.artifact import pack, read
from fairseq_quant_noise.artifact.inspection import inspection
from fairseq_quant_noise.errors import DamagedFileError, UserError
from fairseq_quant_noise.kernels import decode
from fairseq_quant_noise.layers import LatentPQWeight, PQWeight, quantized_weights
from fairseq_quant_noise.plan.plan import Plan
from fairseq_quant_noise.pq.encode import nearest
from fairseq_quant_noise.pq.kmeans import kmeans
from fairseq_quant_noise.quantization.table import make_table
from fairseq_quant_noise.quantization.targets import resolve_stages

X = torch.randn(5, 48, generator=torch.Generator().manual_seed(1))


def quantized(**plan):
    return quantize_(wide_net(), WIDE_PLAN | plan, progress=quiet)


def first(model):
    return next(iter(quantized_weights(model).values()))


@pytest.mark.parametrize("k", [257, 1000, 4096])
def test_k_means_finds_so_many_centroids_and_the_nearest_of_each_block(k):
    vectors = torch.randn(4 * k, 3, generator=torch.Generator().manual_seed(k))
    found = kmeans(vectors, k, iterations=3)
    assert found.centroids.shape == (k, 3)
    assert len(found.codes.unique()) > 0.95 * k
    assert torch.equal(found.codes.long(), nearest(vectors, found.centroids))
    assert found.sse < kmeans(vectors, 256, iterations=3).sse


def test_a_plan_may_ask_for_any_number_up_to_4096():
    for k in (2, 257, 4096):
        assert quantized_k(k) == k
    with refuses("n_centroids is 4097 .*; give at most 4096, codes of 12 bits"):
        quantized_k(4097)
    with pytest.raises(UserError, match="give at most 4096, codes of 12 bits"):
        Plan.of({"noise": [{"match": ".*", "p": 0.1, "kind": "pq", "n_centroids": 4097}]})


def quantized_k(k):
    model = torch.nn.Linear(256, 128)
    plan = Plan.of({"stages": [{"match": "", "block_size": 2, "n_centroids": k}]})
    (target,) = resolve_stages(plan, model)
    return target.n_centroids


def test_the_model_reads_the_centroids_of_its_codes_with_and_without_gradients():
    model = quantized().eval()
    weight = first(model)
    assert (weight.n_centroids, weight.codes.dtype) == (300, torch.int32)
    expected = weight.centroids.detach().half().float()[weight.codes.flatten().long()].view(weight.shape)
    with torch.no_grad():
        assert torch.equal(weight.decode(), expected)
        assert torch.equal(decode(weight.codes, weight.stored_centroids()), expected)
        score = model(X)
    assert torch.allclose(model(X), score, atol=1e-5)
    weight.train().decode().backward(torch.rand(weight.shape))
    assert weight.centroids.grad.abs().sum(1).gt(0).all()


@pytest.mark.parametrize("dtype", ["fp16", "int8"])
def test_a_file_gives_the_same_scores_and_the_sizes_that_were_planned(dtype, tmp_path):
    plan = WIDE_PLAN | {"centroids": {"dtype": dtype}}
    model = quantized(centroids={"dtype": dtype}).eval()
    save(model, tmp_path / "model.safetensors", plan)
    with torch.no_grad():
        assert torch.equal(load(tmp_path / "model.safetensors", into=wide_net()).eval()(X), model(X))
    packed = read(tmp_path / "model.safetensors")
    found = inspection(tmp_path / "model.safetensors", packed)
    assert (found["format_version"], packed.manifest.tensors["0.weight"].code_bits) == (6, 9)
    n, k, d, size = 48 * 64 // 2, 300, 2, {"fp16": 2, "int8": 1}[dtype]
    affine = 8 if dtype == "int8" else 0
    assert packed.tensor_bytes("0.weight") == n * 9 // 8 + k * d * size + affine
    planned = make_table(wide_net(), resolve_stages(Plan.of(plan), wide_net()))
    assert planned.paper_bytes == pytest.approx(found["paper_bytes"])


def test_a_file_of_256_centroids_keeps_its_version():
    few = {"stages": [{"match": ".*", "block_size": 2, "n_centroids": 256}]}
    manifest = pack(quantize_(wide_net(), few, progress=quiet)).manifest
    assert (manifest.format_version, manifest.tensors["0.weight"].code_bits) == (3, 8)


def test_a_code_beyond_the_centroids_is_refused_in_a_file_and_in_a_state(tmp_path):
    model = quantized()
    first(model).codes[0, 0] = 300
    save(model, tmp_path / "model.safetensors")
    with refuses("0.weight: damaged .a code beyond its 300 centroids", DamagedFileError):
        read(tmp_path / "model.safetensors")
    for wrong in (300, -1):
        first(model).codes[0, 0] = wrong
        with pytest.raises(RuntimeError, match="a code beyond its 300 centroids"):
            adopting(wide_net(), model.state_dict())


def test_a_state_goes_on_and_codes_have_one_type():
    model = quantized()
    state = model.state_dict()
    back = adopting(wide_net(), state)
    assert torch.equal(back(X), model(X))
    state["0.weight.codes"] = state["0.weight.codes"].long()  # as written by another program
    assert first(adopting(wide_net(), state)).codes.dtype == torch.int32


@pytest.mark.parametrize("share", [1.0, 0.25])
def test_codes_train(share):
    model = quantized(codes={"kind": "train", "share": share}).train()
    weight = first(model)
    assert type(weight) is LatentPQWeight
    with torch.no_grad():
        weight.latent_weight.copy_(torch.randn(weight.shape))
    before = weight.codes.clone()
    assert weight.encode_again(share) > 0
    assert weight.codes.dtype == torch.int32
    found = nearest(weight.blocks(), weight._centroids()).view_as(before)
    moved = weight.codes != before
    assert torch.equal(weight.codes[moved].long(), found[moved])
    assert share < 1 or torch.equal(weight.codes.long(), found)
    resumed = adopting(wide_net(), copy.deepcopy(model.state_dict())).train()
    assert torch.equal(first(resumed).codes, weight.codes)
    assert type(pack(model).manifest.tensors["0.weight"].format) is type(PQWeight)


def test_noise_has_such_codebooks_too():
    model = Read(wide_net()[0])
    rule = {"match": "part", "p": 1.0, "kind": "pq", "block_size": 2, "n_centroids": 300}
    seen = attach_noise(model, {"noise": [rule]}).train()()
    assert 256 < len(seen.detach().view(-1, 2).unique(dim=0)) <= 300
