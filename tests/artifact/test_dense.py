"""A quantized state back to a dense one."""

import pytest
import torch
from packed_files import packed_zoo, quantized_zoo
from toys import TOKENS, zoo

from fairseq_quant_noise.artifact import dense_state
from fairseq_quant_noise.layers import quantized_weights


@pytest.fixture(scope="module")
def dense():
    packed = packed_zoo()
    shapes = {name: entry.shape for name, entry in packed.manifest.tensors.items()}
    return dense_state(packed.state_dict(), shapes)


def test_it_holds_what_the_quantized_model_decodes(dense):
    weights = quantized_weights(quantized_zoo())
    assert len(weights) == 7
    assert all(torch.equal(dense[f"{name}.weight"], weight.decode()) for name, weight in weights.items())


def test_it_loads_strictly_into_the_stock_model_with_the_same_result(dense):
    model = zoo(1)
    model.load_state_dict(dense)
    assert torch.equal(model.eval()(TOKENS), quantized_zoo()(TOKENS))


@pytest.mark.upstream(8)
def test_tied_copies_share_one_tensor(dense):
    assert dense["out.weight"].data_ptr() == dense["emb.weight"].data_ptr()


def test_a_checkpoint_that_was_trained_in_fp32_centroids_decodes_as_the_file_would():
    dense = dense_state(quantized_zoo().state_dict())
    assert torch.equal(dense["fc.weight"], quantized_zoo().fc.weight)
    assert dense["out.weight"].data_ptr() == dense["emb.weight"].data_ptr()


def test_a_dense_state_comes_back_as_it_is():
    state = zoo().state_dict()
    dense = dense_state(state)
    assert dense.keys() == state.keys()
    assert all(dense[name] is state[name] for name in state)


def test_codes_without_centroids_are_an_ordinary_tensor():
    state = {"a.codes": torch.ones(2), "b.centroids": torch.zeros(3), "codes": torch.ones(1)}
    assert dense_state(state) == state
