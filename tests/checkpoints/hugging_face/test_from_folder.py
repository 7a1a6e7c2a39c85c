"""A Hugging Face folder becomes a fairseq checkpoint that computes the same; what cannot map is refused by name."""

import json
import pickle

import pytest
import torch
from hf_folders import POSITIONS, config, in_fairseq, logits, refusal, rows, tokens, weights, write_folder
from safetensors.torch import save_file

from fairseq_quant_noise.checkpoints.checkpoint import Checkpoint
from fairseq_quant_noise.checkpoints.hugging_face.from_folder import HEAD
from fairseq_quant_noise.cli.main import main
from fairseq_quant_noise.errors import UserError

KINDS = ("roberta", "xlm-roberta", "bert")
HEADS = ("words", "classes", None)


def convert(folder, out):
    main(["from-hf", str(folder), "--out", str(out)])
    return Checkpoint(out)


def numbered(kind, ids, folder):
    """Rows of a folder's words by fairseq's numbers; a RoBERTa's are the same."""
    return ids if kind == "roberta" else in_fairseq(kind, ids, folder / "dict.txt")


def ours(checkpoint, ids, head):
    with torch.no_grad():
        if head is None:
            return checkpoint.network.encoder.sentence_encoder(ids)
        return checkpoint.network(ids, HEAD if head == "classes" else None)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_network_computes_what_the_folders_does(tmp_path, kind, head):
    options = config(kind)
    state = weights(options, head)
    folder = write_folder(tmp_path / "folder", options, state)
    checkpoint = convert(folder, tmp_path / "out/model.pt")
    ids = rows(kind)
    found, expected = ours(checkpoint, numbered(kind, ids, tmp_path / "out"), head), logits(state, options, ids)
    if head == "words":  # fairseq's columns are in its own order
        columns = numbered(kind, torch.arange(len(tokens(kind)))[None], tmp_path / "out")[0]
        found = found[..., columns]
    if head != "classes":
        found, expected = (x[ids != options["pad_token_id"]] for x in (found, expected))
    assert expected.std() > 0.1
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "head", "changed", "tied"),
    [
        ("roberta", "words", {"layer_norm_eps": 1e-3}, True),
        ("roberta", "words", {}, False),
        ("bert", "words", {"hidden_act": "relu"}, True),
        ("bert", "words", {}, False),
        ("bert", "classes", {"hidden_act": "gelu_new"}, True),
        ("roberta", "classes", {"type_vocab_size": 3, "num_attention_heads": 2}, True),
        ("xlm-roberta", "classes", {"num_hidden_layers": 1, "vocab_size": 14}, True),
    ],
)
def test_options_of_the_folder_reach_the_network(tmp_path, kind, head, changed, tied):
    options = config(kind, **changed)
    state = weights(options, head, tied=tied)
    checkpoint = convert(write_folder(tmp_path / "folder", options, state), tmp_path / "model.pt")
    ids = rows(kind)
    found, expected = ours(checkpoint, numbered(kind, ids, tmp_path), head), logits(state, options, ids)
    if head == "words":
        found = found[..., numbered(kind, torch.arange(options["vocab_size"])[None], tmp_path)[0]]
        found, expected = (x[ids != options["pad_token_id"]] for x in (found, expected))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert checkpoint.state["args"].untie_weights_roberta is not tied


