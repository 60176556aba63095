"""Where shards lie: DTensors under all kinds of placements on real ranks, flat shards placed by hand, refusals."""

import itertools
import pickle

import pytest
import ranks
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.distributed.tensor.placement_types import _StridedShard
from torch.testing._internal.two_tensor import TwoTensor

from graddrop_fused import GradDrop, GradDropAdamW, GradDropEpoch, StaticMask, attach
from graddrop_fused.shards import local, place, shard_of

SHAPES = {"tall": (7, 5), "wide": (3, 130), "flat": (257,), "short": (1, 9), "deep": (2, 3, 4)}  # uneven, some empty
DROPS = {"drawn": GradDrop(0.5), "packed": GradDropEpoch(0.6, toggle=True)}
MESHES = {6: [(6,), (2, 3), (3, 2)], 8: [(8,), (2, 4), (2, 2, 2)]}


def whole():
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def train(params, locate, drop):
    """Five steps along given gradients. ``locate`` brings a whole tensor to where parameter ``name`` lies."""
    opt = GradDropAdamW(params.items(), lr=1e-2, drop=drop, steps_per_epoch=2, effect="freeze")
    masks = []
    for step in range(5):
        masks.append({name: opt.keep_mask(p) for name, p in params.items()})
        for name, p in params.items():
            p.grad = locate(name, gradient(name, step))
        opt.step()
    return masks


def gradient(name, step):
    return torch.cos(torch.arange(whole()[name].numel()) * (step + 1.0)).reshape(SHAPES[name])


def numbered(shape):
    return torch.arange(torch.Size(shape).numel()).reshape(shape)


def elements(param):
    shard = shard_of(param)
    return shard.elements(0, shard.numel).reshape(shard.shape)


# DTensor


@pytest.mark.parametrize("world", MESHES)
def test_any_placement_on_any_mesh(world):
    ranks.run(every_placement, world)


def every_placement(rank, world):
    for mesh_shape in MESHES[world]:
        mesh = init_device_mesh("cpu", mesh_shape)
        for shape in SHAPES.values():
            kinds = [Replicate(), *(Shard(dim) for dim in range(len(shape)))]
            for placements in itertools.product(kinds, repeat=len(mesh_shape)):
                tensor = distribute_tensor(numbered(shape), mesh, placements, src_data_rank=None)
                assert torch.equal(elements(tensor), tensor.to_local()), (mesh_shape, shape, placements)


@pytest.mark.parametrize("world", [2, 3])
def test_sharded_runs_are_parts_of_the_whole(world):
    ranks.run(one_of_a_sharded_run, world)


def one_of_a_sharded_run(rank, world):
    mesh = init_device_mesh("cpu", (world,))
    for drop in DROPS.values():
        truth = {name: nn.Parameter(value) for name, value in whole().items()}
        true_masks = train(truth, lambda name, tensor: tensor, drop)
        for placement in (Shard(0), Shard(1), Replicate()):

            def spread(name, tensor, placement=placement):
                here = Shard(0) if placement == Shard(1) and tensor.dim() == 1 else placement
                return distribute_tensor(tensor, mesh, [here])

            params = {name: nn.Parameter(spread(name, value)) for name, value in whole().items()}
            masks = train(params, spread, drop)
            for name, p in params.items():
                assert torch.equal(p.full_tensor(), truth[name]), (name, placement)
                for actual, expected in zip(masks, true_masks, strict=True):
                    assert torch.equal(actual[name].full_tensor(), expected[name]), (name, placement)


def test_fsdp_over_tensor_parallel_where_torchs_placements_err():
    """9 rows, cut in two, then in four: on two ranks torch's placements give another number of rows than is there."""
    differ = ranks.run(cut_in_two_then_in_four, 8)
    assert sum(differ) == 2


def cut_in_two_then_in_four(rank, world):
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    mesh = init_device_mesh("cpu", (4, 2), mesh_dim_names=("data", "tensor"))
    model = nn.Sequential(nn.Linear(3, 9, bias=False))
    model[0].weight.data.copy_(numbered((9, 3)))
    parallelize_module(model, mesh["tensor"], {"0": ColwiseParallel()})
    fully_shard(model, mesh=mesh["data"])
    weight = model[0].weight
    assert torch.equal(elements(weight).to(weight.dtype), weight.to_local())
    shape, _ = compute_local_shape_and_global_offset(weight.shape, weight.device_mesh, weight.placements)
    return shape != weight.to_local().shape


