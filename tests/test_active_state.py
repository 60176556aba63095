"""active_state=True: moments for active elements only, against torch's optimizers over blocks that are parameters of
their own."""

import contextlib
import copy
import io
import weakref
from functools import partial

import pytest
import torch
from torch import nn

from graddrop_fused import (
    GradDrop,
    GradDropAdamW,
    GradDropEpoch,
    GradDropLion,
    GradDropSGD,
    GradFreeze,
    LayerGradDrop,
    LinearAnneal,
    StaticMask,
    release_gradients,
    skip_dropped_layers,
    skip_dropped_rows,
)

SHAPES = {
    "matrix": (17, 23),
    "vector": (133,),
    "scalar": (),
    "empty": (0, 3),
    "odd": (1, 129),
    "cube": (33, 2, 3),
    "31": (31,),
    "one": (1, 1),
    "tall": (32, 31),
}
PER_EPOCH, EPOCHS = 3, 6
ADAMW = {"lr": 1e-2, "weight_decay": 0.1}
RULES = {
    "AdamW": (partial(GradDropAdamW, **ADAMW), partial(torch.optim.AdamW, **ADAMW)),
    "amsgrad": (partial(GradDropAdamW, amsgrad=True, **ADAMW), partial(torch.optim.AdamW, amsgrad=True, **ADAMW)),
    "SGD": (
        partial(GradDropSGD, lr=1e-2, momentum=0.9, dampening=0.5, weight_decay=0.1),
        partial(torch.optim.SGD, lr=1e-2, momentum=0.9, dampening=0.5, weight_decay=0.1),
    ),
    "plain SGD": (partial(GradDropSGD, lr=1e-2), partial(torch.optim.SGD, lr=1e-2)),
    "Lion": (partial(GradDropLion, lr=1e-2), partial(GradDropLion, lr=1e-2, backend="reference")),
}
BLOCKS = {
    "toggle": GradDropEpoch(0.75, block="row", toggle=True),
    "accumulate": GradDropEpoch(0.75, block="row"),
    "replacement": GradDropEpoch(0.75, block="row", replacement=True),
    "toggle 128": GradDropEpoch(0.75, block=128, toggle=True),
    "accumulate 128": GradDropEpoch(0.75, block=128),
    "held": GradDrop(0.75, block=128, hold=2),
    "annealed": GradDropEpoch(anneal=LinearAnneal(0.75, epochs=3), block="row", replacement=True, rescale=False),
}
LAYERS = {
    "GradFreeze": GradFreeze(),
    "bottom-up": GradFreeze("bottom-up", layers_per_epoch=2),
    "LayerGradDrop": LayerGradDrop(0.5, per="epoch"),
    "held layers": LayerGradDrop(0.5, hold=2),
}
BACKENDS = ("reference", "cpu")


