"""A fairseq checkpoint or a packed file of a RoBERTa becomes a Hugging Face folder that computes the same."""

import json

import pytest
import torch
from hf_folders import MERGES, PIECES, POSITIONS, config, logits, refusal, rows, tokens, weights, write_folder
from safetensors.torch import load_file

from fairseq_quant_noise.checkpoints.checkpoint import Checkpoint
from fairseq_quant_noise.checkpoints.hugging_face.from_folder import HEAD
from fairseq_quant_noise.cli.main import main

PLAN = (
    "stages: [{match: '.*(fc.|embed_tokens|proj)', block_size: 4, n_centroids: 8}, {match: '.*dense', scheme: int8}]\n"
)


def checkpoint(folder, kind, head, **changed):
    """A fairseq checkpoint with its dictionary, and the folder it was made of."""
    options = config(kind, **changed)
    write_folder(folder / "theirs", options, weights(options, head))
    main(["from-hf", str(folder / "theirs"), "--out", str(folder / "ours/model.pt")])
    return folder / "ours/model.pt"


def read_back(folder):
    return json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")


def same_logits(path, folder):
    """The network of `path` computes what the folder's does, on rows by fairseq's numbers."""
    from fairseq_quant_noise import load

    options, state = read_back(folder)
    network = load(path) if str(path).endswith(".safetensors") else Checkpoint(path).network
    ids = rows("xlm-roberta")  # whose words every one of the networks has
    with torch.no_grad():
        found = network(ids, HEAD if network.classification_heads else None)
    expected = logits(state, options, ids)
    if not network.classification_heads:
        found, expected = found[ids != 1], expected[ids != 1]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    return options, state


@pytest.mark.parametrize("head", ["words", "classes"])
@pytest.mark.parametrize("kind", ["roberta", "xlm-roberta", "bert"])
def test_there_and_back(tmp_path, kind, head):
    path = checkpoint(tmp_path, kind, head)
    main(["to-hf", str(path), "--out", str(tmp_path / "back")])
    options, back = same_logits(path, tmp_path / "back")
    given = config(kind)
    for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "layer_norm_eps"):
        assert options[name] == given[name], name
    assert options["max_position_embeddings"] == POSITIONS + 2
    assert options["model_type"] == "roberta"
    theirs = load_file(tmp_path / "theirs/model.safetensors")
    if kind != "bert":  # the same tensors; what was token type 0 is in the positions now
        assert theirs.keys() <= back.keys()
        assert all(
            torch.equal(back[name], theirs[name]) for name in theirs if "position" not in name and "type" not in name
        )
    again = tmp_path / "again/model.pt"
    main(["from-hf", str(tmp_path / "back"), "--out", str(again)])
    one, two = Checkpoint(path).weights, Checkpoint(again).weights
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert path.with_name("dict.txt").read_bytes() == again.with_name("dict.txt").read_bytes()


@pytest.mark.usefixtures("fp32_products")
@pytest.mark.parametrize("kind", ["roberta", "bert"])
def test_a_packed_file_becomes_a_folder(tmp_path, kind, capsys):
    path, plan, packed = checkpoint(tmp_path, kind, "classes"), tmp_path / "plan.yaml", tmp_path / "small.safetensors"
    plan.write_text(PLAN)
    main(["quantize", "--path", str(path), "--plan", str(plan), "--out", str(packed)])
    main(["to-hf", str(packed), "--dict", str(path.parent), "--out", str(tmp_path / "back")])
    options, _ = same_logits(packed, tmp_path / "back")
    assert options["architectures"] == ["RobertaForSequenceClassification"]
    capsys.readouterr()
    main(["to-hf", str(packed), "--out", str(tmp_path / "bare")])
    assert "note: no tokenizer" in capsys.readouterr().err
    assert {file.name for file in (tmp_path / "bare").iterdir()} == {"config.json", "model.safetensors"}


def test_the_tokenizer_and_the_labels_come_along(tmp_path):
    path = checkpoint(tmp_path, "roberta", "classes", id2label={"0": "no", "1": "yes", "2": "maybe"})
    main(["to-hf", str(path), "--out", str(tmp_path / "back")])
    words = json.loads((tmp_path / "back/vocab.json").read_text())
    assert words == {token: i for i, token in enumerate(tokens("roberta"))}
    assert (tmp_path / "back/merges.txt").read_text().splitlines()[1:] == [" ".join(pair) for pair in MERGES]
    assert read_back(tmp_path / "back")[0]["id2label"] == {"0": "no", "1": "yes", "2": "maybe"}


