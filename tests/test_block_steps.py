"""Frozen means frozen, of blocks: under effect "freeze" a masked parameter is torch's optimizer on the parameter split
into its blocks, each a parameter of its own that has a gradient where its block is kept."""

import copy
import io
import math

import pytest
import ranks
import torch
from sides import BACKENDS, INTERPRETED, backends
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from graddrop_fused import (
    GradDrop,
    GradDropAdamW,
    GradDropEpoch,
    GradDropLion,
    GradDropSGD,
    LinearAnneal,
    skip_dropped_rows,
)
from graddrop_fused.block_steps import NAME
from graddrop_fused.release import release_gradients

SHAPES = {"flat": (2500,), "matrix": (5, 300), "wide": (3, 130), "deep": (7, 3, 11), "short": (100,), "empty": (0, 4)}
DROPS = {
    "blocks": GradDrop(0.6, block=128, rescale=False),
    "rows": GradDrop(0.6, block="row", rescale=False),
    "annealed": GradDrop(anneal=LinearAnneal(0.9, total_steps=8), block=256, rescale=False),
    "held": GradDrop(0.5, block="row", rescale=False, hold=3),
    "accumulated": GradDropEpoch(0.7, block=128, rescale=False),
    "toggled": GradDropEpoch(0.6, toggle=True, block="row", rescale=False),
    "all": GradDrop(0.0, block=128),
}
RULES = {
    "adamw": (GradDropAdamW, torch.optim.AdamW, {"lr": 1e-2, "weight_decay": 0.1}),
    "amsgrad": (GradDropAdamW, torch.optim.AdamW, {"lr": 1e-2, "amsgrad": True}),
    "damped": (GradDropSGD, torch.optim.SGD, {"lr": 1e-2, "momentum": 0.9, "dampening": 0.5}),
    "momentum": (GradDropSGD, torch.optim.SGD, {"lr": 1e-2, "momentum": 0.9}),
}
STEPS = 14


def shapes(drop):
    # of a vector block="row" decides elements, which hold no count
    return {name: shape for name, shape in SHAPES.items() if drop.block != "row" or len(shape) > 1}


