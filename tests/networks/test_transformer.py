"""Our network for translation against fairseq's `transformer`: the same names, ties and results, in codes too."""

from argparse import Namespace
from types import SimpleNamespace

import pytest
import torch
from toys import refuses
from translation_fixture import as_of_2018

from fairseq_quant_noise.checkpoints.old_names import modern_names
from fairseq_quant_noise.checkpoints.options import task_options, vocabulary_size
from fairseq_quant_noise.layers import adopt_quantized
from fairseq_quant_noise.networks import Transformer, TransformerConfig
from fairseq_quant_noise.networks.registry import build
from fairseq_quant_noise.quantization.quantize import quantize_
from fairseq_quant_noise.weights.discovery import find_weights

PAD, WORDS, SOURCE_WORDS = 1, 60, 44
SMALL = {
    "encoder_embed_dim": 32,
    "encoder_ffn_embed_dim": 48,
    "encoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_layers": 3,
    "decoder_attention_heads": 4,
    "max_source_positions": 40,
    "max_target_positions": 40,
}
CASES = {
    "shared": {"share_all_embeddings": True},
    "own_source": {"share_decoder_input_output_embed": True, "source_words": SOURCE_WORDS},
    "nothing_shared": {"encoder_learned_pos": True, "decoder_learned_pos": True, "source_words": SOURCE_WORDS},
    "pre_norm": {
        "encoder_normalize_before": True,
        "decoder_normalize_before": True,
        "layernorm_embedding": True,
        "activation_fn": "gelu",
    },
    "no_final_norm": {"decoder_normalize_before": True, "no_decoder_final_norm": True, "no_scale_embedding": True},
    "other_widths": {"decoder_embed_dim": 24, "decoder_ffn_embed_dim": 40, "decoder_output_dim": 16},
    "bare": {"no_token_positional_embeddings": True, "activation_fn": "tanh", "encoder_layerdrop": 0.5},
    "adaptive": {"adaptive_softmax_cutoff": "20,40", "adaptive_softmax_factor": 2.0, "share_all_embeddings": True},
    "fairseqs_noise": {"quant_noise_pq": 0.1, "share_all_embeddings": True},  # fairseq's extra Linear, on both sides
}


def dictionary(words):
    from fairseq.data import Dictionary

    made = Dictionary()
    for i in range(words - len(made)):
        made.add_symbol(f"w{i}")
    return made


def fairseq_model(options, seed=0):
    """fairseq's model with every parameter moved off its initial value, and its options as a dict."""
    from fairseq.models.transformer import TransformerModel, base_architecture

    options = dict(options)
    target = dictionary(WORDS)
    source = dictionary(options.pop("source_words")) if "source_words" in options else target
    args = Namespace(**{**SMALL, **options})
    base_architecture(args)
    torch.manual_seed(seed)
    model = TransformerModel.build_model(args, SimpleNamespace(source_dictionary=source, target_dictionary=target))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return model.eval(), {**vars(args), "source_vocab_size": len(source)}


def our_model(options):
    return Transformer(TransformerConfig.from_fairseq(options, WORDS, PAD)).eval()


def batch():
    """Sources padded on the left, as fairseq does it, and translations padded on the right."""
    generator = torch.Generator().manual_seed(1)
    source = torch.randint(4, SOURCE_WORDS, (3, 9), generator=generator)
    target = torch.randint(4, WORDS, (3, 7), generator=generator)
    source[1, :4] = source[2, :8] = PAD
    target[1, 5:] = target[2, 1:] = PAD
    return source, target


def log_probs(theirs, source, target):
    return theirs.get_normalized_probs(theirs(source, None, target), log_probs=True)


def ties(state):
    """The names of a state, grouped by the memory that they share."""
    groups = {}
    for name, tensor in state.items():
        groups.setdefault(tensor.data_ptr(), []).append(name)
    return sorted(groups.values())


@pytest.fixture(scope="module", params=CASES, ids=list(CASES))
def pair(request):
    theirs, options = fairseq_model(CASES[request.param])
    ours = our_model(options)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return ours, theirs


def test_names_types_and_ties_are_fairseqs(pair):
    ours, theirs = (model.state_dict() for model in pair)
    assert [(name, t.dtype, t.shape) for name, t in ours.items()] == [(n, t.dtype, t.shape) for n, t in theirs.items()]
    assert ties(ours) == ties(theirs)
    assert [name for name, _ in pair[0].named_parameters()] == [name for name, _ in pair[1].named_parameters()]
    assert [w.name for w in find_weights(pair[0])] == [w.name for w in find_weights(pair[1])]


