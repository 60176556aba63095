"""Many parameters, threads, forks and too little memory."""

import os
import subprocess
import sys
import textwrap
import threading
import tracemalloc
import warnings

import pytest
import torch
from sides import CLASSES, backends, difference, same
from test_hostile_checkpoints import everything

from graddrop_fused import GradDrop, GradDropAdamW, GradDropEpoch, LinearAnneal
from graddrop_fused.contract import Integer, Layout, Real


def made(count: int, backend: str, rule: str = "adamw", **options):
    """``count`` parameters of eight elements, views of one memory apart."""
    params = [torch.nn.Parameter(t) for t in torch.zeros(count, 8).unbind()]
    for p, grad in zip(params, torch.ones(count, 8).unbind(), strict=True):
        p.grad = grad
    return params, CLASSES[rule](params, backend=backend, **options)


def lines_of(call) -> int:
    """Lines of Python that a call runs: a count of its work that no other process disturbs."""
    lines = 0

    def trace(frame, event, argument):
        nonlocal lines
        lines += event == "line"
        return trace

    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(None)
    return lines


@pytest.mark.skipif(sys.gettrace() is not None, reason="counts lines by sys.settrace, which a debugger uses now")
@pytest.mark.parametrize("what", ["first step", "later step", "construction", "checkpoint"])
@pytest.mark.parametrize("backend", backends()[-1:])
def test_work_grows_no_faster_than_the_number_of_parameters(backend, what):
    def work(count):
        params, opt = made(count, backend, drop=GradDrop(0.5))
        if what == "first step":
            return lines_of(opt.step)
        if what == "construction":
            return lines_of(lambda: GradDropAdamW(params, drop=GradDrop(0.5), backend=backend))
        opt.step()
        return lines_of(opt.step if what == "later step" else lambda: opt.load_state_dict(opt.state_dict()))

    small, large = work(500), work(2000)
    assert large <= 4.5 * small, (small, large)


@pytest.mark.nightly
def test_a_hundred_thousand_parameters():
    """They get what each of them gets alone, and a step keeps two number tables and no more than a few words each."""
    count, (backend, *_) = 100_000, backends()[::-1]
    params, opt = made(count, backend, drop=GradDropEpoch(0.5), seed=3, effect="freeze")
    opt.set_epoch(0)
    opt.step()
    tracemalloc.start()
    try:
        opt.step()
        grown, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    tables = 8 * (Layout.columns() + len(Integer) + Real.columns())
    assert peak < count * (tables + 500)
    for at in (0, 31_337, count - 1):
        mask = opt.keep_mask(params[at])
        assert same(params[at].detach() != 0, mask)
    assert float(opt.state[params[-1]]["step"]) == 2


@pytest.mark.parametrize("backend", backends()[-1:])
def test_steps_of_a_schedule_leave_nothing_behind(backend):
    params, opt = made(1, backend, drop=GradDrop(anneal=LinearAnneal(0.9, total_steps=10**6)))
    opt.step()
    tracemalloc.start()
    try:
        for _ in range(300):
            opt.step()
        grown, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert grown < 300 * 50, grown


@pytest.mark.parametrize("backend", backends())
@pytest.mark.parametrize("rule", CLASSES)
def test_optimizers_stepping_in_threads_at_once(rule, backend):
    def train(params, opt):
        for _ in range(40):
            opt.step()

    alone = made(20, backend, rule, drop=GradDrop(0.5), seed=1), made(30, backend, rule, drop=GradDrop(0.2), seed=2)
    at_once = made(20, backend, rule, drop=GradDrop(0.5), seed=1), made(30, backend, rule, drop=GradDrop(0.2), seed=2)
    for pair in alone:
        train(*pair)
    threads = [threading.Thread(target=train, args=pair) for pair in at_once]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for pair, right in zip(at_once, alone, strict=True):
        assert all(map(same, pair[0], right[0]))
        assert pair[1].draw == 40


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
@pytest.mark.parametrize("backend", backends())
def test_a_step_in_a_forked_child(backend):
    """It gives the bits of the parent's, whose own are untouched."""
    params, opt = made(20, backend, drop=GradDrop(0.5))
    opt.step()
    torch.set_num_threads(threads := torch.get_num_threads())
    read, write = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of fork beside threads
        child = os.fork()
    if child == 0:
        try:
            opt.step()
            os.write(write, torch.stack([p.detach() for p in params]).numpy().tobytes())
        finally:
            os._exit(0)
    os.close(write)
    before = [p.detach().clone() for p in params]
    with os.fdopen(read, "rb") as pipe:
        theirs = torch.frombuffer(bytearray(pipe.read()), dtype=torch.float32).view(20, 8)
    os.waitpid(child, 0)
    assert all(map(same, [p.detach() for p in params], before)) and opt.draw == 1
    opt.step()
    assert same(torch.stack([p.detach() for p in params]), theirs)
    assert torch.get_num_threads() == threads


