"""Checkpoints that must be refused before anything changes, and states that must survive a round trip."""

import copy
import io

import pytest
import torch
from named_parameters import SHAPES, give_gradients, parameters
from policy_cases import BACKENDS, CASES, PER_EPOCH, build, gradients
from torch import nn

from graddrop_fused import GradDrop, GradDropAdamW, GradDropEpoch, GradDropSGD, StaticMask


def train(params, opt, start, stop, tell=True):
    for step in range(start, stop):
        if tell and step % PER_EPOCH == 0:
            opt.set_epoch(step // PER_EPOCH)
        for p, g in zip(params, gradients(step), strict=True):
            p.grad = g
        opt.step()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("cut", [1, 2, 5])
def test_continues_bit_for_bit(name, cut, backend):
    drop = CASES[name][0]
    params, opt = build([drop] * 3, ["gradient"] * 3, amsgrad=True, backend=backend)
    train(params, opt, 0, cut)
    file = io.BytesIO()
    torch.save(opt.state_dict(), file)
    file.seek(0)
    saved_params = [p.detach().clone() for p in params]
    # policies come from the checkpoint, but masks of the user's own do not
    resumed, other = build(
        [drop if name == "StaticMask" else None] * 3, ["gradient"] * 3, amsgrad=True, backend=backend
    )
    for p, saved in zip(resumed, saved_params, strict=True):
        p.data.copy_(saved)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert (other.seed, other.draw, other.epoch) == (opt.seed, cut, opt.epoch)
    train(params, opt, cut, 8)
    train(resumed, other, cut, 8)
    assert all(torch.equal(p, q) for p, q in zip(params, resumed, strict=True))


def rename(state, names):
    state["param_groups"][0]["param_names"] = names


def regroup(**options):
    return lambda state: state["param_groups"][0].update(options)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda s: rename(s, ["a", "a"]), "both called 'a'"),
        (lambda s: rename(s, ["a"]), "param_names"),
        (regroup(effect="vanish"), "effect must be"),
        (regroup(drop={"policy": "GradDrop", "p": 1.5}), "p must be"),
        (regroup(drop={"policy": "Unknown"}), "policy must be"),
        (regroup(seed=-1), "seed must be"),
        (regroup(draw=0.5), "draw must be"),
        (regroup(differentiable=True), "differentiable must be"),
    ],
)
def test_a_bad_checkpoint_changes_nothing(change, message):
    params = [("a", nn.Parameter(torch.ones(5))), ("b", nn.Parameter(torch.ones(3)))]
    opt = GradDropAdamW(params, drop=GradDrop(p=0.5), backend="reference")
    for _, p in params:
        p.grad = torch.ones_like(p)
    opt.step()
    before = copy.deepcopy(opt.state_dict())
    bad = copy.deepcopy(before)
    change(bad)
    with pytest.raises((TypeError, ValueError), match=message):
        opt.load_state_dict(bad)
    after = opt.state_dict()
    assert after["param_groups"] == before["param_groups"]
    for index, entry in before["state"].items():
        assert all(torch.equal(value, after["state"][index][key]) for key, value in entry.items())


@pytest.mark.parametrize("named", [True, False])
def test_checkpoints_go_both_ways_with_torch(named):
    def run(cls, params, **options):
        return cls(params.items() if named else params.values(), lr=1e-2, **options)

    ours, theirs = parameters(), parameters()
    a, b = run(GradDropAdamW, ours, backend="reference"), run(torch.optim.AdamW, theirs, foreach=False)
    for step in range(4):
        give_gradients(ours, step)
        give_gradients(theirs, step)
        a.step()
        b.step()
    from_theirs = run(GradDropAdamW, theirs, drop=GradDrop(0.0), seed=5, backend="reference")
    from_theirs.load_state_dict(b.state_dict())
    from_ours = run(torch.optim.AdamW, ours, foreach=False)
    from_ours.load_state_dict(a.state_dict())
    assert (from_theirs.draw, from_theirs.seed) == (4, 5)
    for step in range(4, 8):
        give_gradients(ours, step)
        give_gradients(theirs, step)
        from_ours.step()
        from_theirs.step()
    for name in SHAPES:
        torch.testing.assert_close(ours[name], theirs[name], rtol=2e-5, atol=2e-6)


OPTIONS = {"amsgrad": (GradDropAdamW, torch.optim.AdamW, True), "momentum": (GradDropSGD, torch.optim.SGD, 0.9)}


