"""GradDropAdamW as a drop-in: with nothing dropped it is torch.optim.AdamW, whatever surrounds the step."""

import copy
import math
import pickle
import weakref
from functools import partial

import pytest
import torch
from policy_cases import BACKENDS
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from graddrop_fused import GradDrop, GradDropAdamW, GradDropEpoch, GradDropSGD, GradFreeze, attach

SHAPES = [(0,), (1,), (33,), (129,), (17, 23)]
# two roundings of the parameter's dtype a step, of which errors of opposite sign cancel
TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}


HOLDING = GradDrop(p=0.5, block="row", hold=9, rescale=False)


def parameters(dtype=torch.float32, shapes=SHAPES):
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(shape).to(dtype)) for shape in shapes]


def set_gradients(params, step, scale=1.0):
    generator = torch.Generator().manual_seed(step)
    for p in params:
        p.grad = (torch.randn(p.shape, generator=generator) * scale).to(p.dtype)


def assert_close(ours, theirs):
    for p, q in zip(ours, theirs, strict=True):
        bound = TOLERANCE[p.dtype]
        torch.testing.assert_close(p, q, rtol=bound, atol=bound)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"amsgrad": True},
        {"maximize": True, "weight_decay": 0.3},
        {"lr": "tensor"},
        {"betas": (0.5, 0.7)},
        {"betas": (0.5, 0.9), "eps": 1e-3, "weight_decay": 0.0},
    ],
    ids=str,
)
def test_follows_torch_over_100_steps(backend, dtype, options):
    ours, theirs = parameters(dtype), parameters(dtype)
    lr = torch.tensor(1e-3, dtype=torch.float64) if options.get("lr") == "tensor" else 1e-3
    options = {**options, "lr": lr}
    opt = GradDropAdamW(ours, **options, drop=GradDrop(p=0.0), backend=backend)
    # torch's own loops compute float16 in float16; its fused step in float32, as we do
    ref = torch.optim.AdamW(theirs, **options, **({"fused": True} if dtype == torch.float16 else {"foreach": False}))
    for step in range(100):
        for params, o in ((ours, opt), (theirs, ref)):
            set_gradients(params, step)
            if step % 7 == 3:
                params[2].grad = None
            o.step()
    assert_close(ours, theirs)
    assert opt.draw == 100
    assert [float(opt.state[p]["step"]) for p in ours] == [float(ref.state[p]["step"]) for p in theirs]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", [{}, {"active_state": True}, {"capturable": True}], ids=str)
@pytest.mark.parametrize("loaded", [False, True])
def test_a_momentum_that_is_set_later_begins_with_the_first_gradient(loaded, options, backend):
    """On whole parameters, and on the kept blocks of a mask that holds."""
    whole, blocks, theirs = (parameters(torch.float64) for _ in range(3))
    opts = [
        GradDropSGD(whole, lr=0.1, backend=backend, **options),
        GradDropSGD(blocks, lr=0.1, backend=backend, **options, drop=HOLDING, effect="freeze"),
        torch.optim.SGD(theirs, lr=0.1),
    ]
    masks, begin = [opts[1].keep_mask(p) for p in blocks], parameters(torch.float64)
    for step in range(5):
        if step == 2:
            for opt in opts:
                opt.param_groups[0].update(momentum=0.9, dampening=0.3)
                if loaded:
                    opt.load_state_dict(copy.deepcopy(opt.state_dict()))
        for params, opt in zip((whole, blocks, theirs), opts, strict=True):
            set_gradients(params, step)
            opt.step()
    assert_close(whole, theirs)
    assert_close(blocks, [torch.where(m, p, b) for m, p, b in zip(masks, theirs, begin, strict=True)])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", [{}, {"momentum": 0.9}, {"momentum": 0.9, "nesterov": True}], ids=str)
def test_infinite_parameters_and_gradients_under_sgd(backend, options):
    """A weight that is -inf on purpose stays so, and an infinite gradient makes the parameter infinite, not NaN."""
    ours, theirs = parameters(), parameters()
    for params, opt in (
        (ours, GradDropSGD(ours, lr=0.1, backend=backend, **options)),
        (theirs, torch.optim.SGD(theirs, lr=0.1, foreach=False, **options)),
    ):
        for p in params:
            p.data.view(-1)[::5] = -math.inf
        for step in range(3):
            set_gradients(params, step)
            for p in params:
                p.grad.view(-1)[1::5] = math.inf
            opt.step()
    assert not any(p.isnan().any() for p in theirs)
    assert_close(ours, theirs)


def test_groups_scheduler_clipping_and_a_group_added_later():
    def run(make):
        params = parameters()
        opt = make([{"params": params[:2], "lr": 1e-2}, {"params": params[2:4], "weight_decay": 0.5}])
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(opt, 80)
        for step in range(100):
            if step == 50:
                opt.add_param_group({"params": params[4:], "lr": 3e-3})
            set_gradients(params, step)
            nn.utils.clip_grad_norm_(params, 1.0)
            opt.step()
            if step < 50:
                schedule.step()
        return params

    assert_close(run(lambda g: GradDropAdamW(g, backend="reference")), run(torch.optim.AdamW))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("unscale", [False, True])
