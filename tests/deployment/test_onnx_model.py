"""ONNX models in onnxruntime: scores are those of the decoded weights, for any batch and length, from codes."""

from dataclasses import replace

import pytest
import torch
from exported import LM, PAD, ROBERTA, TRANSLATION, WORDS, decoded, packed_file, runtime, scores, session, texts
from lm_cases import CASES

from fairseq_quant_noise import load
from fairseq_quant_noise.artifact import Packed, read
from fairseq_quant_noise.cli.main import main
from fairseq_quant_noise.deployment import onnx_model

onnx = pytest.importorskip("onnx", reason="onnx is not installed")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")


def pq(block_size, **keys):
    return {"stages": [{"match": ".*", "block_size": block_size, "n_centroids": 16, **keys}]}


FORMATS = {
    "int8": {"stages": [{"match": ".*", "scheme": "int8"}]},
    "int3 by histogram": {"stages": [{"match": ".*", "scheme": "int3", "range": "histogram"}]},
    "int4 by channel": {"stages": [{"match": ".*", "scheme": "int4", "range": "channel"}]},
    "int8 centroids": pq(4) | {"centroids": {"dtype": "int8"}},
    "shared codebooks": pq(4, codebook="shared"),
    "shared int8 codebooks": pq(4, codebook="shared") | {"centroids": {"dtype": "int8"}},
    "codes of 9 bits": {"stages": [{"match": "decoder.embed_tokens", "block_size": 1, "n_centroids": 300}]},
    "dense": {"stages": [{"match": "decoder.layers.0.fc1", "scheme": "int8"}]},
    "dense in fp16": {"stages": [{"match": "decoder.layers.0.fc1", "scheme": "int8"}], "dense": "fp16"},
}


def same(found, expected, words=None):
    """Within 1e-4 where `words` is true; scores that make a difference."""
    words = torch.ones(expected.shape[:1], dtype=torch.bool) if words is None else words
    assert found.shape == expected.shape
    assert expected[words].std() > 0.01
    torch.testing.assert_close(found[words], expected[words], rtol=0, atol=1e-4)


def check_texts(path, part=None, longest=None):
    network, model = load(path), session(path, part)
    for tokens in texts():
        tokens = tokens[:, :longest]
        expected = decoded(network, tokens, *filter(None, [part]))
        same(scores(model, tokens=tokens), expected, tokens.ne(PAD) if part is None else None)


@pytest.mark.parametrize("case", CASES)
def test_a_language_model_scores_as_it_does_in_torch(case, tmp_path):
    options = {**LM, "share_decoder_input_output_embed": False, **CASES[case]}
    check_texts(packed_file(tmp_path, options=options, plan=pq(2)))


@pytest.mark.parametrize("plan", FORMATS)
def test_every_format_of_a_weight_is_decoded_as_in_torch(plan, tmp_path):
    check_texts(packed_file(tmp_path, plan=FORMATS[plan]))


def test_positions_of_a_long_text_are_as_exact(tmp_path):
    path = packed_file(tmp_path)
    tokens = torch.randint(4, WORDS, (1, 1500), generator=torch.Generator().manual_seed(0))
    same(scores(session(path), tokens=tokens), decoded(load(path), tokens))


@pytest.mark.parametrize("part", [None, "mnli", "other"])
def test_a_roberta_scores_words_or_the_classes_of_a_head(part, tmp_path):
    check_texts(packed_file(tmp_path, "roberta", ROBERTA), part, longest=20)


@pytest.mark.parametrize(
    "changed", [{}, {"encoder_learned_pos": True, "decoder_learned_pos": True}], ids=["sines", "learned"]
)
def test_a_translation_s_encoder_and_decoder_together_score_as_the_model(changed, tmp_path):
    path = packed_file(tmp_path, "transformer", TRANSLATION | changed)
    network, encoder, decoder = load(path), session(path, "encoder"), session(path, "decoder")
    for tokens in texts():
        source = tokens.flip(1)[:, :11]  # padded on the left
        source[:, -1] = 2
        memory = scores(encoder, source=source)
        found = scores(decoder, tokens=tokens, memory=memory, source=source)
        same(found, decoded(network, source, tokens), tokens.ne(PAD))


