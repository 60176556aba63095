"""capturable=True: rows and draws as tensors give the bits that the host's tables give, and nothing waits for the host.

No GPU is needed: what a CUDA graph capture forbids is checked on meta tensors (fake_gpu.py).
"""

from dataclasses import dataclass
from decimal import Decimal, localcontext

import fake_gpu
import pytest
import torch
from policy_cases import CASES, LAYERS, PER_EPOCH, SHAPES, build, gradients

from graddrop_fused import GradDrop, GradDropAdamW, Policy, attach, numbers
from graddrop_fused.contract import Real
from graddrop_fused.policies import DROP, KEEP, Index
from graddrop_fused.rules import AdamW
from graddrop_fused.skip import skip_dropped_layers
from graddrop_fused.tables import runs


def run(drop, effect, capturable, *, tell, scaler=False, absent=False):
    options = {} if tell else {"steps_per_epoch": PER_EPOCH}
    params, opt = build([drop] * 3, [effect] * 3, capturable=capturable, **options)
    lr = torch.tensor(1e-2, dtype=torch.float64)
    for group in opt.param_groups:
        group["lr"] = lr
    amp = torch.amp.GradScaler(device="cpu", init_scale=4.0, enabled=scaler)
    for step in range(9):
        if tell and step % PER_EPOCH == 0:
            opt.set_epoch(step // PER_EPOCH)
        lr.mul_(0.9)
        scale = float(amp.scale(torch.tensor(1.0)))
        for p, g in zip(params, gradients(step), strict=True):
            p.grad = g * scale
        if scaler and step in (0, 4):
            params[1].grad[0] = torch.inf
        if absent and step % 3 > 0:
            params[0].grad = params[step % 3].grad = None
        amp.step(opt)
        amp.update()
    return params, opt


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(
    "options",
    [{"tell": True}, {"tell": False}, {"tell": False, "scaler": True}, {"tell": True, "absent": True}],
    ids=["set_epoch", "steps_per_epoch", "scaler", "absent"],
)
def test_equals_the_eager_run_bit_for_bit(name, options):
    drop = CASES[name][0]
    effect = "gradient" if name == "gaussian" else "freeze"
    eager, on_host = run(drop, effect, False, **options)
    captured, on_device = run(drop, effect, True, **options)
    assert on_host.draw == on_device.draw == (7 if "scaler" in options else 9)
    assert on_host.epoch == on_device.epoch
    for p, q in zip(eager, captured, strict=True):
        assert torch.equal(p, q)
        assert torch.equal(on_host.keep_mask(p), on_device.keep_mask(q))
        assert on_host.state[p].keys() == on_device.state[q].keys()
        for entry, value in on_host.state[p].items():
            assert torch.equal(value, on_device.state[q][entry])


@dataclass(frozen=True)
class FirstLayer(Policy):
    """One of the user's own, without a word about what its rows differ by."""

    p: float

    def row(self, index, layer, layers):
        return DROP if layer else KEEP


@dataclass(frozen=True)
class FirstLayerOfOurs(GradDrop):
    row = FirstLayer.row


class FirstLayerBeside:
    row = FirstLayer.row


@dataclass(frozen=True)
class FirstLayerMixed(FirstLayerBeside, GradDrop):
    pass


@pytest.mark.parametrize("policy", [FirstLayer, FirstLayerOfOurs, FirstLayerMixed])
def test_rows_of_ones_own_policy_may_differ_by_layer(policy):
    for capturable in (False, True):
        params, opt = run(policy(0.5), "freeze", capturable, tell=False)
        start, _ = build([None] * 3, ["freeze"] * 3)
        assert [torch.equal(p, q) for p, q in zip(params, start, strict=True)] == [False, True, True]


@dataclass(frozen=True)
class Long(Policy):
    rows: int

    def index(self, layers):
        return Index("step", self.rows)

    def row(self, index, layer, layers):
        return KEEP


@dataclass(frozen=True)
class LongForAll(Long):
    rows_differ_by_layer = False


def test_a_table_that_is_too_long_says_what_it_holds(monkeypatch):
    monkeypatch.setattr(numbers, "MAX_ROWS", 25)
    with pytest.raises(ValueError, match="schedule of 10 rows, behind 20 of other groups, .* rows_differ_by_layer = F"):
        run(Long(10), "gradient", True, tell=False)
    run(LongForAll(10), "gradient", True, tell=False)


@pytest.fixture
def gpu(monkeypatch):
    pytest.importorskip("triton", reason="triton is not installed: there is no GPU backend")
    with fake_gpu.gpu(monkeypatch, compiles=False) as gpu:
        yield gpu


def on_gpu(drop, effect, **options):
    """test_policies' parameters and groups, on the fake GPU."""
    params = [torch.nn.Parameter(torch.zeros(s, device=fake_gpu.DEVICE)) for s in SHAPES.values()]
    groups = [
        {"params": [(name, p)], "layer": layer, "drop": drop, "effect": effect}
        for name, p, layer in zip(SHAPES, params, LAYERS, strict=True)
    ]
    for p in params:
        p.grad = torch.zeros_like(p)
    return params, GradDropAdamW(groups, backend="triton", **{"capturable": True, **options})


def scalar(value):
    return torch.full((), value, device=fake_gpu.DEVICE)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(
    "setting", ["plain", "tell", "lr tensor", "host lr tensor", "amp", "absent", "moved", "update"]
)
def test_a_captured_step_neither_synchronises_nor_copies_from_the_host(gpu, name, setting):
    effect = "gradient" if name == "gaussian" else "update" if setting == "update" else "freeze"
    params, opt = on_gpu(CASES[name][0], effect, steps_per_epoch=None if setting == "tell" else 2, amsgrad=True)
    for group in opt.param_groups:
        group["lr"] = {"lr tensor": scalar(0.01), "host lr tensor": torch.tensor(0.01)}.get(setting, 0.01)
    if setting == "tell":
        opt.set_epoch(3)
    if setting == "amp":  # as GradScaler hands them over
        opt.grad_scale, opt.found_inf = scalar(128.0), scalar(0.0)
    opt.step()
    if setting == "absent":  # unlike in the step before the capture
        params[0].grad = params[2].grad = None
    if setting == "moved":  # gradients made inside the graph's own pool have new places
        params[1].grad = torch.zeros(33, 2, device=fake_gpu.DEVICE)[:, 0]
    gpu.capturing = True
    with fake_gpu.no_host() as copied:
        if setting == "tell":
            opt.set_epoch(4)
        opt.step()
    # where gradients are not those of the last step, the graph copies their places from memory that it keeps
    (tables,) = (bucket.batch.cache["triton"] for bucket in opt._plan.buckets)
    # (a meta tensor has no address: one that is absent looks like one that has not moved)
    assert len(copied) == (setting == "moved")
    assert all(layout is tables.captured[0][1] for layout in copied)
    draws = [("pack_kernel", (3,))] * (name == "block" and effect == "freeze")  # which blocks count the step
    assert [(kernel, grid) for kernel, grid, _ in gpu.launches] == [*draws, ("update_kernel", (3,))] * 2


def test_a_captured_step_with_switched_off_layers(gpu):
    model = torch.nn.Sequential(*(torch.nn.Linear(4, 4, device=fake_gpu.DEVICE) for _ in LAYERS))
    groups = [{"params": list(m.parameters()), "layer": n} for m, n in zip(model, LAYERS, strict=True)]
    opt = GradDropAdamW(groups, drop=CASES["top-down"][0], effect="freeze", capturable=True, backend="triton")
    opt.set_epoch(0)
    skip_dropped_layers(model, opt)
    for p in model.parameters():
        p.grad = torch.zeros_like(p) if p.requires_grad else None
    opt.step()
    gpu.capturing = True
    with fake_gpu.no_host():
        opt.step()
    assert len(gpu.launches) == 2


def test_graphs_follow_changed_numbers(gpu):
    """They read the tables of the capture, which must stay where they are."""
    _, opt = on_gpu(GradDrop(0.5), "gradient")
    opt.step()
    (bucket,) = opt._plan.buckets
    before = bucket.tables._table
    opt.param_groups[0]["lr"], opt.param_groups[0]["betas"] = 0.5, (0.8, 0.9)
    opt.step()
    assert opt._plan.buckets == [bucket] and bucket.tables._table is before


def test_what_a_capture_cannot_hold_is_refused(gpu):
    params, opt = on_gpu(GradDrop(0.5), "gradient")
    gpu.capturing = True
    with pytest.raises(RuntimeError, match="outside of capture first"):
        opt.step()  # nothing is on the device yet
    assert not opt.state and opt.draw == 0
    gpu.capturing = False
    opt.step()
    gpu.capturing = True
    for name, value in {"lr": 0.5, "effect": "freeze", "drop": GradDrop(0.1), "layer": "encoder"}.items():
        before = opt.param_groups[0].get(name)
        opt.param_groups[0][name] = value
        with pytest.raises(RuntimeError, match="outside of capture first"):
            opt.step()
        opt.param_groups[0][name] = before
    params, opt = on_gpu(GradDrop(0.5), "gradient", capturable=False)
    gpu.capturing = False
    opt.step()
    gpu.capturing = True
    with pytest.raises(RuntimeError, match="capturable=True"):
        opt.step()
    assert len(gpu.launches) == 2
    sgd = torch.optim.SGD(params)
    handle = attach(sgd, GradDrop(0.5), backend="triton")
    with pytest.raises(RuntimeError, match="capturable=True"):
        sgd.step()
    assert handle.draw == 0 and len(gpu.launches) == 2


@pytest.mark.parametrize(
    "broken",
    [
        lambda table: table[0, 0].item(),
        lambda table: table.nonzero(),
        lambda table: torch.tensor([1.0], device=fake_gpu.DEVICE),
        lambda table: torch.ones(3).to(fake_gpu.DEVICE),
        lambda table: table.copy_(torch.ones(5, 3)),
        lambda table: table.to("cpu"),
        lambda table: table.__setitem__([0, 2], 1.0),
        lambda table: table.__setitem__((table > 0), 1.0),
        lambda table: table[[0, 2]],
        lambda table: bool((table > 0).all()),
    ],
)
def test_the_check_of_captured_steps_can_fail(broken):
    table = torch.zeros(5, 3, device=fake_gpu.DEVICE)
    with fake_gpu.no_host(), pytest.raises((AssertionError, RuntimeError, NotImplementedError)):
        broken(table)


def test_runs():
    assert [list(range(9))[run] for run in runs([0, 1, 2, 5, 7, 8])] == [[0, 1, 2], [5], [7, 8]]
    assert runs([]) == []


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.0, 0.99), (0.95, 0.9999999), (0.999999, 1 - 1e-9)])
def test_bias_corrections_are_accurate_at_every_step_count(betas, capturable):
    steps = [1, 2, 3, 10, 999, 1000, 31_337, 10**6, 2**24]  # float32 counts further steps no more: neither does torch
    params = [torch.nn.Parameter(torch.ones(1)) for _ in steps]
    opt = GradDropAdamW(params, lr=1.0, betas=betas, capturable=capturable, backend="reference")
    for p, t in zip(params, steps, strict=True):
        p.grad = torch.ones(1)
        opt.state[p] = {"step": torch.tensor(t - 1.0), "exp_avg": torch.zeros(1), "exp_avg_sq": torch.zeros(1)}
    opt.step()
    (bucket,) = opt._plan.buckets
    with localcontext(prec=60):
        for t, row in zip(steps, bucket.batch.reals.tolist(), strict=True):
            correction1, correction2 = (1 - Decimal(beta) ** t for beta in betas)
            factors = dict(zip(AdamW.factor_names, map(Decimal, row[Real.FACTOR :]), strict=False))
            assert abs(factors["step"] * correction1 / correction2.sqrt() - 1) < 1e-6
            assert abs(factors["eps"] / (Decimal(1e-8) * correction2.sqrt()) - 1) < 1e-6