def test_grad_scaler_and_its_skipped_steps(unscale, backend):
    def run(make):
        params = parameters()
        opt = make(params)
        scaler = torch.amp.GradScaler(device="cpu", init_scale=2.0**10, growth_interval=5)
        for step in range(40):
            set_gradients(params, step, float(scaler.scale(torch.tensor(1.0))))
            if step in (3, 17):
                params[3].grad[5] = torch.inf
            if unscale:
                scaler.unscale_(opt)
            scaler.step(opt)
            scaler.update()
        return params, opt

    ours, opt = run(lambda p: GradDropAdamW(p, backend=backend))
    assert_close(ours, run(torch.optim.AdamW)[0])
    assert opt.draw == 38


@pytest.mark.parametrize("backend", BACKENDS)
def test_scaled_and_skipped_steps_draw_the_masks_of_plain_ones(backend):
    scaled, plain = parameters(), parameters()
    opt = GradDropAdamW(scaled, drop=GradDrop(p=0.5), backend=backend)
    ref = GradDropAdamW(plain, drop=GradDrop(p=0.5), backend=backend)
    scaler = torch.amp.GradScaler(device="cpu", init_scale=8.0)
    for step in range(3):
        set_gradients(scaled, step, float(scaler.scale(torch.tensor(1.0))))
        before = copy.deepcopy(scaled)
        if step == 1:
            scaled[2].grad[3] = torch.inf
        scaler.step(opt)
        scaler.update()
        if step == 1:
            assert all(torch.equal(p, q) for p, q in zip(scaled, before, strict=True)) and opt.draw == 1
        else:
            set_gradients(plain, step)
            ref.step()
    assert opt.draw == 2
    assert_close(scaled, plain)


def test_a_skipped_step_draws_no_mask():
    params = parameters()
    opt = GradDropAdamW(params, drop=GradDrop(p=0.5), backend="reference")
    scaler = torch.amp.GradScaler(device="cpu")
    scaler.scale(torch.tensor(1.0))
    set_gradients(params, 0)
    params[4].grad[0, 0] = torch.nan
    before, mask = copy.deepcopy(params), opt.keep_mask(params[4])
    scaler.step(opt)
    assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True))
    assert opt.draw == 0 and torch.equal(opt.keep_mask(params[4]), mask)


def test_closure_hooks_and_zero_grad():
    p = nn.Parameter(torch.ones(3))
    opt = GradDropAdamW([p], backend="reference")
    calls = []
    opt.register_step_pre_hook(lambda *_: calls.append("pre"))
    opt.register_step_post_hook(lambda *_: calls.append("post"))

    def closure():
        calls.append("closure")
        opt.zero_grad()
        loss = (p**2).sum()
        loss.backward()
        return loss

    assert opt.step(closure).item() == 3.0
    assert calls == ["pre", "closure", "post"]
    opt.zero_grad(set_to_none=False)
    assert torch.equal(p.grad, torch.zeros(3))
    opt.zero_grad()
    assert p.grad is None


@pytest.mark.parametrize("make", [GradDropAdamW, torch.optim.AdamW])
def test_hooks_that_come_during_a_step(make):
    p = nn.Parameter(torch.ones(3))
    opt = make([p])
    calls = []

    def closure():
        p.grad = torch.ones(3)
        handles.append(opt.register_step_post_hook(lambda *given: calls.append(given)))
        handles.append(register_optimizer_step_post_hook(lambda *_: calls.append("of all")))

    handles = []
    try:
        opt.step(closure)
    finally:
        for handle in handles:
            handle.remove()
    assert calls == [(opt, (opt, closure), {}), "of all"]


@pytest.mark.filterwarnings("ignore:.*Profiler")
@pytest.mark.parametrize("hooked", [False, True], ids=["plain", "hooked"])
def test_profilers_see_what_they_see_of_torch(hooked):
    def steps(make):
        p = nn.Parameter(torch.ones(3))
        optimizer = make([p])
        if hooked:
            optimizer.register_step_post_hook(lambda *_: None)
        with torch.profiler.profile() as profile:
            p.grad = torch.ones(3)
            optimizer.step()
            with pytest.raises(RuntimeError, match="of the closure"):
                optimizer.step(raises)
            torch.ones(3) + 1
        return [event for event in profile.events() if event.cpu_parent is None and event.scope != 0], profile.events()

    def raises():
        raise RuntimeError("of the closure")

    (ours, all_ours), (theirs, _) = steps(GradDropAdamW), steps(torch.optim.AdamW)
    assert [e.name for e in theirs] == ["Optimizer.step#AdamW.step"] * 2
    assert [e.name for e in ours] == ["Optimizer.step#GradDropAdamW.step"] * 2
    assert [(e.scope, e.is_user_annotation) for e in ours] == [(e.scope, e.is_user_annotation) for e in theirs]
    assert [e.cpu_parent for e in all_ours if e.name == "aten::add"][-1] is None  # the broken step's record has ended


