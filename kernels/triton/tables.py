"""The contract's enums as compile-time constants: jitted code sees no other kind of global."""

import triton.language as tl

from ...contract import MAX_FACTORS as _MAX_FACTORS
from ...contract import Effect, Integer, Mask, Real, Rounding
from ...device_rows import DeviceRow
from ...mask_stream import TILE as _TILE
from ...mask_stream import Purpose

TILE = tl.constexpr(_TILE)
MAX_FACTORS = tl.constexpr(_MAX_FACTORS)

# Purpose
FOR_ELEMENT = tl.constexpr(int(Purpose.ELEMENT))
FOR_LAYER = tl.constexpr(int(Purpose.LAYER))
FOR_GAUSSIAN = tl.constexpr(int(Purpose.GAUSSIAN))
FOR_BLOCK = tl.constexpr(int(Purpose.BLOCK))
FOR_ROUND_PARAM = tl.constexpr(int(Purpose.ROUND_PARAM))  # and the states' behind it

# Mask
KEEP = tl.constexpr(int(Mask.KEEP))
DROP = tl.constexpr(int(Mask.DROP))
ELEMENT = tl.constexpr(int(Mask.ELEMENT))
BLOCK = tl.constexpr(int(Mask.BLOCK))
LAYER = tl.constexpr(int(Mask.LAYER))
PACKED = tl.constexpr(int(Mask.PACKED))
GAUSSIAN = tl.constexpr(int(Mask.GAUSSIAN))

# one bit each, for KINDS (a constexpr stands on the left of &)
ELEMENT_BIT = tl.constexpr(1 << Mask.ELEMENT)
BLOCK_BIT = tl.constexpr(1 << Mask.BLOCK)
LAYER_BIT = tl.constexpr(1 << Mask.LAYER)
PACKED_BIT = tl.constexpr(1 << Mask.PACKED)
GAUSSIAN_BIT = tl.constexpr(1 << Mask.GAUSSIAN)

# Effect
GRADIENT = tl.constexpr(int(Effect.GRADIENT))
FREEZE = tl.constexpr(int(Effect.FREEZE))
UPDATE = tl.constexpr(int(Effect.UPDATE))

# Columns of Batch.integers
INTEGERS = tl.constexpr(len(Integer))
MASK_KIND = tl.constexpr(int(Integer.MASK))
EFFECT = tl.constexpr(int(Integer.EFFECT))
DRAW = tl.constexpr(int(Integer.DRAW))
STREAM_ID = tl.constexpr(int(Integer.STREAM_ID))
LO = tl.constexpr(int(Integer.LO))
SPAN = tl.constexpr(int(Integer.SPAN))
BLOCK_SIZE = tl.constexpr(int(Integer.BLOCK))

# Columns of Batch.reals
REALS = tl.constexpr(Real.columns())
GRAD_FACTOR = tl.constexpr(int(Real.GRAD_FACTOR))
NOISE_STD = tl.constexpr(int(Real.NOISE_STD))
FACTOR = tl.constexpr(int(Real.FACTOR))

# Columns of Batch.rounding
ROUNDINGS = tl.constexpr(len(Rounding))
ROUND_DRAW = tl.constexpr(int(Rounding.DRAW))
ROUND_STREAM_ID = tl.constexpr(int(Rounding.STREAM_ID))

# Columns of the layout table as it is on a device
ROW = tl.constexpr(DeviceRow.columns())
PARAM = tl.constexpr(int(DeviceRow.PARAM))
GRAD = tl.constexpr(int(DeviceRow.GRAD))
STATE = tl.constexpr(int(DeviceRow.STATE))
PACKED_WORDS = tl.constexpr(int(DeviceRow.PACKED))
BLOCK_FACTORS = tl.constexpr(int(DeviceRow.BLOCK_FACTORS))
NUMEL = tl.constexpr(int(DeviceRow.NUMEL))
OFFSET = tl.constexpr(int(DeviceRow.OFFSET))
LINEAR = tl.constexpr(int(DeviceRow.LINEAR))
SIZE = tl.constexpr(int(DeviceRow.SIZE))
PARAM_STRIDE = tl.constexpr(int(DeviceRow.PARAM_STRIDE))
GRAD_STRIDE = tl.constexpr(int(DeviceRow.GRAD_STRIDE))
GLOBAL_STRIDE = tl.constexpr(int(DeviceRow.GLOBAL_STRIDE))
LOCAL_STRIDE = tl.constexpr(int(DeviceRow.LOCAL_STRIDE))
RECIPROCAL = tl.constexpr(int(DeviceRow.RECIPROCAL))
