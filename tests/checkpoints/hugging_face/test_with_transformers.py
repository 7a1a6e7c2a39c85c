"""The same against transformers itself, where it is installed: `pip install 'fairseq-quant-noise[transformers]'`."""

import json

import pytest
import torch
from hf_folders import config, in_fairseq, rows, write_tokenizer

from fairseq_quant_noise import UserError, load
from fairseq_quant_noise.checkpoints.checkpoint import Checkpoint
from fairseq_quant_noise.checkpoints.hugging_face.from_folder import HEAD
from fairseq_quant_noise.checkpoints.hugging_face.word_pieces import WordPieces
from fairseq_quant_noise.cli.main import main
from fairseq_quant_noise.weights.discovery import stored_weight

transformers = pytest.importorskip("transformers", minversion="5", reason="transformers 5 is not installed")

CLASSES = {
    ("roberta", "words"): "RobertaForMaskedLM",
    ("roberta", "classes"): "RobertaForSequenceClassification",
    ("xlm-roberta", "words"): "XLMRobertaForMaskedLM",
    ("xlm-roberta", "classes"): "XLMRobertaForSequenceClassification",
    ("bert", "words"): "BertForMaskedLM",
    ("bert", "classes"): "BertForSequenceClassification",
}
CASES = pytest.mark.parametrize(("kind", "head"), CLASSES)


def theirs(kind, head, **changed):
    """A network of transformers with weights that make a difference, in eval mode."""
    torch.manual_seed(1)
    name = CLASSES[kind, head]
    options = config(kind, num_labels=3, **changed)
    model = getattr(transformers, name)(getattr(transformers, name.partition("For")[0] + "Config")(**options)).eval()
    for parameter in model.parameters():
        parameter.data += torch.randn_like(parameter) * 0.3
    return model


def write(folder, model, kind):
    model.save_pretrained(folder)
    write_tokenizer(folder, kind)
    return folder


def scores(model, ids):
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=(ids != model.config.pad_token_id).long()).logits


@CASES
def test_the_checkpoint_computes_what_transformers_does(tmp_path, kind, head):
    model = theirs(kind, head)
    main(["from-hf", str(write(tmp_path / "folder", model, kind)), "--out", str(tmp_path / "out/model.pt")])
    ids, out = rows(kind), tmp_path / "out"
    numbers = ids if kind == "roberta" else in_fairseq(kind, ids, out / "dict.txt")
    with torch.no_grad():
        found = Checkpoint(out / "model.pt").network(numbers, HEAD if head == "classes" else None)
    expected = scores(model, ids)
    if head == "words":
        every = torch.arange(expected.shape[-1])[None]
        found = found[..., every[0] if kind == "roberta" else in_fairseq(kind, every, out / "dict.txt")[0]]
        found, expected = (x[ids != model.config.pad_token_id] for x in (found, expected))
    assert expected.std() > 0.1
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@CASES
def test_transformers_loads_the_folder_of_a_checkpoint_and_of_a_packed_file(tmp_path, kind, head):
    """Both by the automatic classes, without a missing or unexpected tensor."""
    main(["from-hf", str(write(tmp_path / "folder", theirs(kind, head), kind)), "--out", str(tmp_path / "model.pt")])
    plan, packed = tmp_path / "plan.yaml", tmp_path / "model.safetensors"
    plan.write_text("stages: [{match: '.*(fc.|embed_tokens)', block_size: 4, n_centroids: 8}]\n")
    main(["quantize", "--path", str(tmp_path / "model.pt"), "--plan", str(plan), "--out", str(packed)])
    ids = rows("xlm-roberta")
    for path, network in (("model.pt", Checkpoint(tmp_path / "model.pt").network), ("model.safetensors", load(packed))):
        main(["to-hf", str(tmp_path / path), "--out", str(tmp_path / f"back-{path}")])
        auto = "AutoModelForMaskedLM" if head == "words" else "AutoModelForSequenceClassification"
        model, said = getattr(transformers, auto).from_pretrained(tmp_path / f"back-{path}", output_loading_info=True)
        assert not said["missing_keys"]
        assert not said["mismatched_keys"]
        assert all(name.startswith("lm_head.") for name in said["unexpected_keys"])
        with torch.no_grad():
            found = network(ids, HEAD if head == "classes" else None)
        expected = scores(model.eval(), ids)
        if head == "words":
            found, expected = found[ids != 1], expected[ids != 1]
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


