"""Wrong use, and rare use: an error that names the tensor and changes nothing, or what torch's own optimizer does.

docs/robustness.md is the table for readers. Where the right value is not an error it comes from torch.optim.AdamW.
"""

import copy
import io
import pickle
import warnings
from collections import namedtuple
from dataclasses import dataclass, field
from enum import Enum
from functools import partial

import pytest
import torch
from policy_cases import BACKENDS
from torch import nn

from graddrop_fused import (
    GradDrop,
    GradDropAdamW,
    GradDropEpoch,
    GradDropSGD,
    GradFreeze,
    LayerGradDrop,
    Policy,
    Schedule,
    StaticMask,
    attach,
    describe,
    keep_mask,
    pack_mask,
    param_groups,
    skip_dropped_layers,
    skip_dropped_rows,
)
from graddrop_fused.contract import Mask
from graddrop_fused.masked import MaskedOptimizer
from graddrop_fused.policies import KEEP, Draw, Index, Row

SHAPES = {"a": (17, 23), "b": (33,), "c": (5, 5)}


def tensors(seed=0, shapes=SHAPES):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def made(backend, **options):
    params = {name: nn.Parameter(t) for name, t in tensors().items()}
    optimizer = GradDropAdamW(params.items(), lr=1e-2, backend=backend, **options)
    give(params)
    return params, optimizer


def give(params, seed=1):
    for name, grad in tensors(seed, {name: p.shape for name, p in params.items()}).items():
        params[name].grad = grad.to(params[name].dtype)


def everything(params, optimizer):
    """Copies of all that a refused step must leave alone."""
    state = {
        id(p): {k: v.clone() for k, v in entry.items() if isinstance(v, torch.Tensor)}
        for p, entry in optimizer.state.items()
    }
    return {name: p.detach().clone() for name, p in params.items()}, state, optimizer.draw


def assert_unchanged(before, params, optimizer):
    old, states, draw = before
    assert optimizer.draw == draw
    for name, p in params.items():
        assert torch.equal(p.detach(), old[name])
    for p, entry in optimizer.state.items():
        for key, value in states.get(id(p), {}).items():
            assert torch.equal(entry[key], value), key


# Addresses: whatever was changed behind the optimizer's back


def grow(params, optimizer):
    params["a"].data = torch.zeros(40, 23)


def shrink(params, optimizer):
    params["a"].data = torch.zeros(3, 23)


def empty_storage(params, optimizer):
    params["a"].untyped_storage().resize_(0)


def state_of_another_shape(params, optimizer):
    optimizer.state[params["a"]]["exp_avg"] = torch.zeros(3)


def complex_state(params, optimizer):
    optimizer.state[params["a"]]["exp_avg"] = torch.zeros(17, 23, dtype=torch.complex64)


def list_state(params, optimizer):
    optimizer.state[params["a"]]["exp_avg"] = [0.0]


def meta_state(params, optimizer):
    optimizer.state[params["a"]]["exp_avg_sq"] = torch.zeros(17, 23, device="meta")


def state_of_an_empty_storage(params, optimizer):
    optimizer.state[params["a"]]["exp_avg"].untyped_storage().resize_(0)


def negative_step(params, optimizer):
    optimizer.state[params["a"]]["step"] = torch.tensor(-1.0)


def half_step(params, optimizer):
    optimizer.state[params["a"]]["step"] = torch.tensor(1.5)


def integer_parameter(params, optimizer):
    params["a"].requires_grad_(False)
    params["a"].data = torch.zeros(17, 23, dtype=torch.int32)


def overlapping(params, optimizer):
    params["a"].data = torch.zeros(100).as_strided((17, 23), (1, 1))


def expanded(params, optimizer):
    params["a"].data = torch.zeros(1, 23).expand(17, 23)


def sharing(params, optimizer):
    params["c"].data = params["a"].data[:5, :5]


BROKEN = [
    grow,
    shrink,
    empty_storage,
    state_of_another_shape,
    complex_state,
    list_state,
    meta_state,
    state_of_an_empty_storage,
    negative_step,
    half_step,
    integer_parameter,
    overlapping,
    expanded,
    sharing,
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("change", BROKEN, ids=lambda change: change.__name__)
def test_what_no_longer_fits_is_refused_by_name(change, backend):
    params, optimizer = made(backend, drop=GradDrop(0.5))
    optimizer.step()
    change(params, optimizer)
    if change not in (grow, shrink):
        give({name: p for name, p in params.items() if name != "a"})
    others = {name: p for name, p in params.items() if name not in ("a", "c")}
    before = {name: p.detach().clone() for name, p in others.items()}
    draw, steps = optimizer.draw, [float(optimizer.state[p]["step"]) for p in others.values()]
    with pytest.raises((TypeError, ValueError), match="'a'"):
        optimizer.step()
    assert optimizer.draw == draw and [float(optimizer.state[p]["step"]) for p in others.values()] == steps
    for name, p in others.items():
        assert torch.equal(p, before[name])


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "reference"])  # which crashes, as torch does
@pytest.mark.parametrize("effect", ["gradient", "freeze"])
@pytest.mark.parametrize("first", [True, False], ids=["first step", "later"])
def test_a_gradient_whose_storage_was_freed(first, effect, backend):
    """Compiled backends are told by address 0 that there is no gradient."""
    params, optimizer = made(
        backend, drop=GradDropEpoch(0.5, block=128), effect=effect, active_state=effect == "freeze"
    )
    optimizer.set_epoch(0)
    if not first:
        optimizer.step()
    before = everything(params, optimizer)
    params["a"].grad.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match=r"a gradient of shape \(17, 23\) must have memory, but its storage is freed"):
        optimizer.step()
    assert_unchanged(before, params, optimizer)


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("name", "value"),
    [("lr", None), ("lr", "x"), ("betas", None), ("betas", (0.9,)), ("eps", "x"), ("weight_decay", None)],
)
def test_what_is_no_number_in_a_group(name, value, backend, capturable):
    params, optimizer = made(backend, drop=GradDrop(0.5), capturable=capturable)
    optimizer.step()
    before = everything(params, optimizer)
    optimizer.param_groups[0][name] = value
    with pytest.raises((TypeError, ValueError), match=f"^{name} must be "):
        optimizer.step()
    assert_unchanged(before, params, optimizer)


