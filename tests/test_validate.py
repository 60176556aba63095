"""Bad input gets an error that names it, before anything changes."""

import copy

import pytest
import torch
from named_parameters import equal, give_gradients, parameters

from graddrop_fused import (
    GradDrop,
    GradDropAdamW,
    GradDropEpoch,
    GradFreeze,
    LayerGradDrop,
    LinearAnneal,
    StaticMask,
)

BAD = [
    (lambda: GradDrop(1.0), "p must be"),
    (lambda: GradDrop(float("nan")), "p must be"),
    (lambda: GradDrop(-0.1), "p must be"),
    (lambda: GradDrop(0.1, anneal=LinearAnneal(epochs=3)), "exactly one of p and anneal"),
    (lambda: GradDrop(0.1, block=100), "block must be"),
    (lambda: LinearAnneal(epochs=1), "epochs must be"),
    (lambda: LinearAnneal(), "exactly one of epochs and total_steps"),
    (lambda: LinearAnneal(start=1.5, epochs=3), "start must be"),
    (lambda: GradDropEpoch(0.5, toggle=True, replacement=True), "toggle and replacement"),
    (lambda: GradFreeze("sideways"), "direction must be"),
    (lambda: LayerGradDrop(0.5, per="minute"), "per must be"),
    (lambda: make(lr=-1.0), "lr must be"),
    (lambda: make(eps=-1.0), "eps must be"),
    (lambda: make(betas=(0.9, 1.0)), r"betas\[1\] must be"),
    (lambda: make(weight_decay=-1.0), "weight_decay must be"),
    (lambda: make(seed=2**64), "seed must be"),
    (lambda: make(seed=-1), "seed must be"),
    (lambda: make(seed=0.5), "seed must be"),
    (lambda: make(steps_per_epoch=0), "steps_per_epoch must be"),
    (lambda: make(effect="vanish"), "effect must be"),
    (lambda: make(backend="abacus"), "backend must be"),
    (lambda: make(drop=0.1), "drop must be"),
    (lambda: make(differentiable=True), "differentiable must be"),
    (lambda: make(state_dtype=torch.int8), "state_dtype must be"),
    (lambda: make(drop=GradDrop(0.1, distribution="gaussian"), effect="freeze"), "effect must be"),
    (lambda: make(drop=StaticMask({"a.bias": torch.ones(2, dtype=torch.bool)})), "StaticMask"),
    (lambda: make(drop=StaticMask({"no.such": torch.ones(2, dtype=torch.bool)})), "no.such"),
    (lambda: GradDropAdamW([torch.zeros(3, dtype=torch.complex64)]), "must be float32"),
    (lambda: GradDropAdamW([torch.zeros(3, dtype=torch.int64)]), "must be float32"),
    (lambda: GradDropAdamW([torch.zeros(3).expand(2, 3)]), "must not be expanded"),
    (lambda: GradDropAdamW([(p := torch.zeros(3)), p]), "twice"),
    (lambda: GradDropAdamW([(3, torch.zeros(3))]), r"params must hold .* got \(3, a tensor"),
    (lambda: GradDropAdamW([("a", torch.zeros(3), 0.1)]), r"params must hold .* got \('a', a tensor"),
    (lambda: make(steps_per_epoch=3).set_epoch(1), "steps_per_epoch=3"),
    (lambda: make().set_epoch(-1), "epoch must be"),
]


def make(**options):
    return GradDropAdamW(parameters().items(), **options)


@pytest.mark.parametrize("case", range(len(BAD)))
def test_bad_input_is_named(case):
    call, message = BAD[case]
    with pytest.raises((TypeError, ValueError, RuntimeError), match=message):
        call()


def test_after_an_error_everything_is_as_it_was():
    params = parameters()
    opt = GradDropAdamW(params.items(), drop=GradDrop(0.5))
    give_gradients(params, 0)
    opt.step()
    saved = copy.deepcopy(opt.state_dict())
    before = {n: p.detach().clone() for n, p in params.items()}

    def unchanged():
        now = opt.state_dict()
        assert equal(before, params)
        assert now["param_groups"] == saved["param_groups"]
        for mine, theirs in zip(now["state"].values(), saved["state"].values(), strict=True):
            assert equal(mine, theirs)

    give_gradients(params, 1)
    params["b.bias"].grad = torch.sparse_coo_tensor([[0]], [1.0], (1,), check_invariants=True)
    with pytest.raises(ValueError, match="must be dense"):
        opt.step()
    unchanged()
    with pytest.raises(ValueError, match="b.bias"):
        opt.add_param_group({"params": [("b.bias", params["b.bias"])]})
    unchanged()

    def broken(change):
        state = copy.deepcopy(saved)
        change(state)
        return state

    for change, message in [
        (lambda s: s["state"][0].pop("exp_avg"), "lacks entry 'exp_avg'"),
        (lambda s: s["state"][0].update(more=torch.zeros(1)), "extra entry 'more'"),
        (lambda s: s["state"][0].update(exp_avg=torch.zeros(2)), "must have its parameter.s shape"),
        (lambda s: s["state"].update({99: s["state"][0]}), "99"),
        (lambda s: s["param_groups"].pop(), "param groups"),
        (lambda s: s["param_groups"][0]["params"].pop(), "parameters"),
        (lambda s: s["param_groups"][0].update(drop={"policy": "Nonsense"}), "Nonsense"),
        (lambda s: s.pop("state"), "'state'"),
    ]:
        with pytest.raises(ValueError, match=message):
            opt.load_state_dict(broken(change))
        unchanged()

    epochs = GradDropAdamW(params.items(), drop=GradDropEpoch(0.5))
    give_gradients(params, 2)
    with pytest.raises(RuntimeError, match="set_epoch"):
        epochs.step()
    unchanged()
    assert not epochs.state
