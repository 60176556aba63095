"""attach(): masks for any other optimizer, in place before each of its steps."""

import pytest
import torch
from named_parameters import give_gradients, parameters
from policy_cases import BACKENDS
from torch import nn

from graddrop_fused import GradDrop, GradDropEpoch, attach


def test_attach_masks_what_the_optimizer_then_sees():
    params = parameters()
    sgd = torch.optim.SGD(params.values(), lr=1.0)
    handle = attach(sgd, GradDrop(0.5), seed=3)
    for step in range(3):
        before = {n: p.detach().clone() for n, p in params.items()}
        give_gradients(params, step)
        masks, grads = [handle.keep_mask(p) for p in params.values()], [p.grad.clone() for p in params.values()]
        sgd.step()
        for (n, p), mask, grad in zip(params.items(), masks, grads, strict=True):
            torch.testing.assert_close(p.detach(), before[n] - torch.where(mask, 2 * grad, 0.0))
    assert handle.draw == 3
    again = attach(torch.optim.SGD(params.values(), lr=1.0), GradDrop(0.1))
    again.load_state_dict(handle.state_dict())
    assert all(torch.equal(again.keep_mask(p), handle.keep_mask(p)) for p in params.values())
    handle.remove()
    give_gradients(params, 9)
    before, grad = params["a.weight"].detach().clone(), params["a.weight"].grad.clone()
    sgd.step()
    torch.testing.assert_close(params["a.weight"].detach(), before - grad)


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.Adagrad, torch.optim.RMSprop])
def test_an_attached_handle_goes_on_and_leaves(make):
    def run(drop, cut):
        torch.manual_seed(0)
        params = [("a", nn.Parameter(torch.randn(17, 23))), ("b", nn.Parameter(torch.randn(33)))]
        opt = make([p for _, p in params], lr=0.1)
        handle = attach(opt, drop=drop, seed=5, backend="reference")
        for step in range(6):
            if step == cut:
                state = handle.state_dict()
                handle.remove()
                handle = attach(opt, drop=drop, backend="reference")
                handle.load_state_dict(state)
            for _, p in params:
                p.grad = torch.full_like(p, step + 1.0)
            masks = [handle.keep_mask(p) for _, p in params]
            opt.step()
            assert all(torch.equal(p.grad != 0, mask) for (_, p), mask in zip(params, masks, strict=True))
        assert handle.draw == 6
        handle.remove()
        params[0][1].grad = torch.ones(17, 23)
        opt.step()
        assert params[0][1].grad.all() and handle.draw == 6
        return [p for _, p in params]

    assert all(torch.equal(p, q) for p, q in zip(run(GradDrop(p=0.5), 3), run(GradDrop(p=0.5), 99), strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("drop", [GradDrop(0.5), GradDropEpoch(0.5)], ids=repr)
def test_gradients_that_come_and_go(backend, drop):
    """Missing in the first step, or later, or for good: the others are masked as ever, and it is left alone."""
    params = {
        "a": nn.Parameter(torch.ones(17, 23).t()),
        "b": nn.Parameter(torch.ones(33)),
        "c": nn.Parameter(torch.ones(9)),
    }
    opt = torch.optim.SGD(params.items(), lr=0.25)
    handle = attach(opt, drop, seed=3, backend=backend)
    handle.set_epoch(0)
    for step in range(5):
        opt.zero_grad()
        given = [params[name] for name in ("ab", "b", "", "a", "ab")[step]]
        for p in given:
            p.grad = torch.ones_like(p)
        masks = {p: handle.keep_mask(p) for p in given}
        before = {p: p.detach().clone() for p in params.values()}
        versions = {p: p._version for p in params.values()}
        opt.step()
        for p in params.values():
            if p in masks:
                torch.testing.assert_close(p.detach(), before[p] - 0.5 * masks[p])
            else:
                assert p.grad is None and torch.equal(p, before[p]) and p._version == versions[p]
    assert handle.draw == 5
