"""Every policy and effect against a loop in Python's float64, whose masks come from helpers/independent.py."""

import pytest
import torch
from policy_cases import BACKENDS, CASES, PER_EPOCH, RUNS, SHAPES, STEPS, build, by_the_equations, gradients


def check(names, effects, tell, backend="reference"):
    policies, masks = zip(*(CASES[name] for name in names), strict=True)
    params, opt = build(policies, effects, backend, **({} if tell else {"steps_per_epoch": PER_EPOCH}))
    start = [p.detach().flatten().tolist() for p in params]
    grads = [gradients(step) for step in range(1, STEPS + 1)]
    for step in range(1, STEPS + 1):
        if tell and (step - 1) % PER_EPOCH == 0:
            opt.set_epoch((step - 1) // PER_EPOCH)
        for p, g in zip(params, grads[step - 1], strict=True):
            p.grad = g.clone()
        opt.step()
    for i, (name, p) in enumerate(zip(SHAPES, params, strict=True)):
        drawn = [masks[i](s, (s - 1) // PER_EPOCH, name, p.numel(), i) for s in range(1, STEPS + 1)]
        in_parts = policies[i] is not None and (policies[i].layerwise or policies[i].block != 1)
        truth = by_the_equations(start[i], drawn, effects[i], [g[i].flatten().tolist() for g in grads], in_parts)
        expected = torch.tensor(truth, dtype=torch.float64).reshape(p.shape)
        # 1/q is rounded to float32; gaussian noise agrees to 1e-5
        torch.testing.assert_close(p.detach(), expected, rtol=1e-4 if "gaussian" in names else 1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name, effect", RUNS)
def test_follows_the_equations(name, effect, backend):
    check([name] * 3, [effect] * 3, tell=effect != "update", backend=backend)


def test_groups_of_different_policies_and_effects():
    check(["toggle", "LayerGradDrop", "steps anneal"], ["freeze", "gradient", "update"], tell=True)


@pytest.mark.parametrize("name", [name for name in CASES if name != "gaussian"])
def test_keep_mask_is_what_the_next_step_applies(name):
    params, opt = build([CASES[name][0]] * 3, ["freeze"] * 3, steps_per_epoch=PER_EPOCH)
    for step in range(STEPS):
        before = [p.detach().clone() for p in params]
        for p, g in zip(params, gradients(step), strict=True):
            p.grad = g
        masks = [opt.keep_mask(p) for p in params]
        for p, mask in zip(params, masks, strict=True):
            p.grad[~mask] = torch.nan
        opt.step()
        for p, old, mask in zip(params, before, masks, strict=True):
            assert mask.dtype == torch.bool and torch.equal(p.detach() != old, mask)
