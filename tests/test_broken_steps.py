"""A step that runs out of memory, wherever it does, leaves one step before, one step after, or says what it did.

Allocations of a step, two dozen spread over all of them, fail one at a time. What the step left is compared with steps
that nothing disturbed.
"""

import copy
import itertools
import os
import signal

import pytest
import torch
from policy_cases import BACKENDS
from sides import CLASSES, same
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from graddrop_fused import (
    GradDrop,
    GradDropAdamW,
    GradDropEpoch,
    GradFreeze,
    LayerGradDrop,
    attach,
    mask_stream,
    release_gradients,
)
from graddrop_fused.rules import AdamW, MaskOnly

SHAPES = {"a": (17, 23), "b": (33,), "c": (5, 5), "d": (129,)}
HALF_PRECISION = "d"  # in a backend call of its own
SETTINGS = [
    ("adamw", {"drop": GradDrop(0.5)}),
    ("adamw", {"drop": GradDrop(0.5), "capturable": True, "amsgrad": True}),
    ("adamw", {"drop": GradDropEpoch(0.5, toggle=True), "effect": "freeze", "steps_per_epoch": 1}),
    ("adamw", {"drop": GradFreeze("top-down"), "steps_per_epoch": 1, "capturable": True}),
    ("sgd", {"drop": GradDrop(0.5, distribution="gaussian"), "momentum": 0.9}),
    ("lion", {"drop": LayerGradDrop(0.5), "effect": "update"}),
]


class NoMemory(TorchDispatchMode):
    """The n-th operation that allocates raises; None counts them."""

    def __init__(self, n=None):
        super().__init__()
        self.n, self.seen = n, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "aten" and not func._schema.is_mutable and not func.is_view:
            self.seen += 1
            if self.seen == self.n:
                raise MemoryError(f"no memory for {func}")
        return func(*args, **(kwargs or {}))


def made(rule, backend, **options):
    generator = torch.Generator().manual_seed(0)
    params = {name: nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in SHAPES.items()}
    params[HALF_PRECISION].data = params[HALF_PRECISION].data.bfloat16()
    groups = [{"params": [(name, p)], "layer": name} for name, p in params.items()]
    return params, CLASSES[rule](groups, lr=1e-2, weight_decay=0.1, backend=backend, **options)


def give(params, seed, but=()):
    generator = torch.Generator().manual_seed(seed)
    for name, p in params.items():
        grad = torch.randn(p.shape, generator=generator).to(p.dtype)
        p.grad = None if name in but else grad


def numbers(params, opt):
    """Each parameter with its state, and its count of steps."""
    found = {}
    for name, p in params.items():
        entry = opt.state.get(p, {})
        states = {k: v.clone() for k, v in entry.items() if k != "step" and bool(v.any())}
        found[name] = {"param": p.detach().clone(), **states}, float(entry.get("step", 0))
    return found


