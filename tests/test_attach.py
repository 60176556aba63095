"""attach(): masks for any other optimizer, in place before each of its steps."""

import copy
import pickle

import pytest
import torch
from named_parameters import give_gradients, parameters
from policy_cases import BACKENDS
from torch import nn

from graddrop_fused import GradDrop, GradDropEpoch, LayerGradDrop, StaticMask, attach


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


def test_steps_per_epoch_stays_where_a_loaded_state_has_none():
    """As in GradDropAdamW: else the epoch would stand still at the one that was told last."""
    told = attach(torch.optim.SGD([nn.Parameter(torch.ones(33))]), GradDropEpoch(0.5))
    told.set_epoch(0)
    param = nn.Parameter(torch.ones(33))
    opt = torch.optim.SGD([param])
    handle = attach(opt, GradDropEpoch(0.5), steps_per_epoch=2)
    handle.load_state_dict(told.state_dict())
    for epoch in (0, 0, 1, 1):
        param.grad = torch.ones(33)
        assert handle.epoch == epoch
        opt.step()


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


class CallsItsBase(torch.optim.SGD):
    def step(self, closure=None):
        return super().step(closure)


@pytest.mark.parametrize("by_closure", [False, True])
def test_a_step_that_calls_its_base_is_masked_once(by_closure):
    torch.optim.SGD([nn.Parameter(torch.zeros(1))])  # from now on torch calls hooks around the base's step, too
    p = nn.Parameter(torch.zeros(1000))
    opt = CallsItsBase([p], lr=1.0)
    handle = attach(opt, GradDrop(0.5))
    for step in range(3):
        before, mask = p.detach().clone(), handle.keep_mask(p)

        def closure():
            p.grad = torch.ones(1000)
            return 1.0

        if by_closure:
            assert opt.step(closure) == 1.0
        else:
            closure()
            opt.step()
        assert handle.draw == step + 1 and torch.equal(p.detach(), before - 2.0 * mask)


class Scaled(torch.optim.SGD):
    def step(self, scale, closure=None):
        loss = None if closure is None else closure()
        for group in self.param_groups:
            group["lr"] = scale
        super().step()
        return loss


@pytest.mark.parametrize("by_closure", [False, True])
def test_a_step_with_an_argument_before_the_closure(by_closure):
    p = nn.Parameter(torch.zeros(1000))
    opt = Scaled([p])
    mask = attach(opt, GradDrop(0.5)).keep_mask(p)

    def closure():
        p.grad = torch.ones(1000)
        return 1.0

    if by_closure:
        assert opt.step(0.25, closure=closure) == 1.0
    else:
        closure()
        opt.step(0.25)
    assert torch.equal(p.detach(), -0.5 * mask)


def kept(opt, handle, params):
    """Which share of each gradient a step keeps; that it is what keep_mask says."""
    for p in params:
        p.grad = torch.ones_like(p)
    masks = [handle.keep_mask(p) for p in params]
    opt.step()
    assert all(torch.equal(p.grad != 0, mask) for p, mask in zip(params, masks, strict=True))
    return [round(mask.double().mean().item(), 1) for mask in masks]


def test_policies_stay_with_their_groups():
    p, q, r = params = [nn.Parameter(torch.ones(4096)) for _ in range(3)]
    opt = torch.optim.SGD([{"params": [p], "drop": GradDrop(0.1)}, {"params": [q], "drop": GradDrop(0.9)}], lr=1.0)
    handle = attach(opt)
    assert kept(opt, handle, [p, q]) == [0.9, 0.1]
    opt.param_groups.reverse()
    assert kept(opt, handle, [p, q]) == [0.9, 0.1]
    opt.add_param_group({"params": [r], "drop": GradDrop(0.5)})
    assert kept(opt, handle, params) == [0.9, 0.1, 0.5]
    plain = opt.state_dict()
    assert not any("drop" in group for group in plain["param_groups"])
    opt.param_groups[0]["drop"] = GradDrop(0.3)  # q's
    assert kept(opt, handle, params) == [0.9, 0.7, 0.5] and "drop" not in opt.param_groups[0]
    opt.load_state_dict({**plain, "param_groups": [{**g, "drop": "of another"} for g in plain["param_groups"]]})
    assert kept(opt, handle, params) == [0.9, 0.7, 0.5]
    assert [state["p"] for state in handle.state_dict()["policies"]] == [0.3, 0.1, 0.5]
    opt.load_state_dict(opt.state_dict())
    del opt.param_groups[0]
    assert kept(opt, handle, [p, r]) == [0.9, 0.5]
    opt.load_state_dict(opt.state_dict())
    opt.param_groups[1]["drop"] = None
    assert kept(opt, handle, [p, r]) == [0.9, 1.0]
    opt.param_groups.clear()
    opt.add_param_group({"params": [q], "drop": GradDrop(0.2)})
    assert kept(opt, handle, [q]) == [0.8]
    handle.remove()
    assert [group["drop"] for group in opt.param_groups] == [GradDrop(0.2)]
    opt.load_state_dict(opt.state_dict())
    assert opt.param_groups[0]["drop"] == GradDrop(0.2)


