"""The layout table as GPU kernels read it: in the order of memory, with what a division needs prepared."""

from enum import IntEnum

import torch
from torch import Tensor

from .contract import MAX_DIMS, Layout


class DeviceRow(IntEnum):
    """Columns of a device's layout table: int64, shape (tensors, 46). As Layout, but for the dimensions."""

    PARAM = Layout.PARAM
    GRAD = Layout.GRAD
    STATE = Layout.STATE
    PACKED = Layout.PACKED
    BLOCK_FACTORS = Layout.BLOCK_FACTORS
    NUMEL = Layout.NUMEL
    OFFSET = Layout.OFFSET
    LINEAR = Layout.NDIM  # 1 where memory and global index run through the tensor with stride 1
    SIZE = Layout.SIZE  # from here on a column for each dimension, the innermost first
    PARAM_STRIDE = Layout.PARAM_STRIDE
    GRAD_STRIDE = Layout.GRAD_STRIDE
    GLOBAL_STRIDE = Layout.GLOBAL_STRIDE
    LOCAL_STRIDE = Layout.GLOBAL_STRIDE + MAX_DIMS  # of the local tensor's row-major order, in which packed words lie
    RECIPROCAL = LOCAL_STRIDE + MAX_DIMS  # a multiplier and, from bit 32 on, a shift: see _reciprocals

    @classmethod
    def columns(cls) -> int:
        return cls.RECIPROCAL + MAX_DIMS


_DIMENSIONS = (Layout.SIZE, Layout.PARAM_STRIDE, Layout.GRAD_STRIDE, Layout.GLOBAL_STRIDE)


def device_rows(table: Tensor, in_memory_order: bool) -> Tensor:
    """A layout table (tensors, 34) -> the table of a device, both on the host.

    Args:
        in_memory_order: number elements as they lie in the parameter's memory, so that neighbouring threads access
            neighbouring addresses; else in row-major order, as packed words need it that are written.
    """
    sizes, *strides = (table[:, column : column + MAX_DIMS] for column in _DIMENSIONS)
    absent = torch.arange(MAX_DIMS, device="cpu") >= table[:, Layout.NDIM, None]
    # steps of the row-major index: the product of the sizes further in
    local = sizes.masked_fill(absent, 1).flip(1).cumprod(1).flip(1) // sizes.clamp(min=1)
    key = strides[0] if in_memory_order else local
    order = key.masked_fill(absent, torch.iinfo(torch.int64).max).argsort(dim=1, stable=True)
    sizes, *strides = (values.gather(1, order) for values in (sizes, *strides, local))
    linear = (table[:, Layout.NDIM] == 0) | (
        (table[:, Layout.NDIM] == 1) & torch.stack([s[:, 0] for s in strides[:3]]).eq(1).all(0)
    )
    return torch.cat(
        [table[:, : Layout.NDIM], linear[:, None].to(torch.int64), sizes, *strides, _reciprocals(sizes)], 1
    )


def _reciprocals(sizes: Tensor) -> Tensor:
    """For n < 2**31 and 2 <= size < 2**31, n // size is the upper half of n * multiplier, shifted right.

    Granlund and Montgomery 1994, "Division by invariant integers using multiplication": with 2**(s-1) < size <= 2**s,
    the multiplier is 2**(31+s) / size, rounded up, and the shift is s - 1.
    """
    sizes = sizes.clamp(2, 2**31 - 1)
    s = (sizes - 1).double().log2().floor().long() + 1
    multiplier = -(-(torch.ones_like(sizes) << 31 + s) // sizes)
    return multiplier | s - 1 << 32


def indexing(rows: Tensor) -> dict[str, int | bool]:
    """What kernels are compiled for: DIMS, the most dimensions of a tensor that is not linear (0: all are), and WIDE.

    Without WIDE, a kernel counts positions, offsets and steps of the global index in 32 bits. ``rows``: of
    :func:`device_rows`.
    """
    rows = rows[(rows[:, DeviceRow.LINEAR] == 0) & (rows[:, DeviceRow.NUMEL] > 0)]
    if len(rows) == 0:
        return {"DIMS": 0, "WIDE": False}
    sizes = rows[:, DeviceRow.SIZE : DeviceRow.SIZE + MAX_DIMS]
    reach = [rows[:, DeviceRow.NUMEL]]
    for column in (DeviceRow.PARAM_STRIDE, DeviceRow.GRAD_STRIDE, DeviceRow.GLOBAL_STRIDE):
        reach.append(((sizes - 1).clamp(min=0) * rows[:, column : column + MAX_DIMS]).sum(1))
    wide = torch.stack(reach) >= 2**31 - 2**16  # a chunk's last pass reaches beyond the tensor
    return {"DIMS": int((sizes > 0).sum(1).max()), "WIDE": bool(wide.any())}
