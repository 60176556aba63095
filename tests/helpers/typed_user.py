"""What a user writes, for `make lint`: mypy must accept it, strictly, with the types that the package declares.

``assert_type`` fails where a public name's type is another, or is unknown (Any).
"""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from typing_extensions import assert_type

from graddrop_fused import (
    GradDrop,
    GradDropAdamW,
    GradDropEpoch,
    GradDropLion,
    GradDropSGD,
    GradFreeze,
    LayerGradDrop,
    LinearAnneal,
    MaskHandle,
    Policy,
    Schedule,
    StaticMask,
    attach,
    describe,
    keep_mask,
    pack_mask,
    param_groups,
    philox4x32,
    policy,
    policy_to_text,
    release_gradients,
    skip_dropped_layers,
    skip_dropped_rows,
    unpack_mask,
)
from graddrop_fused.describe import Description, LayerRow
from graddrop_fused.log_values import log_values
from graddrop_fused.release import ReleasedGradients
from graddrop_fused.rows import SkippedRows
from graddrop_fused.skip import SkippedLayers
from graddrop_fused.trainer import GradDropCallback, graddrop_optimizer


def fine_tune(model: nn.Module, batches: list[Tensor], checkpoint: Path) -> float:
    policy: Policy = GradDrop(anneal=LinearAnneal(start=0.9, total_steps=len(batches)))
    optimizer = GradDropAdamW(model.named_parameters(), lr=1e-5, weight_decay=0.01, drop=policy, seed=0)
    loss = torch.zeros(())
    for batch in batches:
        loss = model(batch).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.save(optimizer.state_dict(), checkpoint)
    optimizer.load_state_dict(torch.load(checkpoint, weights_only=True))
    return loss.item()


def by_epoch(model: nn.Module) -> Tensor:
    optimizer = GradDropAdamW(model.parameters(), drop=GradDropEpoch(p=0.7, toggle=True))
    optimizer.set_epoch(3)
    return optimizer.keep_mask(next(model.parameters()))


def by_layer(model: nn.Module) -> torch.optim.Optimizer:
    return GradDropAdamW(param_groups(model, drop=LayerGradDrop(p=0.5)), lr=1e-5)


def another_optimizer(model: nn.Module) -> MaskHandle:
    masks = {name: torch.rand(p.shape) < 0.5 for name, p in model.named_parameters()}
    assert masks and StaticMask(masks)
    return attach(torch.optim.SGD(model.parameters(), lr=0.1), drop=GradDrop(p=0.1), seed=1)


def masks_alone() -> bool:
    kept = keep_mask((17, 23), 0.1, seed=0, draw=1)
    return torch.equal(unpack_mask(pack_mask(kept), kept.shape), kept)


def the_clock(optimizer: GradDropAdamW, p: nn.Parameter) -> None:
    assert_type(optimizer.draw, int)
    assert_type(optimizer.seed, int)
    assert_type(optimizer.epoch, int | None)
    assert_type(optimizer.keep_mask(p), Tensor)
    assert_type(optimizer.dropped_layers(), list[Tensor])
    assert_type(optimizer.state_dict(), dict[str, Any])
    assert_type(log_values(optimizer), dict[str, float])
    optimizer.set_epoch(3)


def handles(model: nn.Module, optimizer: GradDropAdamW) -> None:
    assert_type(skip_dropped_layers(model, optimizer), SkippedLayers)
    assert_type(release_gradients(model, optimizer), ReleasedGradients)
    with skip_dropped_rows(model, optimizer) as rows:
        assert_type(rows, SkippedRows)
        assert_type(rows.modules, list[nn.Linear | nn.Embedding])
    handle = attach(torch.optim.SGD(model.parameters(), lr=0.1), drop=GradDrop(p=0.1))
    assert_type(handle.keep_mask(next(model.parameters())), Tensor)
    handle.remove()


def tables(model: nn.Module) -> None:
    assert_type(param_groups(model, drop=LayerGradDrop(p=0.5)), list[dict[str, Any]])
    table = describe(param_groups(model, drop=GradFreeze("top-down")))
    assert_type(table, Description)
    assert_type(table.rows, list[LayerRow])
    assert_type(table.rows[0].active, float | None)


def texts(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--drop", type=policy)
    assert_type(policy("graddrop:p=0.1"), Policy | None)
    assert_type(policy_to_text(GradDrop(p=0.1)), str)


def others(model: nn.Module) -> list[torch.optim.Optimizer]:
    schedule = torch.optim.lr_scheduler.LinearLR(GradDropSGD(model.named_parameters(), lr=0.1, momentum=0.9))
    schedule.step()
    return [GradDropLion(model.parameters(), lr=1e-4, drop=GradDropEpoch(p=0.5)), schedule.optimizer]


def words(counter: Tensor, key: Tensor) -> Tensor:
    return assert_type(philox4x32(counter, key), Tensor)


@dataclass(frozen=True)
class Halving(Schedule):
    """A schedule of one's own."""

    start: float

    @property
    def by(self) -> Literal["epoch", "step"]:
        return "epoch"

    @property
    def length(self) -> int:
        return 10

    def p(self, index: int) -> float:
        return self.start * 0.5**index


def trainers(args: Any) -> tuple[type, dict[str, Any]]:
    GradDropCallback(skip_dropped_rows=True, log=False)
    return assert_type(graddrop_optimizer(args, drop=GradDrop(anneal=Halving(0.9))), tuple[type, dict[str, Any]])
