"""`export-onnx --part step`: a word costs a step, and scores are those of the whole text."""

import pytest
import torch
from exported import LM, TRANSLATION, WORDS, decoded, packed_file, scores, session
from lm_cases import CASES

from fairseq_quant_noise import load
from fairseq_quant_noise.networks.attention import Past

onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
pytest.importorskip("onnx", reason="onnx is not installed")

LENGTHS = (5, 1, 1, 3, 1)  # words of each call
PQ = {"stages": [{"match": ".*", "block_size": 2, "n_centroids": 16}]}


def words(rows, length, seed=0):
    """Tokens (rows, length) without padding."""
    return torch.randint(4, WORDS, (rows, length), generator=torch.Generator().manual_seed(seed))


def in_steps(model, tokens, past, **others):
    """The scores of a text that a session of `step` gets in several calls."""
    found = []
    for part in tokens.split(LENGTHS, dim=1):
        inputs = {"tokens": part, "past": past, **others}
        row, present = model.run(["scores", "present"], {name: tensor.numpy() for name, tensor in inputs.items()})
        found.append(torch.from_numpy(row))
        past = torch.from_numpy(present)
    assert past.shape[4] == tokens.shape[1]
    return torch.cat(found, 1)


@pytest.mark.parametrize("case", CASES)
def test_a_language_model_in_steps_scores_as_on_the_whole_text(case, tmp_path):
    options = {**LM, "share_decoder_input_output_embed": False, **CASES[case]}
    path, tokens = packed_file(tmp_path, options=options, plan=PQ), words(3, sum(LENGTHS))
    network = load(path)
    found = in_steps(session(path, "step"), tokens, network.decoder.new_past(3))
    for expected in (scores(session(path), tokens=tokens), decoded(network, tokens)):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def test_layers_that_share_weights_have_keys_of_their_own(tmp_path):
    path, tokens = packed_file(tmp_path, options=LM | {"decoder_layers": 4, "share_layers": 2}), words(2, sum(LENGTHS))
    past = load(path).decoder.new_past(2)
    assert past.shape == (4, 2, 2, 4, 0, 8)
    found = in_steps(session(path, "step"), tokens, past)
    torch.testing.assert_close(found, scores(session(path), tokens=tokens), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "changed", [{}, {"encoder_learned_pos": True, "decoder_learned_pos": True}], ids=["sines", "learned"]
)
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
def test_a_translation_in_steps_scores_as_on_the_whole_text(changed, padded, tmp_path):
    path, tokens, source = (
        packed_file(tmp_path, "transformer", TRANSLATION | changed),
        words(2, 11),
        words(2, 7, seed=1),
    )
    if padded:
        source[1, :3] = 1
    memory = scores(session(path, "source"), source=source)
    network = load(path)
    assert memory.shape == (2, 2, 2, 4, 7, 8)
    found = in_steps(session(path, "step"), tokens, network.decoder.new_past(2), memory=memory, source=source)
    torch.testing.assert_close(found, decoded(network, source, tokens), rtol=0, atol=1e-4)


@pytest.mark.parametrize("learned", [False, True], ids=["sines", "learned"])
def test_a_language_model_in_torch_takes_steps_too(learned, tmp_path):
    network = load(packed_file(tmp_path, options=LM | {"decoder_learned_pos": learned}))
    tokens, keys, found = words(2, sum(LENGTHS)), network.decoder.new_past(2), []
    for part in tokens.split(LENGTHS, dim=1):
        past = Past(keys)
        found.append(network.decoder(part, past=past))
        keys = past.present()
    torch.testing.assert_close(torch.cat(found, 1), network(tokens), rtol=0, atol=1e-4)


def test_a_step_computes_the_scores_of_the_new_words_alone(tmp_path):
    path = packed_file(tmp_path)
    model, past = session(path, "step"), load(path).decoder.new_past(1)
    (long,) = model.run(["present"], {"tokens": words(1, 30).numpy(), "past": past.numpy()})
    row, present = model.run(["scores", "present"], {"tokens": words(1, 1).numpy(), "past": long})
    assert (row.shape, present.shape) == ((1, 1, WORDS), (2, 2, 1, 4, 31, 8))
