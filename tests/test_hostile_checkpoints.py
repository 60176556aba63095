"""A checkpoint or a policy made by a stranger: an error that says what is wrong, at once, in little memory, and nothing
has changed. What is accepted can be stepped with and saved.

Every entry of good checkpoints is replaced in turn by every hostile value, and left out.
"""

import copy
import io
import math
import tracemalloc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from sides import CLASSES, difference, same
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from graddrop_fused import GradDrop, GradDropEpoch, GradFreeze, LayerGradDrop, LinearAnneal, policy

pytestmark = pytest.mark.timeout(300)  # hundreds of cases: one that hangs or computes for long is seen here
MEGABYTES = 4 * 2**20
REFUSALS = (TypeError, ValueError, RecursionError)
POLICIES = {
    "graddrop": GradDrop(0.5),
    "rows": GradDrop(0.5, block="row", hold=2),
    "anneal": GradDrop(anneal=LinearAnneal(0.9, epochs=3)),
    "epochs": GradDropEpoch(0.6, toggle=True),
    "layers": LayerGradDrop(anneal=LinearAnneal(0.9, total_steps=9)),
    "freeze": GradFreeze("bottom-up"),
}


def nested(depth: int) -> list:
    value: list = []
    for _ in range(depth):
        value = [value]
    return value


HOSTILE: dict[str, Callable[[], Any]] = {
    "an integer of a million bits": lambda: 1 << 1_000_000,
    "its negative": lambda: -(1 << 1_000_000),
    "2**31": lambda: 2**31,
    "2**64": lambda: 2**64,
    "-1": lambda: -1,
    "1e300": lambda: 1e300,
    "1e400": lambda: float("1e400"),
    "nan": lambda: math.nan,
    "True": lambda: True,
    "None": lambda: None,
    "text": lambda: "x",
    "much text": lambda: "x" * 2**18,
    "bytes": lambda: b"x",
    "an empty list": list,
    "many zeros": lambda: [0] * 10**5,
    "a range of 2**60": lambda: range(2**60),
    "a dict": lambda: {"policy": "GradDrop"},
    "a deep list": lambda: nested(3000),
    "an object": object,
    "a class": lambda: GradDrop,
    "a number's tensor": lambda: torch.tensor(3.0),
    "2**40 zeros in four bytes": lambda: torch.zeros(1).expand(2**40),
    "a complex tensor": lambda: torch.zeros(3, dtype=torch.complex64),
    "a sparse tensor": lambda: torch.sparse_coo_tensor([[0]], [1.0], (2**40,), check_invariants=True),
    "a meta tensor": lambda: torch.zeros(2**40, device="meta"),
    "an integer tensor": lambda: torch.zeros(3, dtype=torch.int64),
    "an infinite tensor": lambda: torch.tensor(math.inf),
}