PLANS = {
    "codes": "stages: [{match: '.*(fc.|embed_.*|proj|dense)', block_size: 4, n_centroids: 8}]\n",
    "int8": "stages: [{match: '.*', scheme: int8, range: channel}]\n",
    "dense in fp16": "stages: [{match: '.*fc.', block_size: 4, n_centroids: 8}]\ndense: fp16\n",
    "mixed": (
        "stages: [{match: '.*fc.', block_size: 4, n_centroids: 8, codebook: shared}, {match: '.*proj', scheme: int4}]"
    ),
}


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("head", ["words", "classes"])
@pytest.mark.parametrize("kind", ["roberta", "xlm-roberta"])
def test_a_packed_file_loads_straight_into_a_network_of_transformers(tmp_path, kind, head, plan):
    main(["from-hf", str(write(tmp_path / "folder", theirs(kind, head), kind)), "--out", str(tmp_path / "model.pt")])
    (tmp_path / "plan.yaml").write_text(PLANS[plan])
    packed, ids = tmp_path / "model.safetensors", rows("xlm-roberta")
    main(
        ["quantize", "--path", str(tmp_path / "model.pt"), "--plan", str(tmp_path / "plan.yaml"), "--out", str(packed)]
    )
    model = theirs(kind, head, type_vocab_size=2)
    before = scores(model, ids)
    assert load(packed, into=model) is model
    with torch.no_grad():
        expected = load(packed)(ids, HEAD if head == "classes" else None)
    found = scores(model, ids)
    if head == "words":
        words, output = model.roberta.embeddings.word_embeddings, model.lm_head.decoder
        assert stored_weight(output) is stored_weight(words)
        found, expected, before = found[ids != 1], expected[ids != 1], before[ids != 1]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert (found - before).abs().max() > 0.01


def test_a_network_of_transformers_that_computes_something_else_is_refused(tmp_path):
    main(
        [
            "from-hf",
            str(write(tmp_path / "folder", theirs("roberta", "words"), "roberta")),
            "--out",
            str(tmp_path / "m.pt"),
        ]
    )
    (tmp_path / "plan.yaml").write_text(PLANS["codes"])
    packed = tmp_path / "m.safetensors"
    main(["quantize", "--path", str(tmp_path / "m.pt"), "--plan", str(tmp_path / "plan.yaml"), "--out", str(packed)])
    for model, said in (
        (theirs("bert", "words"), "this network is a BERT, whose words have another order"),
        (theirs("roberta", "words", layer_norm_eps=1e-12), "layer_norm_eps is 1e-12 in this network's configuration"),
        (theirs("roberta", "words", hidden_act="relu"), "hidden_act is 'relu' in this network's configuration"),
        (theirs("roberta", "classes"), "this network has a head for classes, and the file has none"),
        (theirs("roberta", "words", num_hidden_layers=3), "does not fit this network"),
    ):
        with pytest.raises(UserError, match=said):
            load(packed, into=model)


def test_the_tokenizers_that_come_along_work(tmp_path):
    """Their own tokenizer of the folder written gives fairseq's numbers."""
    texts = ["the dog", "The un dogs! a", "dogg ##"]
    for kind in ("bert", "roberta"):
        main(
            [
                "from-hf",
                str(write(tmp_path / kind, theirs(kind, "words"), kind)),
                "--out",
                str(tmp_path / f"{kind}-f/m.pt"),
            ]
        )
        main(["to-hf", str(tmp_path / f"{kind}-f/m.pt"), "--out", str(tmp_path / f"{kind}-back")])
        old = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tokenizer(tmp_path / kind)))
        new = transformers.AutoTokenizer.from_pretrained(tmp_path / f"{kind}-back")
        for text in texts:
            ids = torch.tensor([old(text, add_special_tokens=False).input_ids])
            if kind == "bert":
                pieces = WordPieces.of(tmp_path / "bert-f/vocab.txt").encode(text)
                assert pieces == old.convert_ids_to_tokens(ids[0].tolist())
            ids = ids if kind == "roberta" else in_fairseq(kind, ids, tmp_path / f"{kind}-f/dict.txt")
            assert new(text, add_special_tokens=False).input_ids == ids[0].tolist(), (kind, text)
        assert new("a").input_ids[0] == 0
        assert new("a").input_ids[-1] == 2
        assert new.mask_token_id == len(new) - 1


def tokenizer(folder):
    """tokenizer.json as transformers writes it: with the step that splits text before the pieces."""
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    bert = content["model"]["type"] == "WordPiece"
    if bert:
        content["model"] |= {"continuing_subword_prefix": "##", "max_input_chars_per_word": 100}
        content["normalizer"] |= {"clean_text": True}
    split = (
        {"type": "BertPreTokenizer"} if bert else {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    )
    added = [
        {**a, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
        for a in content["added_tokens"]
    ]
    whole = {"version": "1.0", "pre_tokenizer": split, "normalizer": None, **content, "added_tokens": added}
    out = path.with_name("whole.json")
    out.write_text(json.dumps(whole))
    return out
