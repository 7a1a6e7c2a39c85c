"""A checkpoint with two values for what is one weight in the model: refused by name, or the right one is taken."""

import pytest
import torch
from roberta_fixture import ENCODER, MASKED, SENTENCES, roberta  # noqa: F401
from toys import refuses

WORDS, OUTPUT = f"{ENCODER}.embed_tokens.weight", "encoder.lm_head.weight"


@pytest.fixture
def untied(roberta):  # noqa: F811
    """The weights of a pre-training with --untie-weights-roberta."""
    return {name: tensor.clone() for name, tensor in roberta.model("--untie-weights-roberta").state_dict().items()}


def test_a_classifier_keeps_the_words_of_an_untied_pre_training(roberta, untied):  # noqa: F811
    model = roberta.model(kind=SENTENCES)
    model.load_state_dict(dict(untied))
    assert torch.equal(model.state_dict()[WORDS], untied[WORDS])


def test_a_masked_language_model_does_not_take_the_output_for_the_words(roberta, untied):  # noqa: F811
    with refuses(rf"{WORDS} and {OUTPUT}: .*--untie-weights-roberta"):
        roberta.model(kind=MASKED).load_state_dict(dict(untied))


def test_untied_weights_load_into_an_untied_model(roberta, untied):  # noqa: F811
    model = roberta.model("--untie-weights-roberta")
    model.load_state_dict(dict(untied))
    assert torch.equal(model.state_dict()[OUTPUT], untied[OUTPUT])


def test_a_language_model_without_tied_words_is_refused_by_one_with_them(lab):
    apart = {name: tensor.clone() for name, tensor in lab.model(kind="plain").state_dict().items()}
    apart["decoder.output_projection.weight"] += 1
    with refuses("and decoder.output_projection.weight: "):
        lab.model(kind="plain").load_state_dict(apart)
