"""FakeTensorMode: a step on fake parameters makes the state that torch's would, and nothing real is touched."""

import pytest
import torch
from sides import CLASSES
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from graddrop_fused import (
    GradDrop,
    GradDropAdamW,
    GradDropEpoch,
    LayerGradDrop,
    attach,
    release_gradients,
)

TORCHS = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}
OPTIONS = {"adamw": {"amsgrad": True}, "sgd": {"momentum": 0.9}, "lion": {}}


def trained(optimizer_of, steps=2):
    model = nn.Sequential(nn.Embedding(11, 4), nn.Linear(4, 3))
    opt = optimizer_of(model)
    for _ in range(steps):
        model(torch.zeros(2, 5, dtype=torch.long)).sum().backward()
        opt.step()
        opt.zero_grad()
    return model, opt


def described(model, opt):
    return {
        name: {key: (type(t), tuple(t.shape), t.dtype) for key, t in opt.state[p].items()}
        for name, p in model.named_parameters()
    }


@pytest.mark.parametrize("backend", ["auto", "cpu", "reference"])
@pytest.mark.parametrize("rule", CLASSES)
@pytest.mark.parametrize(
    "more",
    [{"drop": GradDrop(0.5)}, {"drop": GradDropEpoch(0.5, toggle=True), "steps_per_epoch": 1}, {"capturable": True}],
    ids=["element", "epoch", "capturable"],
)
def test_a_step_makes_the_state(rule, more, backend):
    options = OPTIONS[rule] | {"lr": 1e-3}
    with FakeTensorMode():
        model, opt = trained(lambda m: CLASSES[rule](m.named_parameters(), backend=backend, **options, **more))
        found = described(model, opt)
        assert opt.draw == 2
        assert all(kind is FakeTensor for entry in found.values() for kind, _, _ in entry.values())
        if rule in TORCHS:
            torchs = described(*trained(lambda m: TORCHS[rule](m.parameters(), **options)))
            assert {name: entry | {"step": None} for name, entry in found.items()} == {
                name: entry | {"step": None} for name, entry in torchs.items()
            }


def test_state_has_its_own_dtype_and_layers_are_read():
    with FakeTensorMode():
        made = {"drop": LayerGradDrop(0.5), "state_dtype": torch.bfloat16}
        model, opt = trained(
            lambda m: GradDropAdamW([{"params": [(n, p)], "layer": n} for n, p in m.named_parameters()], **made)
        )
    assert {entry["exp_avg"].dtype for entry in opt.state.values()} == {torch.bfloat16}


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("steps", [0, 1], ids=["first step", "later step"])
def test_real_parameters_are_left_alone_under_the_mode(backend, steps):
    model, opt = trained(lambda m: GradDropAdamW(m.named_parameters(), drop=GradDrop(0.5), backend=backend), steps)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    before = [p.detach().clone() for p in model.parameters()]
    with FakeTensorMode(allow_non_fake_inputs=True), pytest.raises(RuntimeError, match="FakeTensorMode"):
        opt.step()
    assert all(map(torch.equal, model.parameters(), before)) and opt.draw == steps
    opt.step()
    assert opt.draw == steps + 1


def with_gradients(model):
    model(torch.ones(2, 4)).sum().backward()
    return model


def test_fake_parameters_beside_real_ones_are_refused():
    real = with_gradients(nn.Linear(4, 3))
    before = real.weight.detach().clone()
    with FakeTensorMode():
        fake = with_gradients(nn.Linear(4, 3))
    opt = GradDropAdamW([*real.parameters(), *fake.parameters()], drop=GradDrop(0.5))
    with pytest.raises(RuntimeError, match="all be FakeTensors or none"):
        opt.step()
    assert torch.equal(real.weight, before) and not opt.state[real.weight]


def test_attach_and_release_gradients_say_that_they_do_not_work():
    with FakeTensorMode():
        model = with_gradients(nn.Linear(4, 3))
        plain = torch.optim.SGD(model.parameters(), lr=0.1)
        attach(plain, drop=GradDrop(0.5))
        with pytest.raises(RuntimeError, match="FakeTensorMode"):
            plain.step()
        opt = GradDropAdamW(model.named_parameters(), drop=GradDrop(0.5))
        with pytest.raises(RuntimeError, match="FakeTensorMode"), release_gradients(model, opt):
            with_gradients(model)
