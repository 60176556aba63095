"""What stands around an optimizer in distributed and mixed-precision training: DDP, accumulation, Accelerate, skipped
layers, GradScaler, autocast, steps inside backward, clipping."""

import os
import subprocess
import sys
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import pytest
import ranks
import sharded_transformer
import torch
from test_distributed import DROPS, LOOKED_AT, STEPS, TOLERANCE, follow, local, optimizer, placed_index, single
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from graddrop_fused import GradDrop, GradDropAdamW, attach
from graddrop_fused.skip import skip_dropped_layers

__all__ = ["single"]  # a fixture


def assert_equal_on_all_ranks(model, optimizer):
    """Bit for bit: parameters and state."""
    for p in model.parameters():
        for tensor in (p.detach(), *(optimizer.state[p][name] for name in ("exp_avg", "exp_avg_sq"))):
            first = tensor.clone()
            torch.distributed.broadcast(first, 0)
            assert torch.equal(tensor, first)


def assert_follows(model, trained, index=None):
    """The single process's parameters, up to the order of sums."""
    for name, p in model.named_parameters():
        expected = trained[name.removeprefix("module.")]
        expected = expected if index is None else expected.flatten()[index[name]]
        torch.testing.assert_close(local(p).detach(), expected, rtol=0, atol=TOLERANCE)


# DDP


@pytest.mark.parametrize("world", [2, 3])
def test_ddp_with_accumulation(world, single):
    ranks.run(ddp_with_accumulation, world, single)


def ddp_with_accumulation(rank, world, truth):
    for key, (true_masks, trained, _) in torch.load(truth).items():
        model = DistributedDataParallel(sharded_transformer.model(torch.float64))
        opt = optimizer(model, DROPS[key])
        for step in range(STEPS):
            if step in LOOKED_AT:
                for name, p in model.named_parameters():
                    assert torch.equal(opt.keep_mask(p), true_masks[step][name.removeprefix("module.")])
            for micro in range(2):
                with model.no_sync() if micro == 0 else nullcontext():
                    (sharded_transformer.loss(model, step, 2 * rank + micro, 2 * world) / 2).backward()
            opt.step()
            opt.zero_grad()
        assert_follows(model, trained)
        assert_equal_on_all_ranks(model, opt)


@pytest.mark.parametrize("wrapper", ["ddp", "fsdp"])
def test_skipped_layers(wrapper, single):
    counts = ranks.run(skipped_layers, 2, single, wrapper)
    if wrapper == "ddp":
        assert counts[0] == counts[1]
        assert counts[0] < STEPS * len(list(sharded_transformer.model().parameters()))


def skipped_layers(rank, world, truth, wrapper):
    model, index = sharded_transformer.model(torch.float64), None
    if wrapper == "ddp":
        model = DistributedDataParallel(model, find_unused_parameters=True)
    else:
        index = placed_index(wrapper, world)
        sharded_transformer.SHARDINGS[wrapper](model, world)
    opt = optimizer(model, DROPS["layers"])
    gradients = 0
    with skip_dropped_layers(model, opt):
        for step in range(STEPS):
            sharded_transformer.loss(model, step, rank, world).backward()
            gradients += sum(p.grad is not None for p in model.parameters())
            opt.step()
            opt.zero_grad()
    _, trained, _ = torch.load(truth)["layers"]
    assert_follows(model, trained, index)
    if wrapper == "ddp":
        assert_equal_on_all_ranks(model, opt)
    return gradients


# Accelerate


