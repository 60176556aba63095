"""One optimizer step on a GPU: ours against torch's, on the same tensors, in turns.

    python -m benchmarks.gpu_step                      # XLM-R Large, 560 M elements: needs 10 GB
    python -m benchmarks.gpu_step --population small   # 1,000 tensors of 1,000 elements
    python -m benchmarks.gpu_step --dtype bfloat16

All contestants share parameters, gradients and state, and each call ends with a synchronisation. Printed are medians
over turns of the ratio to torch.optim.AdamW(fused=True), with quartiles, and the share of the memory's rate: bytes that
a step must move, over its time, against plain copies in the same turns. Nothing is timed before ours has computed what
torch computes.
"""

import argparse
from collections.abc import Callable

import torch

from benchmarks import harness, populations
from graddrop_fused import GradDrop, GradDropAdamW, GradDropEpoch, triton_backend

BASE, FLOOR = "torch fused", "copies"
LR, P = 1e-5, 0.1


class Tensors:
    """What all contestants share: parameters with gradients, and AdamW's state as after 10 steps."""

    def __init__(self, shapes, dtype: torch.dtype, device: torch.device):
        generator = torch.Generator(device).manual_seed(0)

        def normal(shape, std):
            return torch.randn(shape, device=device, generator=generator).mul_(std).to(dtype)

        self.device = device
        self.params = [normal(shape, 0.02).requires_grad_() for shape in shapes]
        for param in self.params:
            param.grad = normal(param.shape, 1e-3)
        self.exp_avgs = [torch.zeros_like(p) for p in self.params]
        self.exp_avg_sqs = [torch.full_like(p, 1e-6) for p in self.params]

    @property
    def elements(self) -> int:
        return sum(p.numel() for p in self.params)

    @property
    def step_bytes(self) -> int:
        """What an unmasked step reads (p, g, m, v) and writes (p, m, v)."""
        return 7 * self.elements * self.params[0].element_size()

    def give(self, optimizer, steps_on: torch.device | str = "cpu"):
        for param, m, v in zip(self.params, self.exp_avgs, self.exp_avg_sqs, strict=True):
            optimizer.state[param] = {"step": torch.tensor(10.0, device=steps_on), "exp_avg": m, "exp_avg_sq": v}
        return optimizer

    def torchs(self, **how):
        # torch's fused step wants its counts on the device, its foreach step on the host
        return self.give(torch.optim.AdamW(self.params, lr=LR, **how), self.device if "fused" in how else "cpu")

    def ours(self, backend: str, **arguments):
        return self.give(GradDropAdamW(self.params, lr=LR, backend=backend, **arguments))


def contestants(tensors: Tensors, backend: str) -> dict[str, Callable[[], object]]:
    """Name -> one step, or what stands beside it."""
    fused, foreach = tensors.torchs(fused=True), tensors.torchs(foreach=True)
    epoch = tensors.ours(backend, drop=GradDropEpoch(p=P))
    epoch.set_epoch(0)

    def mask_then_fused():
        for param in tensors.params:
            param.grad.mul_(torch.bernoulli(torch.full_like(param.grad, 1 - P))).div_(1 - P)
        fused.step()

    copied = tensors.step_bytes // 2  # a copy reads and writes
    times = -(-copied // (1 << 28))
    source = torch.zeros(copied // times, dtype=torch.uint8, device=tensors.device)
    target = torch.empty_like(source)

    def copies():
        for _ in range(times):
            target.copy_(source)

    return {
        BASE: fused.step,
        "torch foreach": foreach.step,
        "mask, then torch fused": mask_then_fused,
        "GradDrop, new mask every step": tensors.ours(backend, drop=GradDrop(p=P)).step,
        "GradDropEpoch, packed mask": epoch.step,
        "no mask": tensors.ours(backend).step,
        "GradDrop, block=1024, p=0.9, freeze": tensors.ours(
            backend, drop=GradDrop(p=0.9, block=1024), effect="freeze"
        ).step,
        FLOOR: copies,
    }


def check(dtype: torch.dtype, device: torch.device, backend: str) -> None:
    """The gate: with no mask ours is torch's step, and with a mask it is torch's step on masked gradients."""
    results = {}
    for name in ("torch", "ours", "ours masked", "torch masked"):
        tensors = Tensors([(1000,), (17, 23), (129, 128)], dtype, device)
        ours = tensors.ours(backend, drop=GradDrop(p=0.5) if "masked" in name else None)
        if name == "torch masked":
            for param in tensors.params:
                param.grad = torch.where(ours.keep_mask(param), param.grad * 2, 0)
        (ours if name.startswith("ours") else tensors.torchs(fused=True)).step()
        results[name] = [p.detach() for p in tensors.params]
    rtol, atol = (1e-5, 1e-8) if dtype == torch.float32 else (2e-2, 1e-4)
    harness.assert_close("ours, no mask", results["ours"], results["torch"], rtol, atol)
    harness.assert_close("ours, masked", results["ours masked"], results["torch masked"], rtol, atol)


def table(shapes, dtype: torch.dtype, device: torch.device, backend: str, turns: int) -> list[str]:
    """Check, then time: the table's lines. Raises AssertionError before any timing if ours computes something else."""
    check(dtype, device, backend)
    tensors = Tensors(shapes, dtype, device)

    def finished(call):
        def run():
            call()
            if device.type == "cuda":
                torch.cuda.synchronize(device)

        return run

    steps = {name: finished(call) for name, call in contestants(tensors, backend).items()}
    timing = harness.take_turns(steps, turns)
    lines = [
        f"{len(tensors.params)} tensors, {tensors.elements:,} elements, {str(dtype)[6:]}, {turns} turns",
        "",
        f"| step | time / {BASE} | quartiles | ms | share of the memory's rate |",
        "|---|---|---|---|---|",
    ]
    for name in timing.seconds:
        middle, low, high = timing.ratio(name, BASE)
        share = 1 / timing.ratio(name, FLOOR)[0]
        lines.append(
            f"| {name} | {middle:.2f} | {low:.2f} to {high:.2f} | {timing.median(name) * 1e3:.2f} | {share:.2f} |"
        )
    return lines


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--population", choices=populations.POPULATIONS, default="xlmr-large")
    parser.add_argument("--elements", default="all", help="how many, or 'all'")
    parser.add_argument("--turns", type=int, default=21)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    options = parser.parse_args()
    device = torch.device("cuda")
    if reason := triton_backend.unavailable(device):
        parser.exit(1, f"nothing to time: {reason}\n")
    elements = None if options.elements == "all" else int(float(options.elements))
    shapes = populations.shapes(options.population, elements)
    lines = table(shapes, getattr(torch, options.dtype), device, "triton", options.turns)
    print(f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}; {options.population}:", *lines, sep="\n")


if __name__ == "__main__":
    main()