@pytest.mark.parametrize("backend", BACKENDS)
def test_common_elements_are_found_whatever_lies_between(backend):
    memory = torch.zeros(100)
    views = {"long": memory[::2], "between": memory[1:4:2], "last": memory[50:60:2]}
    params = {name: nn.Parameter(view) for name, view in views.items()}
    optimizer = GradDropAdamW(params.items(), backend=backend)
    give(params)
    with pytest.raises(ValueError, match="parameters 'long' and 'last' must not share memory"):
        optimizer.step()
    assert not memory.any()
    params["last"].grad = None
    optimizer.step()


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_empty_parameter_that_gets_another_shape(backend):
    empty = nn.Parameter(torch.zeros(0, 0))
    optimizer = GradDropAdamW([empty], backend=backend)
    empty.grad = torch.zeros(0, 0)
    optimizer.step()
    empty.data = torch.zeros(0, 1)
    optimizer.step()
    assert optimizer.draw == 2


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides_that_change_at_the_same_address(backend):
    """torch.optim.AdamW keeps its state in the parameter's shape, so a square one may be turned round at any time."""
    ours, theirs = (nn.Parameter(torch.randn(6, 6, generator=torch.Generator().manual_seed(0))) for _ in range(2))
    mine = GradDropAdamW([ours], lr=1e-2, backend=backend)
    reference = torch.optim.AdamW([theirs], lr=1e-2, foreach=False)
    for step in range(4):
        for p in (ours, theirs):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(step))
        mine.step()
        reference.step()
        for p in (ours, theirs):
            p.data = p.data.t()
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_parameter_turned_round_no_longer_has_its_states_shape(backend):
    params, optimizer = made(backend)
    optimizer.step()
    params["a"].data = params["a"].data.t()
    params["a"].grad = torch.zeros(23, 17)
    with pytest.raises(ValueError, match="state 'exp_avg' of parameter 'a' must have its parameter's shape"):
        optimizer.step()


@pytest.mark.parametrize("backend", BACKENDS)
def test_another_shape_of_as_many_elements_is_not_its_states(backend):
    params, optimizer = made(backend)
    optimizer.step()
    params["a"].data = params["a"].data.view(23, 17)
    params["a"].grad = torch.zeros(17, 23).t()
    before = everything(params, optimizer)
    with pytest.raises(ValueError, match="state 'exp_avg' of parameter 'a' must have its parameter's shape"):
        optimizer.step()
    assert_unchanged(before, params, optimizer)


