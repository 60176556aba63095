"""The layout table as GPU kernels read it: in the order of memory, with what a division needs prepared."""

from enum import IntEnum

import torch
from torch import Tensor

from .contract import MAX_DIMS, Layout


class DeviceRow(IntEnum):
    """Columns of a device's layout table: int64, shape (tensors, 45). As Layout, but for the order of dimensions."""

    PARAM = Layout.PARAM
    GRAD = Layout.GRAD
    STATE = Layout.STATE
    PACKED = Layout.PACKED
    NUMEL = Layout.NUMEL
    OFFSET = Layout.OFFSET
    NDIM = Layout.NDIM
    SIZE = Layout.SIZE  # from here on a column for each dimension, the outermost in memory first
    PARAM_STRIDE = Layout.PARAM_STRIDE
    GRAD_STRIDE = Layout.GRAD_STRIDE
    GLOBAL_STRIDE = Layout.GLOBAL_STRIDE
    LOCAL_STRIDE = Layout.GLOBAL_STRIDE + MAX_DIMS  # of the local tensor's row-major order, in which packed words lie
    RECIPROCAL = LOCAL_STRIDE + MAX_DIMS  # a multiplier and, from bit 32 on, a shift: see reciprocals()

    @classmethod
    def columns(cls) -> int:
        return cls.RECIPROCAL + MAX_DIMS


_DIMENSIONS = (Layout.SIZE, Layout.PARAM_STRIDE, Layout.GRAD_STRIDE, Layout.GLOBAL_STRIDE)


def device_rows(table: Tensor, in_memory_order: bool) -> Tensor:
    """A layout table (tensors, 33) -> the table of a device, both on the host.

    Args:
        in_memory_order: number elements as they lie in the parameter's memory, so that neighbouring threads access
            neighbouring addresses; else in row-major order, as packed words need it that are written.
    """
    dims = {column: table[:, column : column + MAX_DIMS] for column in _DIMENSIONS}
    absent = torch.arange(MAX_DIMS) >= table[:, Layout.NDIM, None]
    sizes = dims[Layout.SIZE].masked_fill(absent, 1)
    # products of the sizes further in
    local = sizes.flip(1).cumprod(1).flip(1) // sizes.clamp(min=1)
    if in_memory_order:
        key = torch.where(absent, -1, dims[Layout.PARAM_STRIDE])
        order = key.argsort(dim=1, descending=True, stable=True)
        dims = {column: values.gather(1, order) for column, values in dims.items()}
        local = local.gather(1, order)
    return torch.cat([table[:, : Layout.SIZE], *dims.values(), local, reciprocals(dims[Layout.SIZE])], 1)


def reciprocals(sizes: Tensor) -> Tensor:
    """For n < 2**31 and 2 <= size < 2**31, n // size is the upper half of n * multiplier, shifted right.

    Granlund and Montgomery 1994, "Division by invariant integers using multiplication": with 2**(s-1) < size <= 2**s,
    the multiplier is 2**(31+s) / size, rounded up, and the shift is s - 1.
    """
    sizes = sizes.clamp(2, 2**31 - 1)
    s = (sizes - 1).double().log2().floor().long() + 1
    multiplier = -(-(torch.ones_like(sizes) << 31 + s) // sizes)
    return multiplier | s - 1 << 32


def index_bits(rows: Tensor) -> int:
    """How wide indices must be where dimensions count: 0 where every tensor is linear, else 32 or 64.

    ``rows``: of :func:`device_rows`. Positions, offsets and steps of the global index must all stay below 2**31.
    """
    ndim = rows[:, DeviceRow.NDIM]
    sizes = rows[:, DeviceRow.SIZE : DeviceRow.SIZE + MAX_DIMS]
    columns = (DeviceRow.PARAM_STRIDE, DeviceRow.GRAD_STRIDE, DeviceRow.GLOBAL_STRIDE)
    linear = (ndim == 0) | ((ndim == 1) & (rows[:, list(columns)] == 1).all(1))
    if bool((linear | (rows[:, DeviceRow.NUMEL] == 0)).all()):
        return 0
    reach = [((sizes - 1).clamp(min=0) * rows[:, column : column + MAX_DIMS]).sum(1) for column in columns]
    widest = torch.stack([rows[:, DeviceRow.NUMEL], *reach]).amax(0)
    return 64 if bool((widest[~linear] >= 2**31 - 2**16).any()) else 32
