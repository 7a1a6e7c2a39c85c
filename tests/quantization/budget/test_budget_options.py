"""The ways to store a weight: their bytes, and the order of their predicted losses."""

import pytest
import torch
from torch import nn
from toys import Tied, refuses, zoo

from fairseq_quant_noise.artifact import pack
from fairseq_quant_noise.quantization.budget import options
from fairseq_quant_noise.quantization.budget.options import DENSE, PQ, Option, ways
from fairseq_quant_noise.quantization.budget.pricing import price, unpriced
from fairseq_quant_noise.quantization.quantize import quantize_


def linear(rows=256, inputs=64):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(inputs, rows, bias=False))


def stage(option):
    """The stage of a plan that stores a weight so."""
    pq = {"block_size": option.block_size, "n_centroids": option.n_centroids}
    pq["centroids"] = {16: "fp16", 8: "int8"}[option.centroid_bits]
    return {"match": ".*", "scheme": option.scheme, **(pq if option.scheme == PQ else {"range": options.RANGE})}


def test_bytes_are_those_of_the_packed_file():
    found = list(ways((256, 64)))
    assert {option.scheme for option in found} == {PQ, *options.INTEGERS, DENSE}
    for option in found[:-1]:
        packed = pack(quantize_(linear(), {"stages": [stage(option)]}))
        assert option.bytes == packed.tensor_bytes("0.weight"), option
    assert found[-1] == Option(DENSE, bytes=2 * 256 * 64)  # in fp16


@pytest.mark.parametrize(
    ("shape", "sizes"),
    [((1024, 24), {2, 4, 8}), ((1024, 16, 3, 3), {9}), ((1024, 64, 1, 1), {2, 4, 8, 16}), ((4096, 7), set())],
)
def test_block_sizes_are_those_that_divide_and_a_convolution_s_own(shape, sizes):
    assert {option.block_size for option in ways(shape) if option.scheme == PQ} == sizes


def test_a_small_weight_has_no_more_centroids_than_it_feeds():
    """64 blocks of 16 feed 16 centroids, 512 blocks of 2 feed 64."""
    counts = {(option.block_size, option.n_centroids) for option in ways((64, 16)) if option.scheme == PQ}
    assert counts == {(2, 16), (2, 64), (4, 16), (4, 64), (8, 16), (16, 16)}


def test_more_bits_lose_less():
    (priced,) = price(linear(), {})
    for size in options.BLOCK_SIZES:
        losses = [option.loss for option in priced.plain if option.block_size == size]
        assert losses == sorted(losses, reverse=True)
        assert len(set(losses)) == len(losses)
    *integers, dense = [option.loss for option in priced.options if option.scheme != PQ]
    assert [*integers, dense] == sorted(integers, reverse=True) + [0.0]


def test_a_codebook_that_weighs_much_may_have_8_bits():
    """Which cost a little, and save half of its bytes but for a scale and a zero point."""
    assert {option.n_centroids for option in ways((8192, 2048))} == {*options.CENTROIDS, None}
    assert all(option.centroid_bits == 16 for option in ways((8192, 2048)))
    (priced,) = price(linear(), {})
    of = {(o.block_size, o.n_centroids, o.centroid_bits): o for o in priced.options if o.scheme == PQ}
    small, large = of[8, 256, 8], of[8, 256, 16]
    assert large.bytes - small.bytes == 8 * 256 - 8
    assert small.loss == pytest.approx(large.loss, rel=0.05)


def kin(count=4):
    """Layers alike, which one codebook suits as well as their own."""
    torch.manual_seed(0)
    return nn.ModuleList([nn.Linear(64, 64, bias=False) for _ in range(count)])


def test_weights_of_a_kind_may_share_a_codebook():
    """The bytes are those of the codes; the losses are those of one codebook for all."""
    found = price(kin(), {})
    for one in found:
        by = {option.codebook: option for option in one.shared}
        own = {option.codebook: option for option in one.options if option.scheme == PQ}
        assert by[4, 256, 16].bytes == 64 * 64 // 4
        assert by[4, 64, 16].loss > own[4, 64, 16].loss  # what has 4096 numbers to fit fits them better
    model = kin()
    stage = {"match": ".*", "block_size": 4, "n_centroids": 256, "codebook": "shared"}
    quantize_(model, {"stages": [stage]})
    error = sum(float((a.weight - b.weight).detach().square().sum()) for a, b in zip(kin(), model, strict=True))
    squares = sum(float(a.weight.detach().square().sum()) for a in kin())
    predicted = sum(next(o.loss for o in one.shared if o.codebook == (4, 256, 16)) for one in found)
    assert predicted == pytest.approx(error / (1 - error / squares) ** 2, rel=0.05)


def test_a_large_network_has_no_codebooks_to_share():
    model = nn.ModuleList([nn.Linear(2048, 8192, bias=False, device="meta") for _ in range(2)])
    assert all(not one.shared and one.plain == list(one.options) for one in unpriced(model))


def test_small_errors_cost_what_they_are_weighed_by():
    model = linear()
    h = torch.rand(256, 64)
    (priced,) = price(model, {"0.weight": h})
    int8 = next(option for option in priced.options if option.scheme == "int8")
    before = model[0].weight.detach().clone()
    quantize_(model, {"stages": [stage(int8)]})
    error = float((h * (model[0].weight.detach() - before).square()).sum())
    assert int8.loss == pytest.approx(error, rel=1e-3)


def test_a_row_that_no_gradient_has_reached_counts_as_the_others_do():
    """After a fine-tuning on 5,749 sentences, those are two thirds of a vocabulary; evaluation has such words."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Embedding(256, 64))
    few = torch.zeros(256, 64)
    few[::4] = 0.5
    (all_seen,), (few_seen,) = price(model, {"0.weight": torch.full((256, 64), 0.5)}), price(model, {"0.weight": few})
    assert [option.loss for option in few_seen.options] == [option.loss for option in all_seen.options]


def test_large_errors_cost_more_than_their_squares():
    (priced,) = price(linear(), {})
    coarse = next(option for option in priced.options if (option.block_size, option.n_centroids) == (16, 16))
    assert coarse.loss > 2 * float(linear()[0].weight.square().sum())


def test_a_weight_without_importance_counts_as_the_others_on_average():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 64), nn.Linear(64, 64))
    both = price(model, {"0.weight": torch.full((64, 16), 3.0)})[1]
    alike = price(model, {})[1]
    assert [option.loss for option in both.options] == pytest.approx([3 * option.loss for option in alike.options])


def test_rows_of_a_large_weight_stand_for_all(monkeypatch):
    model, h = linear(2048), torch.rand(2048, 64)
    h[:1024] *= 20
    (whole,) = price(model, {"0.weight": h})
    monkeypatch.setattr(options, "SAMPLE", 1 << 15)
    (part,) = price(model, {"0.weight": h})
    for one, other in zip(whole.options, part.options, strict=True):
        assert one.bytes == other.bytes
        if one.block_size in (None, 2) and one.n_centroids != 256:  # a sample this small suits more centroids
            assert one.loss == pytest.approx(other.loss, rel=0.1)
    assert whole.options != part.options


def test_prices_repeat_and_leave_the_model_as_it_is():
    model = zoo()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = [[one.options for one in price(model, {})] for _ in range(2)]
    assert found[0] == found[1]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_tied_weights_are_one():
    assert [one.weight.name for one in price(Tied(), {})] == ["emb"]


def test_a_weight_that_is_not_finite_is_named():
    model = linear()
    model[0].weight.data[3, 3] = torch.nan
    with refuses("^0: the weight holds NaN or infinity"):
        price(model, {})