def test_what_lies_in_no_box_is_refused():
    ranks.run(placements_to_refuse, 4)


def placements_to_refuse(rank, world):
    mesh = init_device_mesh("cpu", (4,))
    grid = init_device_mesh("cpu", (2, 2))
    local = torch.zeros(2, 3)
    layout = {"run_check": False, "shape": (8, 3), "stride": (3, 1)}
    for param in (
        DTensor.from_local(local, mesh, [Partial()], run_check=False),
        DTensor.from_local(local, grid, [_StridedShard(0, split_factor=2), Replicate()], **layout | {"shape": (4, 3)}),
        DTensor.from_local(torch.zeros(3, 3), mesh, [Shard(0)], **layout),
    ):
        param = nn.Parameter(param)
        for make in (GradDropAdamW, lambda params: attach(torch.optim.SGD(params))):
            with pytest.raises(ValueError, match=r"parameter 'w' has a local shard of shape .* placements"):
                make([("w", param)])


def test_gradients_placed_otherwise():
    ranks.run(gradients_placed_otherwise, 2)


def gradients_placed_otherwise(rank, world):
    """Masks must reach what the optimizer reads, also where the gradient must be reduced or cut before."""
    mesh = init_device_mesh("cpu", (2,))
    for make in (lambda params: attached_sgd(params)[0], lambda params: GradDropAdamW(params, drop=GradDrop(0.5))):
        truth = {name: nn.Parameter(value) for name, value in whole().items()}
        opt = make(truth.items())
        for name, p in truth.items():
            p.grad = gradient(name, 0)
        opt.step()
        for placements in ([Replicate()], [Partial()], [Shard(0)]):
            params = {name: nn.Parameter(distribute_tensor(value, mesh, [Shard(0)])) for name, value in whole().items()}
            opt = make(params.items())
            for name, p in params.items():
                p.grad = spread_gradient(gradient(name, 0), mesh, placements)
            opt.step()
            for name, p in params.items():
                assert torch.equal(p.full_tensor(), truth[name]), (name, placements)

    param = nn.Parameter(distribute_tensor(whole()["tall"], mesh, [Shard(0)]))
    other = init_device_mesh("cpu", (2,), mesh_dim_names=("other",))
    for make in (lambda params: attached_sgd(params)[0], GradDropAdamW):
        for grad, problem in (
            (gradient("tall", 0), "must be a DTensor like its parameter, got a Tensor"),
            (distribute_tensor(gradient("tall", 0), other, [Shard(0)]), "must be on its parameter's mesh"),
        ):
            opt, before = make([("w", param)]), param.to_local().clone()
            param.grad = grad
            with pytest.raises(ValueError, match=f"the gradient of parameter 'w' {problem}"):
                opt.step()
            assert torch.equal(param.to_local(), before)
            param.grad = None


def test_state_that_lies_otherwise_is_refused():
    ranks.run(state_that_lies_otherwise, 2)


def state_that_lies_otherwise(rank, world):
    """Of a checkpoint without shards, and of another mesh. By its numbers, some compact state would fit a shard."""
    mesh, other = init_device_mesh("cpu", (2,)), init_device_mesh("cpu", (2,), mesh_dim_names=("other",))
    compact = {"drop": GradDropEpoch(0.5, block="row"), "effect": "freeze", "steps_per_epoch": 9, "active_state": True}

    def stepped(value, **options):
        param = nn.Parameter(value)
        opt = GradDropAdamW([("w", param)], **options)
        param.grad = torch.ones_like(param)
        opt.step()
        return param, opt

    whole = torch.zeros(2, 5)
    cases = [
        (whole, {}, "exp_avg of parameter 0 must be a DTensor like its parameter, got a Tensor"),
        (distribute_tensor(whole, other, [Shard(0)]), {}, "exp_avg of parameter 0 must be on its parameter's mesh"),
    ]
    for seed in (2, 0, 8):  # which keep row 0, row 1, both
        cases.append((whole, compact | {"seed": seed}, "active of parameter 0 must be a DTensor"))
    for value, options, message in cases:
        saved = stepped(value, **options)[1].state_dict()
        param, opt = stepped(distribute_tensor(whole, mesh, [Shard(0)]), **options)
        before = {name: local(t).clone() for name, t in opt.state[param].items()}
        with pytest.raises(ValueError, match=f"the checkpoint's {message}"):
            opt.load_state_dict(saved)
        assert all(torch.equal(local(t), before[name]) for name, t in opt.state[param].items())
    param, opt = stepped(distribute_tensor(whole, mesh, [Shard(0)]))
    opt.state[param]["exp_avg"] = whole
    with pytest.raises(ValueError, match="state 'exp_avg' of parameter 'w' must be a DTensor like its parameter"):
        opt.step()
    opt.state[param]["exp_avg"] = distribute_tensor(whole, mesh, [Shard(0)])
    local(opt.state[param]["exp_avg"]).untyped_storage().resize_(0)
    with pytest.raises(ValueError, match="state 'exp_avg' of parameter 'w' must have memory"):
        opt.step()