@pytest.mark.parametrize("masked", [*BACKENDS, "attach"])
def test_another_shape_of_as_many_elements_without_state(masked):
    """Rows and strides are then those of the new shape."""
    p = nn.Parameter(torch.zeros(4, 6))
    drop = GradDrop(0.5, block="row")
    if masked == "attach":
        optimizer = torch.optim.SGD([("w", p)], lr=1.0)
        mask_of = attach(optimizer, drop).keep_mask
    else:
        optimizer = GradDropSGD([("w", p)], lr=1.0, drop=drop, backend=masked)
        mask_of = optimizer.keep_mask
    p.grad = torch.ones(4, 6)
    optimizer.step()
    p.data = p.data.zero_().view(6, 4)
    memory = torch.ones(100)
    for grad in (memory[:24].view(4, 6).t(), memory[24:48].view(6, 4)):
        p.data.zero_()
        p.grad = grad
        mask = mask_of(p)
        optimizer.step()
        assert torch.equal(p.detach(), -2.0 * mask)
    assert (memory[48:] == 1.0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_swapped_tensors(backend):
    params, optimizer = made(backend)
    optimizer.step()
    other = nn.Parameter(torch.full((17, 23), 3.0))
    other.grad = torch.ones(17, 23)
    torch.utils.swap_tensors(params["a"], other)
    moments = optimizer.state[params["a"]]["exp_avg"].clone()
    optimizer.step()
    assert torch.allclose(optimizer.state[params["a"]]["exp_avg"], moments * 0.9 + 0.1)
    assert (params["a"] != 3.0).all()


# Gradients


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_with_a_lazy_sign(backend):
    ours, theirs = nn.Parameter(torch.ones(17, 3)), nn.Parameter(torch.ones(17, 3))
    for p in (ours, theirs):
        p.grad = torch.randn(17, 3, dtype=torch.complex64, generator=torch.Generator().manual_seed(3)).conj().imag
        assert p.grad.is_neg()
    GradDropAdamW([ours], backend=backend).step()
    torch.optim.AdamW([theirs], foreach=False).step()
    torch.testing.assert_close(ours, theirs)


class Elsewhere(torch.Tensor):
    """A wrapper subclass: its elements lie in another tensor, and it has no address."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, device=inner.device)

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        def bare(x):
            return x.inner if isinstance(x, cls) else x

        def wrap(x):
            return cls(x) if isinstance(x, torch.Tensor) else x

        tree = torch.utils._pytree.tree_map
        out = function(*tree(bare, args), **tree(bare, kwargs or {}))
        return args[0] if function.__name__.split(".")[0].endswith("_") else tree(wrap, out)


class Marked(torch.Tensor):
    """An ordinary subclass: its elements lie at its address."""


def test_a_wrapper_subclass_as_parameter_goes_to_the_reference():
    inner = torch.randn(17, 3, generator=torch.Generator().manual_seed(0))
    theirs = nn.Parameter(inner.clone())
    ours = nn.Parameter(Elsewhere(inner.clone()))
    grad = torch.randn(17, 3, generator=torch.Generator().manual_seed(1))
    ours.grad, theirs.grad = Elsewhere(grad), grad
    optimizer = GradDropAdamW([("w", ours)], lr=1e-2)
    optimizer.step()
    torch.optim.AdamW([theirs], lr=1e-2, foreach=False).step()
    assert torch.allclose(ours.data.inner if hasattr(ours.data, "inner") else ours.inner, theirs.detach())
    with pytest.raises(RuntimeError, match="class|subclass"):
        GradDropAdamW([("w", ours)], backend="cpu").step()


@pytest.mark.parametrize("backend", BACKENDS)
def test_subclasses_as_gradients(backend):
    params, optimizer = made(backend)
    truth, expected = made(backend)
    params["b"].grad = params["b"].grad.as_subclass(Marked)
    optimizer.step()
    expected.step()
    assert torch.equal(params["b"], truth["b"])
    give(params, 2)
    params["a"].grad = Elsewhere(torch.zeros(17, 23))
    before = everything(params, optimizer)
    with pytest.raises(ValueError, match="gradient of parameter 'a' must be an ordinary tensor"):
        optimizer.step()
    assert_unchanged(before, params, optimizer)


@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
@pytest.mark.parametrize(
    "change",
    [
        lambda state: torch._neg_view(-state),  # as that of x.conj().imag
        lambda state: Elsewhere(state.clone()),
        lambda state: torch._efficientzerotensor(state.shape),
    ],
    ids=["lazy sign", "wrapper subclass", "zeros without memory"],
)
def test_state_put_in_by_hand_that_does_not_lie_at_its_address(change, backend):
    params, optimizer = made(backend)
    truth, expected = made(backend)
    for ps, o in ((params, optimizer), (truth, expected)):
        o.step()
        o.state[ps["a"]]["exp_avg"] = change(o.state[ps["a"]]["exp_avg"])
        if o is expected:
            plain = o.state[ps["a"]]["exp_avg"]
            o.state[ps["a"]]["exp_avg"] = plain.inner if isinstance(plain, Elsewhere) else plain.clone().resolve_neg()
        give(ps, 2)
        o.step()
    for name in params:
        assert torch.equal(params[name], truth[name])


@pytest.mark.parametrize("backend", BACKENDS)
def test_entries_of_state_that_change_places(backend):
    """The dict's values are then the same, in the same order."""
    ours, theirs = ([nn.Parameter(torch.zeros(3)) for _ in range(2)] for _ in range(2))
    for ps, o in ((ours, GradDropAdamW(ours, backend=backend)), (theirs, torch.optim.AdamW(theirs, foreach=False))):
        for step in range(3):
            ps[0].grad, ps[1].grad = torch.full((3,), step + 1.0), torch.full((3,), -3.0)
            if step == 2:
                first, second = (o.state.pop(p) for p in ps)
                o.state[ps[1]], o.state[ps[0]] = first, second
            o.step()
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("capturable", [False, True])
def test_a_step_put_in_by_hand_may_be_a_number(backend, capturable):
    params, optimizer = made(backend, capturable=capturable)
    truth, expected = made(backend, capturable=capturable)
    for (ps, o), step in (((params, optimizer), 5), ((truth, expected), torch.tensor(5.0))):
        o.step()
        o.state[ps["a"]]["step"] = step
        o.step()
        assert o.state[ps["a"]]["step"] == torch.tensor(6.0)
    for name in params:
        assert torch.equal(params[name], truth[name])


def test_a_parameter_with_a_lazy_sign_goes_to_the_reference():
    values = torch.randn(17, 3, dtype=torch.complex64, generator=torch.Generator().manual_seed(3)).conj()
    ours, theirs = nn.Parameter(values.imag), nn.Parameter(values.imag.clone().resolve_neg())
    assert ours.is_neg()
    ours.grad, theirs.grad = torch.ones(17, 3), torch.ones(17, 3)
    GradDropAdamW([("w", ours)], lr=1e-2).step()
    torch.optim.AdamW([theirs], lr=1e-2, foreach=False).step()
    torch.testing.assert_close(ours.detach().resolve_neg(), theirs.detach())
    with pytest.raises(RuntimeError, match="lazy negative sign"):
        GradDropAdamW([("w", ours)], backend="cpu").step()


def test_inference_tensors():
    with torch.inference_mode():
        frozen = torch.zeros(3)
    with pytest.raises(ValueError, match="'w'.*inference"):
        GradDropAdamW([("w", frozen)])


@pytest.mark.parametrize(
    "options",
    [{}, {"capturable": True}, {"drop": GradDropEpoch(0.5, block=128), "effect": "freeze", "active_state": True}],
    ids=["plain", "capturable", "active_state"],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_steps_in_and_out_of_inference_mode(backend, options):
    """What a step makes in it is an inference tensor, which the next step outside must not write to."""
    params, optimizer = made(backend, steps_per_epoch=2, **options)
    truth, expected = made(backend, steps_per_epoch=2, **options)
    for inference in (True, False, True, False):
        with torch.inference_mode(inference):
            optimizer.step()
        expected.step()
    for name in params:
        assert torch.equal(params[name], truth[name])


def test_attached_masks_in_and_out_of_inference_mode():
    params, truth = ({name: nn.Parameter(torch.ones(shape)) for name, shape in SHAPES.items()} for _ in range(2))
    for ps, modes in ((params, (True, False, True, False)), (truth, (False,) * 4)):
        optimizer = torch.optim.SGD(ps.items(), lr=1.0)
        attach(optimizer, GradDrop(0.5))
        for inference in modes:
            give(ps)
            with torch.inference_mode(inference):
                optimizer.step()
    for name in params:
        assert torch.equal(params[name], truth[name])


def test_empty_tensors_of_any_stride():
    empty = torch.empty(0).as_strided((0, 4), (0, 0))
    params = [("e", nn.Parameter(empty)), ("w", nn.Parameter(torch.ones(3)))]
    optimizer = GradDropAdamW(params)
    for _, p in params:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert optimizer.draw == 1


# A refused or interrupted step


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("failure", [MemoryError, KeyboardInterrupt])
@pytest.mark.parametrize("where", ["torch.empty", "pack", "prepare"])
def test_half_a_step_is_none(backend, failure, where, monkeypatch):
    """What fails before the kernel is called leaves counts, parameters and state of one step before."""
    params, optimizer = made(backend, drop=GradDropEpoch(0.5, toggle=True))
    optimizer.set_epoch(0)
    optimizer.step()
    optimizer.set_epoch(1)
    give(params, 2)
    before = everything(params, optimizer)
    module = optimizer._plan.buckets[0].backend

    def fail(*_, **__):
        raise failure

    with monkeypatch.context() as broken:
        if where == "torch.empty":
            for bucket in optimizer._plan.buckets:
                bucket.batch.packed = [None] * len(bucket.batch.packed)
            broken.setattr(torch, "empty", fail)
        else:
            broken.setattr(module, where, fail)
        with pytest.raises(failure):
            optimizer.step()
    assert_unchanged(before, params, optimizer)
    truth, expected = made(backend, drop=GradDropEpoch(0.5, toggle=True))
    expected.set_epoch(0)
    expected.step()
    expected.set_epoch(1)
    give(truth, 2)
    for o in (optimizer, expected):
        o.step()
    for name in params:
        assert torch.equal(params[name], truth[name])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_refused_step_keeps_no_gradient_alive(backend):
    import weakref

    params, optimizer = made(backend, drop=GradDrop(0.5))
    optimizer.step()
    give(params, 2)
    params["c"].grad = torch.zeros(5, 5).to_sparse()
    grad = weakref.ref(params["a"].grad)
    with pytest.raises(ValueError, match="'c'"):
        optimizer.step()
    params["a"].grad = None
    assert grad() is None


# Groups


def test_groups_show_live_values_and_refuse_others():
    params, optimizer = made("reference", drop=GradDrop(0.5), seed=7)
    for _ in range(5):
        optimizer.step()
    assert optimizer.param_groups[0]["draw"] == 5 and "draw: 5" in repr(optimizer)
    optimizer.param_groups[0]["seed"] = 99
    with pytest.raises(ValueError, match="seed in a param group must stay 7, got 99"):
        optimizer.step()
    assert optimizer.draw == 5
    optimizer.step()
    assert optimizer.draw == 6


@pytest.mark.parametrize("read_before", [True, False])
@pytest.mark.parametrize("name", ["draw", "seed", "epoch", "steps_per_epoch"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_clock_in_a_group_is_not_to_be_set_under_capturable(backend, name, read_before):
    """Where the device counts alone, too; the steps go on as if nobody had tried."""
    params, optimizer = made(backend, drop=GradDrop(0.5), capturable=True)
    truth, expected = made(backend, drop=GradDrop(0.5), capturable=True)
    for o in (optimizer, expected):
        o.step()
        o.step()
    if read_before:
        assert optimizer.draw == 2
    before = everything(params, optimizer) if read_before else None
    optimizer.param_groups[0][name] = 99
    with pytest.raises(ValueError, match=f"{name} in a param group must stay .*, got 99"):
        optimizer.step()
    if before is not None:
        assert_unchanged(before, params, optimizer)
    for o in (optimizer, expected):
        o.step()
    assert optimizer.draw == expected.draw == 3
    assert all(torch.equal(params[n], truth[n]) for n in params)


@pytest.mark.parametrize(
    "group, message",
    [
        ({"params": [("a", nn.Parameter(torch.ones(2)))]}, "both called 'a'"),
        ({"params": [("module.a", nn.Parameter(torch.ones(2)))]}, "'a' and 'module.a'"),
        ({"params": [("d", nn.Parameter(torch.ones(2)))], "drop": StaticMask([torch.ones(3) > 0])}, "whole shape"),
        ({"params": [("d", nn.Parameter(torch.ones(2)))], "lr": -1.0}, "lr must be"),
        ({"params": [("d", nn.Parameter(torch.ones(2)))], "layer": 3}, "layer must be"),
    ],
    ids=["same-name", "canonical-name", "static-mask", "lr", "layer"],
)
def test_a_group_that_cannot_be_added_changes_nothing(group, message):
    params, optimizer = made("reference", drop=GradDrop(0.5))
    optimizer.step()
    groups = [dict(g) for g in optimizer.param_groups]
    before = everything(params, optimizer)
    with pytest.raises((TypeError, ValueError), match=message):
        optimizer.add_param_group(group)
    assert [dict(g) for g in optimizer.param_groups] == groups
    assert_unchanged(before, params, optimizer)
    optimizer.step()


# Checkpoints and their hooks


@pytest.mark.parametrize("change", ["more", "fewer"])
def test_parameters_without_their_names_are_refused(change):
    """As a list of parameters is changed by hand, and that of their names forgotten."""
    p, q = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    optimizer = GradDropAdamW([("p", p), ("q", q)], drop=GradDrop(p=0.5))
    group = optimizer.param_groups[0]
    group["params"] = [p] if change == "fewer" else [p, q, nn.Parameter(torch.ones(3))]
    p.grad = torch.ones(3)
    for act in (optimizer.step, partial(optimizer.keep_mask, p)):
        with pytest.raises(ValueError, match="param_names of group 0 must have a name for each of its"):
            act()
    assert torch.equal(p, torch.ones(3)) and optimizer.draw == 0
    group["param_names"] = ["p", "q", "r"][: len(group["params"])]
    optimizer.step()
    assert optimizer.draw == 1


def test_hooks_of_state_dicts_are_called_as_torch_calls_them():
    params, optimizer = made("reference", drop=GradDrop(0.5))
    optimizer.step()
    saved = optimizer.state_dict()
    calls = []
    optimizer.register_state_dict_pre_hook(lambda o: calls.append("state pre"))
    optimizer.register_state_dict_post_hook(lambda o, s: {**s, "more": 1})
    optimizer.register_load_state_dict_pre_hook(lambda o, s: {k: v for k, v in s.items() if k != "extra"})
    optimizer.register_load_state_dict_post_hook(lambda o: calls.append("load post"))
    assert optimizer.state_dict()["more"] == 1
    optimizer.load_state_dict({**saved, "extra": 5})
    assert calls == ["state pre", "load post"]


def test_a_pre_hook_may_reorder_parameters():
    params, optimizer = made("reference")
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    saved["param_groups"][0]["params"] = [0, 2, 1]
    saved["state"] = {0: saved["state"][0], 2: saved["state"][1], 1: saved["state"][2]}
    other = made("reference")[1]

    def reorder(_, state):
        state = copy.deepcopy(state)
        state["param_groups"][0]["params"] = [0, 1, 2]
        state["state"] = {0: state["state"][0], 1: state["state"][2], 2: state["state"][1]}
        return state

    other.register_load_state_dict_pre_hook(reorder)
    other.load_state_dict(saved)
    mine, theirs = (list(o.state.values()) for o in (optimizer, other))
    assert [tuple(e["exp_avg"].shape) for e in theirs] == [tuple(e["exp_avg"].shape) for e in mine]


def test_older_torch_checkpoints_lack_options():
    truth = {name: nn.Parameter(t) for name, t in tensors().items()}
    theirs = torch.optim.AdamW(truth.values(), lr=3e-3)
    give(truth)
    theirs.step()
    saved = theirs.state_dict()
    for name in ("capturable", "foreach", "fused", "differentiable", "maximize", "decoupled_weight_decay"):
        saved["param_groups"][0].pop(name, None)
    params, optimizer = made("reference", maximize=True)
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["maximize"] is True and optimizer.param_groups[0]["lr"] == 3e-3
    assert optimizer.draw == 1


def without_memory(tensor):
    tensor.untyped_storage().resize_(0)
    return tensor


WRONG_VALUES = {
    "step -1": lambda s: s["state"][0].update(step=torch.tensor(-1.0)),
    "step nan": lambda s: s["state"][0].update(step=torch.tensor(float("nan"))),
    "step 1.5": lambda s: s["state"][0].update(step=1.5),
    "step text": lambda s: s["state"][0].update(step="many"),
    "complex moment": lambda s: s["state"][0].update(exp_avg=torch.zeros(17, 23, dtype=torch.complex64)),
    "integer moment": lambda s: s["state"][0].update(exp_avg=torch.zeros(17, 23, dtype=torch.int64)),
    "list moment": lambda s: s["state"][0].update(exp_avg=[1.0]),
    "no moment": lambda s: s["state"][0].pop("exp_avg"),
    "moment without memory": lambda s: s["state"][0]["exp_avg"].untyped_storage().resize_(0),
    "step without memory": lambda s: s["state"][0]["step"].untyped_storage().resize_(0),
    "drop 5": lambda s: s["param_groups"][0].update(drop=5),
    "drop nonsense": lambda s: s["param_groups"][0].update(drop={"policy": "Nonsense"}),
    "drop argument": lambda s: s["param_groups"][0].update(drop={"policy": "GradDrop", "q": 1}),
    "seed": lambda s: s["param_groups"][0].update(seed=-1),
    "draw": lambda s: s["param_groups"][0].update(draw=2**32),
    "epoch": lambda s: s["param_groups"][0].update(epoch="first"),
    "mask stream": lambda s: s["param_groups"][0].update(mask_stream=1),
    "no mask stream": lambda s: s["param_groups"][0].pop("mask_stream"),
    "betas": lambda s: s["param_groups"][0].update(betas=(0.9, 2.0)),
    "lr": lambda s: s["param_groups"][0].update(lr="fast"),
    "lr without memory": lambda s: s["param_groups"][0].update(lr=without_memory(torch.tensor(0.1))),
    "params": lambda s: s["param_groups"][0].update(params=5),
    "state": lambda s: s.update(state=[1]),
}


@pytest.mark.parametrize("name", WRONG_VALUES)
def test_wrong_values_in_a_checkpoint_change_nothing(name):
    params, optimizer = made("reference", drop=GradDrop(0.5))
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    WRONG_VALUES[name](saved)
    before = everything(params, optimizer)
    with pytest.raises((TypeError, ValueError)):
        optimizer.load_state_dict(saved)
    assert_unchanged(before, params, optimizer)
    optimizer.step()


def test_whatever_is_accepted_can_be_saved_and_loaded_again():
    numpy = pytest.importorskip("numpy", reason="numpy is not installed: torch works without it")
    params, optimizer = made("reference", drop=GradDrop(p=numpy.float64(0.25)))
    optimizer.param_groups[0]["lr"] = numpy.float64(0.5)
    optimizer.step()
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    other = made("reference", drop=GradDrop(0.5))[1]
    other.load_state_dict(loaded)
    assert other.param_groups[0]["drop"] == GradDrop(0.25) and other.param_groups[0]["lr"] == 0.5


def test_strings_of_every_class_can_be_saved():
    numpy = pytest.importorskip("numpy", reason="numpy is not installed: torch works without it")

    class Name(str, Enum):
        FIRST = "first"

    groups = [
        {"params": [(numpy.str_("a"), nn.Parameter(torch.ones(3)))], "layer": Name.FIRST},
        {"params": [("b", nn.Parameter(torch.ones(3)))], "layer": numpy.str_("last"), "effect": numpy.str_("freeze")},
    ]
    groups[0]["betas"] = namedtuple("Betas", "first second")(numpy.float64(0.5), numpy.float64(0.75))
    groups[1]["note"] = {numpy.str_("of"): numpy.str_("mine")}
    optimizer = GradDropAdamW(groups, drop=GradFreeze(numpy.str_("bottom-up")), rounding=numpy.str_("nearest"))
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    optimizer.load_state_dict(loaded)
    first, last = loaded["param_groups"]
    assert (first["layer"], first["param_names"], last["layer"], last["effect"]) == ("first", ["a"], "last", "freeze")
    assert first["betas"] == [0.5, 0.75] and last["note"] == {"of": "mine"}
    assert optimizer.param_groups[0]["drop"] == GradFreeze("bottom-up")


@pytest.mark.parametrize("kind", ["float64", "float32", "float16"])
def test_numpy_s_numbers_are_python_s(kind):
    numpy = pytest.importorskip("numpy", reason="numpy is not installed: torch works without it")

    def trained(real, whole):
        params = [nn.Parameter(t) for t in tensors().values()]
        optimizer = GradDropAdamW(
            params,
            lr=real(0.1),
            betas=(real(0.9), real(0.95)),
            eps=real(1e-4),
            weight_decay=real(0.3),
            drop=GradDrop(real(0.3), block=whole(128), hold=whole(2)),
            seed=whole(3),
            backend="reference",
        )
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: real(0.5) ** step)
        optimizer.set_epoch(whole(1))
        for _ in range(4):
            for p in params:
                p.grad = torch.ones_like(p)
            optimizer.step()
            scheduler.step()
        return params, optimizer

    real = getattr(numpy, kind)
    params, optimizer = trained(real, numpy.int64)
    expected, other = trained(lambda x: float(real(x)), int)
    for p, q in zip(params, expected, strict=True):
        torch.testing.assert_close(p, q, rtol=2e-3 if kind == "float16" else 1e-6, atol=0)  # numpy's lr is rounded
        assert torch.equal(optimizer.keep_mask(p), other.keep_mask(q))
    assert repr(optimizer.param_groups[0]["drop"]) == repr(other.param_groups[0]["drop"])
    saved = optimizer.state_dict()
    saved["param_groups"][0].update(draw=numpy.int64(4), epoch=numpy.int64(1))
    optimizer.load_state_dict(saved)
    assert [type(n) for n in (optimizer.seed, optimizer.epoch, optimizer.draw)] == [int, int, int]


def test_step_counts_in_shared_memory_become_private():
    params, optimizer = made("reference")
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    for entry in saved["state"].values():
        for tensor in entry.values():
            tensor.share_memory_()
    other_params, other = made("reference")
    other.load_state_dict(saved)
    other.step()
    assert float(saved["state"][0]["step"]) == 1.0
    assert not any(t.is_shared() for entry in other.state.values() for t in entry.values())


# Policies


def test_layer_policies_without_layers_are_an_error_that_says_what_to_do():
    for drop in (GradFreeze("top-down"), LayerGradDrop(0.5)):
        with pytest.raises(ValueError, match=r"param_groups\(model"):
            GradDropAdamW(nn.Linear(3, 3).named_parameters(), drop=drop)
        with pytest.raises(ValueError, match=r"param_groups\(model"):
            attach(torch.optim.SGD(nn.Linear(3, 3).parameters()), drop)


@pytest.mark.parametrize("theirs", [None, GradDrop(0.3)], ids=["none", "another"])
def test_a_policy_that_every_group_overrules_is_refused(theirs):
    first, second = nn.Linear(3, 3), nn.Linear(3, 3)
    groups = [{"params": [*first.named_parameters("a")], "drop": theirs}]
    with pytest.raises(ValueError, match=r"drop=GradDrop\(p=0.1.* would be used by no group: .*param_groups"):
        GradDropAdamW(groups, drop=GradDrop(p=0.1))
    GradDropAdamW([*groups, {"params": [*second.named_parameters("b")]}], drop=GradDrop(p=0.1))  # the second takes it
    GradDropAdamW([{**groups[0], "drop": GradDrop(p=0.1)}], drop=GradDrop(p=0.1))


def test_groups_of_weight_decay_are_no_layers():
    blocks = nn.ModuleList(nn.Linear(3, 3) for _ in range(3))
    matrices = [(name, p) for name, p in blocks.named_parameters(prefix="encoder") if p.dim() == 2]
    vectors = [(name, p) for name, p in blocks.named_parameters(prefix="encoder") if p.dim() == 1]
    groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    message = r"drops group 0 as one layer, and it holds parameters of 3 blocks \(encoder.0, encoder.1, encoder.2"
    with pytest.warns(UserWarning, match=message), pytest.warns(UserWarning, match="drops group 1 as one layer"):
        GradDropAdamW(groups, drop=LayerGradDrop(p=0.5))
    GradDropAdamW(groups, drop=GradDrop(p=0.5))  # no policy of layers, no warning
    named = [{"params": [*block.named_parameters(f"encoder.{i}")]} for i, block in enumerate(blocks)]
    GradDropAdamW(named, drop=LayerGradDrop(p=0.5))  # a group for a block


def test_a_checkpoint_of_another_policy_says_that_it_wins():
    mine, saved = made("reference", drop=GradDrop(p=0.5))[1], made("reference", drop=GradDrop(p=0.1))[1].state_dict()
    with pytest.warns(UserWarning, match=r"checkpoint's drop=GradDrop\(p=0.1.* replaces drop=GradDrop\(p=0.5"):
        mine.load_state_dict(saved)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mine.load_state_dict(saved)
        mine.load_state_dict(torch.optim.AdamW(tensors().values()).state_dict())  # knows nothing of policies
    assert mine.param_groups[0]["drop"].p == 0.1


def test_a_policy_that_no_checkpoint_could_hold_is_refused_at_once():
    class Plain(Policy):
        def row(self, index, layer, layers):
            return KEEP

    @dataclass
    class Changeable(Plain):
        p: float

    @dataclass
    class Moving(Schedule):
        by = "step"
        length = 3

    for drop in (Plain(), Changeable(0.5), GradDrop(anneal=Moving())):
        with pytest.raises(TypeError, match="(Plain|Changeable|Moving) must be a frozen dataclass"):
            GradDropAdamW(nn.Linear(3, 3).parameters(), drop=drop)


def test_a_schedule_of_ones_own_with_a_field_that_it_computes():
    @dataclass(frozen=True)
    class Halves(Schedule):
        start: float
        values: tuple = field(init=False)
        by = "step"
        length = 3

        def __post_init__(self):
            object.__setattr__(self, "values", (self.start, self.start / 2, self.start / 4))

        def p(self, index):
            return self.values[index]

    drop = GradDrop(anneal=Halves(0.8))
    params, optimizer = made("reference", drop=drop)
    optimizer.step()
    other = made("reference", drop=drop)[1]
    other.load_state_dict(optimizer.state_dict())
    assert other.param_groups[0]["drop"] == drop and other.draw == 1


def schedule(value=0.5, by="step", length=3):
    """One of the user's own, of one value, or of what it does wrong."""

    @dataclass(frozen=True)
    class Own(Schedule):
        def p(self, index):
            return value

    Own.by, Own.length = by, length
    return Own()


@pytest.mark.parametrize("distribution", ["bernoulli", "gaussian"])
@pytest.mark.parametrize(
    "value", [float("nan"), 1.0, 1, -0.5, 1.5, 1 - 1e-9, True, None, "0.5", torch.tensor(0.5)], ids=str
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_schedule_of_ones_own_that_gives_no_probability(backend, value, distribution):
    params, optimizer = made(backend, drop=GradDrop(anneal=schedule(value), distribution=distribution))
    before = everything(params, optimizer)
    with pytest.raises((TypeError, ValueError), match=r"^Own\.p\(0\) must be .*, got "):
        optimizer.step()
    assert_unchanged(before, params, optimizer)


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"by": "epochs"}, "Own.by must be 'step' or 'epoch', got 'epochs'"),
        ({"by": None}, "Own.by must be 'step' or 'epoch', got None"),
        ({"length": 0}, "Own.length must be an integer of at least 1, got 0"),
        ({"length": 3.0}, "Own.length must be an integer of at least 1, got 3.0"),
    ],
)
def test_a_schedule_of_ones_own_that_counts_nothing(wrong, message):
    for policy in (GradDrop, LayerGradDrop):
        with pytest.raises((TypeError, ValueError), match=message):
            policy(anneal=schedule(**wrong))


