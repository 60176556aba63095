"""Any sequence of operations comes out on every backend as on the reference, and an error changes nothing.

Hypothesis chooses the operations (a fixed choice in the suite; `make fuzz-hour` goes on with new ones for as long as
FUZZ_SECONDS says). The interpreter's turn is in a process of its own, since triton chooses it as it is imported.
"""

import os
import random
import subprocess
import sys
import time
from contextlib import nullcontext

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test
from interpreter import repaired_interpreter
from sides import INTERPRETED, Sides, Start

from graddrop_fused import GradDrop, GradDropEpoch, GradFreeze, LayerGradDrop, LinearAnneal, StaticMask

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
POLICIES = (
    None,
    GradDrop(0.5),
    GradDrop(0.3, rescale=False),
    GradDrop(0.9, block=128),
    GradDrop(0.5, block="row"),
    GradDrop(0.5, hold=3),
    GradDrop(0.2, distribution="gaussian"),
    GradDrop(anneal=LinearAnneal(0.8, epochs=3)),
    GradDrop(anneal=LinearAnneal(0.8, total_steps=5)),
    GradDropEpoch(0.7),
    GradDropEpoch(0.6, toggle=True),
    GradDropEpoch(0.6, toggle=True, storage="regenerate"),
    GradDropEpoch(0.4, replacement=True),
    LayerGradDrop(0.5),
    LayerGradDrop(0.5, per="epoch", rescale=True),
    GradFreeze("top-down"),
    GradFreeze("bottom-up", layers_per_epoch=2),
    "static",
)
EFFECTS = (None, "gradient", "freeze", "update")
GRADIENTS = ("normal", "normal", "normal", "missing", "kept", "zero", "strided", "offset", "expanded", "negative")
GRADIENTS += ("bfloat16", "float16", "float32", "wild")
MOVES = ("same", "strided", "offset", "grown", "shrunk", "other dtype", "other shape", "strided in place")
HAND = ("forgotten", "cloned", "strided", "other dtype", "wrong shape", "no tensor", "negative step", "lacks one")
BROKEN = ("no state", "fewer groups", "no moments", "other shape", "policy", "draw", "learning rate", "names")
SEEDS = st.integers(0, 2**16)
WHICH = st.integers(0, 9)

ADAMW = {"lr": (1e-3, 0.0, 0.05), "betas": ((0.9, 0.999), (0.8, 0.9), (0.0, 0.99)), "weight_decay": (0.0, 0.1)}
ADAMW |= {"eps": (1e-8, 1e-4), "amsgrad": (False, True), "maximize": (False, True)}
SGD = {"lr": (1e-3, 0.0, 0.05), "momentum": (0.0, 0.9, 0.5), "weight_decay": (0.0, 0.1), "maximize": (False, True)}
SGD |= {"dampening": (0.0, 0.3), "nesterov": (False, True)}
LION = {"lr": (1e-3, 0.0, 0.05), "betas": ((0.9, 0.99), (0.5, 0.9)), "weight_decay": (0.0, 0.1)}
LION |= {"maximize": (False, True)}
CHOICES = {"adamw": ADAMW, "sgd": SGD, "lion": LION}


@st.composite
def starts(draw) -> Start:
    rule_name = draw(st.sampled_from(list(CHOICES)))
    dtype = draw(st.sampled_from([F32, F32, BF16, F16] + ([] if INTERPRETED else [F64])))
    options = {
        "seed": draw(st.sampled_from([0, 2**40 + 9, 2**64 - 1])),
        "steps_per_epoch": draw(st.sampled_from([None, None, 2])),
        "drop": draw(st.sampled_from([p for p in POLICIES if p != "static"])),
        "capturable": draw(st.booleans()),
        "state_dtype": draw(st.sampled_from([None, None, F32, BF16])),
        **{k: draw(st.sampled_from(v)) for k, v in CHOICES[rule_name].items() if k not in ("nesterov", "dampening")},
    }
    return Start(rule_name, draw(st.booleans()), dtype, options)


