"""A quantized state back to a dense one."""

import pytest
import torch
from packed_files import packed_zoo, quantized_zoo
from toys import INT_PLANS, TOKENS, zoo

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


@pytest.mark.parametrize("plan", INT_PLANS)
@pytest.mark.parametrize("source", ["checkpoint", "file"])
def test_codes_of_every_scheme_decode_as_the_quantized_model_does_in_evaluation(plan, source):
    model = quantized_zoo(plan)
    packed = packed_zoo(plan=plan)
    shapes = {name: entry.shape for name, entry in packed.manifest.tensors.items()}
    found = dense_state(packed.state_dict() if source == "file" else model.train().state_dict(), shapes)
    model.eval()
    assert found.keys() == zoo().state_dict().keys()
    for name, weight in quantized_weights(model).items():
        torch.testing.assert_close(found[f"{name}.weight"], weight.decode(), rtol=1e-6, atol=0)
    assert found["out.weight"].data_ptr() == found["emb.weight"].data_ptr()
    assert not any(t.requires_grad for t in found.values())


def test_a_weight_that_is_still_trained_decodes_bit_for_bit():
    model = quantized_zoo("int3 by histogram")
    assert torch.equal(dense_state(model.state_dict())["fc.weight"], model.fc.weight)


def test_ranges_of_inputs_are_left_out():
    assert dense_state(quantized_zoo("inputs").state_dict()).keys() == zoo().state_dict().keys()


def test_a_dense_state_comes_back_as_it_is():
    state = zoo().state_dict()
    dense = dense_state(state)
    assert dense.keys() == state.keys()
    assert all(dense[name] is state[name] for name in state)


def test_codes_without_centroids_are_an_ordinary_tensor():
    state = {"a.codes": torch.ones(2), "b.centroids": torch.zeros(3), "codes": torch.ones(1), "c.affine": torch.ones(1)}
    assert dense_state(state) == state