def policy_of_ones_own(row=KEEP, index=None, draw=None, **attributes):
    @dataclass(frozen=True)
    class Own(Policy):
        def index(self, layers):
            return index or Index()

        def draw(self, layers):
            return draw or Draw()

        def row(self, index, layer, layers):
            return row

    for name, value in attributes.items():
        setattr(Own, name, value)
    return Own()


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"index": Index("steps")}, r"Own.index\(\).by must be 'step' or 'epoch', got 'steps'"),
        ({"index": Index("step", 0)}, r"Own.index\(\).length must be an integer of at least 1, got 0"),
        ({"draw": Draw("batch")}, r"Own.draw\(\).by must be 'step' or 'epoch' or 'never', got 'batch'"),
        ({"draw": Draw("step", 0)}, r"Own.draw\(\).holds must be an integer of at least 1, got 0"),
        ({"block": 0}, "Own.block, where it is not 'row', must be an integer in .*, got 0"),
        ({"block": "rows"}, "Own.block, where it is not 'row', must be an integer in .*, got 'rows'"),
        ({"default_effect": "frozen"}, "Own.default_effect must be 'gradient' or 'freeze' or 'update', got 'frozen'"),
    ],
)
def test_a_policy_of_ones_own_that_counts_nothing(wrong, message):
    with pytest.raises((TypeError, ValueError), match=message):
        made("reference", drop=policy_of_ones_own(**wrong))
    with pytest.raises((TypeError, ValueError), match=message):
        attach(torch.optim.SGD(nn.Linear(3, 3).parameters()), policy_of_ones_own(**wrong))


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize(
    "row, message",
    [
        (None, " must be a Row, got None"),
        (Row(9, 0, 30000), ".mask must be of contract.Mask, .*, got 9"),
        (Row(Mask.PACKED), ".mask must not be Mask.PACKED but of a StaticMask"),
        (Row(Mask.LAYER, 0, 30000), ".mask must not be Mask.LAYER of a policy without layerwise = True"),
        (Row(Mask.ELEMENT, 0, 2**16), ".span must be an integer in .*, got 65536"),
        (Row(Mask.ELEMENT, 0, -1), ".span must be an integer in .*, got -1"),
        (Row(Mask.ELEMENT, -5, 30000), ".lo must be an integer in .*, got -5"),
        (Row(Mask.ELEMENT, 0.5, 3), ".lo must be an integer in .*, got 0.5"),
        (Row(Mask.ELEMENT, 0, 30000, float("nan")), ".rescale must be finite and at least 0, got nan"),
        (Row(Mask.GAUSSIAN, noise_std=float("inf")), ".noise_std must be finite and at least 0, got inf"),
    ],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_policy_of_ones_own_with_a_row_that_means_no_mask(backend, row, message, capturable):
    """Backends would draw different masks by it, or read words that are not there."""
    params, optimizer = made(backend, drop=policy_of_ones_own(row), capturable=capturable)
    before = everything(params, optimizer)
    with pytest.raises((TypeError, ValueError), match=r"^Own\.row\(0\)" + message):
        optimizer.step()
    assert_unchanged(before, params, optimizer)


def test_a_static_mask_is_copied():
    mask = torch.tensor([True, False, True])
    p = nn.Parameter(torch.ones(3))
    optimizer = GradDropAdamW([("w", p)], drop=StaticMask({"w": mask}), effect="freeze", weight_decay=0.5)
    mask.fill_(True)
    assert optimizer.keep_mask(p).tolist() == [True, False, True]
    p.grad = torch.ones(3)
    optimizer.step()
    assert (p != 1.0).tolist() == [True, False, True]


LOOKS = {
    "keep_mask": lambda model, opt: opt.keep_mask(model[0].weight),
    "dropped_layers": lambda model, opt: opt.dropped_layers(),
    "describe": lambda model, opt: describe(opt),
    "backward": lambda model, opt: model(torch.ones(1, 3)).sum().backward(),  # skip_dropped_rows
    "forward": lambda model, opt: model(torch.ones(1, 3)),  # skip_dropped_layers
    "step": lambda model, opt: opt.step(),
}


@pytest.mark.parametrize("look", LOOKS)
@pytest.mark.parametrize(
    "entry, value, message",
    [
        ("drop", "graddrop:p=0.5", r"drop must be None or a policy .*, got 'graddrop:p=0.5'"),
        ("effect", "frozen", "effect must be None or one of 'gradient', 'freeze', 'update', got 'frozen'"),
    ],
)
def test_whoever_looks_first_at_what_was_set_in_a_group_says_what_is_wrong(look, entry, value, message):
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3))
    policies = GradDrop(0.5, block="row"), LayerGradDrop(0.5), None
    groups = [{"params": layer.parameters(), "drop": drop} for layer, drop in zip(model, policies, strict=True)]
    opt = GradDropSGD(groups, lr=1.0)
    model(torch.ones(1, 3)).sum().backward()
    before = [p.detach().clone() for p in model.parameters()]
    with skip_dropped_layers(model, opt) if look in ("forward", "step") else skip_dropped_rows(model, opt):
        opt.param_groups[2][entry] = value
        with pytest.raises((TypeError, ValueError), match=message):
            LOOKS[look](model, opt)
    assert opt.draw == 0 and all(map(torch.equal, before, model.parameters()))