def test_gradients_whose_collective_is_under_way():
    ranks.run(gradients_under_way, 2)


def gradients_under_way(rank, world):
    """Such a tensor has no memory of its own: whoever reads its address takes it for zeros."""
    mesh = init_device_mesh("cpu", (2,))
    for make in (lambda params: attached_sgd(params)[0], lambda params: GradDropAdamW(params, drop=GradDrop(0.5))):
        truth = {name: nn.Parameter(value) for name, value in whole().items()}
        params = {name: nn.Parameter(distribute_tensor(value, mesh, [Replicate()])) for name, value in whole().items()}
        for name in truth:
            truth[name].grad = gradient(name, 0)
            cut = distribute_tensor(gradient(name, 0), mesh, [Shard(0)])
            params[name].grad = cut.redistribute(mesh, [Replicate()], async_op=True)
        assert any(type(p.grad.to_local()) is not torch.Tensor for p in params.values())
        make(truth.items()).step()
        make(params.items()).step()
        for name, p in params.items():
            assert torch.equal(p.to_local(), truth[name]), name


def test_a_local_tensor_of_a_wrapper_subclass():
    ranks.run(a_local_wrapper, 1)


def a_local_wrapper(rank, world):
    """As FSDP2 cuts weights of quantisation libraries: the reference serves them, as it does without a DTensor."""
    mesh = init_device_mesh("cpu", (1,))
    spec = distribute_tensor(torch.zeros(7, 5), mesh, [Shard(0)])._spec
    inner = whole()["tall"].clone()
    ours = nn.Parameter(DTensor(TwoTensor(inner, inner.clone()), spec, requires_grad=False))
    theirs = nn.Parameter(whole()["tall"])
    for p, opt in (
        (ours, GradDropAdamW([("w", ours)], lr=1e-2)),
        (theirs, GradDropAdamW([("w", theirs)], lr=1e-2, backend="reference")),
    ):
        grad = gradient("tall", 0)
        p.grad = grad if p is theirs else distribute_tensor(grad, mesh, [Shard(0)])
        opt.step()
        opt.step()
    assert torch.equal(inner, theirs)
    with pytest.raises(RuntimeError, match="cannot serve a parameter of class TwoTensor"):
        GradDropAdamW([("w", ours)], backend="cpu").step()


def test_a_learning_rate_that_is_a_dtensor():
    ranks.run(a_learning_rate, 1)


def a_learning_rate(rank, world):
    """As code that makes every tensor a DTensor leaves it. Under capturable a step failed."""
    mesh = init_device_mesh("cpu", (1,))
    for capturable in (False, True):
        lr = distribute_tensor(torch.tensor(1e-2), mesh, [Replicate()])
        ours = nn.Parameter(distribute_tensor(whole()["tall"], mesh, [Shard(0)]))
        theirs = nn.Parameter(whole()["tall"])
        opts = [
            GradDropAdamW([("w", ours)], lr=lr, capturable=capturable),
            GradDropAdamW([("w", theirs)], lr=torch.tensor(1e-2), capturable=capturable),
        ]
        for step in range(2):
            ours.grad = distribute_tensor(gradient("tall", step), mesh, [Shard(0)])
            theirs.grad = gradient("tall", step)
            for opt in opts:
                opt.step()
                opt.param_groups[0]["lr"].mul_(0.5)
        assert torch.equal(ours.to_local(), theirs)


def attached_sgd(params):
    opt = torch.optim.SGD(params, lr=1.0)
    return opt, attach(opt, drop=GradDrop(0.5))


def spread_gradient(tensor, mesh, placements):
    if placements != [Partial()]:
        return distribute_tensor(tensor, mesh, placements)
    half = DTensor.from_local(tensor / 2, mesh, [Replicate()], run_check=False)
    return DTensor.from_local(half.to_local(), mesh, placements, run_check=False)


