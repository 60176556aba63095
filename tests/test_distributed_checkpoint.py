"""Interrupted runs: torch.distributed.checkpoint from one world size to another, and processes killed at any moment."""

import copy
import io
import itertools
import os
import random
import signal
import time
from pathlib import Path

import pytest
import ranks
import sharded_transformer
import torch
import torch.distributed.checkpoint as dcp
from test_distributed import DROPS, effect, follow, local, optimizer, placed_index
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)

from graddrop_fused import GradDrop, GradDropAdamW, GradDropEpoch

SAVED_AT, STEPS = 7, 12


# torch.distributed.checkpoint


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with checkpoints after 7 steps on 4 ranks under FSDP2, and what a single process makes of 12."""
    folder = str(tmp_path_factory.mktemp("checkpoints"))
    ranks.run(save, 4, folder)
    return folder


def save(rank, world, folder):
    index = placed_index("fsdp", world)
    for key, drop in DROPS.items():
        model = sharded_transformer.model()
        sharded_transformer.fsdp(model, world)
        opt = optimizer(model, drop)
        follow(model, opt, range(SAVED_AT), index)
        for flat in (False, True):
            options = StateDictOptions(flatten_optimizer_state_dict=flat)
            model_state, optim_state = get_state_dict(model, opt, options=options)
            dcp.save({"model": model_state, "optim": optim_state}, checkpoint_id=f"{folder}/{key}-{flat}")
        if rank == 0:
            model = sharded_transformer.model()
            opt = optimizer(model, drop)
            follow(model, opt, range(STEPS))
            masks = {name: opt.keep_mask(p) for name, p in model.named_parameters()}
            torch.save((model.state_dict(), masks), f"{folder}/{key}.pt")


@pytest.mark.parametrize(
    "sharding, world",
    [("fsdp", 1), ("fsdp", 3), ("hsdp", 4), ("fsdp_over_tensor_parallel", 2), ("fsdp_over_tensor_parallel", 8)],
)
def test_a_checkpoint_of_four_ranks_goes_on_on_any_number(sharding, world, saved):
    ranks.run(resume, world, sharding, saved)


def resume(rank, world, sharding, folder):
    index = placed_index(sharding, world)
    for key, drop in DROPS.items():
        truth, true_masks = torch.load(f"{folder}/{key}.pt")
        for flat in (False, True):
            model = sharded_transformer.model()
            nn.init.zeros_(model.head.weight)
            sharded_transformer.SHARDINGS[sharding](model, world)
            groups = sharded_transformer.groups(model)
            opt = GradDropAdamW(groups, drop=drop, effect=effect(drop), seed=1, steps_per_epoch=1)
            options = StateDictOptions(flatten_optimizer_state_dict=flat)
            model_state, optim_state = get_state_dict(model, opt, options=options)
            state = {"model": model_state, "optim": optim_state}
            dcp.load(state, checkpoint_id=f"{folder}/{key}-{flat}")
            set_state_dict(
                model, opt, model_state_dict=state["model"], optim_state_dict=state["optim"], options=options
            )
            follow(model, opt, range(SAVED_AT, STEPS), index)
            for name, p in model.named_parameters():
                mask = local(opt.keep_mask(p))
                assert torch.equal(mask, true_masks[name].flatten()[index[name]]), (key, flat, name)
                assert torch.equal(local(p), truth[name].flatten()[index[name]]), (key, flat, name)


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("change", ["split", "joined"])
def test_groups_that_were_split_or_joined_since_go_on_with_the_same_masks(change, named, flat):
    model = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2))
    params = list(model.named_parameters() if named else model.parameters())
    one, two = params, [{"params": params[:2]}, {"params": params[2:]}]
    before, after = (one, two) if change == "split" else (two, one)
    opt = GradDropAdamW(before, drop=GradDrop(0.5), seed=7, steps_per_epoch=2)
    for _ in range(5):
        model(torch.ones(1, 3)).sum().backward()
        opt.step()
    how = StateDictOptions(flatten_optimizer_state_dict=flat)
    saved = copy.deepcopy(get_optimizer_state_dict(model, opt, options=how))
    other = GradDropAdamW(after, drop=GradDrop(0.5))
    model.zero_grad()
    set_optimizer_state_dict(model, other, saved, options=how)
    assert (other.seed, other.draw, other.epoch) == (7, 5, 2)
    assert [name for g in other.param_groups for name in g.get("param_names", [])] == [p[0] for p in params if named]
    for p in model.parameters():
        assert torch.equal(other.keep_mask(p), opt.keep_mask(p))


@pytest.mark.parametrize("named", [True, False])
def test_names_stay_with_their_parameters_in_another_order(named):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    opt = GradDropAdamW(model.named_parameters(), drop=GradDrop(0.5), seed=7)
    model(torch.ones(1, 4)).sum().backward()
    opt.step()
    saved = copy.deepcopy(get_optimizer_state_dict(model, opt))
    reverse = list(model.named_parameters())[::-1]
    other = GradDropAdamW(reverse if named else [p for _, p in reverse], drop=GradDrop(0.5))
    set_optimizer_state_dict(model, other, saved)
    assert other.param_groups[0]["param_names"] == [name for name, _ in reverse]
    for p in model.parameters():
        assert torch.equal(other.state[p]["exp_avg"], opt.state[p]["exp_avg"])
        assert torch.equal(other.keep_mask(p), opt.keep_mask(p))


# Killed at any moment

KILLS = 20


def train_on(folder, stop, progress=None):
    """Up to step ``stop``, with a checkpoint every 3, written beside the last and put in its place at one stroke."""
    torch.set_num_threads(1)
    file = Path(folder) / "checkpoint.pt"
    model = sharded_transformer.model()
    opt = GradDropAdamW(
        model.named_parameters(), lr=1e-3, drop=GradDropEpoch(0.7, toggle=True), seed=11, steps_per_epoch=5
    )
    start = 0
    if file.exists():
        saved = torch.load(file)
        model.load_state_dict(saved["model"])
        opt.load_state_dict(saved["optimizer"])
        start = saved["step"]
    for step in itertools.count(start + 1):
        sharded_transformer.loss(model, step).backward()
        opt.step()
        opt.zero_grad()
        if step % 3 == 0 or step == stop:
            state = {"model": model.state_dict(), "optimizer": opt.state_dict(), "step": step}
            torch.save(state, f"{file}.new")
            os.replace(f"{file}.new", file)
        if progress:
            progress.send(step)
        if step == stop:
            break


def run_process(*args, kill_after=None):
    """train_on(*args) in a process of its own, to its end or until a while after so many steps."""
    receiver, sender = ranks.CONTEXT.Pipe(duplex=False)
    process = ranks.CONTEXT.Process(target=train_on, args=(*args, sender))
    process.start()
    sender.close()
    try:
        if kill_after is None:
            process.join()
            assert process.exitcode == 0
        else:
            steps, seconds = kill_after
            for _ in range(steps):
                receiver.recv()
            time.sleep(seconds)  # into a step, or into the writing of a checkpoint
            process.kill()
            process.join()
            assert process.exitcode == -signal.SIGKILL
    finally:
        process.kill()
        process.join()
        receiver.close()


def test_killed_twenty_times_it_ends_with_the_same_bits(tmp_path):
    seed = random.SystemRandom().randrange(2**32)
    moments = random.Random(seed)
    interrupted, whole = tmp_path / "interrupted", tmp_path / "whole"
    interrupted.mkdir(), whole.mkdir()
    for _ in range(KILLS):
        run_process(str(interrupted), None, kill_after=(moments.randrange(1, 12), moments.uniform(0, 0.02)))
    stop = torch.load(interrupted / "checkpoint.pt")["step"] + 10
    for folder in (interrupted, whole):
        run_process(str(folder), stop)
    one, other = (torch.load(folder / "checkpoint.pt") for folder in (interrupted, whole))
    assert one["step"] == other["step"] == stop
    for part in ("model", "optimizer"):
        assert bits(one[part]) == bits(other[part]), f"{part} differ at step {stop}; moments from seed {seed}"


def bits(state):
    file = io.BytesIO()
    torch.save(state, file)
    return file.getvalue()