def test_a_checkpoint_of_a_policy_that_is_none_is_refused():
    opt = GradDropSGD(nn.Linear(3, 3).parameters())
    opt.param_groups[0]["drop"] = "graddrop:p=0.5"
    with pytest.raises(TypeError, match="drop must be None or a policy"):
        opt.state_dict()


# attach()


def attached(policy=None, optimizer=torch.optim.SGD, **options):
    params = {name: nn.Parameter(t) for name, t in tensors().items()}
    sgd = optimizer(params.values(), lr=1.0)
    handle = attach(sgd, GradDrop(0.5) if policy is None else policy, **options)
    return params, sgd, handle


@pytest.mark.parametrize("as_keyword", [False, True])
def test_gradients_of_a_closure_are_masked(as_keyword):
    params, sgd, handle = attached()
    masks = {name: handle.keep_mask(p) for name, p in params.items()}

    def closure():
        sgd.zero_grad()
        loss = sum(p.sum() for p in params.values())
        loss.backward()
        return loss

    sgd.step(closure=closure) if as_keyword else sgd.step(closure)
    start = tensors()
    for name, p in params.items():
        assert torch.equal(p.detach() != start[name], masks[name])
        assert torch.allclose(p.detach(), start[name] - 2.0 * masks[name])
    assert handle.draw == 1


