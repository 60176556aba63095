"""What a mask does to AdamW's steps, on gradients that are drawn: how far they go together, and how much they scatter.

    python -m benchmarks.crosslingual.step_lengths

Each of 100,000 elements has gradients of mean 1 and standard deviation 3. Once the moments are warm, a step's mean over
elements is its drift, and the standard deviation of single elements' steps is its noise. The second table is about
elements that an epoch mask switches on after 1,000 steps without them.
"""

import sys

import torch

from graddrop_fused import GradDrop, GradDropAdamW, GradDropEpoch

from . import tables

ELEMENTS, WARM, MEASURED = 100_000, 1_000, 50
COLD = 50  # steps looked at after elements are switched on
BLOCK = 128  # elements of a block, which counts its own steps under "freeze"
PROBABILITIES = (0.1, 0.2, 0.5, 0.9)


def steps(drop: GradDrop | None) -> tuple[float, float]:
    """(drift, noise) of steps with learning rate 1."""
    generator = torch.Generator().manual_seed(0)
    param = torch.nn.Parameter(torch.zeros(ELEMENTS))
    optimizer = GradDropAdamW([param], lr=1.0, weight_decay=0.0, drop=drop, seed=0)
    drift, noise = [], []
    for step in range(WARM + MEASURED):
        param.grad = 1.0 + 3.0 * torch.randn(ELEMENTS, generator=generator)
        before = param.detach().clone()
        optimizer.step()
        if step >= WARM:
            moved = before - param.detach()
            drift.append(moved.mean().item())
            noise.append(moved.std().item())
    return sum(drift) / MEASURED, sum(noise) / MEASURED


def rows() -> tables.Rows:
    """Drift and noise by p, as shares of those without a mask."""
    drift, noise = steps(None)
    found = [["p", "sqrt(1 - p)", "drift, rescale=True", "drift, rescale=False", "noise", "drift / noise"]]
    for p in PROBABILITIES:
        (scaled, scatter), (plain, _) = steps(GradDrop(p)), steps(GradDrop(p, rescale=False))
        ratios = (scaled / drift, plain / drift, scatter / noise, scaled / drift / (scatter / noise))
        found.append([f"{p:g}", f"{(1 - p) ** 0.5:.2f}", *(f"{ratio:.2f}" for ratio in ratios)])
    return found


def cold_starts() -> tables.Rows:
    """How far elements move in the steps after they are switched on, as a multiple of those that were on before."""
    found = [["effect", f"root mean square of {COLD} steps' sum, new to old", "of the first step"]]
    for effect, block in (("gradient", 1), ("update", 1), ("freeze", 1), ("freeze", BLOCK)):
        generator = torch.Generator().manual_seed(0)
        param = torch.nn.Parameter(torch.zeros(ELEMENTS))
        drop = GradDropEpoch(0.5, rescale=False, block=block)  # half of the elements, then all
        optimizer = GradDropAdamW(
            [param], lr=1.0, weight_decay=0.0, drop=drop, seed=0, effect=effect, steps_per_epoch=WARM
        )
        old = optimizer.keep_mask(param)
        moved = []
        for step in range(WARM + COLD):
            if step == WARM:
                start = param.detach().clone()
            param.grad = 1.0 + 3.0 * torch.randn(ELEMENTS, generator=generator)
            optimizer.step()
            if step in (WARM, WARM + COLD - 1):
                moved.append(param.detach() - start)
        ratios = [(m[~old].square().mean() / m[old].square().mean()).sqrt().item() for m in reversed(moved)]
        found.append([effect if block == 1 else f"{effect}, block={block}", *(f"{ratio:.1f}" for ratio in ratios)])
    return found


if __name__ == "__main__":
    print(tables.markdown(rows()))
    print()
    print(tables.markdown(cold_starts()))
    sys.exit(0)