def test_word_pieces_come_in_fairseqs_order(tmp_path):
    path = checkpoint(tmp_path, "bert", "words")
    main(["to-hf", str(path), "--out", str(tmp_path / "back")])
    words = (tmp_path / "back/vocab.txt").read_text().splitlines()
    assert words == ["[CLS]", "[PAD]", "[SEP]", "[UNK]", "[unused0]", *PIECES, "[MASK]"]
    settings = json.loads((tmp_path / "back/tokenizer_config.json").read_text())
    assert (settings["tokenizer_class"], settings["model_max_length"]) == ("BertTokenizer", POSITIONS)


def ones(name, *shape):
    """A layer of ones: its weight of this shape, and its bias."""
    return {f"{name}.weight": torch.ones(*shape), f"{name}.bias": torch.ones(shape[0])}


_ENCODER, _HEAD = "encoder.sentence_encoder", f"classification_heads.{HEAD}"
_SECOND_HEAD = ones("classification_heads.b.dense", 16, 16) | ones("classification_heads.b.out_proj", 2, 16)
_NARROW_HEAD = ones(f"{_HEAD}.dense", 8, 16) | ones(f"{_HEAD}.out_proj", 3, 8)


@pytest.mark.parametrize(
    ("head", "option", "value", "extra", "said"),
    [
        ("words", "activation_fn", "relu", {}, "option activation_fn='relu' has no place"),
        ("classes", "pooler_activation_fn", "relu", {}, "option pooler_activation_fn='relu' has no place"),
        (
            "words",
            "quant_noise_pq",
            0.1,
            {f"{_ENCODER}.quant_noise.weight": torch.ones(16, 16)},
            "embedding_layer=True",
        ),
        ("words", "encoder_normalize_before", True, ones(f"{_ENCODER}.layer_norm", 16), "normalize_before=True"),
        ("classes", "seed", 1, _SECOND_HEAD, f"has the heads {HEAD}, b, and a Hugging Face folder holds one"),
        ("classes", "seed", 1, _NARROW_HEAD, f"{_HEAD}.dense.weight has 8 rows"),
    ],
)
def test_what_their_roberta_does_not_compute_is_refused(tmp_path, capsys, head, option, value, extra, said):
    path = checkpoint(tmp_path, "roberta", head)
    state = dict(Checkpoint(path).state)
    setattr(state["args"], option, value)
    torch.save(state | {"model": state["model"] | extra}, path)
    capsys.readouterr()
    assert said in refusal(capsys, "to-hf", path, tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_a_classifier_with_another_nonlinearity_goes_without_its_head_for_words(tmp_path, capsys):
    path = checkpoint(tmp_path, "bert", "classes", hidden_act="relu")
    main(["to-hf", str(path), "--out", str(tmp_path / "back")])
    assert "left out encoder.lm_head: theirs has gelu, not relu" in capsys.readouterr().err
    options, state = same_logits(path, tmp_path / "back")
    assert options["hidden_act"] == "relu"
    assert not any(name.startswith("lm_head") for name in state)


def test_a_dictionary_of_another_network_is_refused(tmp_path, capsys):
    path = checkpoint(tmp_path, "roberta", "words")
    path.with_name("dict.txt").write_text("4 1\n")
    capsys.readouterr()
    main(["to-hf", str(path), "--out", str(tmp_path / "back")])
    assert "has 6 words, and the network 19" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main(["to-hf", str(path), "--dict", str(path.parent), "--out", str(tmp_path / "other")])
    assert "has 6 words, and the network 19; give the folder that from-hf wrote" in capsys.readouterr().err


def test_an_output_that_is_a_file_or_holds_another_folder_is_refused(tmp_path, capsys):
    path = checkpoint(tmp_path, "roberta", "words")
    with pytest.raises(SystemExit, match="2"):
        main(["to-hf", str(path), "--out", str(path)])
    with pytest.raises(SystemExit, match="2"):
        main(["to-hf", str(path), "--out", str(tmp_path / "theirs")])
    assert "config.json is there already and differs" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main(["to-hf", str(tmp_path / "theirs"), "--out", str(tmp_path / "back")])
    assert "is a Hugging Face folder already" in capsys.readouterr().err