SHORT_OF_MEMORY = """
    import resource
    import torch
    from sides import difference
    from test_limits import everything_of
    from graddrop_fused import {optimizer}, GradDrop, GradDropEpoch

    torch.set_num_threads(1)
    small, large = torch.nn.Parameter(torch.ones(64)), torch.nn.Parameter(torch.ones(4 * 2**20))
    params = {{"small": small, "large": large}}
    opt = {optimizer}(params.items(), drop={drop}, backend={backend!r}, steps_per_epoch=2, **{options})
    small.grad = torch.ones_like(small)
    opt.step()
    large.grad = torch.ones(1).expand(4 * 2**20)
    before = everything_of(params, opt)
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + {room} * 2**20, -1))
    try:
        opt.step()
        print("stepped")
    except (MemoryError, RuntimeError) as error:
        print("refused:", type(error).__name__, str(error)[:60].replace("\\n", " "))
    resource.setrlimit(resource.RLIMIT_AS, (-1, -1))
    changed = difference(before, everything_of(params, opt))
    print("changed:", changed)
    opt.step()
    print("then:", opt.draw, float(opt.state[large]["step"]), float(opt.state[small]["step"]))
"""


def everything_of(params, opt):
    """All but the large tensors' elements, of which a sample must do where memory is short."""
    found = everything({"small": params["small"]}, _Small(opt))
    found["large"] = params["large"].detach()[:1000].clone()
    return found


class _Small:
    """An optimizer whose state dict holds samples."""

    def __init__(self, opt):
        self.param_groups, self.draw, self.epoch, self.seed = opt.param_groups, opt.draw, opt.epoch, opt.seed
        self.saved = opt.state_dict()
        entries = self.saved["state"].items()
        self.saved["state"] = {i: {k: v.reshape(-1)[:1000] for k, v in entry.items()} for i, entry in entries}

    def state_dict(self):
        return self.saved


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="address space is limited and read as on Linux")
@pytest.mark.parametrize("backend", backends()[-1:])
@pytest.mark.parametrize(
    ("optimizer", "options", "drop", "room"),
    [
        ("GradDropAdamW", {}, "GradDrop(0.5)", 8),
        ("GradDropAdamW", {}, "GradDrop(0.5)", 24),  # the first moment has room, the second not
        ("GradDropSGD", {"momentum": 0.9}, "GradDrop(0.5)", 8),
        ("GradDropLion", {}, "GradDropEpoch(0.5)", 8),
    ],
)
def test_a_step_that_runs_out_of_memory_has_not_begun(backend, optimizer, options, drop, room):
    code = textwrap.dedent(SHORT_OF_MEMORY).format(
        optimizer=optimizer, options=options, drop=drop, backend=backend, room=room
    )
    here = os.path.dirname(__file__)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([os.path.dirname(here), here, os.path.join(here, "helpers")])
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=300)
    assert run.returncode == 0, run.stderr[-3000:]
    refused, changed, then = run.stdout.strip().splitlines()
    assert refused.startswith("refused:")
    assert changed == "changed: None"
    assert then == "then: 2 1.0 2.0"


def test_the_comparison_sees_a_difference():
    params, opt = made(2, "reference", drop=GradDrop(0.5))
    before = everything(dict(zip("ab", params, strict=True)), opt)
    opt.step()
    assert difference(before, everything(dict(zip("ab", params, strict=True)), opt)) is not None
