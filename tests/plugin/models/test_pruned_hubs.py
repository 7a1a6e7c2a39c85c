"""Pruned RoBERTa and BART: fairseq's own `from_pretrained` loads them, whichever layers stayed."""

import pytest
import torch
from fairseq.models.bart import BARTModel
from fairseq.models.roberta import RobertaModel
from lm_fixture import state_of
from roberta_fixture import ENCODER, SENTENCES, roberta, roberta_batch  # noqa: F401
from toys import refuses
from translation_fixture import SHARED, translation, verb  # noqa: F401

from fairseq_quant_noise.structure.modules import find_stacks

WAYS = ["the verb", "training", "an override"]
NARROW = ["--decoder-embed-dim", 32, "--decoder-ffn-embed-dim", 64]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A classifier of sentences of three layers, trained with LayerDrop; stock fairseq's own architecture."""
    from roberta_fixture import _lab

    lab = _lab(tmp_path_factory.getbasetemp() / "roberta")
    return lab.train("--encoder-layers", 3, "--encoder-layerdrop", 0.2, arch="roberta_base", kind=SENTENCES)


def fc1(state, stack, layer):
    return state["model"][f"{stack}.{layer}.fc1.weight"]


@pytest.mark.upstream(30)
@pytest.mark.parametrize("way", WAYS)
def test_a_pruned_roberta_that_classifies(roberta, whole, way):  # noqa: F811
    path, overrides = whole.path, {}
    if way == "the verb":
        path = roberta.new("pruned.pt")
        verb("prune", "--path", whole.path, "--keep", "0,2", "--out", path)
    elif way == "training":
        flags = ["--encoder-layers", 3, "--encoder-layers-to-keep", "0,2", "--finetune-from-model", whole.path]
        path = roberta.train(*flags, "--lr", 0, arch="roberta_base", kind=SENTENCES, updates=1).path
    else:
        overrides = {"encoder_layers_to_keep": "0,2"}
    data = str(roberta.of(SENTENCES))
    hub = RobertaModel.from_pretrained(str(path.parent), path.name, data, bpe=None, **overrides).eval()
    (stack,) = find_stacks(hub.model).values()
    for layer, stored in zip(stack, (0, 2), strict=True):
        assert torch.equal(layer.fc1.weight, fc1(state_of(whole.path), f"{ENCODER}.layers", stored))
    tokens = roberta_batch(SENTENCES)["net_input"]["src_tokens"]
    (head,) = hub.model.classification_heads
    found = hub.predict(head, tokens, return_logits=True)
    pruned = roberta.new("expected.pt")
    verb("prune", "--path", whole.path, "--keep", "0,2", "--out", pruned)
    expected, _ = roberta.load(pruned, SENTENCES)(tokens, features_only=True, classification_head_name=head)
    torch.testing.assert_close(found, expected)


def test_a_layer_that_the_roberta_does_not_have_is_named(roberta, whole):  # noqa: F811
    data = str(roberta.of(SENTENCES))
    with refuses("--encoder-layers-to-keep names layer 3, and .* has 3 layers"):
        RobertaModel.from_pretrained(
            str(whole.path.parent), whole.path.name, data, bpe=None, encoder_layers_to_keep="0,3"
        )


@pytest.fixture(scope="module")
def bart(tmp_path_factory):
    """Three layers a side, trained with LayerDrop."""
    from translation_fixture import _lab

    lab = _lab(tmp_path_factory.getbasetemp() / "translation")
    flags = ["--encoder-layers", 3, "--decoder-layers", 3, "--encoder-layerdrop", 0.2, "--decoder-layerdrop", 0.2]
    return lab.train(*flags, *NARROW, arch="bart_base", updates=3)


@pytest.mark.upstream(30)
@pytest.mark.parametrize("way", WAYS)
def test_a_pruned_bart_of_other_layers_on_each_side(translation, bart, way):  # noqa: F811
    path, overrides = bart.path, {}
    pruned = translation.new("pruned.pt")
    verb("prune", "--path", bart.path, "--keep", "encoder=0,2", "--keep", "decoder=2", "--out", pruned)
    if way == "the verb":
        path = pruned
    elif way == "training":
        flags = ["--encoder-layers", 3, "--decoder-layers", 3, *NARROW, "--finetune-from-model", bart.path, "--lr", 0]
        flags += ["--encoder-layers-to-keep", "0,2", "--decoder-layers-to-keep", "2"]
        path = translation.train(*flags, arch="bart_base", updates=1).path
        assert translation.translate(path) == translation.translate(pruned)  # and without overrides
    else:
        overrides = {"encoder_layers_to_keep": "0,2", "decoder_layers_to_keep": "2"}
    data = str(translation.folder / SHARED)
    hub = BARTModel.from_pretrained(str(path.parent), path.name, data, bpe=None, **overrides).eval()
    stacks = find_stacks(hub.model)
    for side, kept in {"encoder": (0, 2), "decoder": (2,)}.items():
        for layer, stored in zip(stacks[f"{side}.layers"], kept, strict=True):
            assert torch.equal(layer.fc1.weight, fc1(state_of(bart.path), f"{side}.layers", stored))
