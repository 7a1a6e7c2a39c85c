"""A plan applied to a model: a row a tensor, by the paper's accounting, without memory."""

import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn
from toys import ZOO_PLAN, Tied, Zoo, quiet, refuses, zoo

from fairseq_quant_noise.accounting import MIB, pq_bytes
from fairseq_quant_noise.errors import UserError
from fairseq_quant_noise.networks.registry import meta_model
from fairseq_quant_noise.plan.plan import Plan
from fairseq_quant_noise.quantization.quantize import quantize_
from fairseq_quant_noise.quantization.table import make_table, model_bytes
from fairseq_quant_noise.quantization.targets import resolve_stages

WIKITEXT = Path(__file__).parents[2] / "configs/plans/wikitext103.yaml"
#: fairseq's transformer_lm_wiki103: the paper's language model.
WIKITEXT_LM = {
    "decoder_layers": 16,
    "decoder_embed_dim": 1024,
    "decoder_ffn_embed_dim": 4096,
    "decoder_attention_heads": 8,
    "decoder_normalize_before": True,
    "no_decoder_final_norm": True,
    "adaptive_input": True,
    "adaptive_input_cutoff": "20000,60000",
    "adaptive_input_factor": 4,
    "adaptive_softmax_cutoff": "20000,60000",
    "adaptive_softmax_factor": 4,
    "tie_adaptive_weights": True,
    "tie_adaptive_proj": True,
}


def table(model, plan):
    return make_table(model, resolve_stages(Plan.of(plan), model))


def stage(match, **settings):
    return {"match": match, **settings}


@pytest.fixture(scope="module")
def paper():
    model = meta_model("quant_noise_transformer_lm", WIKITEXT_LM, 267744)
    return model, table(model, WIKITEXT)


def test_the_papers_language_model_has_its_sizes(paper):
    """Table 1 of the paper: 942 MiB and 38 MiB."""
    _, found = paper
    assert found.parameters == 246_933_504
    assert found.dense_bytes / MIB == pytest.approx(941.98, abs=0.005)
    assert found.paper_bytes / MIB == pytest.approx(38.66, abs=0.005)


@pytest.mark.parametrize(("scheme", "mib"), [("int8", 235.5), ("int4", 117.7)])
@pytest.mark.parametrize("range_", ["tensor", "channel", "histogram"])
def test_the_papers_language_model_in_n_bits_has_its_sizes(paper, scheme, mib, range_):
    """Table 1 of the paper: 236 and 118 MB, which counts biases and norms in N bits too."""
    found = table(paper[0], {"stages": [stage(".*", scheme=scheme, range=range_)]})
    assert round(found.paper_bytes / MIB, 1) == mib
    assert found.paper_bytes == found.parameters * int(scheme[3:]) / 8


def test_where_schemes_are_mixed_the_rest_counts_in_fp32(paper):
    """The tables of words in int8, the rest of the weights by pq with int8 centroids."""
    plan = {
        "stages": [stage(r".*embed_tokens\.embeddings\..*", scheme="int8"), stage(r".*layers\..*")],
        "centroids": {"dtype": "int8"},
    }
    rows = [r for r in table(paper[0], plan).rows if not r.tied_to]
    for row in rows:
        n = math.prod(row.shape)
        expected = {"int8": n, "pq": n / 8 + 256 * 8, "dense": 4 * n}[row.scheme]
        assert row.bytes == expected
    assert {r.scheme for r in rows} == {"int8", "pq", "dense"}


def test_its_sizes_cost_no_memory(paper):
    assert all(p.is_meta for p in paper[0].parameters())


def test_its_ties_are_counted_once(paper):
    model, found = paper
    tied = {r.name: r for r in found.rows if r.tied_to}
    head = tied["decoder.adaptive_softmax.head.word_proj.weight"]
    assert (head.tied_to, head.bytes, head.scheme) == ("decoder.embed_tokens.embeddings.0.0.weight", 0.0, "pq")
    assert len(tied) == 5  # three bands of words, and the projections of the two tails
    assert found.parameters == sum(p.numel() for p in model.parameters())


def test_a_weight_is_counted_by_hand():
    """512 x 16 in blocks of 8: 1024 blocks of one byte, 256 centroids of 8 halves; the bias in fp32."""
    model = nn.ModuleDict({"fc": nn.Linear(16, 512)})
    weight, bias = table(model, {"stages": [stage("fc")]}).rows
    assert (weight.name, weight.scheme, weight.shape) == ("fc.weight", "pq", (512, 16))
    assert (weight.block_size, weight.n_centroids) == (8, 256)
    assert weight.bytes == 1024 + 256 * 8 * 2
    assert (bias.name, bias.scheme, bias.bytes) == ("fc.bias", "dense", 4 * 512)


@pytest.mark.parametrize(("k", "bits"), [(256, 8), (16, 4), (2, 1), (1, 0)])
def test_a_code_costs_log2_k_bits(k, bits):
    assert pq_bytes(1000, 4, k) == 1000 * bits / 8 + k * 4 * 2


@pytest.mark.parametrize("bits", range(2, 9))
def test_a_number_of_n_bits_takes_n_bits(bits):
    weight = table(zoo(), {"stages": [stage("fc", scheme=f"int{bits}")]}).rows
    fc = next(row for row in weight if row.name == "fc.weight")
    assert (fc.scheme, fc.bytes, fc.block_size, fc.n_centroids) == (f"int{bits}", 64 * bits / 8, None, None)