@pytest.mark.parametrize("active_state", [False, True])
@pytest.mark.parametrize("option", OPTIONS)
def test_an_option_that_is_off_when_it_is_saved_and_on_again_later(option, active_state):
    ours, theirs, on = OPTIONS[option]
    rows = {"drop": GradDropEpoch(0.5, block="row"), "steps_per_epoch": 9, "effect": "freeze", "active_state": True}

    def run(optimizer, params, steps):
        for step in steps:
            optimizer.param_groups[0][option] = type(on)(0) if step == 1 else on
            give_gradients(params, step)
            optimizer.step()
        return optimizer.state_dict()

    others = rows if active_state else {}
    whole, params, torchs = parameters(), parameters(), parameters()
    run(ours(whole.items(), **others), whole, range(3))
    saved = run(ours(params.items(), **others), params, range(2))
    resumed = ours(params.items(), **others)
    resumed.load_state_dict(copy.deepcopy(saved))
    run(resumed, params, [2])
    assert all(torch.equal(params[name], whole[name]) for name in SHAPES)
    resumed.load_state_dict(run(theirs(torchs.items()), torchs, range(2)))


@pytest.mark.parametrize("active_state", [False, True])
@pytest.mark.parametrize("option", OPTIONS)
def test_an_option_that_is_set_between_the_last_step_and_the_checkpoint(option, active_state):
    """The state that it adds begins with the next step, loaded or not."""
    ours, _, on = OPTIONS[option]
    rows = {"drop": GradDropEpoch(0.5, block="row"), "steps_per_epoch": 9, "effect": "freeze", "active_state": True}

    def run(loaded):
        params = parameters()
        opt = ours(params.items(), **(rows if active_state else {}))
        for step in range(4):
            if step == 2:
                opt.param_groups[0][option] = on
                if loaded:
                    saved, opt = opt.state_dict(), ours(params.items(), **(rows if active_state else {}))
                    opt.load_state_dict(saved)
            give_gradients(params, step)
            opt.step()
        return params

    whole, resumed = run(False), run(True)
    assert all(torch.equal(resumed[name], whole[name]) for name in SHAPES)


def test_moments_of_another_dtype_survive_loading():
    params = parameters(torch.bfloat16)
    opt = GradDropAdamW(params.items(), state_dtype=torch.float32, drop=GradDrop(0.5))
    give_gradients(params, 0)
    opt.step()
    other = GradDropAdamW(parameters(torch.bfloat16).items(), state_dtype=torch.float32)
    other.load_state_dict(opt.state_dict())
    for mine, theirs in zip(opt.state.values(), other.state.values(), strict=True):
        assert mine["exp_avg"].dtype == torch.float32
        assert torch.equal(mine["exp_avg"], theirs["exp_avg"])
    half = parameters(torch.float16)
    opt = GradDropAdamW(half.items())
    give_gradients(half, 0)
    opt.step()
    assert {s["exp_avg_sq"].dtype for s in opt.state.values()} == {torch.float32}  # float16 squares underflow


def test_state_of_parameters_in_another_order_is_refused():
    params = parameters()
    give_gradients(params, 0)
    opt = GradDropAdamW([("module.a", params["b.bias"]), ("b", nn.Parameter(torch.zeros(1)))])
    opt.step()
    other = GradDropAdamW([("b", nn.Parameter(torch.zeros(1))), ("a", params["b.bias"])])
    with pytest.raises(ValueError, match="must be in the optimizer's order, .* got 'a' in the place of 'b'"):
        other.load_state_dict(opt.state_dict())
    assert other.draw == 0 and not other.state and other.param_groups[0]["param_names"] == ["b", "a"]
    other.load_state_dict(torch.optim.AdamW(other.param_groups[0]["params"]).state_dict())  # without names


def test_pairs_whose_name_is_none_have_no_names():
    params = parameters()
    give_gradients(params, 0)
    opt = GradDropAdamW([(None, p) for p in params.values()], drop=GradDrop(0.5))
    opt.step()
    opt.load_state_dict(opt.state_dict())
    assert opt.draw == 1 and "param_names" not in opt.param_groups[0]


def test_static_masks_by_name():
    params = parameters()
    mask = torch.rand(SHAPES["a.weight"], generator=torch.Generator().manual_seed(1)) < 0.5
    opt = GradDropAdamW(params.items(), drop=StaticMask({"a.weight": mask}), effect="freeze", weight_decay=0.5)
    before = params["a.weight"].detach().clone()
    give_gradients(params, 0)
    opt.step()
    assert torch.equal(params["a.weight"] != before, mask)
    other = GradDropAdamW(params.items(), drop=StaticMask({"a.weight": mask}))
    other.load_state_dict(opt.state_dict())
    assert torch.equal(other.keep_mask(params["a.weight"]), mask)
    with pytest.raises(ValueError, match="StaticMask"):
        GradDropAdamW(params.items()).load_state_dict(opt.state_dict())
