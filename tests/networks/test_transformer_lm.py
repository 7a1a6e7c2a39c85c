"""Our transformer_lm against fairseq's: the same names, ties and results, and no fairseq in the import."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lm_cases import CASES, SMALL, VOCAB, batches, fairseq_model, our_model
from torch import nn

from fairseq_quant_noise.errors import UserError
from fairseq_quant_noise.networks import TransformerLM, TransformerLMConfig


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def ties(model):
    """The names of the state dict, grouped by the memory that they share."""
    groups = {}
    for name, tensor in model.state_dict().items():
        groups.setdefault(tensor.data_ptr(), []).append(name)
    return sorted(groups.values())


@pytest.fixture(params=CASES, ids=list(CASES))
def pair(request):
    theirs, options = fairseq_model(CASES[request.param])
    ours = our_model(options)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return ours, theirs


def test_names_types_and_ties_are_fairseqs(pair):
    ours, theirs = pair
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert ties(ours) == ties(theirs)
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in theirs.named_parameters()]
    for kind in (nn.Linear, nn.Embedding, nn.LayerNorm):
        holders = [[n for n, m in model.named_modules() if isinstance(m, kind)] for model in pair]
        assert holders[0] == holders[1]
    for name, tensor in theirs.state_dict().items():
        assert ours.state_dict()[name].dtype == tensor.dtype


def test_state_dict_loads_into_fairseqs(pair):
    ours, theirs = pair
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(0.01)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    tokens = batches()["full"]
    expected = theirs.get_normalized_probs(theirs(tokens), log_probs=True)
    torch.testing.assert_close(ours(tokens).log_softmax(-1), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("batch", list(batches()))
def test_results_are_fairseqs(pair, batch):
    ours, theirs = pair
    tokens = batches()[batch]
    with torch.no_grad():
        output = theirs(tokens)
        expected = theirs.get_normalized_probs(output, log_probs=True)
        scores = ours(tokens)
    assert scores.shape == (*tokens.shape, VOCAB)
    torch.testing.assert_close(scores.log_softmax(-1), expected, atol=1e-5, rtol=1e-5)
    raw = expected if theirs.decoder.adaptive_softmax is not None else output[0]
    torch.testing.assert_close(scores, raw, atol=1e-5, rtol=1e-5)


def fairseq_nll(model, tokens, targets):
    """The loss that fairseq's criterions train on: adaptive_loss, or cross_entropy."""
    features, _ = model(tokens)
    softmax = model.decoder.adaptive_softmax
    if softmax is None:
        return nn.functional.cross_entropy(features.flatten(0, 1), targets.flatten(), reduction="sum")
    scores, parts = softmax(features, targets)
    pairs = [(score, part) for score, part in zip(scores, parts, strict=True) if part is not None]
    return sum(nn.functional.cross_entropy(score, part, reduction="sum") for score, part in pairs)


def test_gradients_are_fairseqs(pair):
    ours, theirs = pair
    tokens, targets = batches()["padded"], batches()["full"]
    nn.functional.cross_entropy(ours(tokens).flatten(0, 1), targets.flatten(), reduction="sum").backward()
    fairseq_nll(theirs, tokens, targets).backward()
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, theirs.get_parameter(name).grad, atol=1e-4, rtol=1e-4)


def _swap_weights(model):
    """Replace every stored weight by a property, as the package's quantized lookups do."""
    held = {}
    for module in model.modules():
        parameter = module._parameters.get("weight")
        if parameter is None or isinstance(module, nn.LayerNorm):
            continue
        del module._parameters["weight"]
        value = held.setdefault(id(parameter), parameter.detach() * 1.5)
        swapped = property(lambda self: self.__dict__["_decoded"])
        module.__class__ = type(type(module).__name__, (type(module),), {"weight": swapped})
        module.__dict__["_decoded"] = value


def test_weights_are_read_at_use(pair):
    ours, theirs = pair
    tokens = batches()["padded"]
    stored = {
        f"{name}.weight"
        for name, module in ours.named_modules()
        if "weight" in module._parameters and not isinstance(module, nn.LayerNorm)
    }
    scaled = {n: t * 1.5 if n in stored else t for n, t in theirs.state_dict().items()}
    _swap_weights(ours)
    theirs.load_state_dict(scaled, strict=True)
    with torch.no_grad():
        expected = theirs.get_normalized_probs(theirs(tokens), log_probs=True)
        torch.testing.assert_close(ours(tokens).log_softmax(-1), expected, atol=1e-4, rtol=1e-4)


def test_trains():
    torch.manual_seed(0)
    options = {**SMALL, **CASES["all_tied"], "decoder_normalize_before": True}
    model = TransformerLM(TransformerLMConfig.from_fairseq(options, VOCAB))
    tokens = batches()["full"]
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(30):
        loss = nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("case", ["all_tied", "shared"])
def test_half_precision(case, dtype):
    theirs, options = fairseq_model(CASES[case])
    ours = our_model(options)
    ours.load_state_dict(theirs.state_dict())
    tokens = batches()["padded"]
    with torch.no_grad():
        scores = ours.to(dtype)(tokens)
        expected = theirs.get_normalized_probs(theirs(tokens), log_probs=True)
    assert scores.dtype == dtype
    torch.testing.assert_close(scores.float().log_softmax(-1), expected, atol=0.15, rtol=0.05)


@pytest.mark.parametrize("case", ["all_tied", "shared"])
def test_built_on_meta_and_loaded_by_assignment(case):
    theirs, options = fairseq_model(CASES[case])
    with torch.device("meta"):
        ours = our_model(options)
    ours.load_state_dict(theirs.state_dict(), strict=True, assign=True)
    tokens = batches()["full"]
    expected = theirs.get_normalized_probs(theirs(tokens), log_probs=True)
    torch.testing.assert_close(ours(tokens).log_softmax(-1), expected, atol=1e-5, rtol=1e-5)


def test_buffers_of_other_fairseq_versions_are_dropped():
    ours = our_model(SMALL)
    state = ours.state_dict() | {"decoder.embed_positions._float_tensor": torch.zeros(1)}
    ours.load_state_dict(state, strict=True)


def test_more_tokens_than_learned_positions_are_refused():
    model = our_model({**SMALL, "decoder_learned_pos": True, "max_target_positions": 8})
    with pytest.raises(UserError, match="max_target_positions 8"):
        model(batches()["full"])


def test_sharing_is_ignored_beside_an_adaptive_softmax():
    theirs, options = fairseq_model({**CASES["adaptive_softmax"], "share_decoder_input_output_embed": True})
    assert list(our_model(options).state_dict()) == list(theirs.state_dict())


def test_runs_without_importing_fairseq():
    code = """
import sys, torch
from fairseq_quant_noise.networks import build
scores = build("transformer_lm", {"decoder_layers": 1}, 10)(torch.full((1, 3), 5))
assert scores.shape == (1, 3, 10), scores.shape
assert "fairseq" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