def test_old_files_give_the_same_checkpoint(tmp_path):
    """pytorch_model.bin with gamma and beta, buffers, a pooler that no head uses, half precision, the old tokenizer."""
    for kind in KINDS:
        options = config(kind)
        state = {name: tensor.half().float() for name, tensor in weights(options, "words").items()}
        new = convert(write_folder(tmp_path / kind, options, state), tmp_path / f"{kind}-new/model.pt")
        folder = write_folder(tmp_path / f"{kind}-old", options, {}, whole=False)
        (folder / "model.safetensors").unlink()
        prefix = "bert." if kind == "bert" else "roberta."
        old = {n.replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta"): t for n, t in state.items()}
        old |= {
            f"{prefix}embeddings.position_ids": torch.arange(4)[None],
            f"{prefix}pooler.dense.weight": torch.ones(16, 16),
        }
        torch.save(
            {name: t.half() if t.is_floating_point() else t for name, t in old.items()}, folder / "pytorch_model.bin"
        )
        again = convert(folder, tmp_path / f"{kind}-again/model.pt")
        assert new.weights.keys() == again.weights.keys()
        assert all(torch.equal(new.weights[name], again.weights[name]) for name in new.weights)
        names = ["dict.txt", *{"roberta": ("encoder.json", "vocab.bpe"), "bert": ("vocab.txt",)}.get(kind, ())]
        for name in names:
            assert (tmp_path / f"{kind}-new" / name).read_text() == (tmp_path / f"{kind}-again" / name).read_text()


def test_weights_in_several_files_are_read(tmp_path):
    options = config("roberta")
    state = weights(options, "words")
    folder = write_folder(tmp_path / "folder", options, state)
    one = convert(folder, tmp_path / "one.pt")
    (folder / "model.safetensors").unlink()
    names = sorted(state)
    parts = {"a.safetensors": names[:7], "b.safetensors": names[7:]}
    for file, part in parts.items():
        save_file({name: state[name] for name in part}, folder / file)
    index = {"weight_map": {name: file for file, part in parts.items() for name in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    two = convert(folder, tmp_path / "two.pt")
    assert all(torch.equal(one.weights[name], two.weights[name]) for name in one.weights)
    index["weight_map"][names[0]] = "../model.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(SystemExit, match="3"):
        convert(folder, tmp_path / "three.pt")


def test_what_is_left_out_and_the_options_to_train_with_are_said(tmp_path, capsys):
    options = config("bert")
    convert(write_folder(tmp_path / "folder", options, weights(options)), tmp_path / "model.pt")
    said = capsys.readouterr()
    assert "left out the pooler" in said.err
    assert "has no head for masked words" in said.err
    assert "--layer-norm-eps 1e-12" in said.err
    sizes = "--encoder-layers 2 --encoder-embed-dim 16 --encoder-ffn-embed-dim 24 --encoder-attention-heads 4"
    assert f"--arch quant_noise_roberta {sizes} --max-positions {POSITIONS} --layer-norm-eps 1e-12" in said.out


def test_a_classifier_brings_its_task_and_labels(tmp_path):
    options = config("xlm-roberta", id2label={"0": "not it", "1": "it", "2": "neither"})
    convert(write_folder(tmp_path / "folder", options, weights(options, "classes")), tmp_path / "model.pt")
    assert (tmp_path / "label/dict.txt").read_text() == "not_it 1\nit 1\nneither 1\n"
    args = Checkpoint(tmp_path / "model.pt").state["args"]
    assert (args.task, args.num_classes, args.init_token, args.separator_token) == ("sentence_prediction", 3, 0, 2)
    score = config("bert")
    convert(
        write_folder(tmp_path / "score", score, weights(score, "classes", classes=1)), tmp_path / "score/out/model.pt"
    )
    args = Checkpoint(tmp_path / "score/out/model.pt").state["args"]
    assert (args.regression_target, args.separator_token) == (True, None)
    assert not (tmp_path / "score/out/label").exists()


def of_words(state):
    return {name: tensor for name, tensor in state.items() if "pooler" not in name}


@pytest.mark.parametrize(
    ("kind", "changed", "change", "said"),
    [
        ("bert", {"model_type": "distilbert"}, dict, "model_type 'distilbert' cannot be converted; only roberta"),
        ("bert", {"hidden_act": "silu"}, dict, "hidden_act 'silu' cannot be converted"),
        ("bert", {"position_embedding_type": "relative_key"}, dict, "position_embedding_type 'relative_key'"),
        ("bert", {"is_decoder": True}, dict, "is_decoder True cannot be converted"),
        ("bert", {"num_attention_heads": 3}, dict, "encoder_attention_heads 3 does not divide"),
        ("bert", {"num_attention_heads": "2"}, dict, "num_attention_heads in config.json is '2'"),
        ("bert", {}, of_words, "classifier.bias, with 1 more has no place"),
        ("bert", {"architectures": ["BertForTokenClassification"]}, dict, "classifier.bias, with 1 more has no place"),
        ("bert", {}, lambda s: s | {"qa_outputs.weight": torch.ones(2, 16)}, "qa_outputs.weight has no place"),
        ("bert", {"num_hidden_layers": 1}, dict, "bert.encoder.layer.1."),
        ("bert", {"num_hidden_layers": 3}, dict, "encoder.sentence_encoder.layers.2."),
        ("bert", {}, lambda s: s | {"bert.embeddings.LayerNorm.bias": torch.ones(3)}, "layernorm_embedding.bias"),
        ("bert", {}, lambda s: s | {"bert.embeddings.LayerNorm.bias": torch.full((16,), torch.inf)}, "NaN or infinity"),
        ("bert", {}, lambda s: {"x": torch.ones(1)}, "has no matrix embeddings.word_embeddings.weight"),
    ],
)  # fmt: skip
def test_what_cannot_map_is_refused_by_name(tmp_path, capsys, kind, changed, change, said):
    options = config(kind) | changed
    state = change(weights(config(kind), "classes"))
    folder = write_folder(tmp_path / "folder", options, state)
    assert said in refusal(capsys, "from-hf", folder, tmp_path / "out/model.pt")
    assert not (tmp_path / "out").exists()


def test_a_head_for_words_with_another_nonlinearity_is_refused(tmp_path):
    options = config("roberta", hidden_act="relu")
    folder = write_folder(tmp_path / "folder", options, weights(options, "words"))
    with pytest.raises(SystemExit, match="2"):
        convert(folder, tmp_path / "model.pt")


class Touch:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (self.path, "w"))


def test_nothing_in_a_folder_runs(tmp_path, capsys):
    options = config("roberta")
    folder = write_folder(tmp_path / "folder", options, {})
    (folder / "model.safetensors").unlink()
    for protocol in (2, 4):
        with open(folder / "pytorch_model.bin", "wb") as file:
            pickle.dump({"x": Touch(str(tmp_path / "ran"))}, file, protocol=protocol)
        with pytest.raises(SystemExit, match="3"):
            convert(folder, tmp_path / "model.pt")
        assert capsys.readouterr().err.startswith("error: ")
    assert not (tmp_path / "ran").exists()
    torch.save({"x": [torch.ones(1)]}, folder / "pytorch_model.bin")
    with pytest.raises(SystemExit, match="3"):
        convert(folder, tmp_path / "model.pt")
    assert "it holds 'x': a list, not a tensor" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "content", "code", "said"),
    [
        ("config.json", b"{", 3, "config.json: is not JSON"),
        ("config.json", b"[]", 3, "holds no options by name"),
        ("config.json", None, 2, "has no config.json"),
        ("model.safetensors", b"\x10\0\0\0\0\0\0\0{}", 3, "not a whole safetensors file"),
        ("model.safetensors", None, 2, "has neither model.safetensors nor pytorch_model.bin"),
        ("tokenizer.json", b"{}", 2, "a tokenizer of type None cannot be converted"),
        ("tokenizer.json", b'{"model": {"type": "WordPiece", "vocab": {"a": "b"}}}', 3, "has no numbers by token"),
        ("tokenizer.json", b'{"model": {"type": "WordPiece", "vocab": {"a": 1}}}', 2, "no cls_token '[CLS]'"),
        ("tokenizer.json", None, 2, "has no tokenizer.json or vocab.txt"),
    ],
)  # fmt: skip
def test_a_damaged_folder_is_refused(tmp_path, capsys, name, content, code, said):
    options = config("bert")
    folder = write_folder(tmp_path / "folder", options, weights(options))
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_bytes(content)
    with pytest.raises(SystemExit, match=str(code)):
        convert(folder, tmp_path / "model.pt")
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changed", "code", "said"),
    [
        (
            {"num_hidden_layers": 10**9},
            2,
            "num_hidden_layers in config.json is 1000000000, more than it has tensors",
        ),
        ({"num_attention_heads": 0}, 2, "num_attention_heads in config.json is 0; give a whole number from 1 up"),
        ({"pad_token_id": 10**9}, 2, "has no matrix embeddings.position_embeddings.weight"),
        ({"hidden_act": ["gelu"]}, 3, "its configuration or tokenizer is damaged"),
        ({"hidden_dropout_prob": "much"}, 3, "its configuration or tokenizer is damaged"),
        ({"layer_norm_eps": {}}, 3, "its configuration or tokenizer is damaged"),
        ({"model_type": {}}, 3, "its configuration or tokenizer is damaged"),
        ({"architectures": 5, "id2label": 7}, 0, ""),
    ],
)
def test_values_that_no_configuration_has_end_in_a_line(tmp_path, capsys, changed, code, said):
    options = config("roberta")
    folder = write_folder(tmp_path / "folder", options | changed, weights(options, "classes"))
    if code:
        with pytest.raises(SystemExit, match=str(code)):
            convert(folder, tmp_path / "model.pt")
        error = capsys.readouterr().err
        assert said in error
        assert error.count("\n") == 1
    else:
        convert(folder, tmp_path / "model.pt")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", b'{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [5]}}'),
        ("tokenizer.json", b'{"model": {"type": "BPE", "vocab": {"a": 0}}, "added_tokens": 7}'),
        ("special_tokens_map.json", b'{"cls_token": ["<s>"]}'),
        ("tokenizer_config.json", b"[1]"),
        ("vocab.json", b"[]"),
        ("merges.txt", b"\xff\xff"),
    ],
)
def test_a_damaged_tokenizer_is_refused(tmp_path, capsys, name, content):
    options = config("roberta")
    folder = write_folder(
        tmp_path / "folder", options, weights(options), whole=name.endswith("json") and name != "vocab.json"
    )
    (folder / name).write_bytes(content)
    with pytest.raises(SystemExit, match="3"):
        convert(folder, tmp_path / "model.pt")
    assert capsys.readouterr().err.startswith("error: ")