class Allocations(TorchDispatchMode):
    """Counts the bytes of all tensors that operations return, views aside."""

    total = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        given = {id(t) for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and id(tensor) not in given and tensor.layout is torch.strided:
                self.total += 0 if tensor._is_view() or tensor.is_meta else tensor.untyped_storage().nbytes()
        return result


def within_bounds(call: Callable[[], Any], accepted: tuple = REFUSALS) -> str | None:
    """The error of a call, or None; fails on another error and on more than a few megabytes."""
    tracemalloc.start()
    try:
        with Allocations() as tensors:
            try:
                call()
                text = None
            except accepted as error:
                text = f"{type(error).__name__}: {error}"
        assert tracemalloc.get_traced_memory()[1] + tensors.total < MEGABYTES
    finally:
        tracemalloc.stop()
    assert text is None or len(text) < 1500, f"an error of {len(text)} characters: {text[:300]}"
    return text


def trained(rule: str, drop=None):
    params = {f"{layer}.weight": torch.nn.Parameter(torch.linspace(-1, 1, 40).reshape(5, 8)) for layer in "ab"}
    groups = [{"params": [(name, p)], "layer": name[0], "drop": drop} for name, p in params.items()]
    options = {"momentum": 0.9} if rule == "sgd" else {}
    optimizer = CLASSES[rule](groups, lr=0.1, steps_per_epoch=2, backend="reference", **options)
    for p in params.values():
        p.grad = torch.ones_like(p)
    optimizer.step()
    return params, optimizer


def everything(params, optimizer) -> dict[str, Any]:
    state = optimizer.state_dict()
    entries = {f"{i}.{name}": value.clone() for i, e in state["state"].items() for name, value in e.items()}
    return {
        "groups": copy.deepcopy(state["param_groups"]),
        "live groups": [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups],
        "state": entries,
        "params": {name: p.detach().clone() for name, p in params.items()},
        "draw": (optimizer.draw, optimizer.epoch, optimizer.seed),
    }


def paths(value: Any, at: tuple = ()) -> list[tuple]:
    """Every place in a checkpoint, as keys from the outermost in."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return ([at] if at else []) + [path for key, inner in items for path in paths(inner, (*at, key))]


def unlike_places(state: dict) -> list[tuple]:
    """:func:`paths`, of groups and parameters the first alone: the second is checked by the same lines."""
    return [path for path in paths(state) if len(path) < 2 or path[1] == 0]


def replaced(state: dict, path: tuple, value: Any) -> dict:
    """A copy of the checkpoint with another value at a place; without ``value``, with nothing there."""
    bad = copy.deepcopy(state)
    inner = bad
    for key in path[:-1]:
        inner = inner[key]
    if value is MISSING:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    return bad


MISSING = object()


def check_loading(params, optimizer, bad: dict, what: str) -> None:
    """It is refused and nothing has changed; or it is taken, and a step and a further checkpoint are possible."""
    before = everything(params, optimizer)
    if within_bounds(lambda: optimizer.load_state_dict(bad)) is not None:
        changed = difference(before, everything(params, optimizer))
        assert changed is None, f"{what}: {changed}"
        return
    loaded = everything(params, optimizer)
    if within_bounds(optimizer.step, (*REFUSALS, RuntimeError, OverflowError)) is not None:
        changed = difference(loaded, everything(params, optimizer))
        assert changed is None, f"{what}: then a refused step changed {changed}"
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("rule", CLASSES)
def test_any_entry_replaced(rule, name):
    params, optimizer = trained(rule, POLICIES["anneal"])
    good = copy.deepcopy(optimizer.state_dict())
    hostile = HOSTILE[name]()
    for path in unlike_places(good):
        check_loading(params, optimizer, replaced(good, path, hostile), f"{path} is {name}")
        optimizer.load_state_dict(good)


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("name", POLICIES)
def test_any_field_of_a_policy_replaced(name, capturable):
    params, optimizer = trained("adamw", POLICIES[name])
    good = copy.deepcopy(optimizer.state_dict())
    for group in good["param_groups"]:
        group["capturable"] = capturable
    for path in paths(good["param_groups"][0]["drop"]):
        for value in HOSTILE:
            place = ("param_groups", 0, "drop", *path)
            check_loading(params, optimizer, replaced(good, place, HOSTILE[value]()), f"{path} is {value}")
            optimizer.load_state_dict(good)


@pytest.mark.parametrize("rule", CLASSES)
def test_any_entry_left_out(rule):
    params, optimizer = trained(rule, POLICIES["anneal"])
    good = copy.deepcopy(optimizer.state_dict())
    for path in unlike_places(good):
        check_loading(params, optimizer, replaced(good, path, MISSING), f"{path} is missing")
        optimizer.load_state_dict(good)


@pytest.mark.parametrize("name", HOSTILE)
def test_a_checkpoint_of_nothing_but_that(name):
    params, optimizer = trained("adamw")
    before = everything(params, optimizer)
    assert within_bounds(lambda: optimizer.load_state_dict(HOSTILE[name]())) is not None
    assert difference(before, everything(params, optimizer)) is None


@pytest.mark.parametrize("name", POLICIES)
def test_policies_constructed_from_anything(name):
    """A policy that a constructor takes has a text and a row at any time, capturable or not."""
    good = POLICIES[name]
    for path in paths(good.to_state()):
        for value in HOSTILE:
            options = replaced(good.to_state(), path, HOSTILE[value]())
            made: list = []
            within_bounds(lambda options=options, made=made: made.append(type(good).from_options(_own(options), None)))
            for taken in made:
                assert same(policy(repr(taken)) if len(repr(taken)) < 1000 else taken, taken)


def _own(options: dict) -> dict:
    return {key: value for key, value in options.items() if key != "policy"}


def test_a_parameter_listed_twice():
    params, optimizer = trained("adamw")
    bad = copy.deepcopy(optimizer.state_dict())
    bad["param_groups"][1]["params"] = bad["param_groups"][0]["params"]
    before = everything(params, optimizer)
    with pytest.raises(ValueError, match="must list parameter 0 once"):
        optimizer.load_state_dict(bad)
    assert difference(before, everything(params, optimizer)) is None
