"""The access of a module's weight: another class of the same name, and the same storage."""

import copy

import pytest
import torch
from torch import nn

from fairseq_quant_noise.weights.access import WeightAccess, intercept, release

MODULES = [nn.Linear(4, 3), nn.Embedding(5, 4), nn.Conv2d(2, 3, 3)]


def intercepted(module=None):
    module = module or nn.Linear(4, 3)
    intercept(module)
    return module


@pytest.mark.parametrize("module", MODULES, ids=lambda m: type(m).__name__)
def test_a_module_keeps_its_type_name_parameters_and_state(module):
    cls, weight, state, text = type(module), module.weight, dict(module.state_dict()), repr(module)
    intercept(module)
    assert isinstance(module, cls)
    assert (type(module).__name__, type(module).__module__) == (cls.__name__, cls.__module__)
    assert repr(module) == text
    assert module.weight is weight
    assert list(module.state_dict()) == list(state)
    release(module)
    assert type(module) is cls


def test_a_second_call_changes_nothing():
    module = intercepted()
    cls = type(module)
    intercept(module)
    assert type(module) is cls
    release(module)
    release(module)
    assert type(module) is nn.Linear


def test_modules_of_one_type_share_one_class():
    assert type(intercepted()) is type(intercepted())


def test_reading_goes_through_the_noise():
    module = intercepted()
    module._weight_noise = lambda m, stored: stored * 0
    assert not module.weight.any()
    assert torch.equal(module(torch.ones(1, 4))[0], module.bias)
    assert module._parameters["weight"].any()


def test_a_new_parameter_can_be_assigned_and_a_state_loaded():
    module, new = intercepted(), nn.Parameter(torch.randn(3, 4))
    module.weight = new
    assert module.weight is new
    module.load_state_dict({"weight": torch.ones(3, 4), "bias": torch.zeros(3)})
    assert module.weight.eq(1).all()


def test_a_quantized_weight_is_read_by_decoding_it():
    class Quantized(nn.Module):
        def decode(self):
            return torch.eye(4)

    module = intercepted(nn.Linear(4, 4, bias=False))
    del module._parameters["weight"]
    module._modules["weight"] = Quantized()
    assert torch.equal(module(torch.eye(4)), torch.eye(4))


def test_a_copy_is_intercepted_too():
    assert isinstance(copy.deepcopy(intercepted()), WeightAccess)


def test_functional_calls_see_the_parameters_they_bring():
    module = intercepted()
    brought = {"weight": torch.ones(3, 4), "bias": torch.zeros(3)}
    assert torch.func.functional_call(module, brought, torch.ones(1, 4)).tolist() == [[4.0, 4.0, 4.0]]