def values(shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gradient(name, step):
    return values(SHAPES[name], 1000 * step + len(name))


class Split:
    """torch's optimizer on blocks."""

    def __init__(self, cls, options, drop, dtype):
        self.blocks = {}
        for name, shape in shapes(drop).items():
            size = max(1, math.prod(shape[1:])) if drop.block == "row" else drop.block
            start = values(shape, len(name)).to(dtype)
            self.blocks[name] = [nn.Parameter(part.clone()) for part in start.reshape(-1).split(size)]
        self.opt = cls([block for blocks in self.blocks.values() for block in blocks], **options)

    def step(self, masks, grads):
        for name, blocks in self.blocks.items():
            sizes = [len(block) for block in blocks]
            parts = zip(masks[name].reshape(-1).split(sizes), grads[name].reshape(-1).split(sizes), strict=True)
            for block, (mask, grad) in zip(blocks, parts, strict=True):
                assert mask.all() or not mask.any()
                block.grad = grad.clone() if mask.any() else None
        self.opt.step()

    def whole(self, name):
        return torch.cat([block.detach() for block in self.blocks[name]]).reshape(SHAPES[name])

    def counts(self, name):
        return [int(self.opt.state[block].get("step", 0)) for block in self.blocks[name]]


def ours(cls, options, drop, dtype=torch.float64, **more):
    params = {name: nn.Parameter(values(shape, len(name)).to(dtype)) for name, shape in shapes(drop).items()}
    epochs = {"steps_per_epoch": 3} if drop.needs_epoch else {}
    return params, cls(params.items(), drop=drop, effect="freeze", seed=7, **options, **epochs, **more)


def follow(params, opt, steps, truth=None):
    for step in steps:
        grads = {name: gradient(name, step).to(p.dtype) for name, p in params.items()}
        if step % 5 == 3:
            grads["matrix"] = None  # no step for it
        masks = {name: opt.keep_mask(p) for name, p in params.items()}
        for name, p in params.items():
            p.grad = grads[name]
        opt.step()
        if truth is not None:
            present = {name: torch.zeros_like(p) if grads[name] is None else grads[name] for name, p in params.items()}
            kept = {name: mask & (grads[name] is not None) for name, mask in masks.items()}
            truth.step(kept, present)


def counts(params, opt):
    return {name: opt.state[p][NAME].tolist() for name, p in params.items() if p.numel()}


def assert_equal(params, opt, truth):
    for name, p in params.items():
        tolerance = {torch.float64: 1e-12, torch.float32: 2e-6}[p.dtype]
        torch.testing.assert_close(p.detach(), truth.whole(name), rtol=tolerance, atol=tolerance)
        if isinstance(truth.opt, torch.optim.AdamW) and p.numel():
            assert opt.state[p][NAME].tolist() == truth.counts(name)


@pytest.mark.parametrize("capturable", [False, True], ids=["eager", "capturable"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("drop", DROPS)
@pytest.mark.parametrize("rule", RULES)
def test_a_masked_parameter_is_its_blocks(rule, drop, backend, capturable):
    if backend not in backends():
        pytest.skip(f"the backend {backend} does not run here")
    cls, theirs, options = RULES[rule]
    dtypes = [torch.float32] if backend == "triton" else [torch.float64, torch.float32]
    for dtype in dtypes:
        truth = Split(theirs, options, DROPS[drop], dtype)
        params, opt = ours(cls, options, DROPS[drop], dtype, backend=backend, capturable=capturable)
        follow(params, opt, range(5 if INTERPRETED else STEPS), truth)
        assert_equal(params, opt, truth)


@pytest.mark.skipif(INTERPRETED, reason="of the host, whatever the backend")
class TestStates:
    def test_only_who_must_count_has_counts(self):
        params, opt = ours(GradDropAdamW, {}, DROPS["rows"])
        vector = nn.Parameter(torch.zeros(300))
        opt.add_param_group({"params": [("vector", vector)]})
        vector.grad = torch.ones(300)
        follow(params, opt, range(1))
        assert NAME not in opt.state[vector]
        assert len(opt.state[params["deep"]][NAME]) == 7
        for cls, options in ((GradDropLion, {}), (GradDropSGD, {"momentum": 0.9})):
            params, opt = ours(cls, options, DROPS["blocks"])
            follow(params, opt, range(1))
            assert all(NAME not in entry for entry in opt.state.values())
        for effect in ("gradient", "update"):
            params, opt = ours(GradDropAdamW, {}, DROPS["blocks"])
            opt.param_groups[0]["effect"] = effect
            follow(params, opt, range(1))
            assert all(NAME not in entry for entry in opt.state.values())

    @pytest.mark.parametrize("way", ["state_dict", "saved", "deepcopy", "capturable"])
    def test_a_run_goes_on_bit_for_bit(self, way):
        cls, theirs, options = RULES["adamw"]
        truth = Split(theirs, options, DROPS["accumulated"], torch.float64)
        params, opt = ours(cls, options, DROPS["accumulated"])
        follow(params, opt, range(6), truth)
        if way == "deepcopy":
            params, opt = copy.deepcopy((params, opt))
        else:
            state, copied = opt.state_dict(), params
            if way == "saved":
                file = io.BytesIO()
                torch.save(state, file)
                state = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
            params, opt = ours(cls, options, DROPS["accumulated"], capturable=way == "capturable")
            for name, p in params.items():
                p.data.copy_(copied[name].detach())
            opt.load_state_dict(state)
        follow(params, opt, range(6, STEPS), truth)
        assert_equal(params, opt, truth)

    def test_without_counts_a_checkpoint_begins_at_the_parameters_step(self):
        params, opt = ours(GradDropAdamW, {}, DROPS["blocks"])
        follow(params, opt, range(4))
        state = opt.state_dict()
        for entry in state["state"].values():
            entry.pop(NAME, None)  # the empty one has none
        params, opt = ours(GradDropAdamW, {}, DROPS["blocks"])
        opt.load_state_dict(state)
        mask = opt.keep_mask(params["flat"])[::128].long()
        follow(params, opt, [4])
        assert opt.state[params["flat"]][NAME].tolist() == (4 + mask).tolist()

    def test_a_step_beyond_31_bits_leaves_counts_that_can_go_on(self):
        """They became negative: bias corrections of a first step, and a checkpoint that nothing loads."""
        params, opt = ours(GradDropAdamW, {}, DROPS["all"])
        follow(params, opt, [0])
        state = opt.state_dict()
        for entry in state["state"].values():
            entry["step"] = torch.tensor(2.0**31)
            entry.pop(NAME, None)
        opt.load_state_dict(state)
        follow(params, opt, [1, 2])
        assert min(opt.state[params["flat"]][NAME].tolist()) > 2**24
        opt.load_state_dict(copy.deepcopy(opt.state_dict()))

    def test_there_and_back_through_torch_they_begin_anew(self):
        params, opt = ours(GradDropAdamW, {}, DROPS["blocks"], torch.float32)
        follow(params, opt, range(4))
        torchs = torch.optim.AdamW(params.items())
        torchs.load_state_dict(opt.state_dict())
        for p in params.values():
            p.grad = torch.ones_like(p)
        torchs.step()
        _, opt = ours(GradDropAdamW, {}, DROPS["blocks"])
        opt = GradDropAdamW(params.items(), drop=DROPS["blocks"], effect="freeze")
        opt.load_state_dict(torchs.state_dict())
        mask = opt.keep_mask(params["flat"])[::128].long()
        follow(params, opt, [4])
        assert opt.state[params["flat"]][NAME].tolist() == (5 + mask).tolist()

    def test_another_policy_begins_at_the_parameters_step(self):
        params, opt = ours(GradDropAdamW, {}, GradDrop(0.5, block=128))
        group, flat = opt.param_groups[0], params["flat"]
        follow(params, opt, range(3))
        counted = opt.state[flat][NAME].tolist()
        group["drop"] = GradDrop(0.0, block=128)  # the same blocks
        follow(params, opt, [3])
        assert opt.state[flat][NAME].tolist() == [count + 1 for count in counted]
        group["drop"] = GradDrop(0.0, block=256)
        follow(params, opt, [4])
        assert opt.state[flat][NAME].tolist() == [5] * 10
        group["drop"] = GradDrop(0.5)
        follow(params, opt, [5])
        assert NAME not in opt.state[flat]
        group["drop"] = GradDrop(0.0, block=256)
        follow(params, opt, [6])
        assert opt.state[flat][NAME].tolist() == [7] * 10

    @pytest.mark.parametrize(
        "counts, message",
        [
            ([1] * 20, "tensor"),
            (torch.full((20,), -1, dtype=torch.int32), "at least 0"),
            (torch.full((20,), 2**31), "2\\*\\*31"),
            (torch.ones(20, 1, dtype=torch.int32), "one dimension"),
            (torch.ones(20, dtype=torch.int32, device="meta"), "elements"),
        ],
    )
    def test_bad_counts_change_nothing(self, counts, message):
        params, opt = ours(GradDropAdamW, {}, DROPS["blocks"])
        follow(params, opt, range(2))
        before = copy.deepcopy(opt.state_dict())
        bad = copy.deepcopy(before)
        bad["state"][0][NAME] = counts
        with pytest.raises((TypeError, ValueError), match=f"{NAME}.*{message}"):
            opt.load_state_dict(bad)
        assert opt.state_dict()["state"][0][NAME].tolist() == before["state"][0][NAME].tolist()
        opt.state[params["flat"]][NAME] = counts
        with pytest.raises((TypeError, ValueError), match=f"{NAME}.*{message}"):
            follow(params, opt, [2])

    @pytest.mark.parametrize("capturable", [False, True])
    def test_a_step_that_the_scaler_skips_counts_nothing(self, capturable):
        params, opt = ours(GradDropAdamW, {"fused": True}, DROPS["blocks"], torch.float32, capturable=capturable)
        follow(params, opt, range(2))
        before = counts(params, opt)
        opt.found_inf = torch.tensor(1.0)
        follow(params, opt, [2])
        assert counts(params, opt) == before
        opt.found_inf = torch.tensor(0.0)
        follow(params, opt, [2])
        assert counts(params, opt) != before

    def test_a_step_that_fails_counts_nothing(self, monkeypatch):
        params, opt = ours(GradDropAdamW, {}, DROPS["blocks"])
        follow(params, opt, range(2))
        before = counts(params, opt)
        with monkeypatch.context() as broken, pytest.raises(OSError):
            broken.setattr(opt, "_launch", lambda *_: (_ for _ in ()).throw(OSError()))
            follow(params, opt, [2])
        assert counts(params, opt) == before


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(6, 9, bias=False), nn.Tanh(), nn.Linear(9, 5, bias=False)).double()

    def forward(self, x):
        return self.layers(x)


def backward(model, step):
    model(values((4, 6), step)).square().sum().backward()


@pytest.mark.skipif(INTERPRETED, reason="of the host, whatever the backend")
@pytest.mark.parametrize(
    "helpers", [(skip_dropped_rows,), (release_gradients,), (skip_dropped_rows, release_gradients)]
)
def test_with_rows_skipped_and_gradients_released(helpers):
    """Against torch's optimizer on rows, whose gradients are computed in full."""
    drop = GradDrop(0.6, block="row", rescale=False)
    model, plain = Net(), Net()
    opt = GradDropAdamW(model.named_parameters(), lr=1e-2, drop=drop, effect="freeze")
    for helper in helpers:
        helper(model, opt)
    rows = {name: [nn.Parameter(row.detach().clone()) for row in p] for name, p in plain.named_parameters()}
    theirs = torch.optim.AdamW([row for found in rows.values() for row in found], lr=1e-2)
    for step in range(12):
        masks = {name: opt.keep_mask(p) for name, p in model.named_parameters()}
        backward(model, step)
        opt.step()
        opt.zero_grad()
        plain.zero_grad()
        for name, p in plain.named_parameters():
            p.data.copy_(torch.stack([row.detach() for row in rows[name]]))
        backward(plain, step)
        for name, p in plain.named_parameters():
            for row, grad, mask in zip(rows[name], p.grad, masks[name], strict=True):
                row.grad = grad.clone() if mask.all() else None
        theirs.step()
    for name, p in model.named_parameters():
        truth = torch.stack([row.detach() for row in rows[name]])
        torch.testing.assert_close(p.detach(), truth, rtol=1e-10, atol=1e-12)
        assert opt.state[p][NAME].tolist() == [int(theirs.state[row].get("step", 0)) for row in rows[name]]


@pytest.mark.skipif(INTERPRETED, reason="of the host, whatever the backend")
@pytest.mark.parametrize("dim", [0, 1])
def test_shards_of_a_parameter(dim):
    ranks.run(a_shard, 2, dim)


def a_shard(rank, world, dim):
    mesh = init_device_mesh("cpu", (world,))
    for drop in (DROPS["blocks"], DROPS["toggled"]):
        whole, opt = ours(GradDropAdamW, {}, drop)
        for backend in backends():
            parts = {}
            for name, shape in shapes(drop).items():
                at = Shard(min(dim, len(shape) - 1))
                parts[name] = nn.Parameter(distribute_tensor(values(shape, len(name)), mesh, [at], src_data_rank=None))
            epochs = {"steps_per_epoch": 3} if drop.needs_epoch else {}
            sharded = GradDropAdamW(parts.items(), drop=drop, effect="freeze", seed=7, backend=backend, **epochs)
            whole, opt = ours(GradDropAdamW, {}, drop, backend=backend)
            for step in range(8):
                for name, p in whole.items():
                    p.grad = gradient(name, step)
                    part = parts[name]
                    part.grad = distribute_tensor(gradient(name, step), mesh, part.placements, src_data_rank=None)
                opt.step()
                sharded.step()
            for name, p in whole.items():
                assert torch.equal(parts[name].full_tensor(), p), (name, backend)
                if p.numel():
                    assert torch.equal(sharded.state[parts[name]][NAME], opt.state[p][NAME])


def test_the_check_can_fail(monkeypatch):
    """Counts that go on for blocks that are left alone are seen."""
    from graddrop_fused.block_steps import BlockSteps

    monkeypatch.setattr(BlockSteps, "commit", lambda self, done: self.counts.add_(1))
    cls, theirs, options = RULES["adamw"]
    truth = Split(theirs, options, DROPS["blocks"], torch.float64)
    params, opt = ours(cls, options, DROPS["blocks"], backend="reference")
    follow(params, opt, range(6), truth)
    with pytest.raises(AssertionError):
        assert_equal(params, opt, truth)
