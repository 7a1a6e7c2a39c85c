"""What from-hf writes, in fairseq: it loads, encodes text, trains and is packed; a folder itself says the command."""

import re
from pathlib import Path

import fairseq.checkpoint_utils
import pytest
import torch
from fairseq.data.encoders.gpt2_bpe_utils import get_encoder
from fairseq.models.roberta import RobertaModel
from hf_folders import POSITIONS, config, in_fairseq, logits, rows, tokens, weights, write_folder
from lm_fixture import split
from roberta_fixture import HEAD, roberta  # noqa: F401

from fairseq_quant_noise import load
from fairseq_quant_noise.artifact import read
from fairseq_quant_noise.cli.main import main
from fairseq_quant_noise.plugin.models.roberta import QuantNoiseRoberta


def convert(folder: Path, kind, head=None, **changed):
    """What from-hf makes of a small folder: the checkpoint, and the logits of `rows(kind)` by its own numbers."""
    options = config(kind, **changed)
    state = weights(options, head)
    write_folder(folder / "theirs", options, state)
    main(["from-hf", str(folder / "theirs"), "--out", str(folder / "ours/model.pt")])
    return folder / "ours/model.pt", logits(state, options, rows(kind))


def numbered(kind, path):
    return rows(kind) if kind == "roberta" else in_fairseq(kind, rows(kind), path.with_name("dict.txt"))


@pytest.mark.parametrize("head", ["words", "classes"])
@pytest.mark.parametrize("kind", ["roberta", "bert"])
def test_fairseq_loads_it_and_computes_the_same(tmp_path, kind, head):
    """Of a folder whose layer norms are fairseq's, the model is fairseq's own."""
    path, expected = convert(tmp_path, kind, head)
    for part in ("input0", "label") if head == "classes" else ():
        (path.parent / part).mkdir(exist_ok=True)
        (path.parent / part / "dict.txt").write_text(path.with_name("dict.txt").read_text())
    (model,), _ = fairseq.checkpoint_utils.load_model_ensemble([str(path)], {"data": str(path.parent)})
    assert isinstance(model, RobertaModel)
    assert isinstance(model, QuantNoiseRoberta) == (kind != "roberta")  # a stock one else, with noise if asked for
    ids, name = numbered(kind, path), HEAD if head == "classes" else None
    with torch.no_grad():
        found = model.eval()(ids, features_only=name is not None, classification_head_name=name)[0]
    if head == "words":
        found = found[..., numbered_columns(kind, path)]
        found, expected = found[ids != 1], expected[ids != 1]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def numbered_columns(kind, path):
    every = torch.arange(len(tokens(kind)))[None]
    return (every if kind == "roberta" else in_fairseq(kind, every, path.with_name("dict.txt")))[0]


def test_from_pretrained_encodes_text_as_the_folders_tokenizer_does(tmp_path):
    path, _ = convert(tmp_path, "roberta", "words")
    hub = QuantNoiseRoberta.from_pretrained(path.parent, bpe="gpt2").eval()
    names = tokens("roberta")
    expected = ["<s>", "t", "he", "Ġ", "d", "og", "##", "Ġthe", "</s>"]
    assert [names[i] for i in hub.encode("the dog## the").tolist()] == expected
    encoder = get_encoder(str(path.with_name("encoder.json")), str(path.with_name("vocab.bpe")))
    assert encoder.decode(encoder.encode("the dog")) == "the dog"


def test_a_training_goes_on_from_it_and_the_file_keeps_its_layer_norms(roberta, tmp_path, capsys):  # noqa: F811
    words = len((roberta.data / "dict.txt").read_text().splitlines())
    pieces = [f"w{i}" for i in range(words)]
    options = config("bert", vocab_size=words + 5, layer_norm_eps=1e-3)
    folder = write_folder(tmp_path / "theirs", options, weights(options))
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *pieces]))
    main(["from-hf", str(folder), "--out", str(tmp_path / "ours/model.pt")])
    sizes = split(
        "--encoder-layers 2 --encoder-embed-dim 16 --encoder-ffn-embed-dim 24 --encoder-attention-heads 4",
        f"--max-positions {POSITIONS} --tokens-per-sample {POSITIONS} --layer-norm-eps 1e-3 --lr 0",
    )
    run = roberta.train("--finetune-from-model", tmp_path / "ours/model.pt", *sizes, updates=1)
    packed = tmp_path / "model.safetensors"
    plan = roberta.plan({"stages": [{"match": ".*fc1", "scheme": "int8"}]})
    main(["quantize", "--path", str(run.path), "--plan", plan, "--out", str(packed)])
    assert read(packed).manifest.model["cfg"]["model"]["layer_norm_eps"] == 1e-3
    ids = torch.arange(4, 24).view(2, 10)
    main(["to-dense", str(packed), "--out", str(tmp_path / "dense.pt")])
    assert "add 0.001 to the variance, and those of stock fairseq 1e-05" in capsys.readouterr().err
    with torch.no_grad():
        one, two = load(packed)(ids), roberta.load(packed)(ids)[0]
    torch.testing.assert_close(one, two, rtol=0, atol=1e-5)


@pytest.mark.parametrize("option", ["--restore-file", "--finetune-from-model"])
def test_a_folder_in_the_place_of_a_checkpoint_says_the_command(roberta, tmp_path, capsys, option):  # noqa: F811
    options = config("bert")
    folder = write_folder(tmp_path / "mini", options, weights(options))
    command = re.escape(f"fairseq-quant-noise from-hf {folder} --out mini-fairseq/model.pt")
    for place, said in (
        (folder, f"is a Hugging Face folder; make a checkpoint of it first: {command}"),
        (tmp_path, "is a folder"),
    ):
        with pytest.raises(SystemExit, match="2"):
            roberta.train(option, place)
        assert re.search(rf"error: {option} {place}: {said}", capsys.readouterr().err)


def test_from_pretrained_encodes_pairs_in_a_berts_word_pieces(tmp_path):
    path, _ = convert(tmp_path, "bert", "classes")
    packed = tmp_path / "model.safetensors"
    plan = tmp_path / "plan.yaml"
    plan.write_text("stages: [{match: '.*fc1', scheme: int8}]\n")
    main(["quantize", "--path", str(path), "--plan", str(plan), "--out", str(packed)])
    for folder, name, data in ((path.parent, "model.pt", "."), (tmp_path, packed.name, path.parent)):
        hub = QuantNoiseRoberta.from_pretrained(folder, name, data, bpe="word_pieces").eval()
        found = hub.encode("A DOGS!", "unaffable x", no_separator=True)
        words = ["<s>", "a", "dog", "##s", "!", "</s>", "un", "##aff", "##able", "<unk>", "</s>"]
        assert [hub.task.source_dictionary[i] for i in found] == words
        assert hub.predict(HEAD, found).shape == (1, 3)
        assert hub.bpe.decode("un ##aff ##able dog") == "unaffable dog"
