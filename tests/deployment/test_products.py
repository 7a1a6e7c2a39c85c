"""`export-onnx --products`: the products by weights in integers, in whole numbers."""

from collections import Counter

import pytest
import torch
from exported import LM, PAD, ROBERTA, TRANSLATION, decoded, packed_file, runtime, scores, texts
from toys import refuses

from fairseq_quant_noise import load
from fairseq_quant_noise.artifact import read
from fairseq_quant_noise.cli.main import PRODUCTS as CHOICES
from fairseq_quant_noise.cli.main import main
from fairseq_quant_noise.deployment import onnx_model
from fairseq_quant_noise.deployment.products import PRODUCTS

onnx = pytest.importorskip("onnx", reason="onnx is not installed")
onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")

CENTROIDS = {"stages": [{"match": ".*", "block_size": 4, "n_centroids": 16}], "centroids": {"dtype": "int8"}}
ROUNDED = {"activations": {"range": "tensor"}}
ENCODER = r"encoder\.sentence_encoder\..*"


def ints(bits, match=".*", **keys):
    return {"stages": [{"match": match, "scheme": f"int{bits}", **keys}]}


def model_of(path, products, part=None):
    return onnx_model(path, read(path), part, products)


def nodes(content):
    """How many nodes of each operator there are."""
    return Counter(node.op_type for node in onnx.load_model_from_string(content).graph.node)


def fused(content, folder):
    """The same, of the graph that onnxruntime makes of it."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = str(folder / "optimized.onnx"), 3
    onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    return nodes((folder / "optimized.onnx").read_bytes())


def in_torch(network, tokens, *part):
    """Scores with products in whole numbers, where there are compiled kernels."""
    with torch.inference_mode():
        return network(tokens, *part)


def largest(found, expected, words):
    """The largest difference of a score, in units of the scores' standard deviation."""
    return ((found - expected)[words].abs().max() / expected[words].std()).item()


@pytest.mark.parametrize(
    "plan",
    [ints(8), ints(8, range="channel"), ints(6), ints(4), CENTROIDS],
    ids=["int8", "int8 by channel", "int6", "int4", "int8 centroids"],
)
def test_a_language_model_with_rounded_inputs_scores_as_in_torch(plan, tmp_path):
    path = packed_file(tmp_path, plan=plan | ROUNDED, calibration=[texts()[3]])
    content, tokens = model_of(path, "int8"), texts()[2]
    network, found, words = load(path), scores(runtime(content), tokens=tokens), tokens.ne(PAD)
    for expected in (decoded(network, tokens), in_torch(network, tokens)):
        torch.testing.assert_close(found[words], expected[words], rtol=0, atol=1e-4)
    assert fused(content, tmp_path)["MatMulIntegerToFloat"] == 13


def test_a_roberta_with_rounded_inputs_scores_as_in_torch(tmp_path):
    path = packed_file(
        tmp_path, "roberta", ROBERTA, ints(8, ENCODER) | ROUNDED, calibration=[texts()[3][:, :20], texts()[2]]
    )
    content, tokens = model_of(path, "int8", "mnli"), texts()[2]
    torch.testing.assert_close(
        scores(runtime(content), tokens=tokens), in_torch(load(path), tokens, "mnli"), rtol=0, atol=1e-4
    )
    assert fused(content, tmp_path)["MatMulIntegerToFloat"] == 12


def test_a_product_whose_input_a_file_with_rounded_inputs_does_not_round_stays_in_float(tmp_path):
    """Those by the words of a RoBERTa, which torch multiplies in float too."""
    path = packed_file(
        tmp_path, "roberta", ROBERTA, ints(8, ENCODER) | ROUNDED, calibration=[texts()[3][:, :20], texts()[2]]
    )
    tokens = texts()[2]
    found, expected = scores(runtime(model_of(path, "int8")), tokens=tokens), in_torch(load(path), tokens)
    torch.testing.assert_close(found[tokens.ne(PAD)], expected[tokens.ne(PAD)], rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("plan", "products", "operator", "count"),
    [
        (ints(8), "int8", "MatMulInteger", 13),
        (ints(8, range="channel"), "int8", "MatMulInteger", 13),
        (ints(3), "int8", "MatMulInteger", 13),
        (CENTROIDS, "int8", "MatMulInteger", 13),
        (ints(8), "int4", "MatMulInteger", 13),
        (ints(4), "int4", "MatMulNBits", 13),
        (ints(4, range="channel"), "int4", "MatMulNBits", 13),
        (ints(4), "int8", "MatMulInteger", 13),
        (ints(4), "float", "MatMulNBits", 0),
    ],
)
def test_other_files_have_their_inputs_rounded_as_they_come(plan, products, operator, count, tmp_path):
    path, tokens = packed_file(tmp_path, plan=plan), texts()[2]
    content, expected = model_of(path, products), decoded(load(path), tokens)
    found = scores(runtime(content), tokens=tokens)
    difference = largest(found, expected, tokens.ne(PAD))
    assert nodes(content)[operator] == count
    assert difference < 1e-5 if products == "float" else 1e-4 < difference < 0.1