def test_all_calls_of_a_closure_in_one_step_share_a_mask():
    params, lbfgs, handle = attached(optimizer=torch.optim.LBFGS)
    seen = []

    def closure():
        lbfgs.zero_grad()
        loss = sum((p**2).sum() for p in params.values())
        loss.backward()
        return loss

    mask = handle.keep_mask(params["a"])
    original = handle._mask
    handle._mask = lambda draw: (original(draw), seen.append(params["a"].grad != 0))
    lbfgs.step(closure)
    assert handle.draw == 1 and len(seen) > 1
    for kept in seen:
        assert not kept[~mask].any()


def test_attach_twice_and_to_ours_is_refused():
    params, sgd, handle = attached()
    with pytest.raises(ValueError, match="attached already"):
        attach(sgd, GradDrop(0.5))
    handle.remove()
    attach(sgd, GradDrop(0.5)).remove()
    with pytest.raises(TypeError, match="masks by itself"):
        attach(GradDropSGD(params.values()), GradDrop(0.5))


def test_a_policy_that_no_group_would_use_is_refused():
    """Groups that say drop=None keep everything, so this one would have no effect."""
    sgd = torch.optim.SGD([{"params": nn.Linear(2, 2).parameters(), "drop": None}], lr=0.1)
    with pytest.raises(ValueError, match="drop must be of use"):
        attach(sgd, GradDrop(0.5))


