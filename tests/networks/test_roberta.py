"""Our roberta against fairseq's: the same names, ties and results, its options, and its sizes."""

from argparse import Namespace
from types import SimpleNamespace

import pytest
import torch
from fairseq.data import Dictionary
from fairseq.models.roberta import RobertaModel
from fairseq.models.roberta.model import base_architecture
from toys import refuses

from fairseq_quant_noise.accounting import MIB
from fairseq_quant_noise.checkpoints.old_names import modern_names
from fairseq_quant_noise.checkpoints.options import task_options, vocabulary_size
from fairseq_quant_noise.networks import RobertaConfig
from fairseq_quant_noise.networks.registry import NoNetworkError, build, meta_model
from fairseq_quant_noise.plan.plan import Plan
from fairseq_quant_noise.quantization.table import make_table
from fairseq_quant_noise.quantization.targets import resolve_stages
from fairseq_quant_noise.weights.discovery import find_weights

VOCAB = 60
SMALL = {
    "encoder_layers": 2,
    "encoder_embed_dim": 32,
    "encoder_ffn_embed_dim": 48,
    "encoder_attention_heads": 4,
    "max_positions": 20,
}
HEADS = {"mnli": [32, 3], "other": [16, 2]}
CASES = {
    "base": {},
    "pre_norm": {"encoder_normalize_before": True, "layernorm_embedding": False, "activation_fn": "relu"},
    "untied": {"untie_weights_roberta": True, "pooler_activation_fn": "gelu_accurate"},
    "kept": {"encoder_layers_to_keep": "0,2,3", "encoder_layerdrop": 0.5, "dropout": 0.5},
    "noise": {"quant_noise_pq": 0.1},  # fairseq's extra Linear
}


def fairseq_model(options):
    """fairseq's model with two heads, every parameter moved off its initial value; its options as a dict."""
    dictionary = Dictionary()
    for i in range(VOCAB - len(dictionary)):
        dictionary.add_symbol(f"w{i}")
    args = Namespace(**{**SMALL, **options}, spectral_norm_classification_head=False)
    base_architecture(args)
    chosen = dict(vars(args))  # build_model changes args
    torch.manual_seed(0)
    model = RobertaModel.build_model(args, SimpleNamespace(source_dictionary=dictionary)).eval()
    for name, (inner_dim, n_classes) in HEADS.items():
        model.register_classification_head(name, n_classes, inner_dim)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return model.eval(), {**chosen, "classification_heads": HEADS}


@pytest.fixture(params=CASES, ids=list(CASES))
def pair(request):
    theirs, options = fairseq_model(CASES[request.param])
    ours = build("roberta_base", options, VOCAB).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return ours, theirs


def batches():
    """(B, T): full rows, and rows with padding on the right."""
    full = torch.randint(4, VOCAB, (3, 15), generator=torch.Generator().manual_seed(1))
    padded = full.clone()
    padded[1, 9:] = padded[2, 1:] = 1
    return {"full": full, "padded": padded}


def test_names_types_and_ties_are_fairseqs(pair):
    ours, theirs = (model.state_dict(keep_vars=True) for model in pair)
    assert [(name, t.dtype, t.shape) for name, t in ours.items()] == [(n, t.dtype, t.shape) for n, t in theirs.items()]
    for state in (ours, theirs):
        tied = state["encoder.lm_head.weight"] is state["encoder.sentence_encoder.embed_tokens.weight"]
        assert tied == (not pair[0].config.untie_weights_roberta)
    pair[1].load_state_dict(pair[0].state_dict(), strict=True)


@pytest.mark.parametrize("batch", ["full", "padded"])
def test_results_are_fairseqs(pair, batch):
    ours, theirs = pair
    tokens = batches()[batch]
    with torch.no_grad():
        expected = theirs(tokens)[0]
        assert expected.shape == (*tokens.shape, VOCAB)
        words = tokens != 1
        torch.testing.assert_close(ours(tokens)[words], expected[words], atol=1e-5, rtol=1e-5)
        for name, (_, n_classes) in HEADS.items():
            expected = theirs(tokens, classification_head_name=name)[0]
            assert expected.shape == (len(tokens), n_classes)
            torch.testing.assert_close(ours(tokens, name), expected, atol=1e-5, rtol=1e-5)


def test_every_weight_is_known_to_plans(pair):
    ours, _ = pair
    names = {weight.name for weight in find_weights(ours)}
    matrices = {name for name, p in ours.named_parameters() if p.dim() == 2}
    assert {f"{name}.weight" for name in names} == matrices
    assert ("encoder.lm_head" in names) == ours.config.untie_weights_roberta