@pytest.mark.parametrize("make", [GradDropAdamW, torch.optim.SGD], ids=["GradDropAdamW", "attach"])
def test_zero_grad_frees_gradients(make):
    """A reference that outlived the step would keep a second copy of all gradients through the next backward."""
    param = nn.Parameter(torch.ones(300))
    opt = make([param], lr=0.1)
    if make is torch.optim.SGD:
        attach(opt, drop=GradDrop(0.5))
    for _ in range(2):
        param.grad = torch.ones(300)
        freed = []
        weakref.finalize(param.grad, freed.append, True)
        opt.step()
        opt.zero_grad()
        assert freed


@pytest.mark.parametrize(
    "copy_of", [copy.deepcopy, lambda opt: pickle.loads(pickle.dumps(opt))], ids=["copy", "pickle"]
)
@pytest.mark.parametrize("drop", [GradDrop(p=0.3), GradDropEpoch(p=0.5, toggle=True)], ids=["step", "epoch"])
def test_copies_continue_bit_for_bit(copy_of, drop):
    params = parameters()
    opt = GradDropAdamW(params, drop=drop, seed=2**64 - 1)
    opt.set_epoch(3)
    for step in range(3):
        set_gradients(params, step)
        opt.step()
    twin = copy_of(opt)
    assert (twin.seed, twin.draw, twin.epoch) == (2**64 - 1, 3, 3)
    copies = twin.param_groups[0]["params"]
    for step in range(3, 6):
        for ps, o in ((params, opt), (copies, twin)):
            set_gradients(ps, step)
            o.step()
    assert twin.draw == 6
    assert all(torch.equal(p, q) and p is not q for p, q in zip(params, copies, strict=True))


@pytest.mark.parametrize("change", ["data", "state", "layout"])
def test_replaced_tensors_are_noticed(change):
    ours, theirs = parameters(), parameters()
    opt, ref = GradDropAdamW(ours, backend="reference"), torch.optim.AdamW(theirs)
    for step in range(6):
        for params, o in ((ours, opt), (theirs, ref)):
            if step == 3:
                p = params[4]
                if change == "data":
                    p.data = p.data * 0.5
                elif change == "state":
                    o.state[p]["exp_avg"] = torch.ones_like(p)
                else:
                    o.state[p]["exp_avg"] = o.state[p]["exp_avg"].t().contiguous().t()
            set_gradients(params, step)
            o.step()
    assert_close(ours, theirs)


def step_and_clear(opt, _):
    opt.step()
    opt.zero_grad()


def test_one_optimizer_per_parameter_draws_the_masks_of_the_whole():
    together, alone = nn.Linear(40, 30), nn.Linear(40, 30)
    alone.load_state_dict(together.state_dict())
    options = {"drop": GradDrop(p=0.5), "seed": 3, "backend": "reference"}
    opt = GradDropAdamW(together.named_parameters(), **options)
    for name, p in alone.named_parameters():
        own = GradDropAdamW([(name, p)], **options)
        p.register_post_accumulate_grad_hook(partial(step_and_clear, own))
    x = torch.randn(5, 40)
    for _ in range(3):
        for model in (together, alone):
            model(x).square().sum().backward()
        opt.step()
        opt.zero_grad()
    assert all(torch.equal(p, q) for p, q in zip(together.parameters(), alone.parameters(), strict=True))


def test_names_make_masks_independent_of_order_and_wrappers():
    params = [(f"layer.{i}", p) for i, p in enumerate(parameters())]
    opt = GradDropAdamW(params, drop=GradDrop(0.5))
    turned = GradDropAdamW([(f"module._orig_mod.{n}", p) for n, p in reversed(params)], drop=GradDrop(0.5))
    for _, p in params:
        assert torch.equal(opt.keep_mask(p), turned.keep_mask(p))


def test_two_optimizers_side_by_side_and_state_dtype():
    params = parameters(torch.bfloat16)
    a = GradDropAdamW(params[:3], backend="reference", state_dtype=torch.float32)
    b = GradDropAdamW(params[3:], backend="reference")
    set_gradients(params, 0)
    a.step(), b.step(), a.step()
    assert (a.draw, b.draw) == (2, 1)
    assert a.state[params[2]]["exp_avg"].dtype == torch.float32
    assert b.state[params[3]]["exp_avg"].dtype == torch.bfloat16


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("absent", ["no gradient", "frozen as a whole"])
def test_what_a_step_leaves_alone_stays_fit_for_backward(backend, absent):
    a, b = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    drop = GradFreeze("top-down") if absent == "frozen as a whole" else None
    groups = [{"params": [p], "layer": name} for p, name in ((a, "first"), (b, "last"))]
    opt = GradDropAdamW(groups, drop=drop, backend=backend)
    opt.set_epoch(0)
    if drop is None:
        (a * b).sum().backward()
        opt.step()
        opt.zero_grad()
    x = torch.ones(3, requires_grad=True)
    waiting = (a * x).sum()  # its backward needs a
    b.sum().backward()
    if drop is not None:
        a.grad = torch.ones(3)
    opt.step()
    waiting.backward()
    assert torch.equal(x.grad, a.detach())
