"""active_state=True on shards: every rank keeps moments of its part of what is active, and a checkpoint goes on on any
number of ranks."""

import pytest
import ranks
import sharded_transformer
import torch
import torch.distributed.checkpoint as dcp
from test_distributed import follow, local, placed_index
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from graddrop_fused import GradDropAdamW, GradDropEpoch, GradFreeze, LayerGradDrop

DROPS = {
    "rows": GradDropEpoch(0.6, block="row"),
    "toggle": GradDropEpoch(0.6, block="row", toggle=True),
    "blocks": GradDropEpoch(0.5, block=128, replacement=True),
    "freeze": GradFreeze("bottom-up"),
    "layers": LayerGradDrop(0.5, per="epoch"),
}
SAVED_AT, STEPS = 7, 12


def optimizer(model, drop, **options):
    groups = sharded_transformer.groups(model)
    options = {"lr": 1e-2, "seed": 2**40 + 7, "steps_per_epoch": 3, "drop": drop, "effect": "freeze", **options}
    return GradDropAdamW(groups, active_state=True, **options)


def moments(opt, model):
    """{name: the moments of what is active, in order}."""
    return {
        name: local(opt.state[p]["exp_avg"]).flatten() if p in opt.state else torch.empty(0)
        for name, p in model.named_parameters()
    }


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    """A file with what a single process makes of it: {policy: (parameters, moments)}."""
    file = str(tmp_path_factory.mktemp("truth") / "truth.pt")
    ranks.run(single_process, 1, file)
    return file


def single_process(rank, world, file):
    truth = {}
    for key, drop in DROPS.items():
        model = sharded_transformer.model()
        opt = optimizer(model, drop)
        follow(model, opt, range(STEPS))
        truth[key] = model.state_dict(), moments(opt, model)
    torch.save(truth, file)


@pytest.mark.parametrize("sharding, world", [("fsdp", 2), ("fsdp", 3), ("hsdp", 4), ("fsdp_over_tensor_parallel", 4)])
def test_every_rank_does_its_part_of_the_whole(sharding, world, single):
    ranks.run(one_rank, world, sharding, single)


def one_rank(rank, world, sharding, file):
    index = placed_index(sharding, world)
    for key, (params, _) in torch.load(file).items():
        model = sharded_transformer.model()
        sharded_transformer.SHARDINGS[sharding](model, world)
        opt = optimizer(model, DROPS[key])
        follow(model, opt, range(STEPS - 1), index)
        masks = {name: local(opt.keep_mask(p)) for name, p in model.named_parameters()}
        follow(model, opt, [STEPS - 1], index)
        held = moments(opt, model)
        for name, p in model.named_parameters():
            assert torch.equal(local(p), params[name].flatten()[index[name]]), (key, name)
            assert held[name].numel() == masks[name].sum(), (key, name)


def test_a_policy_that_ends_leaves_all_ranks_with_state_of_one_form():
    ranks.run(rows_until_the_policy_ends, 2)


def rows_until_the_policy_ends(rank, world):
    """Each rank has one of two rows, which has been active for three steps or, under some seeds, for the last alone."""
    seen = set()
    for seed in range(8):
        model = nn.Linear(3, 2, bias=False)
        fully_shard(model, mesh=init_device_mesh("cpu", (world,)))
        options = {"effect": "freeze", "steps_per_epoch": 9, "active_state": True, "seed": seed}
        opt = GradDropAdamW(model.named_parameters(), drop=GradDropEpoch(0.5, block="row"), **options)
        kept = opt.keep_mask(model.weight).full_tensor()[:, :1]
        seen.add(tuple(kept.flatten().tolist()))
        for step in range(3):
            if step == 2:
                opt.param_groups[0]["drop"] = None
            model.weight.grad = torch.ones_like(model.weight)
            opt.step()
        saved = opt.state_dict()["state"][0]
        assert torch.equal(saved["active"].full_tensor(), torch.where(kept, 3, 1).int().expand(2, 3)), seed
    assert len(seen) == 4


# torch.distributed.checkpoint


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with checkpoints after 7 steps on 2 ranks under FSDP2, in the middle of an epoch."""
    folder = str(tmp_path_factory.mktemp("checkpoints"))
    ranks.run(save, 2, folder)
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
        full = get_state_dict(model, opt, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        if rank == 0:
            torch.save(full, f"{folder}/{key}.pt")


@pytest.mark.parametrize("sharding, world", [("fsdp", 1), ("fsdp", 3), ("hsdp", 4), ("fsdp_over_tensor_parallel", 4)])
def test_a_checkpoint_of_two_ranks_goes_on_on_any_number(sharding, world, saved, single):
    ranks.run(resume, world, sharding, saved, single)


def resume(rank, world, sharding, folder, file):
    index, truth = placed_index(sharding, world), torch.load(file)
    for key, drop in DROPS.items():
        for flat in (False, True):
            model = sharded_transformer.model()
            sharded_transformer.SHARDINGS[sharding](model, world)
            opt = optimizer(model, drop, seed=1, steps_per_epoch=1)
            options = StateDictOptions(flatten_optimizer_state_dict=flat)
            model_state, optim_state = get_state_dict(model, opt, options=options)
            state = {"model": model_state, "optim": optim_state}
            dcp.load(state, checkpoint_id=f"{folder}/{key}-{flat}")
            set_state_dict(
                model, opt, model_state_dict=state["model"], optim_state_dict=state["optim"], options=options
            )
            follow(model, opt, range(SAVED_AT, STEPS), index)
            for name, p in model.named_parameters():
                assert torch.equal(local(p), truth[key][0][name].flatten()[index[name]]), (key, flat, name)


def test_a_full_checkpoint_goes_on_in_one_process_without_shards(saved, single):
    truth = torch.load(single)
    for key, drop in DROPS.items():
        model = sharded_transformer.model()
        opt = optimizer(model, drop, seed=1)
        model_state, optim_state = torch.load(f"{saved}/{key}.pt")
        set_state_dict(model, opt, model_state_dict=model_state, optim_state_dict=optim_state)
        follow(model, opt, range(SAVED_AT, STEPS))
        for name, p in model.named_parameters():
            assert torch.equal(p, truth[key][0][name]), (key, name)
        for name, values in moments(opt, model).items():
            assert torch.equal(values, truth[key][1][name]), (key, name)