def test_a_checkpoint_with_other_names():
    """It brings them to the groups, and masks go by them."""
    param = nn.Parameter(torch.zeros(40, 25))
    opt = torch.optim.SGD([("w", param)], lr=1.0)
    handle = attach(opt, drop=GradDrop(0.5, rescale=False))
    for name in ("w", "net.w"):
        saved = opt.state_dict()
        saved["param_groups"][0]["param_names"] = [name]
        opt.load_state_dict(saved)
        expected = handle.keep_mask(param)
        param.grad = torch.ones_like(param)
        opt.step()
        assert torch.equal(param.grad.bool(), expected)


@pytest.mark.parametrize(
    "entries, error, message",
    [
        ({"drop": "graddrop:p=0.1"}, TypeError, "drop must be None or a policy"),
        ({"layer": 1}, TypeError, "layer must be a layer's name"),
        ({"drop": StaticMask({"zz": torch.ones(3, dtype=torch.bool)})}, ValueError, "StaticMask names 'zz'"),
        ({"drop": LayerGradDrop(0.5)}, None, ""),
    ],
    ids=["text", "number", "unknown name", "good"],
)
def test_what_is_set_later_is_checked(entries, error, message):
    p, q = (nn.Parameter(torch.ones(64)) for _ in range(2))
    opt = torch.optim.SGD([{"params": [("p", p)]}, {"params": [("q", q)]}], lr=1.0)
    handle = attach(opt, GradDrop(0.5))
    state = handle.state_dict()
    opt.param_groups[1].update(entries)
    p.grad, q.grad = torch.ones(64), torch.ones(64)
    if error is None:
        opt.step()
        assert len(set(q.grad.tolist())) == 1 and handle.draw == 1
        return
    for act in (opt.step, handle.state_dict, lambda: handle.keep_mask(p)):
        with pytest.raises(error, match=message):
            act()
    assert torch.equal(p.grad, torch.ones(64)) and torch.equal(p, torch.ones(64)) and handle.draw == 0
    for name in entries:
        del opt.param_groups[1][name]
    assert handle.state_dict() == state


def test_what_attach_refuses():
    p, z = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4, dtype=torch.complex64))
    with pytest.warns(UserWarning, match="duplicate"):
        twice = torch.optim.SGD([p, p], lr=1.0)
    with pytest.raises(ValueError, match="must not list a parameter twice"):
        attach(twice, GradDrop(0.5))
    with pytest.raises(ValueError, match=r"parameter \(0, 1\) must be float32.*got torch.complex64"):
        attach(torch.optim.SGD([p, z], lr=1.0), GradDrop(0.5))
    attach(torch.optim.SGD([p, nn.Parameter(torch.ones(4, dtype=torch.uint8), requires_grad=False)]), GradDrop(0.5))
    with pytest.raises(TypeError, match="layer must be a layer's name"):
        attach(torch.optim.SGD([{"params": [p], "layer": 1.5}], lr=1.0), GradDrop(0.5))
    opt = torch.optim.SGD([p], lr=1.0)
    handle = attach(opt, GradDrop(0.5))
    for copied in (copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match=r"attach\(\) to the copy of its optimizer"):
            copied(handle)
    with pytest.raises(TypeError, match="state must be a dict as state_dict"):
        handle.load_state_dict(None)
    p.grad = torch.ones(4).to_sparse()
    with pytest.raises(ValueError, match="give the parameter a group with drop=None"):
        opt.step()


def test_one_memory_given_to_two_parameters():
    p, q = nn.Parameter(torch.zeros(40, 25)), nn.Parameter(torch.zeros(1000))
    opt = torch.optim.SGD([p, q], lr=1.0)
    handle = attach(opt, GradDrop(0.5))
    grad = torch.ones(1000)
    p.grad, q.grad = grad.view(40, 25), grad
    masks = [handle.keep_mask(p), handle.keep_mask(q)]
    opt.step()
    for param, mask in zip((p, q), masks, strict=True):
        assert torch.equal(param.detach(), -2.0 * mask)
