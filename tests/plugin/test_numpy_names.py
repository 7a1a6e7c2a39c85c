"""fairseq on a numpy that has none of the names that were removed: where it has them still, they are taken away."""

import numpy as np
import pytest
import torch
from fairseq.data import LanguagePairDataset, ListDataset, TokenBlockDataset
from fairseq.models.transformer_lm import TransformerLanguageModel
from fairseq.modules import DynamicCRF
from lm_fixture import Lab

LENGTHS = [3, 5, 7, 4, 9, 6]


@pytest.fixture(autouse=True)
def newest_numpy(monkeypatch):
    """numpy without the names."""
    percentile = np.percentile
    monkeypatch.setattr(np, "percentile", lambda a, q, *, method: percentile(a, q, method=method))
    for name in ("compat", "float"):
        monkeypatch.delitem(vars(np), name, raising=False)


def sentences(dictionary):
    """One of each of LENGTHS, of the word whose number is its length, with the end of sentence."""
    lines = [torch.tensor([*[dictionary.nspecial + n] * (n - 1), dictionary.eos()]) for n in LENGTHS]
    return ListDataset(lines, np.array(LENGTHS))


def test_a_block_is_a_sentence_where_sentences_are_asked_for(lab: Lab):
    dictionary = lab.task().source_dictionary
    data = sentences(dictionary)
    blocks = TokenBlockDataset(data, data.sizes, 512, dictionary.pad(), dictionary.eos(), break_mode="eos")
    assert [block.tolist() for block in blocks] == [line.tolist() for line in data]


def test_sentences_are_padded_to_the_length_of_their_bucket(lab: Lab):
    dictionary = lab.task().source_dictionary
    data = sentences(dictionary)
    pairs = LanguagePairDataset(data, data.sizes, dictionary, data, data.sizes, dictionary, num_buckets=2)
    lower_half, upper_half = 5, 9  # of 3 4 5 | 6 7 9: the longest of each
    assert [len(pairs[i]["source"]) for i in range(len(LENGTHS))] == [
        lower_half if n <= lower_half else upper_half for n in LENGTHS
    ]
    assert pairs.buckets == [(None, lower_half), (None, upper_half)]


def test_the_crf_of_nacrf_transformer_has_a_likelihood(lab: Lab):
    torch.manual_seed(0)
    crf = DynamicCRF(num_embedding=12, low_rank=4, beam_size=5)
    emissions, targets = torch.randn(2, 6, 12), torch.randint(12, (2, 6))
    likelihood = crf(emissions, targets, torch.ones(2, 6, dtype=torch.bool))
    assert likelihood.isfinite().all()


def test_a_language_model_continues_and_scores_a_text(lab: Lab, runs):
    path = runs.noised("plain").path
    model = TransformerLanguageModel.from_pretrained(str(path.parent), path.name, data_name_or_path=str(lab.data))
    text = model.sample("w1 w2", beam=1, min_len=6, max_len_b=6)
    assert text.startswith("w1 w2 ")
    assert len(model.score(text)["tokens"]) == len(text.split())