def test_biases_count_in_n_bits_only_where_every_weight_has_one_scheme():
    model = nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Linear(8, 8)})
    plans = {
        "one": [stage(".*", scheme="int4")],
        "two": [stage("a", scheme="int4"), stage("b", scheme="int8")],
        "part": [stage("a", scheme="int4")],
    }
    sizes = {name: table(model, {"stages": stages}).paper_bytes for name, stages in plans.items()}
    assert sizes == {"one": 144 / 2, "two": 32 + 64 + 64, "part": 32 + 4 * 64 + 64}


def test_a_weight_of_few_blocks_gets_fewer_centroids():
    """At least four blocks a centroid: 24 blocks, 4 centroids."""
    target = resolve_stages(Plan.of({"stages": [stage("emb", block_size=4)]}), Tied())[0]
    assert target.n_centroids == 4


def test_a_model_without_a_plan_is_dense():
    found = table(zoo(), {})
    assert {r.scheme for r in found.rows} == {"dense"}
    assert found.paper_bytes == found.dense_bytes == 4 * sum(p.numel() for p in Zoo().parameters())


@pytest.mark.upstream(8)
def test_a_tied_projection_has_a_row_and_no_bytes():
    emb, out = table(Tied(), {"stages": [stage("emb")]}).rows
    assert (out.name, out.tied_to, out.bytes) == ("out.weight", "emb.weight", 0.0)
    assert (out.scheme, out.block_size, out.n_centroids) == (emb.scheme, emb.block_size, emb.n_centroids)


def test_a_model_that_is_one_layer_is_counted():
    found = table(nn.Linear(8, 64), {"stages": [stage(".*", block_size=4)]})
    assert found.rows[0].scheme == "pq"


def test_the_dictionary_has_the_keys_of_plan_json():
    found = json.loads(json.dumps(table(zoo(), ZOO_PLAN).to_dict()))
    assert found.keys() >= {"dense_bytes", "paper_bytes", "ratio", "tensors"}
    assert found["ratio"] == pytest.approx(found["dense_bytes"] / found["paper_bytes"])
    fields = {"name", "scheme", "shape", "block_size", "n_centroids", "bytes", "tied_to"}
    assert all(row.keys() >= fields for row in found["tensors"])


def test_the_sizes_of_the_quantized_model_are_those_of_the_dry_run():
    model = zoo()
    found = table(model, ZOO_PLAN)
    assert model_bytes(model) == (found.dense_bytes, found.dense_bytes)
    quantize_(model, ZOO_PLAN, progress=quiet)
    now, dense = model_bytes(model)
    assert now == pytest.approx(found.paper_bytes)
    assert dense == found.dense_bytes


def test_what_stays_dense_counts_two_bytes_in_fp16():
    model, plan = zoo(), ZOO_PLAN | {"dense": "fp16"}
    targets = resolve_stages(Plan.of(plan), model)
    full, half = make_table(model, targets), make_table(model, targets, dense_bits=16)
    rest = sum(math.prod(row.shape) for row in full.rows if row.scheme == "dense" and row.tied_to is None)
    assert full.paper_bytes - half.paper_bytes == 2 * rest > 0
    assert full.dense_bytes == half.dense_bytes
    quantize_(model, plan, progress=quiet)
    assert model_bytes(model, 16) == pytest.approx((half.paper_bytes, half.dense_bytes))


class UsesAWeightUnderAnotherName(nn.Module):
    """A decoder whose output matrix is the embedding's Parameter, kept as `out_weight`."""

    def __init__(self):
        super().__init__()
        self.emb = nn.Embedding(16, 8)
        self.out_weight = self.emb.weight


@pytest.mark.upstream(8)
def test_a_tie_under_another_name_is_kept_and_counted_once_or_refused():
    model, plan = UsesAWeightUnderAnotherName(), {"stages": [stage("emb", block_size=4)]}
    try:
        counted = table(model, plan).paper_bytes
        quantize_(model, plan, progress=quiet)
    except UserError:
        return
    assert model_bytes(model)[0] == pytest.approx(counted)


# Stages


def test_targets_come_in_the_models_order_with_their_stage():
    targets = resolve_stages(Plan.of(ZOO_PLAN), zoo())
    projections = [(f"attn.{p}_proj", 0, 4) for p in ("q", "k", "v", "out")]
    found = [(t.weight.name, t.stage, t.block_size) for t in targets]
    assert found == [("emb", 1, 8), *projections, ("fc", 0, 4), ("conv", 2, 9)]


def test_two_stages_for_one_weight_are_refused_with_both():
    plan = Plan.of({"stages": [stage("f.*", block_size=4), stage(".c", block_size=4)]})
    with refuses(r"fc: matched by two stages, 'f\.\*' and '\.c'; narrow one of them"):
        resolve_stages(plan, zoo())


def test_a_stage_that_matches_nothing_is_refused():
    with refuses("stage rule 'fc9' matches no weight of this model"):
        resolve_stages(Plan.of({"stages": [stage("fc9")]}), zoo())


@pytest.mark.upstream(8)
def test_a_stage_cannot_name_a_tied_copy():
    with refuses("stage rule 'out' matches no weight"):
        resolve_stages(Plan.of({"stages": [stage("out")]}), Tied())


def test_a_block_size_that_does_not_divide_is_refused():
    with refuses(r"fc: blocks of 3 do not divide a weight of shape \(8, 8\); choose a block_size of 1, 2, 4, 8"):
        resolve_stages(Plan.of({"stages": [stage("fc", block_size=3)]}), zoo())


def test_nothing_is_changed_by_a_dry_run():
    model = zoo()
    state = {name: t.clone() for name, t in model.state_dict().items()}
    table(model, ZOO_PLAN)
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())
    assert math.prod(model.fc.weight.shape) == 64