def stepped(rule, backend, options, steps, but=()):
    """After ``steps`` steps, the last without the gradients ``but``."""
    params, opt = made(rule, backend, **options)
    for step in range(1, steps + 1):
        give(params, step, but if step == steps else ())
        opt.step()
    return params, opt


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("steps", [0, 2], ids=["first step", "later step"])
@pytest.mark.parametrize(("rule", "options"), SETTINGS, ids=lambda value: value if isinstance(value, str) else "")
def test_whichever_allocation_fails(rule, options, steps, backend):
    """The tensors that the step has reached are updated and counted, the rest is as if it had had no gradient; and the
    next step goes on from there. The compiled backends reach all or none."""
    params, opt = stepped(rule, backend, options, steps)
    before = numbers(params, opt)
    give(params, steps + 1)
    with NoMemory(None) as allocations:
        opt.step()
    after = numbers(params, opt)
    moving = {name for name in SHAPES if not same(before[name], after[name])}
    expected = {}  # what a next step must make of each outcome
    for n in range(1, allocations.seen + 1, max(1, allocations.seen // 23)):
        params, opt = stepped(rule, backend, options, steps)
        give(params, steps + 1)
        with pytest.raises(MemoryError), NoMemory(n):
            opt.step()
        found = numbers(params, opt)
        untouched = frozenset(name for name in SHAPES if same(found[name], before[name]))
        assert all(same(found[name], after[name]) for name in SHAPES if name not in untouched)
        moved = moving - untouched
        assert opt.draw == steps + 1 if moved else opt.draw in (steps, steps + 1)
        assert backend == "reference" or moved in (set(), moving)
        outcome = untouched, opt.draw
        if outcome not in expected:
            left_out = untouched if opt.draw > steps else ()
            expected[outcome] = next_step(*stepped(rule, backend, options, opt.draw, left_out))
        assert same(next_step(params, opt), expected[outcome])
    assert backend != "reference" or len(expected) > 1


def next_step(params, opt):
    give(params, 9)
    opt.step()
    return numbers(params, opt)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_later_bucket_that_cannot_be_served(backend, monkeypatch):
    """Every backend call is prepared before the first is launched."""
    params, opt = stepped("adamw", backend, {"drop": GradDrop(0.5)}, 1)
    before = numbers(params, opt)
    give(params, 2)
    module = opt._plan.buckets[1].backend
    right = module.prepare

    def prepare(batch, *args, **kwargs):
        if batch.params[0].dtype == torch.bfloat16:
            raise RuntimeError("no kernel for this")
        return right(batch, *args, **kwargs)

    monkeypatch.setattr(module, "prepare", prepare)
    with pytest.raises(RuntimeError, match="no kernel"):
        opt.step()
    assert same(numbers(params, opt), before) and opt.draw == 1


def failing_at(rule, tensor, monkeypatch):
    """Make the reference fail at the n-th tensor, once."""
    right, calls = rule.update, itertools.count()

    def update(self, *args):
        if next(calls) == tensor:
            raise MemoryError
        return right(self, *args)

    monkeypatch.setattr(rule, "update", update)


def test_a_step_inside_backward_is_taken_up_again(monkeypatch):
    """release_gradients: what is updated has no gradient any more, and step() updates the rest."""

    def trained(broken):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(7, 5), nn.Linear(5, 3))
        opt = GradDropAdamW(model.named_parameters(), drop=GradDrop(0.5), backend="reference")
        with release_gradients(model, opt):
            for step in range(3):
                loss = model(torch.ones(2, 7)).square().sum()
                if broken and step == 1:
                    with monkeypatch.context() as patch, pytest.raises(MemoryError):
                        failing_at(AdamW, 3, patch)  # the first layer's second tensor: all gradients are there
                        loss.backward()
                    assert [p.grad is None for p in model.parameters()] == [True, False, True, True]
                else:
                    loss.backward()
                opt.step()
        return numbers(dict(model.named_parameters()), opt), opt.draw

    assert same(trained(True), trained(False))


def test_attached_masks_that_are_broken_off_draw_again(monkeypatch):
    """The other optimizer has not stepped, and new gradients get the same masks."""
    masked = []
    for broken in (False, True):
        params = {name: nn.Parameter(torch.ones(shape)) for name, shape in SHAPES.items()}
        opt = torch.optim.SGD(params.values(), lr=1.0)
        handle = attach(opt, drop=GradDrop(0.5), backend="reference")
        if broken:
            give(params, 1)
            with monkeypatch.context() as patch, pytest.raises(MemoryError):
                failing_at(MaskOnly, 2, patch)
                opt.step()
            assert handle.draw == 0 and all(bool((p == 1).all()) for p in params.values())
        give(params, 1)
        opt.step()
        masked.append({name: p.detach() for name, p in params.items()})
    assert same(*masked)


def test_packed_masks_that_are_broken_off_are_drawn_anew(monkeypatch):
    """Also for the epoch that their words were drawn for before."""
    options = {"drop": GradDropEpoch(0.5, toggle=True), "effect": "freeze"}
    twins = []
    for broken in (False, True):
        params, opt = made("adamw", "reference", **options)
        opt.set_epoch(0)
        give(params, 1)
        opt.step()
        if broken:
            opt.set_epoch(1)
            right, calls = mask_stream.pack_mask, itertools.count()

            def pack_mask(mask, right=right, calls=calls):
                if next(calls) == 2:
                    raise MemoryError
                return right(mask)

            with monkeypatch.context() as patch, pytest.raises(MemoryError):
                patch.setattr(mask_stream, "pack_mask", pack_mask)
                opt.step()
            opt.set_epoch(0)
        opt.step()
        twins.append(numbers(params, opt))
    assert same(*twins)


def test_ctrl_c_waits_for_the_end_of_the_step(monkeypatch, ctrl_c_is_heard):
    twins = []
    for interrupted in (False, True):
        params, opt = made("adamw", "reference", drop=GradDrop(0.5))
        give(params, 1)
        if interrupted:
            right = AdamW.update

            def update(self, *args, right=right):
                os.kill(os.getpid(), signal.SIGINT)
                return right(self, *args)

            with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
                patch.setattr(AdamW, "update", update)
                opt.step()
        else:
            opt.step()
        assert opt.draw == 1
        twins.append(numbers(params, opt))
    assert same(*twins)


CHANGING = {
    "toggle": GradDropEpoch(0.75, block="row", toggle=True),
    "accumulate": GradDropEpoch(0.75, block="row"),  # what was active goes on
    "replacement": GradDropEpoch(0.5, block="row", replacement=True),  # some of it does
    "held blocks": GradDrop(0.5, block=128, hold=2),
    "GradFreeze": GradFreeze("top-down"),
}


@pytest.mark.parametrize("policy", CHANGING)
def test_whichever_allocation_fails_while_active_state_changes(policy):
    """Parameters stay as they were, state says of itself what it is for, and the step taken again is the step."""
    options = {"drop": CHANGING[policy], "effect": "freeze", "steps_per_epoch": 2, "active_state": True}

    def before_a_change():
        params, opt = stepped("adamw", "cpu", options, 4)
        give(params, 5)
        return params, opt

    params, opt = before_a_change()
    with NoMemory(None) as allocations:
        opt.step()
    expected, half_changed = whole(params, opt), set()
    for n in range(1, allocations.seen + 1, max(1, allocations.seen // 41)):
        params, opt = before_a_change()
        unmoved, entries = [p.detach().clone() for p in params.values()], dict(opt.state)
        with pytest.raises(MemoryError), NoMemory(n):
            opt.step()
        assert opt.draw == 4
        assert all(map(torch.equal, params.values(), unmoved))
        half_changed.add(sum(opt.state.get(p) is not entry for p, entry in entries.items()))
        opt.load_state_dict(copy.deepcopy(opt.state_dict()))  # a checkpoint of it is a good one
        opt.step()
        assert same_entries(whole(params, opt), expected)
    between = len(half_changed) > 1  # two parameters, of which a layer policy changes one at a time
    assert between or policy == "GradFreeze"


def whole(params, opt):
    """Each parameter, and all of its state."""
    return {
        name: {"param": p.detach().clone(), **{k: torch.as_tensor(v).clone() for k, v in opt.state.get(p, {}).items()}}
        for name, p in params.items()
    }


def same_entries(a, b):
    return all(a[n].keys() == b[n].keys() and all(torch.equal(a[n][k], b[n][k]) for k in a[n]) for n in b)