@pytest.mark.slow
def test_accelerate_with_one_process_and_with_two(tmp_path):
    # on CPUs `accelerate launch` starts several processes only through MPI; torchrun needs none
    launchers = {
        1: ["accelerate.commands.launch", "--cpu", "--num_processes=1", "--num_machines=1", "--mixed_precision=no"]
        + ["--dynamo_backend=no"],
        2: ["torch.distributed.run", "--standalone", "--nproc-per-node=2"],
    }
    root = Path(__file__).parents[1]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(root), "ACCELERATE_USE_CPU": "true"}
    for processes, launcher in launchers.items():
        command = [sys.executable, "-m", *launcher, "tests/helpers/accelerate_loop.py", str(tmp_path), str(processes)]
        launched = subprocess.Popen(
            command, cwd=root, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        try:
            out, _ = launched.communicate(timeout=240)
        finally:
            launched.terminate()  # not kill: the launcher then ends those that it started
            launched.wait()
            launched.stdout.close()
        assert launched.returncode == 0, out[-4000:]
    draw, masks, parameters = torch.load(tmp_path / "1-0.pt")
    assert draw == 6
    of_two = [torch.load(tmp_path / f"2-{rank}.pt") for rank in range(2)]
    for its_draw, its_masks, its_parameters in of_two:
        assert its_draw == draw
        for epoch, mask in zip(its_masks, masks, strict=True):
            assert all(map(torch.equal, epoch, mask))
        assert all(map(torch.equal, its_parameters, of_two[0][2]))
        torch.testing.assert_close(its_parameters, parameters, rtol=0, atol=TOLERANCE)


def test_an_optimizer_whose_parameters_accelerate_switches(single):
    ranks.run(switched_parameters, 2, single)


def switched_parameters(rank, world, truth):
    """Accelerate shards (FSDP2) after the optimizer was made, and then puts the new parameters into its groups."""
    from accelerate.utils.fsdp_utils import fsdp2_switch_optimizer_parameters

    index = placed_index("fsdp", world)
    for key, drop in DROPS.items():
        model = sharded_transformer.model()
        opt = optimizer(model, drop)
        pointers = {name: p.data_ptr() for name, p in model.named_parameters()}
        for group in opt.param_groups:
            for i, p in enumerate(group["params"]):
                group["params"][i] = torch.empty(1)
                group["params"][i].data_ptr = p.data_ptr()
        sharded_transformer.fsdp(model, world)
        fsdp2_switch_optimizer_parameters(opt, {pointers[name]: p for name, p in model.named_parameters()})
        follow(model, opt, range(STEPS), index)
        _, _, followed = torch.load(truth)[key]
        for name, p in model.named_parameters():
            assert torch.equal(local(p), followed[name].flatten()[index[name]]), (key, name)


# Mixed precision


def test_a_step_that_overflows_on_one_rank_happens_on_none():
    ranks.run(overflow_on_one_rank, 2)


def overflow_on_one_rank(rank, world):
    model = sharded_transformer.model()
    part, parts = sharded_transformer.fsdp(model, world)
    opt = optimizer(model, GradDrop(0.5))
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for step, overflows in enumerate([False, True, False]):
        scaler.scale(sharded_transformer.loss(model, step, part, parts)).backward()
        if overflows and rank == 0:
            local(model.head.weight.grad)[0, 0] = torch.inf
        before = [local(p).detach().clone() for p in model.parameters()]
        masks = [local(opt.keep_mask(p)) for p in model.parameters()]
        scaler.step(opt)
        scaler.update()
        opt.zero_grad()
        after = [local(p).detach() for p in model.parameters()]
        if overflows:
            assert all(map(torch.equal, before, after))
            assert all(map(torch.equal, masks, [local(opt.keep_mask(p)) for p in model.parameters()]))
        else:
            assert not any(torch.equal(b, a) for b, a in zip(before, after, strict=True) if a.numel())
    assert opt.draw == 2


@pytest.mark.parametrize("precision", ["autocast", "fsdp"])
def test_masks_under_bfloat16_are_those_of_float32(precision, single):
    ranks.run(in_bfloat16, 2, single, precision)


def in_bfloat16(rank, world, truth, precision):
    model = sharded_transformer.model()
    index = placed_index("fsdp", world)
    if precision == "fsdp":
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        fully_shard(model, mesh=torch.distributed.device_mesh.init_device_mesh("cpu", (world,)), mp_policy=policy)
    else:
        sharded_transformer.fsdp(model, world)
    opt = optimizer(model, DROPS["packed"])
    for group in opt.param_groups:
        group["effect"] = "freeze"  # so that what stays as it was shows what was dropped
    true_masks, _, _ = torch.load(truth)["packed"]
    for step in range(3):
        before = [local(p).detach().clone() for p in model.parameters()]
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
            loss = sharded_transformer.loss(model, step, rank, world)
        loss.backward()
        opt.step()
        opt.zero_grad()
        for (name, p), old in zip(model.named_parameters(), before, strict=True):
            kept = true_masks[step][name].flatten()[index[name]]
            assert local(p).dtype == torch.float32
            assert torch.equal(local(p).detach() != old, kept), (name, step)  # decay alone would move all kept


# A step per parameter, inside backward


def test_steps_inside_backward_draw_the_masks_of_a_whole_step():
    ranks.run(steps_inside_backward, 2)


def steps_inside_backward(rank, world):
    for drop in (DROPS["drawn"], DROPS["packed"]):  # an optimizer of one parameter has too few layers to drop some
        together, alone = sharded_transformer.model(), sharded_transformer.model()
        for model in (together, alone):
            sharded_transformer.fsdp(model, world)
        opt = optimizer(together, drop)
        each = []
        for group in sharded_transformer.groups(alone):
            for name, p in group["params"]:
                own = GradDropAdamW(
                    [{"params": [(name, p)], "layer": group["layer"]}],
                    lr=1e-2,
                    drop=drop,
                    seed=opt.seed,
                    steps_per_epoch=3,
                )
                p.register_post_accumulate_grad_hook(partial(step_and_clear, own))
                each.append(own)
        for step in range(5):
            for model in (together, alone):
                sharded_transformer.loss(model, step, rank, world).backward()
            opt.step()
            opt.zero_grad()
            assert [own.draw for own in each] == [opt.draw] * len(each)
            assert not any(p.grad is not None for p in alone.parameters())
        for (name, p), q in zip(together.named_parameters(), alone.parameters(), strict=True):
            assert torch.equal(local(p), local(q)), name


def step_and_clear(opt, param):
    opt.step()
    opt.zero_grad()


# Clipping


def test_clipping_before_masking_and_after():
    """Before: the norm of unmasked gradients. After, by attach() and a later hook: the norm of what the masks left."""
    before, after = (sharded_transformer.model() for _ in range(2))

    def clip_masked(*_):
        torch.nn.utils.clip_grad_norm_(after.parameters(), 0.1)

    for model in (before, after):
        start = [p.detach().clone() for p in model.parameters()]
        opt = torch.optim.SGD(model.named_parameters(), lr=1.0)
        handle = attach(opt, drop=GradDrop(0.5), seed=1)
        masks = [handle.keep_mask(p) for p in model.parameters()]
        sharded_transformer.loss(model, 0).backward()
        gradients = [p.grad.clone() for p in model.parameters()]
        masked = [2.0 * g * mask for g, mask in zip(gradients, masks, strict=True)]
        if model is before:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            norm = torch.nn.utils.get_total_norm(gradients)
        else:
            opt.register_step_pre_hook(clip_masked)
            norm = torch.nn.utils.get_total_norm(masked)
        opt.step()
        for p, old, g in zip(model.parameters(), start, masked, strict=True):
            torch.testing.assert_close(old - p.detach(), g * (0.1 / norm), rtol=1e-4, atol=1e-6)