def test_a_token_beyond_the_embedding_is_refused(tmp_path, capsys):
    options = config("bert", vocab_size=12)
    folder = write_folder(tmp_path / "folder", options, weights(options))
    with pytest.raises(SystemExit, match="2"):
        convert(folder, tmp_path / "model.pt")
    assert "is number 12, and the embedding has 12 rows" in capsys.readouterr().err


def test_another_networks_dictionary_is_not_replaced(tmp_path, capsys):
    options = config("bert")
    folder = write_folder(tmp_path / "folder", options, weights(options))
    (tmp_path / "dict.txt").write_text("other 1\n")
    with pytest.raises(SystemExit, match="2"):
        convert(folder, tmp_path / "model.pt")
    assert "dict.txt is there already and differs" in capsys.readouterr().err
    assert (tmp_path / "dict.txt").read_text() == "other 1\n"
    assert not (tmp_path / "model.pt").exists()


def test_a_folder_in_the_place_of_a_checkpoint_says_the_command(tmp_path):
    options = config("bert")
    folder = write_folder(tmp_path / "mini", options, weights(options))
    command = f"fairseq-quant-noise from-hf {folder} --out mini-fairseq/model.pt"
    for path in (folder, folder / "model.safetensors"):
        with pytest.raises(UserError, match=command):
            Checkpoint(path).state  # noqa: B018
    with pytest.raises(UserError, match="is a folder; give the path of a checkpoint"):
        Checkpoint(tmp_path).state  # noqa: B018