def test_a_head_s_classes_are_products_in_whole_numbers_too(tmp_path):
    """They multiply rows (B, C) and add a bias in one operator, Gemm."""
    path, tokens = packed_file(tmp_path, "roberta", ROBERTA, ints(8)), texts()[2]
    content, expected = model_of(path, "int8", "mnli"), decoded(load(path), tokens, "mnli")
    found = scores(runtime(content), tokens=tokens)
    assert (nodes(content)["MatMulInteger"], nodes(content)["Gemm"]) == (14, 0)
    assert 1e-4 < largest(found, expected, slice(None)) < 0.1


def test_a_translation_with_rounded_inputs_scores_as_in_torch_in_steps_and_whole(tmp_path):
    tokens, source = texts()[1], texts()[2][:1, :9]
    path = packed_file(
        tmp_path,
        "transformer",
        TRANSLATION,
        ints(8) | ROUNDED,
        calibration=[{"src_tokens": source, "prev_output_tokens": tokens}],
    )
    network, past = load(path), load(path).decoder.new_past(1)
    memory = scores(runtime(model_of(path, "int8", "source")), source=source)
    found = scores(runtime(model_of(path, "int8", "step")), tokens=tokens, past=past, memory=memory, source=source)
    with torch.inference_mode():
        expected = network(source, tokens)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    encoded = scores(runtime(model_of(path, "int8", "encoder")), source=source)
    whole = scores(runtime(model_of(path, "int8", "decoder")), tokens=tokens, memory=encoded, source=source)
    torch.testing.assert_close(whole, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("width", [16, 24, 136], ids="{} inputs".format)
@pytest.mark.parametrize("range_", ["tensor", "channel"])
def test_int4_rows_of_any_length_are_cut_into_blocks(width, range_, tmp_path):
    """With inputs that the file rounds, so that the products by them are in float, and exact."""
    options = LM | {"decoder_embed_dim": width, "decoder_ffn_embed_dim": width + 4}
    path = packed_file(tmp_path, options=options, plan=ints(4, range=range_) | ROUNDED, calibration=[texts()[3]])
    content, tokens = model_of(path, "int4"), texts()[1]
    assert nodes(content)["MatMulNBits"] == 13
    torch.testing.assert_close(scores(runtime(content), tokens=tokens), decoded(load(path), tokens), rtol=0, atol=1e-4)


def test_onnxruntime_fuses_the_products_of_inputs_that_are_rounded_as_they_come(tmp_path):
    """One rounding for queries, keys and values."""
    found = fused(model_of(packed_file(tmp_path, plan=ints(8)), "int8"), tmp_path)
    assert (found["MatMulIntegerToFloat"], found["DynamicQuantizeMatMul"]) == (6, 7)
    assert found["DynamicQuantizeLinear"] == 2


@pytest.mark.parametrize(("bits", "products"), [(8, "int8"), (4, "int8"), (4, "int4")])
def test_words_that_are_tied_to_their_embedding_are_stored_once(bits, products, tmp_path):
    path = packed_file(tmp_path, options=LM | {"decoder_embed_dim": 128}, plan=ints(bits))
    content = model_of(path, products)
    onnx.checker.check_model(onnx.load_model_from_string(content), full_check=products != "int4")
    assert len(content) < path.stat().st_size + 25_000
    assert content == model_of(path, products)


@pytest.mark.parametrize("plan", [ints(8), ints(3, range="channel"), CENTROIDS], ids=["int8", "int3", "centroids"])
def test_an_embedding_stays_in_codes_in_the_graph_that_runs(plan, tmp_path):
    """Else its dense form would be most of the memory that a large vocabulary takes."""
    options = LM | {"share_decoder_input_output_embed": False, "decoder_embed_dim": 40}
    path = packed_file(tmp_path, options=options, plan=plan)
    fused(model_of(path, "float"), tmp_path)
    stored = onnx.load(tmp_path / "optimized.onnx").graph.initializer
    dense = [i for i in stored if i.data_type == onnx.TensorProto.FLOAT and {*i.dims} == {60, 40}]
    assert len(dense) == 1  # the output's


def test_the_verb_takes_products(tmp_path):
    path, out = packed_file(tmp_path, plan=ints(8)), tmp_path / "model.onnx"
    main(["export-onnx", str(path), "--out", str(out), "--products", "int8"])
    assert out.read_bytes() == model_of(path, "int8")
    assert CHOICES == PRODUCTS


def test_other_products_are_refused(tmp_path):
    with refuses("^products 'int7' are none of float, int8, int4; give one of them$"):
        model_of(packed_file(tmp_path), "int7")