@pytest.mark.parametrize("change", [grow, shrink], ids=["grown", "shrunk"])
def test_attach_follows_a_parameter_that_is_replaced(change):
    params, sgd, handle = attached()
    give(params)
    sgd.step()
    params["a"].grad = None
    change(params, None)
    give(params, 2)
    masks = {name: handle.keep_mask(p) for name, p in params.items()}
    before = {name: p.detach().clone() for name, p in params.items()}
    sgd.step()
    for name, p in params.items():
        assert torch.equal(p.detach() != before[name], masks[name])


def test_attach_leaves_groups_without_a_policy_alone():
    embedding = nn.Embedding(10, 3, sparse=True)
    linear = nn.Linear(3, 2)
    sgd = torch.optim.SGD([{"params": embedding.parameters(), "drop": None}, {"params": linear.parameters()}], lr=1.0)
    attach(sgd, GradDrop(0.5))
    linear(embedding(torch.tensor([1, 2]))).sum().backward()
    sgd.step()


def test_checkpoints_of_an_optimizer_with_masks_attached_are_plain():
    params = {name: nn.Parameter(t) for name, t in tensors().items()}
    sgd = torch.optim.SGD([{"params": list(params.values()), "drop": GradDrop(0.5), "layer": "only"}], lr=1.0)
    old = sgd.state_dict()
    old["param_groups"][0] = {k: v for k, v in old["param_groups"][0].items() if k not in ("drop", "layer")}
    handle = attach(sgd)
    file = io.BytesIO()
    torch.save(sgd.state_dict(), file)
    file.seek(0)
    sgd.load_state_dict(torch.load(file, weights_only=True))
    sgd.load_state_dict(old)  # that an older checkpoint has no policy drops none
    mask = handle.keep_mask(params["a"])
    give(params)
    sgd.step()
    assert torch.equal(params["a"].detach() != tensors()["a"], mask) and not mask.all()
    handle.remove()
    assert sgd.param_groups[0]["drop"] == GradDrop(0.5)


