"""What the coming step will do, drawn by the reference whatever the backend."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from . import reference
from .buckets import Bucket, make_buckets
from .clock import Clock
from .contract import Mask
from .groups import Layers, members
from .numbers import decided, rows_at
from .rules import MaskOnly
from .shards import like, local
from .tables import GroupStep, group_step


def keep_mask(groups: Sequence[Mapping[str, Any]], clock: Clock, param: Tensor) -> Tensor:
    """The mask that step ``clock.draw + 1`` applies to ``param``: bool, of its shape (a DTensor for a DTensor).

    Raises:
        TypeError: if ``param`` is no tensor. ValueError: if no group has it. RuntimeError: if the epoch is not known.
    """
    if not isinstance(param, Tensor):
        raise TypeError(f"param must be a parameter of this optimizer, got {param!r:.200}")
    every = members(groups)
    position = next((i for i, m in enumerate(every) if m.param is param), None)
    if position is None:
        raise ValueError(f"param must be a parameter of this optimizer, got a tensor of shape {tuple(param.shape)}")
    rule = MaskOnly()
    (bucket,) = make_buckets(groups, every, [position], lambda i: (rule, None, None), lambda p: reference, Bucket)
    g = every[position].group
    row, word = rows_at(groups, Layers.of(groups), clock, clock.next_draw())[g]
    step: GroupStep = group_step({**groups[g], "lr": 0.0}, rule, row, word)
    bucket.fill({g: step}, [1.0])
    mask, kept = like(param, torch.bool), reference.keep(bucket.batch, 0, clock.seed)
    local(mask).copy_(kept) if isinstance(kept, Tensor) else local(mask).fill_(kept)
    return mask


def dropped_layers(groups: Sequence[Mapping[str, Any]], clock: Clock) -> list[Tensor]:
    """The parameters that step ``clock.draw + 1`` drops as a whole, under LayerGradDrop and GradFreeze."""
    dropped: list[Tensor] = []
    layers = Layers.of(groups)
    rows = rows_at(groups, layers, clock, clock.next_draw())
    for group, layer, (row, word) in zip(groups, layers.of_group, rows, strict=True):
        if row.mask == Mask.LAYER:
            row = decided(row, word, clock.seed, layers.stream_ids[layer])
        if row.mask == Mask.DROP:
            dropped += group["params"]
    return dropped