@pytest.mark.parametrize("plan", ["pq", "int8"])
def test_an_efficientnet_scores_images_of_any_size(plan, tmp_path):
    pytest.importorskip("timm")
    options = {"num_classes": 5, "width": 0.1, "depth": 0.6}
    plan = FORMATS["int8"] if plan == "int8" else {"stages": [{"match": "blocks.*conv_pwl?", "block_size": 4}]}
    path = packed_file(tmp_path, "quant_noise_efficientnet", options, plan)
    network, model = load(path), session(path)
    for shape in ((1, 3, 64, 64), (2, 3, 50, 34)):
        images = torch.randn(shape)
        same(scores(model, images=images), decoded(network, images))


def test_inputs_are_rounded_where_the_file_says_so(tmp_path):
    """A number on the border between two codes may fall to the other side: so most scores are asked for, not all."""
    plan = FORMATS["int8"] | {"activations": {"range": "tensor"}}
    path = packed_file(tmp_path, plan=plan, calibration=[texts()[3]])
    packed, tokens = read(path), texts()[2]
    expected = decoded(load(path), tokens)
    plain = onnx_model(path, Packed(packed.tensors, replace(packed.manifest, inputs={})))
    found, unrounded = scores(session(path), tokens=tokens), scores(runtime(plain), tokens=tokens)
    assert ((found - expected).abs() < 1e-4).float().mean() > 0.9
    assert ((unrounded - expected).abs() < 1e-4).float().mean() < 0.1


def test_layers_that_share_weights_store_them_once(tmp_path):
    path = packed_file(tmp_path, options=LM | {"decoder_layers": 4, "share_layers": 2})
    check_texts(path)
    graph = onnx.load_model_from_string(onnx_model(path, read(path))).graph
    stored = {initializer.name for initializer in graph.initializer}
    assert [i for i in range(4) if f"decoder.layers.{i}.fc1.weight.centroids" in stored] == [0, 2]


def test_dense_tensors_in_half_precision_stay_so(tmp_path):
    path = packed_file(tmp_path, half=True)
    check_texts(path)
    graph = onnx.load_model_from_string(onnx_model(path, read(path))).graph
    assert {i.data_type for i in graph.initializer if i.name.endswith("bias.stored")} == {onnx.TensorProto.FLOAT16}


def test_the_model_holds_codes_and_centroids_and_is_about_as_small(tmp_path):
    path = packed_file(tmp_path, options=LM | {"decoder_embed_dim": 128, "decoder_ffn_embed_dim": 512})
    content = onnx_model(path, read(path))
    model = onnx.load_model_from_string(content)
    onnx.checker.check_model(model, full_check=True)
    types = {i.name: i.data_type for i in model.graph.initializer}
    assert len(content) < path.stat().st_size + 30_000  # what the graph takes
    assert types["decoder.embed_tokens.weight.codes.packed"] == onnx.TensorProto.UINT8
    assert types["decoder.embed_tokens.weight.centroids"] == onnx.TensorProto.FLOAT16
    assert not any(name.startswith("decoder.output_projection") for name in types)  # it is tied
    assert content == onnx_model(path, read(path))


def test_onnxruntime_1_17_has_every_operator_of_a_language_model(tmp_path):
    """It has no Trilu of truth values, by which a mask was made once; found by running the models in it."""
    path = packed_file(tmp_path)
    used = {node.op_type for node in onnx.load_model_from_string(onnx_model(path, read(path))).graph.node}
    assert "Trilu" not in used


def test_a_row_of_padding_alone_has_scores_and_leaves_the_others_theirs(tmp_path):
    """A mask of large negative numbers needs no look for NaN, which cost 7 % of a RoBERTa's time."""
    path, tokens = packed_file(tmp_path), texts()[2]
    tokens[1] = PAD
    content = onnx_model(path, read(path))
    found = scores(runtime(content), tokens=tokens)
    assert found.isfinite().all()
    same(found[:1], decoded(load(path), tokens)[:1])
    assert "IsNaN" not in {node.op_type for node in onnx.load_model_from_string(content).graph.node}


def test_the_verb_writes_the_model(tmp_path, capsys):
    path, out = packed_file(tmp_path), tmp_path / "model.onnx"
    main(["export-onnx", str(path), "--out", str(out)])
    assert out.read_bytes() == onnx_model(path, read(path))
    assert "model.onnx: 0.0" in capsys.readouterr().out