@torch.no_grad()
def test_results_are_fairseqs(pair):
    ours, theirs = pair
    for source, target in (batch(), (batch()[0][:1], batch()[1][:1])):
        words = target != PAD
        expected = log_probs(theirs, source, target)
        scores = ours(source, target)
        assert scores.shape == (*target.shape, WORDS)
        torch.testing.assert_close(scores.log_softmax(-1)[words], expected[words], atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("case", ["shared", "nothing_shared"])
def test_quantized_results_are_fairseqs_with_the_same_codes(case):
    theirs, options = fairseq_model(CASES[case])
    ours = our_model(options)
    ours.load_state_dict(theirs.state_dict())
    quantize_(ours, {"stages": [{"match": ".*", "block_size": 4, "n_centroids": 16}]}, progress=str)
    adopt_quantized(theirs, ours.state_dict())
    theirs.load_state_dict(ours.state_dict(), strict=True)
    source, target = batch()
    words = target != PAD
    expected = log_probs(theirs, source, target)[words]
    torch.testing.assert_close(ours(source, target).log_softmax(-1)[words], expected, atol=1e-5, rtol=1e-5)


def test_what_the_weights_say_of_the_dictionaries(pair):
    ours, theirs = pair
    assert vocabulary_size(theirs.state_dict()) == WORDS
    assert task_options(theirs.state_dict()) == {"source_vocab_size": ours.config.encoder.vocab_size}


@torch.no_grad()
@pytest.mark.parametrize("case", ["shared", "nothing_shared"])
def test_weights_under_the_names_of_2018_are_read(case):
    theirs, options = fairseq_model(CASES[case])
    state = theirs.state_dict()
    aged = as_of_2018(state)
    if case == "nothing_shared":
        aged["decoder.embed_out"] = state["decoder.output_projection.weight"]
    ours = our_model(options)
    ours.load_state_dict(modern_names(aged), strict=True)
    fresh = fairseq_model(CASES[case], seed=1)[0]
    fresh.upgrade_state_dict(aged)  # as fairseq reads them
    fresh.load_state_dict(aged)
    source, target = batch()
    words = target != PAD
    torch.testing.assert_close(
        ours(source, target).log_softmax(-1)[words], log_probs(fresh, source, target)[words], atol=1e-5, rtol=1e-5
    )
    assert modern_names(state).keys() == state.keys()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"no_cross_attention": True}, "no_cross_attention=True is not implemented.*fairseq-generate --user-dir"),
        ({"cross_self_attention": True}, "cross_self_attention=True"),
        ({"encoder_xformers_att_config": "{}"}, "encoder_xformers_att_config"),
        ({"quant_noise_scalar": 0.1}, "quant_noise_scalar=0.1: stock fairseq rounds"),
        ({"activation_fn": "swish"}, "activation_fn 'swish' is not implemented.*fairseq-generate"),
        ({"encoder_attention_heads": 5}, "encoder_attention_heads 5 does not divide encoder_embed_dim 32"),
        ({"decoder_attention_heads": 5}, "decoder_attention_heads 5 does not divide decoder_embed_dim 32"),
        ({"share_all_embeddings": True, "source_vocab_size": 44}, "share_all_embeddings: 44 words of 32 numbers"),
        ({"share_all_embeddings": True, "decoder_embed_dim": 24}, "60 of 24 in the decoder"),
        ({"decoder_layers_to_keep": "0,x"}, "decoder_layers_to_keep is 0,x"),
    ],
)
def test_other_options_are_refused(options, message):
    with refuses(message):
        build("transformer", {**SMALL, **options}, WORDS)


def test_options_that_are_not_given_have_fairseqs_defaults():
    config = TransformerConfig.from_fairseq({"encoder_embed_dim": 64, "encoder_layers_to_keep": "0,2"}, WORDS)
    assert (config.encoder.layers, config.decoder.decoder_layers) == (2, 6)
    assert (config.decoder.decoder_embed_dim, config.decoder.decoder_ffn_embed_dim) == (64, 2048)
    assert config.encoder.vocab_size == WORDS


def test_more_tokens_than_learned_positions_are_refused():
    model = our_model({**SMALL, "encoder_learned_pos": True, "max_source_positions": 8})
    with refuses("9 tokens exceed max_source_positions 8"):
        model(*batch())
