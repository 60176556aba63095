"""rounding="stochastic": the bits against Python integers, chances against statistics, and what users rely on."""

import copy
import math
import struct

import independent
import pytest
import ranks
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from graddrop_fused import (
    GradDrop,
    GradDropAdamW,
    GradDropEpoch,
    GradDropLion,
    GradDropSGD,
    LayerGradDrop,
    dispatch,
    release_gradients,
)
from graddrop_fused.mask_stream import Purpose, element_random, round_stochastically

BF16, F32 = torch.bfloat16, torch.float32
SEED = 0xFEDCBA9876543210
BACKENDS = [
    pytest.param(name, marks=pytest.mark.skipif(reason is not None, reason=str(reason)))
    for name in ("reference", "cpu", "triton")
    for reason in [dispatch.load(name).unavailable(torch.device("cpu"))]
]
on_every_backend = pytest.mark.parametrize("backend", BACKENDS)


def rounded(x: float, random: int) -> float:
    """A second implementation, for float32 numbers x in Python integers."""
    bits = struct.unpack("<I", struct.pack("<f", x))[0]
    return struct.unpack("<f", struct.pack("<I", (bits + random) // 2**16 * 2**16))[0]


def exact(n: int, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A bfloat16 parameter of multiples of 2**-6 and a float32 gradient of multiples of 2**-16, both below 1: sums of a
    few of them are exact in float32, so that arithmetic is the same on every backend."""
    draw = torch.Generator().manual_seed(step)
    param = torch.randint(-63, 64, (n,), generator=draw) / 2**6
    grad = torch.randint(-(2**16), 2**16, (n,), generator=draw) / 2**16
    return param.to(BF16), grad


def as_bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().view(torch.int16)


# The bits


@on_every_backend
@pytest.mark.parametrize("drop", [None, GradDrop(0.5, rescale=False), LayerGradDrop(0.5, hold=3)], ids=str)
def test_bits_are_the_mask_streams(backend, drop):
    """Draw and stream id are the step's and the parameter's own, whatever the policy draws or if there is none."""
    params = [(f"layer.{k}", torch.nn.Parameter(exact(n, k)[0])) for k, n in enumerate((1000, 257))]
    groups = [{"params": [named]} for named in params]
    opt = GradDropSGD(groups, lr=1.0, momentum=0.5, drop=drop, seed=SEED, rounding="stochastic", backend=backend)
    for step in (1, 2, 3):
        expected = []
        for name, p in params:
            opt.state.pop(p, None)  # a momentum of more bits would no longer be exact
            p.data.copy_(exact(len(p), 7 * step)[0])
            p.grad = exact(len(p), step)[1].to(BF16)
            kept = opt.keep_mask(p).tolist()
            at = {"seed": SEED, "draw": step, "stream_id": independent.name_id(name)}
            for e, (old, g) in enumerate(zip(p.tolist(), p.grad.tolist(), strict=True)):
                g = g if kept[e] else 0.0
                r = [independent.element_random(e, **at, purpose=purpose) for purpose in (4, 5)]
                expected.append((rounded(old - g, r[0]), rounded(g, r[1])))
        opt.step()
        found = [
            pair for _, p in params for pair in zip(p.tolist(), opt.state[p]["momentum_buffer"].tolist(), strict=True)
        ]
        assert found == expected


@on_every_backend
def test_each_state_has_numbers_of_its_own(backend):
    """AdamW's moments from zero, with factors of powers of two: exp_avg = g / 2, exp_avg_sq = g**2 / 4."""
    n = 500
    p = torch.nn.Parameter(torch.zeros(n, dtype=BF16))
    opt = GradDropAdamW(
        [("w", p)], lr=0.0, betas=(0.5, 0.75), amsgrad=True, seed=SEED, rounding="stochastic", backend=backend
    )
    p.grad = torch.randint(-(2**7), 2**7, (n,), generator=torch.Generator().manual_seed(1)).to(BF16) / 2**6
    opt.step()
    at = {"seed": SEED, "draw": 1, "stream_id": independent.name_id("w")}
    for name, purpose in (("exp_avg", 5), ("exp_avg_sq", 6), ("max_exp_avg_sq", 7)):
        for e, (g, found) in enumerate(zip(p.grad.tolist(), opt.state[p][name].tolist(), strict=True)):
            value = g / 2 if name == "exp_avg" else g * g / 4
            assert found == rounded(value, independent.element_random(e, **at, purpose=purpose))


@on_every_backend
def test_float32_state_stays_float32(backend):
    """A sum of gradients that bfloat16 could not hold."""
    p = torch.nn.Parameter(torch.zeros(300, dtype=BF16))
    options = {"state_dtype": F32, "rounding": "stochastic", "backend": backend}
    opt = GradDropSGD([("w", p)], lr=0.25, momentum=1.0, **options)
    for grad in (1.0, 2.0**-12, 2.0**-12, 2.0**-12):
        p.grad = torch.full_like(p, grad)
        opt.step()
    assert opt.state[p]["momentum_buffer"].dtype == F32
    assert torch.equal(opt.state[p]["momentum_buffer"], torch.full((300,), 1 + 3 * 2.0**-12))
    assert p.unique().numel() > 1


def test_borders_of_bfloat16():
    """Carries, overflow, zeros of both signs, subnormal numbers, infinities and NaN of any payload."""
    words = [0x3F7FFFFF, 0x3FFFFFFF, 0x7F7F0000, 0x7F7F0001, 0x7F7FFFFF, 0, 1, 0x7FFF, 0x8000, 0x007FFFFF, 0x00800001]
    words += [word | 0x80000000 for word in words]
    for random in (0, 1, 0x7FFF, 0x8000, 0xFFFF):
        values = torch.tensor([struct.unpack("<f", struct.pack("<I", word))[0] for word in words])
        expected = [(word + random) >> 16 for word in words]
        found = round_stochastically(values, torch.full_like(values, random, dtype=torch.int64))
        assert [word & 0xFFFF for word in as_bits(found).tolist()] == expected
        special = torch.tensor([0x7F800000, -0x800000, 0x7F800001, 0x7FFFFFFF, -1, -0x7FFFFF], dtype=torch.int32)
        special = special.view(F32)
        found = round_stochastically(special, torch.full((6,), random))
        assert torch.equal(found.isnan(), special.isnan())
        assert found[:2].tolist() == [math.inf, -math.inf]


@on_every_backend
def test_what_bfloat16_holds_is_left_as_it_is(backend):
    """Every bfloat16 number but NaN and the subnormal ones, which kernels may flush: no step, no change."""
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(BF16)
    every = every[~every.isnan() & ((every == 0) | (every.abs() >= torch.finfo(BF16).tiny))]
    p = torch.nn.Parameter(every.clone())
    opt = GradDropLion([p], lr=0.0, rounding="stochastic", backend=backend)
    p.grad = torch.zeros_like(p)
    opt.step()
    finite = every.isfinite()  # minus zero steps of an infinity are NaN
    assert torch.equal(as_bits(p)[finite], as_bits(every)[finite])


# Chances


def test_rounding_is_right_on_average():
    """Between two neighbours, the upper one with the share that a value lies above the lower."""
    n = 200_000
    for value in (1 + 2.0**-20, 1 + 2.0**-8, -3.0 - 2.0**-7, 1.99999, 2.0**-100 * 1.0001, 65535.0):
        x = torch.full((n,), value)
        random = element_random(torch.arange(n), seed=3, draw=5, stream_id=7, purpose=Purpose.ROUND_PARAM)
        found = round_stochastically(x, random).double()
        truth = float(x[0])
        low, high = found.min().item(), found.max().item()
        unit = 2.0 ** (math.frexp(truth)[1] - 8)
        assert low <= truth <= high and high - low <= unit
        share = abs(truth) / unit % 1
        deviation = unit * math.sqrt(share * (1 - share) / n)
        assert abs(found.mean().item() - truth) <= 5 * deviation + unit * 2.0**-16


@on_every_backend
def test_a_training_that_stands_still_to_nearest_moves(backend):
    """Steps of a fiftieth of a unit in the last place: to nearest nothing ever happens."""
    n, steps, lr = 4096, 40, 2.0**-13
    moved = {}
    for rounding in ("nearest", "stochastic")[backend == "triton" :]:  # whose interpreter truncates in place of nearest
        p = torch.nn.Parameter(torch.full((n,), 1.5, dtype=BF16))
        opt = GradDropSGD([("w", p)], lr=lr, rounding=rounding, backend=backend)
        for _ in range(steps):
            p.grad = torch.ones_like(p)
            opt.step()
        moved[rounding] = 1.5 - p.detach().double()
    assert backend == "triton" or not moved["nearest"].any()
    unit = 2.0**-7
    deviation = unit * math.sqrt(steps * (lr / unit) * (1 - lr / unit) / n)
    assert abs(moved["stochastic"].mean() - steps * lr) < 5 * deviation
    assert moved["stochastic"].std() > 0.5 * deviation * math.sqrt(n)  # elements, and steps, have chances of their own


# What users rely on


def parameters(n=3):
    draw = torch.Generator().manual_seed(5)
    return {f"layer.{k}.w": torch.nn.Parameter(torch.randn(40, 33, generator=draw).to(BF16)) for k in range(n)}


def train(opt, params, steps):
    for step in steps:
        for k, p in enumerate(params.values()):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(100 * step + k)).to(p.dtype)
        opt.step()


def assert_same(params, opt, others, other_opt):
    for p, q in zip(params.values(), others.values(), strict=True):
        assert torch.equal(as_bits(p), as_bits(q))
        for name in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(as_bits(opt.state[p][name]), as_bits(other_opt.state[q][name]))


POLICIES = [None, GradDrop(0.5), GradDropEpoch(0.6, toggle=True), GradDrop(0.5, block=128), LayerGradDrop(0.5)]


@pytest.mark.parametrize("drop", POLICIES, ids=str)
def test_resumed_training_goes_on_bit_for_bit(drop):
    """The checkpoint's rounding wins over the constructor's."""
    options = {"lr": 1e-3, "drop": drop, "steps_per_epoch": 2, "effect": "freeze" if drop else None}
    whole, begun, resumed = parameters(), parameters(), parameters()
    opts = [
        GradDropAdamW([{"params": [named]} for named in params.items()], rounding="stochastic", seed=9, **options)
        for params in (whole, begun)
    ]
    train(opts[0], whole, range(6))
    train(opts[1], begun, range(3))
    saved = copy.deepcopy(opts[1].state_dict())
    for name, p in resumed.items():
        p.data.copy_(begun[name])
    opt = GradDropAdamW([{"params": [named]} for named in resumed.items()], **options)
    opt.load_state_dict(saved)
    assert {group["rounding"] for group in opt.param_groups} == {"stochastic"}
    train(opt, resumed, range(3, 6))
    assert_same(whole, opts[0], resumed, opt)


@pytest.mark.parametrize("drop", POLICIES, ids=str)
def test_capturable_gives_the_same_bits(drop):
    runs = []
    for capturable in (False, True):
        params = parameters()
        groups = [{"params": [named]} for named in params.items()]
        opt = GradDropAdamW(groups, lr=1e-3, drop=drop, steps_per_epoch=2, capturable=capturable, rounding="stochastic")
        train(opt, params, range(5))
        runs += [params, opt]
    assert_same(*runs)


def test_gradients_released_in_backward_give_the_same_bits():
    def model():
        torch.manual_seed(2)
        return torch.nn.Sequential(torch.nn.Linear(20, 30), torch.nn.Tanh(), torch.nn.Linear(30, 4)).to(BF16)

    runs = []
    for released in (False, True):
        net = model()
        opt = GradDropAdamW(net.named_parameters(), lr=1e-3, drop=GradDrop(0.3), rounding="stochastic")
        if released:
            release_gradients(net, opt)
        for step in range(4):
            x = torch.randn(8, 20, generator=torch.Generator().manual_seed(step)).to(BF16)
            net(x).square().sum().backward()
            opt.step()
            opt.zero_grad()
        runs += [dict(net.named_parameters()), opt]
    assert_same(*runs)


def test_groups_round_each_in_its_own_way():
    params = parameters(2)
    names = list(params)
    both, alone = copy.deepcopy(params), {names[0]: copy.deepcopy(params[names[0]])}
    opt = GradDropAdamW(
        [{"params": [(names[0], both[names[0]])], "rounding": "stochastic"}, {"params": [(names[1], both[names[1]])]}],
        lr=1e-3,
    )
    single = GradDropAdamW(alone.items(), lr=1e-3, rounding="stochastic")
    nearest = GradDropAdamW({names[1]: params[names[1]]}.items(), lr=1e-3)
    train(opt, both, range(3))
    train(single, alone, range(3))
    for step in range(3):
        params[names[1]].grad = torch.randn(40, 33, generator=torch.Generator().manual_seed(100 * step + 1)).to(BF16)
        nearest.step()
    assert torch.equal(as_bits(both[names[0]]), as_bits(alone[names[0]]))
    assert torch.equal(as_bits(both[names[1]]), as_bits(params[names[1]]))


def test_two_ranks_round_as_one(tmp_path):
    truth = str(tmp_path / "truth.pt")
    ranks.run(one_rank, 1, truth)
    ranks.run(one_rank, 2, truth)


def one_rank(rank, world, truth):
    net = torch.nn.Linear(33, 21).to(BF16)
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.linspace(-1, 1, p.numel()).reshape(p.shape))
    if world > 1:
        fully_shard(net, mesh=init_device_mesh("cpu", (world,)))
    opt = GradDropAdamW(net.named_parameters(), lr=1e-3, drop=GradDrop(0.5), rounding="stochastic", seed=3)
    for step in range(4):
        for p in net.parameters():
            whole = torch.cos(torch.arange(p.numel()) * (step + 1.0)).reshape(p.shape).to(BF16)
            p.grad = whole
            if world > 1:
                from torch.distributed.tensor import distribute_tensor

                p.grad = distribute_tensor(whole, p.device_mesh, p.placements)
        opt.step()
    found = {name: p.detach().full_tensor() if world > 1 else p.detach() for name, p in net.named_parameters()}
    if world == 1:
        torch.save(found, truth)
    for name, p in torch.load(truth).items():
        assert torch.equal(as_bits(found[name]), as_bits(p)), name


# What is refused


@pytest.mark.parametrize("dtype", [F32, torch.float16, torch.float64], ids=str)
def test_other_dtypes_are_refused_before_anything_changes(dtype):
    good, bad = torch.nn.Parameter(torch.ones(3, dtype=BF16)), torch.nn.Parameter(torch.ones(3, dtype=dtype))
    with pytest.raises(ValueError, match=f"rounding must be 'nearest' for parameter 'bad', got 'stochastic'.*{dtype}"):
        GradDropAdamW([("good", good), ("bad", bad)], rounding="stochastic")
    opt = GradDropAdamW([("good", good)], rounding="stochastic")
    with pytest.raises(ValueError, match="rounding must be 'nearest' for parameter 'bad'"):
        opt.add_param_group({"params": [("bad", bad)]})
    assert len(opt.param_groups) == 1
    opt.add_param_group({"params": [("bad", bad)], "rounding": "nearest"})
    for p in (good, bad):
        p.grad = torch.ones_like(p)
    opt.step()
    good.data = good.data.to(F32)
    good.grad = torch.ones(3)
    before = good.detach().clone()
    with pytest.raises(ValueError, match="rounding must be 'nearest' for parameter 'good'"):
        opt.step()
    assert torch.equal(good, before) and opt.draw == 1


def test_checkpoints_of_other_dtypes_are_refused():
    opt = GradDropAdamW([("w", torch.nn.Parameter(torch.ones(3, dtype=BF16)))], rounding="stochastic")
    other = GradDropAdamW([("w", torch.nn.Parameter(torch.ones(3)))], seed=4)
    with pytest.raises(ValueError, match="rounding must be 'nearest' for parameter 'w'"):
        other.load_state_dict(opt.state_dict())
    assert other.seed == 4 and other.param_groups[0]["rounding"] == "nearest"


@pytest.mark.parametrize("value", ["up", "Stochastic", True, None, 1], ids=str)
def test_what_is_no_rounding_is_refused(value):
    with pytest.raises(ValueError, match="rounding must be 'nearest' or 'stochastic', got"):
        GradDropAdamW([torch.nn.Parameter(torch.ones(3, dtype=BF16))], rounding=value)


def test_a_checkpoint_of_torch_keeps_the_constructors_choice():
    p = torch.nn.Parameter(torch.ones(3, dtype=BF16))
    p.grad = torch.ones_like(p)
    theirs = torch.optim.AdamW([p])
    theirs.step()
    ours = GradDropAdamW([p], rounding="stochastic")
    ours.load_state_dict(theirs.state_dict())
    ours.step()
    assert ours.param_groups[0]["rounding"] == "stochastic" and ours.draw == 2
