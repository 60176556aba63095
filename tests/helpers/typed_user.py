"""What a user writes, for `make lint`: mypy --strict must accept it with the types that the package declares."""

from pathlib import Path

import torch
from torch import Tensor, nn

from graddrop_fused import (
    GradDrop,
    GradDropAdamW,
    GradDropEpoch,
    LayerGradDrop,
    LinearAnneal,
    MaskHandle,
    Policy,
    StaticMask,
    attach,
    keep_mask,
    pack_mask,
    param_groups,
    unpack_mask,
)


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