def test_attach_does_not_plan_anew_when_gradients_come_and_go():
    params, sgd, handle = attached(GradDropEpoch(0.5, toggle=True))
    handle.set_epoch(0)
    give(params)
    sgd.step()
    buckets = handle._buckets
    packed = buckets[0].packed_with
    for step in range(4):
        give(params, step)
        params["b"].grad = None if step % 2 else params["b"].grad
        mask = handle.keep_mask(params["a"])
        before = params["a"].detach().clone()
        sgd.step()
        assert handle._buckets is buckets and buckets[0].packed_with is packed
        assert torch.equal(params["a"].detach() != before, mask)


# torch's machinery


def test_backward_through_changed_weights_is_an_error():
    for backend in BACKENDS:
        p = nn.Parameter(torch.ones(3))
        optimizer = GradDropAdamW([p], backend=backend)
        loss = (p**2).sum()
        loss.backward(retain_graph=True)
        optimizer.step()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


@pytest.mark.parametrize("what", ["step", "training step"])
def test_torch_compile_before_the_first_eager_step(what):
    """One graph break, no error. The backend "eager" compiles nothing, but traces all."""
    torch._dynamo.reset()
    model, truth = nn.Linear(3, 2), nn.Linear(3, 2)
    truth.load_state_dict(model.state_dict())
    optimizer = GradDropAdamW(model.parameters(), lr=1e-2)
    expected = torch.optim.AdamW(truth.parameters(), lr=1e-2, foreach=False)
    x = torch.ones(4, 3)

    def train():
        optimizer.zero_grad()
        model(x).pow(2).sum().backward()
        optimizer.step()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # dynamo's own
        compiled = torch.compile(train if what == "training step" else optimizer.step, backend="eager")
        for _ in range(3):
            if what == "step":
                optimizer.zero_grad()
                model(x).pow(2).sum().backward()
            compiled()
            expected.zero_grad()
            truth(x).pow(2).sum().backward()
            expected.step()
    for p, q in zip(model.parameters(), truth.parameters(), strict=True):
        torch.testing.assert_close(p, q)
    assert optimizer.draw == 3


def test_torch_compile_of_a_subclass_s_own_step():
    torch._dynamo.reset()

    class Own(GradDropAdamW):
        @torch.compile(backend="eager")
        def step(self, closure=None):
            return MaskedOptimizer.step(self, closure)  # torch decorates the step of classes that are made, not this

    p = nn.Parameter(torch.ones(3))
    optimizer = Own([p])
    expected = nn.Parameter(torch.ones(3))
    truth = torch.optim.AdamW([expected])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # dynamo's own
        for _ in range(3):
            p.grad, expected.grad = torch.ones(3), torch.ones(3)
            optimizer.step()
            truth.step()
    torch.testing.assert_close(p, expected)
    assert optimizer.draw == 3


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "options",
    [{"drop": GradDropEpoch(0.5, toggle=True)}, {"drop": GradDrop(0.5, block=128), "effect": "freeze"}],
    ids=["elements", "blocks"],
)
def test_another_default_device(options, backend):
    params, optimizer = made(backend, steps_per_epoch=2, **options)
    truth, expected = made(backend, steps_per_epoch=2, **options)
    with torch.device("meta"):
        for _ in range(3):
            optimizer.step()
        saved = optimizer.state_dict()
        optimizer.load_state_dict(saved)
        saved["param_groups"][0].pop("draw")  # as torch's, whose steps stand in for it
        for entry in saved["state"].values():
            entry["step"] = int(entry["step"])
        optimizer.load_state_dict(saved)
        assert optimizer.keep_mask(params["a"]).device.type == "cpu"
    for _ in range(3):
        expected.step()
    for name in params:
        assert torch.equal(params[name], truth[name])


def test_amp_support_is_the_instances_and_for_fused_alone():
    assert not hasattr(GradDropAdamW, "_step_supports_amp_scaling")
    assert not getattr(made("reference")[1], "_step_supports_amp_scaling", False)
    assert made("reference", fused=True)[1]._step_supports_amp_scaling


# Small


def test_wrong_types_say_what_is_expected():
    params, optimizer = made("reference", drop=GradDrop(0.5))
    with pytest.raises(TypeError, match="param must be"):
        optimizer.keep_mask(None)
    with pytest.raises(TypeError, match="mask must be"):
        pack_mask([True, False])
    with pytest.raises(TypeError, match="model must be"):
        param_groups(3)
    with pytest.raises(ValueError, match="draw must be in"):
        keep_mask((3,), 0.5, draw=2**32)


def test_a_draw_that_would_reach_32_bits_is_refused():
    params, optimizer = made("reference", drop=GradDrop(0.5))
    saved = optimizer.state_dict()
    saved["param_groups"][0]["draw"] = 2**32 - 1
    optimizer.load_state_dict(saved)
    before = everything(params, optimizer)
    with pytest.raises(OverflowError, match="2\\*\\*32"):
        optimizer.step()
    assert_unchanged(before, params, optimizer)


def test_errors_name_parameters_as_they_were_given():
    with pytest.raises(ValueError, match="'a.weight' and 'module.a.weight'"):
        GradDropAdamW([("a.weight", nn.Parameter(torch.ones(1))), ("module.a.weight", nn.Parameter(torch.ones(1)))])


def test_pickles_of_everything():
    params, optimizer = made("reference", drop=GradDrop(0.5))
    optimizer.step()
    for twin in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert twin.draw == 1 and twin.param_groups[0]["drop"] == GradDrop(0.5)