# Flat shards


def test_flat_shards_placed_by_hand():
    """A ZeRO-style buffer: parameters one behind the other, cut into equal parts wherever that falls."""
    truth = {name: nn.Parameter(value) for name, value in whole().items()}
    drop = GradDropEpoch(0.6, toggle=True)
    true_masks = train(truth, lambda name, tensor: tensor, drop)
    total = sum(value.numel() for value in whole().values())
    size = -(-total // 5)
    for part in range(5):
        pieces = dict(pieces_of(part * size, min(total, (part + 1) * size)))
        params = {name: nn.Parameter(whole()[name].flatten()[a:b].clone()) for name, (a, b) in pieces.items()}
        for name, (a, _) in pieces.items():
            place(params[name], SHAPES[name], a)
        masks = train(params, lambda name, tensor, at=pieces: tensor.flatten()[slice(*at[name])], drop)
        for name, (a, b) in pieces.items():
            assert torch.equal(params[name], truth[name].flatten()[a:b])
            for actual, expected in zip(masks, true_masks, strict=True):
                assert torch.equal(actual[name], expected[name].flatten()[a:b])


def pieces_of(start, stop):
    """The parameters in elements start..stop-1 of all, each with the range of its own elements there."""
    before = 0
    for name, value in whole().items():
        a, b = max(start - before, 0), min(stop - before, value.numel())
        if a < b:
            yield name, (a, b)
        before += value.numel()


def test_a_placed_parameter_in_other_respects():
    param = nn.Parameter(torch.zeros(2, 5))
    place(param, (7, 5), 10)  # rows 2 and 3
    mask = torch.rand(7, 5) < 0.5
    opt = GradDropAdamW([("w", param)], drop=StaticMask({"w": mask}))
    assert torch.equal(opt.keep_mask(param), mask[2:4])
    assert shard_of(pickle.loads(pickle.dumps(param))) == shard_of(param)
    with pytest.raises(ValueError, match=r"must have its whole shape \(7, 5\)"):
        GradDropAdamW([("w", param)], drop=StaticMask({"w": mask[2:4]}))
    param.data = torch.zeros(6, 5)
    with pytest.raises(ValueError, match=r"parameter 'w' has 30 elements, more than shards.place\(\) left room for"):
        GradDropAdamW([("w", param)])


@pytest.mark.parametrize(
    "param, whole, start, error, message",
    [
        (torch.zeros(4), (3,), 0, ValueError, r"start must be an integer in \[0, -1\]"),
        (torch.zeros(4), (2, 5), 7, ValueError, r"start must be an integer in \[0, 6\], .* got 7"),
        (torch.zeros(4), (2, 5), -1, ValueError, "got -1"),
        (torch.zeros(4), (2, 5), 0.0, ValueError, r"got 0\.0"),
        (torch.zeros(4), (2.0, 5), 0, ValueError, r"whole must be .* got \(2\.0, 5\)"),
        ([0.0], (1,), 0, TypeError, "param must be a plain tensor .* got <class 'list'>"),
    ],
)
def test_places_that_cannot_be(param, whole, start, error, message):
    with pytest.raises(error, match=message):
        place(param, whole, start)
    assert not isinstance(param, torch.Tensor) or shard_of(param).offset == 0


def test_fully_sharded_data_parallel_is_refused():
    ranks.run(flat_parameters, 2)


def flat_parameters(rank, world):
    message = "flat parameter of FullyShardedDataParallel.* use FSDP2, torch.distributed.fsdp.fully_shard"
    model = nn.Linear(5, 7)
    opt = GradDropAdamW(model.named_parameters())  # made before, as Accelerate has it
    model = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
    model(torch.ones(2, 5)).sum().backward()
    with pytest.raises(ValueError, match="parameter 'weight' is a " + message):
        opt.step()
    assert opt.draw == 0 and not opt.state
    for use_orig_params in (True, False):
        model = FullyShardedDataParallel(
            nn.Linear(5, 7), use_orig_params=use_orig_params, device_id=torch.device("cpu")
        )
        with pytest.raises(ValueError, match=message):
            GradDropAdamW(model.named_parameters())
        with pytest.raises(ValueError, match=message):
            attach(torch.optim.SGD(model.parameters()), drop=GradDrop(0.5))