def values(shape, seed: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def placed(tensor: torch.Tensor, how: str) -> torch.Tensor:
    """The same values elsewhere in memory."""
    if how == "strided" and tensor.dim() > 1:
        return tensor.transpose(0, -1).contiguous().transpose(0, -1)
    if how in ("strided", "offset"):
        step = 2 if how == "strided" else 1
        memory = torch.zeros(tensor.numel() * step + 3, dtype=tensor.dtype)[3:][::step]
        return memory[: tensor.numel()].view(tensor.shape).copy_(tensor)
    return tensor.clone()


def gradient(p: torch.Tensor, kind: str, seed: int) -> torch.Tensor | None:
    if kind in ("missing", "kept"):
        return None if kind == "missing" else p.grad
    dtype = {"bfloat16": BF16, "float16": F16, "float32": F32}.get(kind, p.dtype)
    grad = values(p.shape, seed, F64 if p.dtype == F64 else dtype)
    if kind == "expanded" and p.dim() and len(p):
        return grad[:1].expand(p.shape)
    if kind == "negative":
        return torch._neg_view(grad)
    if kind == "zero":
        return torch.zeros_like(grad)
    if kind == "wild" and grad.numel():
        grad.view(-1)[0], grad.view(-1)[-1] = torch.nan, torch.inf
    return placed(grad, kind)


def policy_for(policy, params):
    """``policy``, or for "static" masks of these parameters."""
    if policy != "static":
        return policy
    return StaticMask([values(p.shape, 5 + p.numel(), F32) > 0.3 for p in params], rescale=True)


class Sequences(RuleBasedStateMachine):
    """The operations. What each does to one side stands in a function of its own, so that all sides get the same."""

    def __init__(self):
        super().__init__()
        self.threads = torch.get_num_threads()

    def teardown(self):
        torch.set_num_threads(self.threads)

    @initialize(start=starts())
    def begin(self, start):
        self.sides = Sides(start)
        self.choices = CHOICES[start.rule]
        self.sides.compare({})

    @property
    def groups(self):
        return self.sides.first.opt.param_groups

    # Steps

    def give(self, kinds, seed: int) -> None:
        def gradients(side):
            for i, p in enumerate(side.params):
                p.grad_dtype = None  # any
                p.grad = gradient(p.detach() if p.grad is None else p, kinds[i % len(kinds)], seed + i)

        self.sides.each(gradients)

    @rule(kinds=st.tuples(*[st.sampled_from(GRADIENTS)] * 6), seed=SEEDS)
    def step(self, kinds, seed):
        self.give(kinds, seed)
        self.sides.step()

    @rule()
    def step_again(self):
        self.sides.step()

    @rule(kinds=st.tuples(*[st.sampled_from(GRADIENTS)] * 6), seed=SEEDS, inf=st.booleans())
    def step_with_scaler(self, kinds, seed, inf):
        self.give(kinds, seed)
        self.sides.step(scale=8.0, inf=inf)

    @rule(seed=SEEDS, left_out=WHICH)
    def step_with_closure(self, seed, left_out):
        def closure_of(side):
            def closure():
                side.opt.zero_grad()
                used = [(i, p) for i, p in enumerate(side.params) if i != left_out]
                loss = sum(((p * values(p.shape, seed + i, p.dtype)).sum() for i, p in used), torch.zeros(()))
                loss.backward()
                return loss * 0 + seed  # the losses of two sides may differ in their last bit

            return closure

        self.give(("missing",), 0)
        self.sides.step(closure_of)

    @rule(to_none=st.booleans())
    def zero_grad(self, to_none):
        self.sides.each(lambda side: side.opt.zero_grad(set_to_none=to_none))

    @rule(threads=st.integers(1, 3))
    def use_threads(self, threads):
        torch.set_num_threads(threads)

    # Time and groups

    @rule(epoch=st.integers(0, 4) | st.sampled_from([-1, 2**32, 1.5]))
    def set_epoch(self, epoch):
        self.sides.each(lambda side: side.opt.set_epoch(epoch))

    @rule(group=WHICH, name=WHICH, value=WHICH, as_tensor=st.booleans())
    def set_hyperparameter(self, group, name, value, as_tensor):
        names = list(self.choices)
        name = names[name % len(names)]
        value = self.choices[name][value % len(self.choices[name])]
        chosen = self.groups[group % len(self.groups)]
        if name == "nesterov" and value:
            value = bool(chosen["momentum"]) and not chosen["dampening"]
        if (name == "dampening" and value or name == "momentum" and not value) and chosen["nesterov"]:
            return
        if name == "lr" and as_tensor:
            value = torch.tensor(value)
        for side in self.sides.all:
            side.opt.param_groups[group % len(self.groups)][name] = value

    @rule(policy=st.sampled_from(POLICIES), effect=st.sampled_from(EFFECTS), group=WHICH)
    def set_policy(self, policy, effect, group):
        if "gaussian" in repr(policy):
            effect = None
        for side in self.sides.all:
            chosen = side.opt.param_groups[group % len(self.groups)]
            chosen["drop"], chosen["effect"] = policy_for(policy, chosen["params"]), effect
        self.sides.compare({})

    @rule(value=st.booleans())
    def set_capturable(self, value):
        for side in self.sides.all:
            for group in side.opt.param_groups:
                group["capturable"] = value
        self.sides.compare({})

    @rule(name=st.sampled_from(["draw", "seed", "epoch", "steps_per_epoch"]))
    def what_the_clock_shows_is_not_to_be_set(self, name):
        def operation(side):
            clock = side.opt.param_groups[0]
            then = clock[name]
            clock[name] = 99
            try:
                side.opt.step()
            finally:
                clock[name] = then

        assert self.sides.each(operation)[0] == "raised"

    @precondition(lambda self: len(self.sides.first.params) < 10)
    @rule(policy=st.sampled_from(POLICIES), effect=st.sampled_from(EFFECTS), shape=st.sampled_from([(7,), (9, 40)]))
    def add_param_group(self, policy, effect, shape):
        start, count = self.sides.start, len(self.sides.first.params)

        def operation(side):
            names, params = list(side.names), list(side.params)
            group = side.new_group(start, [shape], f"added{count}", 1)
            policy_here = policy_for(policy, side.params[count:])
            try:
                side.opt.add_param_group({**group, "drop": policy_here, "effect": effect})
            except Exception:
                side.names, side.params = names, params
                raise

        self.sides.each(operation)

    @rule(how=st.sampled_from(["again", "name", "mask", "option", "type"]))
    def add_what_cannot_be_added(self, how):
        def operation(side):
            p = torch.nn.Parameter(torch.zeros(3))
            listed = [("new", p)] if self.sides.start.named else [p]
            if how == "again":
                listed = [("new", side.params[0])] if self.sides.start.named else [side.params[0]]
            if how == "name":
                listed = [(side.names[0], p)] if self.sides.start.named else [p, p]
            group = {"params": listed}
            if how == "mask":
                group["drop"] = StaticMask([torch.ones(4, dtype=torch.bool)])
            if how == "option":
                group["lr"] = -1.0
            side.opt.add_param_group([group] if how == "type" else group)

        assert self.sides.each(operation)[0] == "raised"

    # Copies and checkpoints

    @rule(how=st.sampled_from(["deepcopy", "pickle"]))
    def go_on_with_a_copy(self, how):
        self.sides.copied(how)

    @rule(into=st.sampled_from(["same", "new", "foreign"]))
    def load(self, into):
        self.sides.reloaded(into)

    @rule(how=st.sampled_from(BROKEN))
    def load_what_is_broken(self, how):
        if how == "no moments" and self.choices is SGD:
            return  # taken, as by torch: the momentum may have been set after the last step
        if how == "no moments" and not any(len(entry) > 1 for entry in self.sides.first.opt.state.values()):
            return
        if how == "other shape" and not self.sides.first.opt.state:
            return
        kind, what = self.sides.each(lambda side: side.opt.load_state_dict(broken(side.opt.state_dict(), how)))
        assert kind == "raised", (how, what)

    # Tensors under the optimizer's hands

    @rule(how=st.sampled_from(MOVES), which=WHICH, seed=SEEDS)
    def move_data(self, how, which, seed):
        """``p.data = ...``; a step then works on the new memory, or refuses it and everything is as it was."""
        at = which % len(self.sides.first.params)
        held = [side.params[at].data for side in self.sides.all]
        left = [side.params[at].grad for side in self.sides.all]
        for side in self.sides.all:
            side.params[at].data = moved(side.params[at].data, how, seed)
        result = self.sides.step()
        if how in ("grown", "shrunk", "other shape", "other dtype") or result[0] == "raised":
            for side, data, grad in zip(self.sides.all, held, left, strict=True):
                side.params[at].grad = None
                side.params[at].data = data
                side.params[at].grad = grad
            self.sides.step()

    @rule(how=st.sampled_from(HAND), which=WHICH)
    def change_state_by_hand(self, how, which):
        """What replaces an entry is taken, or refused and everything is as it was."""
        at = which % len(self.sides.first.params)
        held = [dict(side.opt.state.get(side.params[at], {})) for side in self.sides.all]
        if not held[0]:
            return
        for side in self.sides.all:
            change_entry(side.opt.state, side.params[at], how)
        if self.sides.step()[0] == "raised":
            for side, entry in zip(self.sides.all, held, strict=True):
                side.opt.state[side.params[at]] = entry
            self.sides.step()


def moved(data: torch.Tensor, how: str, seed: int) -> torch.Tensor:
    if how == "grown":
        return values((*data.shape[:-1], data.shape[-1] + 1000), seed, data.dtype)
    if how == "shrunk":
        return data[..., : data.shape[-1] // 2].clone()
    if how == "other shape":
        return data.reshape(-1, 1).clone()
    if how == "other dtype":
        return data.to(BF16 if data.dtype == F32 else F32)
    if how == "strided in place":  # the same address
        return data.as_strided(data.shape[::-1], data.stride()[::-1])
    return placed(data, how)


def change_entry(state, param, how: str) -> None:
    entry = state[param]
    names = [name for name in entry if name != "step"]
    if how == "forgotten":
        del state[param]
    elif how == "negative step":
        entry["step"] = -1
    elif names:
        old = entry[names[0]]
        if how == "lacks one":
            del entry[names[0]]
        elif how == "other dtype":
            entry[names[0]] = old.to(BF16 if old.dtype == F32 else F32)
        else:
            wrong = {"wrong shape": old.new_zeros(3, 5), "no tensor": [1.0]}
            entry[names[0]] = wrong.get(how, placed(old, how))


def broken(state: dict, how: str) -> dict:
    state = {**state, "param_groups": [dict(group) for group in state["param_groups"]]}
    state["state"] = {index: dict(entry) for index, entry in state["state"].items()}
    groups = state["param_groups"]
    if how == "no state":
        del state["state"]
    elif how == "fewer groups":
        groups.pop()
    elif how in ("no moments", "other shape"):
        entry = next(e for e in state["state"].values() if how == "other shape" or len(e) > 1)
        names = [name for name in entry if name != "step"] or ["step"]
        if how == "no moments":
            del entry[names[0]]
        else:
            entry[names[0]] = torch.zeros(3, 5)
    else:
        changes = {"policy": {"drop": {"policy": "GradDrop", "p": 7}}, "draw": {"draw": -1}}
        changes |= {"learning rate": {"lr": -1.0}, "names": {"param_names": ["a"]}}
        groups[0].update(changes[how])
    return state


def run(examples: int, operations: int, **settings) -> None:
    chosen = hypothesis.settings(
        max_examples=examples,
        stateful_step_count=operations,
        deadline=None,
        database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
        **settings,
    )
    with repaired_interpreter() if INTERPRETED else nullcontext():
        run_state_machine_as_test(Sequences, settings=chosen)


def test_fixed_sequences():
    run(*((6, 20) if INTERPRETED else (40, 25)), derandomize=True)


@pytest.mark.parametrize("which", range(6))
def test_a_checkpoint_after_a_parameter_moved(which):
    """An empty parameter among them, whose strides may be anything."""
    sequence = Sequences()
    sequence.begin(Start("lion", options={"drop": None, "capturable": True}))
    sequence.step(("normal",) * 6, 3)
    sequence.move_data("strided", which, 11)
    sequence.load("same")


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="this is the process that it starts")
def test_fixed_sequences_under_the_interpreter():
    pytest.importorskip("triton", reason="triton is not installed: nothing to interpret")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", "test_fixed_sequences"]
    process = subprocess.run(
        command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=590
    )
    assert process.returncode == 0, process.stdout[-6000:] + process.stderr[-2000:]
    assert "1 passed" in process.stdout


@pytest.mark.skipif("FUZZ_SECONDS" not in os.environ, reason="runs for FUZZ_SECONDS: make fuzz-hour")
@pytest.mark.timeout(0)
def test_new_sequences(capsys):
    """Rounds of 50 sequences, each of a seed that it prints; FUZZ_SEED=n begins with that one."""
    end = time.monotonic() + float(os.environ["FUZZ_SECONDS"])
    first = int(os.environ.get("FUZZ_SEED", random.SystemRandom().randrange(10**9)))
    seed = first
    while time.monotonic() < end:
        with capsys.disabled():
            print(f"sequences: FUZZ_SEED={seed} ({(seed - first) * 50} sequences before it)", flush=True)
        Sequences._hypothesis_internal_use_seed = seed
        run(50, 40, print_blob=False)
        seed += 1
