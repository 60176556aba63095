"""Where a rank's part of a parameter lies in the whole: DTensor (FSDP2, tensor parallel), and flat shards by hand."""

import math
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor

from .contract import Shard

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

_PLACE = "_graddrop_place"  # plain numbers, so that a pickled parameter needs nothing of ours to load


def place(param: Tensor, whole: Sequence[int], start: int) -> None:
    """Say that a plain tensor is a piece of a larger parameter: its elements, in row-major order, are the whole's
    elements ``start``, ``start + 1``, ... in row-major order.

    For optimizers over flat shards in the manner of ZeRO: cut the flat buffer where parameters meet, place every piece,
    and give the optimizer (name of the whole parameter, piece) pairs. Masks are then those of the whole parameter. Call
    it before the optimizer is made, and again on a deepcopy of the parameter, which torch makes without attributes.

    Args:
        param: any dense tensor but a DTensor, which knows its place.
        whole: shape of the whole parameter.
        start: index of element 0 in it.

    Raises:
        TypeError, ValueError: naming the argument; nothing has changed then.
    """
    if not isinstance(param, Tensor) or is_dtensor(param):
        raise TypeError(f"param must be a plain tensor (a DTensor knows its place), got {type(param)}")
    whole = tuple(whole)
    if not all(isinstance(size, int) and size >= 0 for size in whole):
        raise ValueError(f"whole must be the whole parameter's shape, integers of at least 0, got {whole!r}")
    last = math.prod(whole) - param.numel()
    if isinstance(start, bool) or not isinstance(start, int) or not 0 <= start <= last:
        raise ValueError(
            f"start must be an integer in [0, {last}], so that {param.numel()} elements lie in a parameter of shape "
            f"{whole}, got {start!r}"
        )
    setattr(param, _PLACE, (whole, start))


def local(tensor: Tensor) -> Tensor:
    """The part of ``tensor`` that this rank holds: a DTensor's local tensor, otherwise the tensor itself."""
    return tensor._local_tensor if is_dtensor(tensor) else tensor


def whole_shape(param: Tensor) -> tuple[int, ...]:
    """The shape of the whole parameter."""
    whole, _ = getattr(param, _PLACE, (param.shape, 0))
    return tuple(whole)


def place_problem(param: Tensor, other: Tensor) -> str | None:
    """Why ``other``, its gradient or state, cannot be brought to where ``param`` lies, or None."""
    if is_dtensor(param) != is_dtensor(other):
        return f"must be a {type(param.data).__name__} like its parameter, got a {type(other).__name__}"
    if is_dtensor(param) and is_dtensor(other) and other.device_mesh != param.device_mesh:
        return f"must be on its parameter's mesh {param.device_mesh}, got {other.device_mesh}"
    return None


def placed_like(param: Tensor, grad: Tensor) -> Tensor:
    """``grad``, reduced, gathered or cut first if it is a DTensor placed in another way than ``param``."""
    if not is_dtensor(grad) or not is_dtensor(param) or grad.placements == param.placements:
        return grad
    return grad.redistribute(param.device_mesh, param.placements)


def local_gradient(param: Tensor, grad: Tensor) -> Tensor:
    """The gradient of the local part of ``param``. Raises ValueError if it cannot be brought there."""
    problem = place_problem(param, grad)
    if problem is not None:
        raise ValueError(f"the gradient of a parameter of shape {tuple(param.shape)} {problem}")
    grad = placed_like(param, grad)
    if is_dtensor(grad):
        grad = grad.to_local()
        if type(grad) is not Tensor:  # such as of a collective under way: its elements do not lie at its address
            grad = torch.empty(grad.shape, dtype=grad.dtype, device=grad.device).copy_(grad)
    # autograd leaves some gradients as views with a lazy sign or conjugation, which kernels would not see
    return grad.as_subclass(Tensor).resolve_conj().resolve_neg()


