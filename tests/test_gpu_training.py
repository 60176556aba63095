"""Training loops on a device follow the reference: GradScaler, two optimizers, more than 2**31 elements.

The same loops run on the CPU's own backend everywhere, so that a GPU meets no test for the first time.
"""

import pytest
import torch

from graddrop_fused import GradDrop, GradDropAdamW, GradDropEpoch, cpu, mask_stream
from graddrop_fused.names import stream_id

needs_op = pytest.mark.skipif(
    cpu.unavailable(torch.device("cpu")) is not None, reason="the native CPU op is not built here"
)
PLACES = [
    pytest.param(("cpu", "cpu"), marks=needs_op, id="cpu"),
    pytest.param(("cuda", "triton"), marks=pytest.mark.gpu, id="cuda"),
]


def model(device: str) -> torch.nn.Module:
    torch.manual_seed(0)
    layers = [torch.nn.Linear(33, 129), torch.nn.Tanh(), torch.nn.Linear(129, 257), torch.nn.Linear(257, 3)]
    return torch.nn.Sequential(*layers).to(device)


def batch(step: int, device: str) -> torch.Tensor:
    return torch.randn(8, 33, generator=torch.Generator().manual_seed(step)).to(device)


def assert_same(ours: torch.nn.Module, expected: torch.nn.Module) -> None:
    for (name, a), b in zip(ours.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(a.cpu(), b.cpu(), rtol=1e-4, atol=1e-5, msg=lambda text, of=name: f"{of}: {text}")


def with_scaler(device: str, backend: str) -> tuple[torch.nn.Module, list[float]]:
    """Six steps, of which the scaler must skip the third. Returns the model and the scales."""
    net = model(device)
    optimizer = GradDropAdamW(net.named_parameters(), lr=1e-3, drop=GradDrop(p=0.3), seed=5, backend=backend)
    scaler = torch.amp.GradScaler(device, init_scale=2.0**12)
    scales = []
    for step in range(6):
        optimizer.zero_grad()
        loss = net(batch(step, device)).square().mean()
        scaler.scale(loss * (float("inf") if step == 2 else 1.0)).backward()
        before = [p.detach().clone() for p in net.parameters()]
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
        if step == 2:
            assert all(torch.equal(p, old) for p, old in zip(net.parameters(), before, strict=True))
    return net, scales


@pytest.mark.parametrize("place", PLACES)
def test_grad_scaler(place):
    ours, scales = with_scaler(*place)
    expected, its_scales = with_scaler("cpu", "reference")
    assert scales == its_scales and scales[2] < scales[1]
    assert_same(ours, expected)


def with_two(device: str, backend: str) -> torch.nn.Module:
    """Two optimizers of one model, whose steps alternate; one accumulates two micro-batches."""
    net = model(device)
    named = list(net.named_parameters())
    common = {"lr": 1e-3, "backend": backend}
    first = GradDropAdamW(named[:3], drop=GradDrop(p=0.5), seed=1, **common)
    second = GradDropAdamW(named[3:], drop=GradDropEpoch(p=0.5), seed=2, steps_per_epoch=2, **common)
    for step in range(6):
        net(batch(step, device)).square().mean().backward()
        first.step()
        first.zero_grad()
        if step % 2:
            second.step()
            second.zero_grad()
    return net


@pytest.mark.parametrize("place", PLACES)
def test_two_optimizers(place):
    assert_same(with_two(*place), with_two("cpu", "reference"))


@pytest.mark.gpu
@pytest.mark.slow
def test_a_step_beyond_32_bits():
    """The last elements of one tensor with more than 2**31: their masks, and torch's own step of what is kept."""
    n, tail = 2**31 + 1000, 4000
    if torch.cuda.mem_get_info()[0] < 10 * n:
        pytest.skip("needs 20 GiB of free device memory")
    param = torch.nn.Parameter(torch.ones(n, dtype=torch.bfloat16, device="cuda"))
    param.grad = torch.full_like(param, 0.5)
    options = {"lr": 0.125, "weight_decay": 0.0}
    GradDropAdamW([("weight", param)], drop=GradDrop(p=0.5), seed=5, backend="triton", **options).step()
    random = mask_stream.element_random(torch.arange(n - tail, n), seed=5, draw=1, stream_id=stream_id("weight"))
    kept = mask_stream.decide(random, *mask_stream.bernoulli_window(0.5))
    moved = param.detach()[-tail:].cpu() != 1
    assert torch.equal(moved, kept)
    # the first step of AdamW is lr, whatever the gradient
    torch.testing.assert_close(param.detach()[-tail:].cpu()[kept], torch.full((int(kept.sum()),), 0.875).bfloat16())