def test_what_the_weights_say_of_the_options(pair):
    state = pair[1].state_dict()
    assert task_options(state) == {"max_positions": 20, "classification_heads": HEADS}
    assert vocabulary_size(state) == VOCAB


def test_modern_names_change_no_modern_state(pair):
    state = pair[1].state_dict()
    modern = modern_names(state)
    assert modern.keys() == state.keys()
    assert all(modern[name] is state[name] for name in state)
    other = {"decoder.layers.0.self_attn.in_proj_weight": torch.zeros(3)}
    assert modern_names(other) == other


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"spectral_norm_classification_head": True}, "spectral_norm_classification_head=True is not implemented"),
        ({"adaptive_input": True}, "adaptive_input=True"),
        ({"encoder_learned_pos": False}, "encoder_learned_pos=False"),
        ({"no_scale_embedding": False}, "no_scale_embedding=False"),
        ({"mha_heads_to_keep": 2}, "mha_heads_to_keep=2 is not implemented without fairseq; evaluate it with"),
        ({"ffn_blocks_to_remove": 8}, "ffn_blocks_to_remove=8"),
        ({"quant_noise_scalar": 0.1}, "quant_noise_scalar=0.1: stock fairseq rounds"),
        ({"activation_fn": "swish"}, "activation_fn 'swish' is not implemented"),
        ({"pooler_activation_fn": "swish"}, "pooler_activation_fn 'swish' is not implemented"),
        ({"encoder_attention_heads": 5}, "encoder_attention_heads 5 does not divide encoder_embed_dim 32"),
        ({"max_positions": "${task.max_positions}"}, "a reference to another option"),
        ({"encoder_layers_to_keep": "0,x"}, "encoder_layers_to_keep is 0,x; give the numbers of the layers"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_other_options_are_refused(options, message):
    with refuses(message):
        build("roberta", {**SMALL, **options}, VOCAB)


def test_options_that_are_not_given_have_fairseqs_defaults():
    options = {"_name": "quant_noise_roberta", "encoder_layers": None, "quant_noise_scalar": 0.5, "quant_noise_pq": 0.5}
    config = RobertaConfig.from_fairseq(options, VOCAB)
    assert (config.encoder_layers, config.encoder_embed_dim, config.max_positions) == (12, 768, 512)
    assert config.layernorm_embedding
    assert not config.quant_noise_embedding_layer  # our own models have it where it is asked for
    assert not config.encoder_normalize_before
    assert RobertaConfig.from_fairseq({"tokens_per_sample": 128}, VOCAB).max_positions == 128


def test_misuse_is_refused():
    model = build("roberta", {**SMALL, "classification_heads": HEADS}, VOCAB)
    with refuses("21 tokens exceed max_positions 20"):
        model(torch.full((1, 21), 5))
    with refuses("no classification head 'cola'; this network has mnli, other"):
        model(torch.full((1, 2), 5), "cola")
    with refuses("roberta: these options make no network .AttributeError: .*; change one of them", NoNetworkError):
        meta_model("roberta", {**SMALL, "classification_heads": [1]}, VOCAB)


BASE = {"classification_heads": {"mnli": [768, 3]}}


def sizes(plan=None, **options):
    """Parameters, and MiB dense and under the plan, of the base architecture with a head of three classes."""
    model = meta_model("roberta_base", {**BASE, **options}, 50_265)
    targets = resolve_stages(Plan.of(plan), model) if plan else []
    table = make_table(model, targets)
    return table.parameters, round(table.dense_bytes / MIB, 2), round(table.paper_bytes / MIB, 2)


def test_sizes_of_the_base_model():
    """The paper's 480 MB count the 768 x 768 layer that stock fairseq adds after the embedding for its noise."""
    assert sizes() == (125_289_564, 477.94, 477.94)
    assert sizes(quant_noise_pq=0.1) == (125_289_564 + 768**2, 480.19, 480.19)
    layers_and_words = {"stages": [{"match": r".*\.layers\..*|.*embed_tokens", "block_size": 4}]}
    assert sizes(layers_and_words, quant_noise_pq=0.1) == (125_879_388, 480.19, 38.53)
    everything_else = {"stages": [{"match": r"(?!.*\.quant_noise$).*", "block_size": 4}]}
    assert sizes(everything_else, quant_noise_pq=0.1)[2] == 32.9