def named(seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return {n: nn.Parameter(torch.randn(s, generator=generator, dtype=dtype)) for n, s in SHAPES.items()}


def by_layers(params):
    """Groups of a layer each, of one or two parameters."""
    items = list(params.items())
    return [{"params": items[i : i + 2], "layer": str(i)} for i in range(0, len(items), 2)]


def give_gradients(params, step, missing=()):
    for number, (name, p) in enumerate(params.items()):
        generator = torch.Generator().manual_seed(1000 * step + number)
        g = torch.randn(p.shape, generator=generator, dtype=p.dtype)
        p.grad = None if (name, step) in missing else g


def block_numbers(shape, block):
    """Each element's block, from the definition."""
    elements = torch.arange(torch.Size(shape).numel())
    if block == "row":
        return elements // max(1, torch.Size(shape[1:]).numel()) if len(shape) > 1 else elements
    return elements // block


class Split:
    """Every block (or whole parameter) as a parameter of another optimizer, which has state while it is active."""

    def __init__(self, params, make, drop):
        self.drop = drop
        self.pieces, self.elements = {}, {}
        for name, p in params.items():
            flat, numbers = p.detach().reshape(-1), block_numbers(p.shape, getattr(drop, "block", 10**9))
            for number in numbers.unique().tolist():
                self.elements[name, number] = (numbers == number).nonzero().flatten()
                self.pieces[name, number] = nn.Parameter(flat[self.elements[name, number]])
        self.optimizer = make(list(self.pieces.values()))

    def step(self, params, masks, rescale=1.0):
        for (name, number), piece in self.pieces.items():
            of_block = self.elements[name, number]
            kept = masks[name].reshape(-1)[of_block]
            assert kept.all() or not kept.any()
            grad = params[name].grad
            piece.grad = None
            if not kept.all():
                self.optimizer.state.pop(piece, None)
            elif grad is not None:
                piece.grad = rescale * grad.reshape(-1)[of_block]
        self.optimizer.step()

    def value(self, name, like):
        out = torch.zeros(like.numel(), dtype=like.dtype)
        for key, piece in self.pieces.items():
            if key[0] == name:
                out[self.elements[key]] = piece.detach()
        return out.reshape(like.shape)

    def state(self, name, key, like):
        """(elements that have state, their values)."""
        has, out = torch.zeros(like.numel(), dtype=torch.bool), torch.zeros(like.numel(), dtype=like.dtype)
        for place, piece in self.pieces.items():
            if place[0] == name and piece in self.optimizer.state and self.optimizer.state[piece].get(key) is not None:
                has[self.elements[place]] = True
                out[self.elements[place]] = self.optimizer.state[piece][key].detach().reshape(-1).to(like.dtype)
        return has, out


def spread(entry, key, like):
    """The same of our state."""
    has, out = torch.zeros(like.numel(), dtype=torch.bool), torch.zeros(like.numel(), dtype=like.dtype)
    if not entry:
        return has, out
    if "active" not in entry:
        value = entry[key].detach()
        return ~has, value.reshape(-1).to(like.dtype).expand(like.numel()).clone()
    at = 0
    for start, length, count in entry["active"].tolist():
        has[start : start + length] = True
        out[start : start + length] = entry[key][count] if key == "step" else entry[key][at : at + length]
        at += length
    assert at == (entry[key].numel() if key != "step" else at)
    return has, out


def rescale_of(drop, step):
    """1/q at a step, by hand."""
    if isinstance(drop, LayerGradDrop | GradFreeze) or drop is None or drop.rescale is False:
        return 1.0
    if isinstance(drop, GradDropEpoch) and not (drop.toggle or drop.replacement):
        return 4 / min(4, step // PER_EPOCH + 1)
    return 4.0


def optimizer(make, params, drop, **options):
    groups = by_layers(params) if drop is not None and drop.layerwise else params.items()
    options = {"drop": drop, "effect": "freeze", "seed": 5, "steps_per_epoch": PER_EPOCH, **options}
    return make(groups, active_state=True, **options)


MISSING = {("matrix", 4), ("vector", 0), ("vector", 7), ("tall", 8), ("cube", 3)}


POLICIES = {**BLOCKS, **LAYERS, "none": None}
CASES = [(policy, "AdamW", backend) for policy in POLICIES for backend in BACKENDS]
CASES += [
    (policy, rule, "cpu")
    for policy in ("toggle", "accumulate", "replacement", "accumulate 128", "GradFreeze")
    for rule in RULES
    if rule != "AdamW"
]


@pytest.mark.parametrize("policy, rule, backend", CASES, ids=["-".join(case) for case in CASES])
def test_it_trains_as_torch_does_on_blocks_that_are_parameters(policy, rule, backend):
    drop = POLICIES[policy]
    ours, theirs = RULES[rule]
    params = named()
    opt = optimizer(ours, params, drop, backend=backend)
    truth = Split(params, theirs, drop)
    for step in range(PER_EPOCH * EPOCHS):
        give_gradients(params, step, MISSING)
        masks = {name: opt.keep_mask(p) for name, p in params.items()}
        opt.step()
        truth.step(params, masks, rescale_of(drop, step))
        for name, p in params.items():
            torch.testing.assert_close(p.detach(), truth.value(name, p), rtol=1e-12, atol=1e-12, msg=f"{name} {step}")
            for key in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer", "step"):
                has, expected = truth.state(name, key, p)
                if not has.any() or (key == "step" and rule == "Lion"):
                    continue
                held, values = spread(opt.state[p], key, p)
                assert (held | ~has).all(), (name, key, step)  # active before its first gradient: zeros
                torch.testing.assert_close(values[has], expected[has], rtol=1e-12, atol=1e-12)
            held, _ = spread(opt.state.get(p, {}), "step", p)
            assert not (held & ~masks[name].reshape(-1)).any(), (name, step)


def test_accumulate_ends_with_all():
    """Then every element has moments, and each part its own count."""
    params = named()
    opt = optimizer(RULES["AdamW"][0], params, BLOCKS["accumulate"])
    run(opt, params, range(5 * PER_EPOCH))
    assert opt.state[params["tall"]]["exp_avg"].numel() == 32 * 31
    # four epochs' parts, and a step of the third epoch without a gradient
    assert opt.state[params["tall"]]["step"].tolist() == [6.0, 8.0, 11.0, 14.0]


def run(opt, params, steps):
    for step in steps:
        give_gradients(params, step, MISSING)
        opt.step()


def same(a, b, params_a, params_b):
    """Equal parameters and state, bit for bit."""
    assert a.draw == b.draw
    for name, p in params_a.items():
        q = params_b[name]
        assert torch.equal(p, q), name
        one, other = a.state.get(p, {}), b.state.get(q, {})
        assert one.keys() == other.keys(), name
        for key in one:
            assert torch.equal(one[key], other[key]), (name, key)


# Float types, layouts, sharing a model with others


@pytest.mark.parametrize("drop", [BLOCKS["toggle"], BLOCKS["accumulate 128"], LAYERS["GradFreeze"]], ids=repr)
@pytest.mark.parametrize(
    "dtype, state_dtype", [("float32", None), ("bfloat16", None), ("bfloat16", "float32"), ("float16", None)]
)
def test_backends_agree_in_every_dtype(dtype, state_dtype, drop):
    dtype, state_dtype = getattr(torch, dtype), state_dtype and getattr(torch, state_dtype)
    both = []
    for backend in BACKENDS:
        params = named(dtype=dtype)
        opt = optimizer(RULES["AdamW"][0], params, drop, backend=backend, state_dtype=state_dtype)
        run(opt, params, range(PER_EPOCH * 3))
        both.append((params, opt))
    (one, opt), (other, other_opt) = both
    for name, p in one.items():
        q, tolerance = other[name], 4 * torch.finfo(dtype).eps
        torch.testing.assert_close(p.detach(), q.detach(), rtol=tolerance, atol=tolerance)
        a, b = opt.state.get(p, {}), other_opt.state.get(q, {})
        assert a.keys() == b.keys()
        for key in a:
            assert a[key].dtype == b[key].dtype and a[key].shape == b[key].shape
        if "active" in a:
            assert torch.equal(a["active"], b["active"])


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("policy", ["toggle", "accumulate", "toggle 128", "GradFreeze"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_first_epoch_is_that_of_whole_state_bit_for_bit(backend, policy, rounding):
    """Until the mask changes, moments that nobody reads are all that differs. Rounding goes by the same numbers."""
    both = []
    for active_state in (False, True):
        params = {n: p for n, p in named(dtype=torch.bfloat16).items() if n != "31"}
        drop = POLICIES[policy]
        groups = by_layers(params) if drop.layerwise else params.items()
        options = {"effect": "freeze", "seed": 5, "steps_per_epoch": 5, "rounding": rounding, "backend": backend}
        opt = GradDropAdamW(groups, lr=1e-2, drop=drop, active_state=active_state, **options)
        for step in range(5):
            give_gradients(params, step)
            opt.step()
        both.append((params, opt))
    (dense, dense_opt), (compact, opt) = both
    for name, p in dense.items():
        assert torch.equal(p, compact[name]), name
        held, values = spread(opt.state.get(compact[name], {}), "exp_avg_sq", p)
        assert torch.equal(values[held], dense_opt.state[p]["exp_avg_sq"].reshape(-1)[held]), name


def turned(shape):
    return nn.Parameter(torch.randn(shape[::-1], generator=torch.Generator().manual_seed(0)).t())


def test_parameters_that_are_not_contiguous_go_to_the_reference():
    """Under "auto"; compiled backends refuse them before anything changes. Layers take them as ever."""
    params = {"turned": turned((17, 23)), "straight": nn.Parameter(turned((17, 23)).detach().contiguous())}
    opts = [
        GradDropAdamW([("w", p)], lr=1e-2, drop=BLOCKS["toggle"], effect="freeze", steps_per_epoch=2, active_state=True)
        for p in params.values()
    ]
    for step in range(6):
        grad = torch.randn(17, 23, generator=torch.Generator().manual_seed(step))
        for p, opt in zip(params.values(), opts, strict=True):
            p.grad = grad.clone()
            opt.step()
    torch.testing.assert_close(params["turned"], params["straight"])
    p = turned((17, 23))
    opt = GradDropAdamW(
        [p], drop=BLOCKS["toggle"], effect="freeze", steps_per_epoch=2, active_state=True, backend="cpu"
    )
    p.grad = torch.ones_like(p)
    before = p.detach().clone()
    with pytest.raises(ValueError, match=r"backend must be .* with active_state=True .* got 'cpu' .* \(17, 23\)"):
        opt.step()
    assert torch.equal(p, before) and not opt.state


@pytest.mark.parametrize(
    "turn", [lambda g: g.t().contiguous().t(), lambda g: g[:1].expand_as(g)], ids=["t", "expanded"]
)
def test_gradients_of_any_layout(turn):
    params, others = named(), named()
    opts = [optimizer(RULES["AdamW"][0], ps, BLOCKS["accumulate"], backend="cpu") for ps in (params, others)]
    for step in range(4):
        for ps, layout in ((params, turn), (others, lambda g: turn(g).contiguous())):
            give_gradients(ps, step)
            ps["matrix"].grad = layout(ps["matrix"].grad)
        for opt in opts:
            opt.step()
    same(*opts, params, others)


# The clock


def test_the_same_epoch_told_again_and_an_earlier_one():
    """set_epoch is idempotent. Going back is another mask: what is active in both goes on, all else begins."""
    params = named()
    opt = optimizer(RULES["AdamW"][0], params, BLOCKS["accumulate"], steps_per_epoch=None)
    with pytest.raises(RuntimeError, match="the epoch is not known"):
        give_gradients(params, 0)
        opt.step()
    assert not opt.state
    for epoch in (0, 0, 2, 1):
        opt.set_epoch(epoch)
        masks = {name: opt.keep_mask(p) for name, p in params.items()}
        run(opt, params, range(20, 22))
        for name, p in params.items():
            assert opt.state.get(p, {"exp_avg": torch.empty(0)})["exp_avg"].numel() == masks[name].sum()
    assert opt.state[params["tall"]]["step"].tolist() == [4.0, 8.0]


def test_a_step_that_grad_scaler_skips_changes_no_state():
    params = named()
    opt = optimizer(RULES["AdamW"][0], params, BLOCKS["toggle"])
    run(opt, params, range(PER_EPOCH))
    before = {p: {k: t.clone() for k, t in entry.items()} for p, entry in opt.state.items()}
    opt.found_inf, opt.grad_scale = torch.tensor(1.0), torch.tensor(2.0)
    opt.step()  # the first of the next epoch
    assert opt.draw == PER_EPOCH and before.keys() == opt.state.keys()
    for p, entry in before.items():
        assert all(torch.equal(entry[key], opt.state[p][key]) for key in entry)
    opt.found_inf = torch.tensor(0.0)
    other = named()
    plain = optimizer(RULES["AdamW"][0], other, BLOCKS["toggle"])
    run(plain, other, range(PER_EPOCH))
    give_gradients(params, 50), give_gradients(other, 50)
    for p in params.values():
        p.grad *= 2
    opt.step(), plain.step()
    for name, p in params.items():
        torch.testing.assert_close(p, other[name], rtol=1e-12, atol=1e-12)


def test_a_group_added_in_the_middle():
    """It begins where it is, and those that were there go on."""
    params = named()
    late = {name: params.pop(name) for name in ("tall", "vector")}
    opt = optimizer(RULES["AdamW"][0], params, BLOCKS["accumulate"])
    alone = named()
    twin = optimizer(RULES["AdamW"][0], {n: alone[n] for n in params}, BLOCKS["accumulate"])
    run(opt, params, range(4)), run(twin, {n: alone[n] for n in params}, range(4))
    opt.add_param_group({"params": list(late.items())})
    everything = {**params, **late}
    run(opt, everything, range(4, 8)), run(twin, {n: alone[n] for n in params}, range(4, 8))
    for name in params:
        assert torch.equal(params[name], alone[name])
    assert sorted(opt.state[late["tall"]]["step"].tolist()) == [2.0, 4.0]


def test_another_policy_in_the_middle():
    """The state says of itself what it is for: whatever comes next takes along what it can."""
    params = named()
    opt = optimizer(RULES["AdamW"][0], params, BLOCKS["accumulate"])
    run(opt, params, range(8))
    held, values = spread(opt.state[params["tall"]], "exp_avg", params["tall"])
    opt.param_groups[0]["drop"] = None
    give_gradients(params, 100)
    opt.param_groups[0]["lr"] = 0.0
    for p in params.values():
        p.grad.zero_()
    opt.step()
    now_held, now = spread(opt.state[params["tall"]], "exp_avg", params["tall"])
    assert now_held.all()
    torch.testing.assert_close(now, 0.9 * values)
    assert not now[~held].any()
    opt.param_groups[0]["drop"] = GradDrop(0.5)
    with pytest.raises(ValueError, match=r"drop must decide whole layers or blocks with active_state=True"):
        opt.step()


@pytest.mark.parametrize("policy", ["toggle", "accumulate", "GradFreeze", "none"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_another_default_dtype_changes_nothing(dtype, policy):
    params, truth = named(dtype=torch.float32), named(dtype=torch.float32)
    run(optimizer(RULES["AdamW"][0], truth, POLICIES[policy]), truth, range(8))
    torch.set_default_dtype(dtype)
    try:
        run(optimizer(RULES["AdamW"][0], params, POLICIES[policy]), params, range(8))
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(params[name], truth[name]) for name in params)


# Checkpoints and copies


def reloaded(state_dict):
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("how", ["checkpoint", "deepcopy", "pickle"])
def test_going_on_in_the_middle_of_an_epoch_bit_for_bit(how, policy):
    make, drop = RULES["amsgrad"][0], POLICIES[policy]
    params = named()
    opt = optimizer(make, params, drop, backend="cpu")
    run(opt, params, range(5))
    if how == "checkpoint":
        others = {n: nn.Parameter(p.detach().clone()) for n, p in params.items()}
        other = optimizer(make, others, drop, backend="cpu")
        other.load_state_dict(reloaded(opt.state_dict()))
    else:
        go = copy.deepcopy if how == "deepcopy" else pickled
        others, other = go((params, opt))
    same(opt, other, params, others)
    run(opt, params, range(5, 11)), run(other, others, range(5, 11))
    same(opt, other, params, others)


def pickled(value):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def test_a_checkpoint_goes_on_on_another_backend():
    results = []
    for backends in (("cpu", "reference"), ("reference", "cpu")):
        params = named()
        opt = optimizer(RULES["AdamW"][0], params, BLOCKS["accumulate"], backend=backends[0])
        run(opt, params, range(4))
        other = optimizer(RULES["AdamW"][0], params, BLOCKS["accumulate"], backend=backends[1])
        other.load_state_dict(reloaded(opt.state_dict()))
        run(other, params, range(4, 8))
        results.append(params)
    for name, p in results[0].items():
        torch.testing.assert_close(p, results[1][name], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("policy", ["toggle", "GradFreeze", "none"])
def test_a_checkpoint_of_torch_loads_and_shrinks(policy):
    """It has moments of everything. What is active keeps them."""
    params = named()
    theirs = torch.optim.AdamW(params.values(), **ADAMW)
    run(theirs, params, range(4))
    dense = {name: theirs.state[p]["exp_avg"].clone() for name, p in params.items()}
    make, drop = partial(GradDropAdamW, lr=0.0), POLICIES[policy]
    opt = make(by_layers(params), drop=drop, effect="freeze", steps_per_epoch=3, active_state=True)
    saved = reloaded(theirs.state_dict())
    saved["param_groups"] = [
        {**saved["param_groups"][0], "params": list(range(i, min(i + 2, len(params))))}
        for i in range(0, len(params), 2)
    ]
    opt.load_state_dict(saved)
    assert opt.draw == 4
    for p in params.values():
        p.grad = torch.zeros_like(p)
    masks = {name: opt.keep_mask(p).reshape(-1) for name, p in params.items()}
    opt.step()
    for name, p in params.items():
        held, values = spread(opt.state.get(p, {}), "exp_avg", p)
        assert torch.equal(held, masks[name]), name
        torch.testing.assert_close(values[held], 0.9 * dense[name].reshape(-1)[held])


@pytest.mark.parametrize("policy", ["accumulate", "accumulate 128"])
def test_a_checkpoint_without_active_state_loads_with_its_counts_of_blocks(policy):
    """Accumulating blocks that are active stay so: both go on alike."""
    both = []
    for active_state in (False, True):
        params = named()
        options = {"drop": BLOCKS[policy], "effect": "freeze", "seed": 5, "steps_per_epoch": PER_EPOCH}
        opt = GradDropAdamW(params.items(), lr=1e-2, **options)
        run(opt, params, range(5))
        other = GradDropAdamW(params.items(), lr=1e-2, active_state=active_state, **options)
        other.load_state_dict(reloaded(opt.state_dict()))
        run(other, params, range(5, 11))
        both.append(params)
    for name in (name for name in SHAPES if policy.endswith("128") or len(SHAPES[name]) > 1):  # vectors count together
        torch.testing.assert_close(both[0][name], both[1][name], rtol=1e-12, atol=1e-12)


def test_a_layer_policys_checkpoint_loads_into_torch():
    """Of active layers it is torch's own."""
    params = named()
    opt = optimizer(RULES["AdamW"][0], params, GradFreeze())
    run(opt, params, range(4))
    theirs = torch.optim.AdamW([{"params": [p for _, p in group["params"]]} for group in by_layers(params)])
    theirs.load_state_dict(reloaded(opt.state_dict()))
    assert theirs.state.keys() == opt.state.keys() and theirs.state
    run(theirs, params, range(4, 6))


def damaged(change):
    params = named()
    opt = optimizer(RULES["AdamW"][0], params, BLOCKS["accumulate"])
    run(opt, params, range(5))
    saved = reloaded(opt.state_dict())
    change(saved["state"][list(params).index("tall")])
    return params, opt, saved


def edit(name, value):
    return lambda entry: entry.__setitem__(name, value(entry[name]) if callable(value) else value)


@pytest.mark.parametrize(
    "change, message",
    {
        "a float table": (edit("active", lambda t: t.float()), "active of parameter 8 must be an int64 tensor"),
        "two columns": (edit("active", lambda t: t[:, :2]), "active of parameter 8 must be an int64 tensor"),
        "a list": (edit("active", [1]), "active of parameter 8 must be an int64 tensor"),
        "beyond the end": (edit("active", lambda t: t + 1000 * (t > 0)), "within its parameter's 992 elements"),
        "negative": (edit("active", lambda t: t - 1000), "within its parameter's 992 elements"),
        "descending": (edit("active", lambda t: t.flip(0)), "must have ascending runs"),
        "overlapping": (edit("active", lambda t: t.clone().fill_(1)), "must have ascending runs"),
        "no such count": (edit("active", lambda t: t + torch.tensor([0, 0, 5])), "refer to the 2 counts"),
        "a scalar step": (edit("step", torch.tensor(3.0)), "step of parameter 8 must be a 1-D"),
        "half a step": (edit("step", lambda t: t + 0.5), "step of parameter 8 must be a whole number"),
        "NaN for a step": (edit("step", lambda t: t * float("nan")), "step of parameter 8 must be a whole number"),
        "too few moments": (edit("exp_avg", lambda t: t[1:]), "exp_avg of parameter 8 must be a dense floating-point"),
        "integer moments": (edit("exp_avg", lambda t: t.long()), "exp_avg of parameter 8 must be a dense"),
        "no moments": (lambda entry: entry.pop("exp_avg"), "lacks entry 'exp_avg'"),
        "one more": (lambda entry: entry.update(other=1), "has an extra entry 'other'"),
    }.values(),
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_damaged_checkpoint_is_refused(change, message):
    params, opt, saved = damaged(change)
    before = reloaded(opt.state_dict())
    with pytest.raises((TypeError, ValueError), match=message.replace("(", r"\(")):
        opt.load_state_dict(saved)
    after = opt.state_dict()
    for index, entry in before["state"].items():
        assert all(torch.equal(entry[key], after["state"][index][key]) for key in entry)


def test_compact_state_needs_active_state():
    params, opt, saved = damaged(lambda entry: None)
    other = GradDropAdamW(params.items(), drop=BLOCKS["accumulate"], effect="freeze", steps_per_epoch=PER_EPOCH)
    with pytest.raises(ValueError, match="construct this one with active_state=True, got False"):
        other.load_state_dict(saved)
    assert not other.state and other.draw == 0


def test_the_checkpoints_policy_is_checked():
    params = named()
    plain = GradDropAdamW(params.items(), drop=GradDrop(0.5))
    opt = optimizer(RULES["AdamW"][0], params, BLOCKS["toggle"])
    with pytest.raises(ValueError, match="with active_state=True"):
        opt.load_state_dict(plain.state_dict())
    assert opt.param_groups[0]["drop"] == BLOCKS["toggle"]


# What is refused

REFUSED = {
    "gradient": (GradDropEpoch(0.5, block=128), {"effect": "gradient"}, "effect must be 'freeze' .*got 'gradient'"),
    "update": (GradDropEpoch(0.5, block=128), {"effect": "update"}, "effect must be 'freeze' .*got 'update'"),
    "the policy's default": (LayerGradDrop(0.5, per="epoch"), {"effect": None}, "effect must be 'freeze'"),
    "elements": (GradDropEpoch(0.5), {}, r"drop must decide whole layers or blocks .*GradDropEpoch\(p=0.5"),
    "drawn elements": (GradDrop(0.5), {}, "drop must decide whole layers or blocks"),
    "static": (StaticMask([torch.ones(4, 4, dtype=torch.bool)]), {}, "drop must decide whole layers or blocks"),
    "every step": (GradDrop(0.5, block=128), {}, "drop must have masks that hold"),
    "layers every step": (LayerGradDrop(0.5), {}, "drop must have masks that hold"),
    "annealed by steps": (
        LayerGradDrop(anneal=LinearAnneal(0.9, total_steps=9), per="epoch"),
        {},
        "drop must have masks that hold",
    ),
    "capturable": (GradDropEpoch(0.5, block=128), {"capturable": True}, "capturable must be False .*got True"),
    "capturable without a policy": (None, {"capturable": True}, "capturable must be False .*got True"),
}


@pytest.mark.parametrize("drop, options, message", REFUSED.values(), ids=REFUSED)
def test_refused_when_made_and_when_a_group_is_added(drop, options, message):
    options = {"effect": "freeze", **options}
    groups = [{"params": [nn.Parameter(torch.zeros(4, 4))], "drop": drop}, {"params": [nn.Parameter(torch.zeros(3))]}]
    for make in (GradDropAdamW, GradDropSGD, GradDropLion):
        with pytest.raises(ValueError, match=f"{message}.*" if "with" in message else message) as caught:
            make(groups[:1] if drop is None or not drop.layerwise else groups, active_state=True, **options)
        assert "active_state=True" in str(caught.value)
    opt = GradDropAdamW(groups[1]["params"], active_state=True)
    if "capturable" not in options:
        with pytest.raises(ValueError, match=message):
            opt.add_param_group({**groups[0], **options})
        assert len(opt.param_groups) == 1


@pytest.mark.parametrize("value", [1, None, "yes"])
def test_active_state_is_true_or_false(value):
    with pytest.raises(TypeError, match=f"active_state must be True or False, got {value!r}"):
        GradDropAdamW([nn.Parameter(torch.zeros(3))], active_state=value)


def test_state_that_was_replaced_is_looked_at_again():
    params = named()
    opt = optimizer(RULES["AdamW"][0], params, BLOCKS["toggle"])
    run(opt, params, range(2))
    p = params["tall"]
    opt.state[p]["exp_avg"] = torch.zeros(5, dtype=torch.float64)
    before = p.detach().clone()
    give_gradients(params, 3)
    with pytest.raises(ValueError, match="state 'exp_avg' of parameter 'tall' must be a dense floating-point tensor"):
        opt.step()
    assert torch.equal(p, before)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("how", ["strided", "lazy sign"])
def test_state_put_in_by_hand_that_is_not_packed_close(how, backend):
    params, truth = named(), named()
    memory = None
    for ps in (params, truth):
        opt = optimizer(RULES["AdamW"][0], ps, BLOCKS["toggle"], backend=backend)
        run(opt, ps, range(2))
        entry = opt.state[ps["tall"]]
        if ps is params:
            old = entry["exp_avg"]
            memory = torch.stack([old, torch.ones_like(old), torch.ones_like(old)], 1)
            entry["exp_avg"] = memory[:, 0] if how == "strided" else torch._neg_view(-old)
        run(opt, ps, range(2, 2 * PER_EPOCH))
    for name in params:
        assert torch.equal(params[name], truth[name])
    assert (memory[:, 1:] == 1).all()  # what lies between belongs to others


def test_state_whose_storage_is_gone():
    params = named()
    opt = optimizer(RULES["AdamW"][0], params, BLOCKS["toggle"])
    run(opt, params, range(2))
    opt.state[params["tall"]]["exp_avg"].untyped_storage().resize_(0)
    with pytest.raises(ValueError, match="state 'exp_avg' of parameter 'tall' must have memory"):
        opt.step()


@pytest.mark.parametrize("as_dtensor", [False, True])
@pytest.mark.parametrize("name", ["step", "active", "exp_avg"])
def test_a_checkpoint_whose_storage_is_gone(name, as_dtensor):
    params = named()
    opt = optimizer(RULES["AdamW"][0], params, BLOCKS["toggle"])
    run(opt, params, range(2))
    saved = copy.deepcopy(opt.state_dict())
    if as_dtensor:  # as a DTensor's state is saved
        like = partial(torch.ones_like, next(iter(params.values())))
        moments = {"exp_avg": like(), "exp_avg_sq": like()}
        saved["state"][0] = {"step": torch.tensor(2.0), "active": like(dtype=torch.int32), **moments}
    saved["state"][0][name].untyped_storage().resize_(0)
    with pytest.raises(ValueError, match=f"the checkpoint's {name} of parameter 0 must have memory"):
        opt.load_state_dict(saved)


# Memory


def state_bytes(opt):
    return sum(t.untyped_storage().nbytes() for entry in opt.state.values() for t in entry.values())


@pytest.mark.parametrize("policy", [*BLOCKS, *LAYERS])
def test_state_is_as_large_as_what_is_active(policy):
    params = {f"w{i}": nn.Parameter(torch.zeros(64, 64)) for i in range(8)}
    opt = optimizer(RULES["AdamW"][0], params, POLICIES[policy])
    for step in range(PER_EPOCH * EPOCHS):
        active = sum(int(opt.keep_mask(p).sum()) for p in params.values())
        give_gradients(params, step)
        opt.step()
        moments = sum(entry[k].nbytes for entry in opt.state.values() for k in ("exp_avg", "exp_avg_sq"))
        assert moments == 8 * active
        tables = 8 * 64 * 24 + 8 * 8 * 4 * EPOCHS  # a run for each row, and all step counts in one buffer
        assert state_bytes(opt) <= 8 * active + tables


def test_while_the_epoch_changes_old_and_new_state_never_stand_side_by_side(monkeypatch):
    """One parameter's at a time do."""
    from graddrop_fused import compact

    params = {f"w{i}": nn.Parameter(torch.zeros(64, 64)) for i in range(8)}
    opt = optimizer(RULES["AdamW"][0], params, BLOCKS["toggle"])
    alive, peak, made = weakref.WeakSet(), 0, torch.zeros

    def watched(*args, **kwargs):
        nonlocal peak
        tensor = made(*args, **kwargs)
        if kwargs.get("dtype") is torch.float32 and "device" in kwargs and tensor.numel() > 64:
            alive.add(tensor)
            peak = max(peak, sum(t.nbytes for t in alive))
        return tensor

    monkeypatch.setattr(compact.torch, "zeros", watched)
    for step in range(PER_EPOCH * 3):
        give_gradients(params, step)
        opt.step()
    usual = sum(8 * int(opt.keep_mask(p).sum()) for p in params.values())
    assert usual / 2 < peak < 1.5 * usual


# Together with what else saves memory


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(23, 17)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(17, 33), nn.ReLU(), nn.Linear(33, 17)) for _ in range(3))
        self.head = nn.Linear(17, 23)

    def forward(self, tokens):
        x = self.embedding(tokens)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


def net():
    torch.manual_seed(0)
    model = Net()
    layers = [model.embedding, *model.blocks, model.head]
    groups = [
        {"params": [(f"{i}.{n}", p) for n, p in layer.named_parameters()], "layer": str(i)}
        for i, layer in enumerate(layers)
    ]
    return model, groups


def train(model, opt, steps):
    for step in steps:
        tokens = torch.randint(0, 23, (4, 7), generator=torch.Generator().manual_seed(step))
        nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()).backward()
        opt.step()
        opt.zero_grad()


@pytest.mark.parametrize(
    "policy", ["toggle", "accumulate", "replacement", "GradFreeze", "LayerGradDrop", "held layers"]
)
@pytest.mark.parametrize("helps", ["released", "skipped", "released and skipped"])
def test_with_released_gradients_and_skipped_layers(helps, policy):
    """The same bits, and as little state; with rows skipped, the same up to the rounding of a product."""
    drop, runs = POLICIES[policy], []
    for helped in (False, True):
        model, groups = net()
        opt = GradDropAdamW(
            groups, lr=1e-2, drop=drop, effect="freeze", seed=3, steps_per_epoch=PER_EPOCH, active_state=True
        )
        with contextlib.ExitStack() as stack:
            if helped and "skipped" in helps:
                stack.enter_context((skip_dropped_layers if drop.layerwise else skip_dropped_rows)(model, opt))
            if helped and "released" in helps:
                stack.enter_context(release_gradients(model, opt))
            train(model, opt, range(PER_EPOCH * 4))
        runs.append((dict(model.named_parameters()), {n: opt.state.get(p, {}) for n, p in model.named_parameters()}))
    (one, states), (other, other_states) = runs
    exact = drop.layerwise or "skipped" not in helps
    for name, p in one.items():
        assert states[name].keys() == other_states[name].keys()
        for a, b in [(p, other[name]), *((states[name][k], other_states[name][k]) for k in states[name])]:
            assert torch.equal(a, b) if exact else torch.allclose(a, b, rtol=1e-3, atol=1e-5), name


@pytest.mark.parametrize("released", [False, True])
def test_layers_that_freeze_lose_their_state_even_without_gradients(released):
    model, groups = net()
    opt = GradDropAdamW(
        groups, lr=1e-2, drop=LayerGradDrop(0.5, per="epoch"), effect="freeze", seed=3, steps_per_epoch=2,
        active_state=True,
    )  # fmt: skip
    with contextlib.ExitStack() as stack:
        if released:
            stack.enter_context(release_gradients(model, opt))
        stack.enter_context(skip_dropped_layers(model, opt))
        seen = set()
        for epoch in range(6):
            active = {p for p in model.parameters()} - set(opt.dropped_layers())
            train(model, opt, range(2 * epoch, 2 * epoch + 2))
            assert set(opt.state) == active
            seen.add(frozenset(map(id, active)))
    assert len(seen) > 2


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_a_table_of_runs_of_the_parameter_s_own_shape_is_loaded(rows):
    def made(seed):
        model = nn.Linear(3, rows)
        drop = GradDropEpoch(0.5, block="row")
        options = {"steps_per_epoch": 2, "active_state": True, "effect": "freeze"}
        return model, GradDropAdamW(model.named_parameters(), drop=drop, seed=seed, **options)

    seen = set()
    for seed in range(12):
        model, optimizer = made(seed)
        for _ in range(3):
            model(torch.ones(1, 3)).sum().backward()
            optimizer.step()
        saved = optimizer.state_dict()
        seen.update(entry["active"].shape for entry in saved["state"].values() if "active" in entry)
        other_model, other = made(0)
        other.load_state_dict(saved)
        for p, q in zip(model.parameters(), other_model.parameters(), strict=True):
            for name, value in optimizer.state.get(p, {}).items():
                assert torch.equal(other.state[q][name], value)
    assert (rows, 3) in seen


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_what_a_step_leaves_alone_keeps_its_version(backend):
    params = {name: nn.Parameter(torch.ones(5, 7)) for name in "ab"}
    drop = GradDropEpoch(0.5, block="row", replacement=True)
    options = {"active_state": True, "effect": "freeze", "steps_per_epoch": 9, "seed": 3}
    optimizer = GradDropAdamW(params.items(), drop=drop, backend=backend, **options)
    for step in range(3):
        params["a"].grad = torch.ones(5, 7)
        params["b"].grad = None if step else torch.ones(5, 7)
        tensors = {n: [p, *(t for k, t in optimizer.state.get(p, {}).items() if "exp" in k)] for n, p in params.items()}
        versions = {name: [t._version for t in of] for name, of in tensors.items()}
        optimizer.step()
        if step:
            assert [t._version for t in tensors["b"]] == versions["b"]
            assert all(new > old for new, old in zip([t._version for t in tensors["a"]], versions["a"], strict=True))
