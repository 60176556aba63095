"""FSDP2, hybrid sharding and FSDP2 over tensor parallelism, on real processes: every rank does its part of what a
single process does."""

import math
import zlib

import pytest
import ranks
import sharded_transformer
import torch
from torch.distributed.tensor import DTensor

from graddrop_fused import GradDrop, GradDropAdamW, GradDropEpoch, LayerGradDrop

ORDINARY = {("fsdp", 3), ("hsdp", 4), ("fsdp_over_tensor_parallel", 4)}  # the rest is for the nightly run
GRID = [
    pytest.param(sharding, world, marks=[] if (sharding, world) in ORDINARY else pytest.mark.nightly)
    for sharding in sharded_transformer.SHARDINGS
    for world in (1, 2, 3, 4, 8)
]
DROPS = {
    "drawn": GradDrop(0.5),
    "packed": GradDropEpoch(0.6, toggle=True),
    "layers": LayerGradDrop(0.5),
    "rows": GradDrop(0.6, block="row"),  # frozen, with counts of their own
}
STEPS = 20
LOOKED_AT = (0, 1, 2, 10, 19)  # steps whose masks are compared as such; the parameters' bits tell of all others
# Sums in another order differ by 1e-17; AdamW divides what should be a gradient of zero by its own size, or eps
TOLERANCE = 1e-9


def optimizer(model, drop):
    groups = sharded_transformer.groups(model)
    return GradDropAdamW(groups, lr=1e-2, drop=drop, effect=effect(drop), seed=2**40 + 7, steps_per_epoch=3)


def effect(drop):
    return None if drop.block == 1 else "freeze"


def train(model, drop, part=0, parts=1):
    """Real training in float64. Returns the masks of some steps."""
    opt = optimizer(model, drop)
    masks = {}
    for step in range(STEPS):
        if step in LOOKED_AT:
            masks[step] = {name: local(opt.keep_mask(p)) for name, p in model.named_parameters()}
        sharded_transformer.loss(model, step, part, parts).backward()
        opt.step()
        opt.zero_grad()
    return masks


def follow(model, opt, steps, index=None):
    """Steps along gradients that each element's name and place decide: no reduction, so no rounding."""
    for step in steps:
        for name, p in model.named_parameters():
            place = torch.arange(p.numel()).reshape(p.shape) if index is None else index[name]
            p.grad = like(p, torch.cos(place * (step + 1.0) + zlib.crc32(name.encode()) % 1000))
        opt.step()


def placed_index(sharding, world):
    """Where the wrappers really put each element, whatever placements say: {name: global indices of the local part}."""
    model = sharded_transformer.model(torch.float64)
    sharded_transformer.whole_index(model)
    sharded_transformer.SHARDINGS[sharding](model, world)
    return {name: local(p).detach().long() for name, p in model.named_parameters()}


def local(tensor):
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def like(param, part):
    if not isinstance(param, DTensor):
        return part
    layout = {"shape": param.shape, "stride": param.stride(), "run_check": False}
    return DTensor.from_local(part, param.device_mesh, param.placements, **layout)


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    """A file with what a single process makes of it: {policy: (masks, trained parameters, followed parameters)}."""
    file = str(tmp_path_factory.mktemp("truth") / "truth.pt")
    ranks.run(single_process, 1, file)
    return file


def single_process(rank, world, file):
    truth = {}
    for key, drop in DROPS.items():
        trained, followed = sharded_transformer.model(torch.float64), sharded_transformer.model()
        masks = train(trained, drop)
        follow(followed, optimizer(followed, drop), range(STEPS))
        truth[key] = masks, trained.state_dict(), followed.state_dict()
    torch.save(truth, file)


@pytest.mark.parametrize("sharding, world", GRID)
def test_every_rank_does_its_part_of_the_whole(sharding, world, single):
    indices = ranks.run(one_rank, world, sharding, single)
    for name, p in sharded_transformer.model().named_parameters():
        held = torch.cat([index[name].flatten() for index in indices]).unique()
        assert torch.equal(held, torch.arange(p.numel())), name


def one_rank(rank, world, sharding, truth):
    shard = sharded_transformer.SHARDINGS[sharding]
    index = placed_index(sharding, world)
    for key, (true_masks, trained, followed) in torch.load(truth).items():
        model = sharded_transformer.model(torch.float64)
        part, parts = shard(model, world)
        masks = train(model, DROPS[key], part, parts)
        for name, p in model.named_parameters():
            for step in LOOKED_AT:
                assert torch.equal(masks[step][name], true_masks[step][name].flatten()[index[name]]), (key, name, step)
            expected = trained[name].flatten()[index[name]]
            torch.testing.assert_close(local(p).detach(), expected, rtol=0, atol=TOLERANCE)

        model = sharded_transformer.model()
        shard(model, world)
        opt = optimizer(model, DROPS[key])
        follow(model, opt, range(STEPS), index)
        for name, p in model.named_parameters():
            assert torch.equal(local(p), followed[name].flatten()[index[name]]), (key, name)
            for state in ("exp_avg", "exp_avg_sq"):
                assert opt.state[p][state].shape == p.shape
                assert local(opt.state[p][state]).shape == local(p).shape, (key, name)
        packed = sum(words.nbytes for bucket in opt._plan.buckets for words in bucket.batch.packed if words is not None)
        assert packed == (sum(4 * math.ceil(i.numel() / 32) for i in index.values()) if key == "packed" else 0)
        # FSDP2 puts the transformer's parameters on its mesh and tensor parallelism's on another: one call serves both
        assert len(opt._plan.buckets) == 1
    return index