def like(param: Tensor, dtype: torch.dtype) -> Tensor:
    """An uninitialised tensor with the shape, strides, device and sharding of ``param``."""
    part = local(param)
    empty = torch.empty_strided(part.shape, part.stride(), dtype=dtype, device=part.device)
    if not is_dtensor(param):
        return empty
    return type(param).from_local(
        empty, param.device_mesh, param.placements, run_check=False, shape=param.shape, stride=param.stride()
    )


def shard_of(param: Tensor) -> Shard:
    """Where the local part of ``param`` lies in its whole parameter.

    Raises ValueError if that cannot be known. Its text goes on from "parameter NAME".
    """
    if getattr(param, "_fsdp_flattened", False):
        raise ValueError(
            "is a flat parameter of FullyShardedDataParallel, which does not say where its elements lie; use FSDP2, "
            "torch.distributed.fsdp.fully_shard"
        )
    if is_dtensor(param):
        return _shard_of_dtensor(param)
    whole, start = getattr(param, _PLACE, (param.shape, 0))
    if start + param.numel() > math.prod(whole):
        raise ValueError(
            f"has {param.numel()} elements, more than shards.place() left room for: it begins at element {start} of "
            f"shape {whole}"
        )
    return Shard(tuple(param.shape), Shard.whole(param.shape).strides, start)


def _shard_of_dtensor(param: "DTensor") -> Shard:
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shape, placements = tuple(local(param).shape), param.placements
    if not math.prod(shape):
        return Shard(shape, (0,) * len(shape))
    box: tuple[tuple[int, ...], tuple[int, ...]] | None
    box = compute_local_shape_and_global_offset(param.shape, param.device_mesh, placements)
    if any(map(_is_strided, placements)):
        # torch gives a strided shard's first element, which need not begin a box, and another shape than FSDP2's for
        # some uneven ones
        first, box = box, _strided_box(param)
        if first[0] == shape and first != box:
            box = None
    if box is None or box[0] != shape or any(placement.is_partial() for placement in placements):
        raise ValueError(
            f"has a local shard of shape {shape}, which placements {placements} of shape {tuple(param.shape)} on "
            f"{param.device_mesh} do not describe as one box; use sizes that the mesh divides, or other placements"
        )
    return Shard.box(shape, param.shape, box[1])


def _strided_box(param: "DTensor") -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """(shape, start) of a shard under placements as FSDP2 makes them over tensor parallelism, None under others.

    There a strided shard was cut after all shards of its dimension that stand to its right, as many as its split_factor
    says, so that each rank has one range.
    """
    mesh, ranges = param.device_mesh, [(0, size) for size in param.shape]
    order: dict[int, list[int]] = {}  # dimension -> mesh dimensions in the order of cuts
    placements: list[Any] = list(param.placements)  # of classes that torch imports only when it needs them
    for mesh_dim, placement in reversed(list(enumerate(placements))):
        if placement.is_replicate():
            continue
        cuts = order.setdefault(placement.dim, [])
        if not _is_strided(placement):
            cuts.insert(0, mesh_dim)
        elif placement.split_factor == math.prod(mesh.size(cut) for cut in cuts):
            cuts.append(mesh_dim)
        else:
            return None
    for dim, cuts in order.items():
        for mesh_dim in cuts:
            ranges[dim] = _chunk(*ranges[dim], mesh.size(mesh_dim), mesh.get_local_rank(mesh_dim))
    return tuple(size for _, size in ranges), tuple(start for start, _ in ranges)


def _chunk(start: int, size: int, count: int, index: int) -> tuple[int, int]:
    """(start, size) of chunk ``index`` of a range, as torch.chunk cuts it."""
    most = -(-size // count)
    first = min(size, index * most)
    return start + first, min(size, first + most) - first


def is_dtensor(tensor: Tensor) -> "TypeGuard[DTensor]":
    # before its module is imported (most of a second) there is none
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def _is_strided(placement: Any) -> bool:
    return hasattr(placement, "split_factor")
