"""A weight that is used twice in a forward: one draw, one noised weight, and the gradient of both uses."""

import gc
import weakref

import torch
from toys import TOKENS, Tied, noised, stored


def reads(model, *modules):
    """What each of the modules reads in one training forward."""
    seen = []
    handles = [m.register_forward_hook(lambda module, *_: seen.append(module.weight)) for m in modules]
    model(TOKENS % 12)
    for handle in handles:
        handle.remove()
    return seen


def test_both_uses_read_the_same_tensor():
    model = noised(Tied())
    one, two = reads(model, model.emb, model.out)
    assert one is two
    assert not torch.equal(one, stored(model.emb))


def test_the_gradient_is_that_of_both_uses():
    torch.manual_seed(0)
    model = noised(Tied())
    model(TOKENS % 12).square().sum().backward()
    gradient = stored(model.emb).grad.clone()
    assert gradient.abs().sum() > 0

    torch.manual_seed(0)
    again = noised(Tied())
    weights = []
    again.emb.register_forward_hook(lambda module, *_: weights.append(module.weight.detach()))
    again(TOKENS % 12)
    weight = weights[0].clone().requires_grad_()
    x = torch.nn.functional.embedding(TOKENS % 12, weight, padding_idx=1)
    torch.nn.functional.linear(x, weight).square().sum().backward()
    torch.testing.assert_close(gradient, weight.grad)


def test_the_noised_copy_is_gone_after_backward():
    model = noised(Tied())
    copy = weakref.ref(reads(model, model.emb, model.out)[0])
    assert any(noise.seen for noise in model._quant_noise.weights.values())
    model(TOKENS % 12).sum().backward()
    gc.collect()
    assert copy() is None
    assert all(noise.seen is None for noise in model._quant_noise.weights.values())


def test_a_forward_without_gradient_does_not_lend_its_copy_to_one_with():
    model = noised(Tied())
    with torch.no_grad():
        model(TOKENS % 12)
    out = model(TOKENS % 12)
    out.sum().backward()
    assert stored(model.emb).grad is not None
