"""On a GPU: parity, captured graphs, streams, devices. Skipped, with the reason, where torch sees none."""

import parity
import pytest
import torch
from passes import several_passes

from graddrop_fused import mask_stream, triton_backend
from graddrop_fused.contract import Batch, Shard
from graddrop_fused.rules import MaskOnly

pytestmark = pytest.mark.gpu

# wide passes take 2048 elements of 4 bytes or 4096 of 2, and twice as many on a GPU with warps of 64
CASES = [*parity.CASES, *several_passes(triton_backend.CHUNK, 4096)]


@pytest.mark.parametrize("check", [parity.check_update, parity.check_mask, parity.check_pack])
@pytest.mark.parametrize("case", [c for c in CASES if c.param != torch.float64], ids=str)
def test_parity(check, case):
    check(triton_backend, case, device="cuda")


def test_known_answers():
    parity.check_known_answers(triton_backend, device="cuda")


@pytest.mark.parametrize(
    "case", [c for c in CASES if c.name in ("mixed-batch-adamw", "kinds-freeze-adamw-several-passes")], ids=str
)
def test_with_tables_on_the_device(case):
    parity.check_update(triton_backend, case, device="cuda", capturable=True)


def test_a_strided_tensor_beyond_32_bits():
    """Its kernel counts in 64 bits: a column of a matrix of more than 2**31 elements, 4 GiB in bfloat16."""
    rows, tail = 2**30 + 77, 5000
    if torch.cuda.mem_get_info()[0] < 6 << 30:
        pytest.skip("needs 6 GiB of free memory on the GPU")
    matrix = torch.zeros(rows, 2, dtype=torch.bfloat16, device="cuda")
    grads = [matrix[:, 1:]]
    grads[0].fill_(1.0)
    spec, rule = parity.Spec((rows, 1)), MaskOnly()
    integers, reals = torch.tensor([spec.integers()]), torch.tensor([spec.reals(rule)], dtype=torch.float64)
    batch = Batch(grads, [Shard.whole(spec.shape)], integers, reals, grads=grads)
    triton_backend.update(batch, rule, seed=3)
    assert not matrix[:, 0].any()
    random = mask_stream.element_random(torch.arange(rows - tail, rows), seed=3, draw=1, stream_id=0)
    assert torch.equal(matrix[-tail:, 1].cpu() != 0, mask_stream.decide(random, *spec.lo_span()))


def _model(device="cuda"):
    torch.manual_seed(0)
    return [torch.randn(n, device=device, requires_grad=True) for n in (1, 129, 4096, 50_001)]


def _optimizer(params, **options):
    from graddrop_fused import GradDrop, GradDropAdamW, LinearAnneal

    drop = GradDrop(anneal=LinearAnneal(start=0.9, total_steps=6))
    return GradDropAdamW(params, lr=1e-3, drop=drop, seed=3, backend="triton", **options)


def _grads(params, step):
    generator = torch.Generator(device="cpu").manual_seed(step)
    return [torch.randn(p.shape, generator=generator).to(p.device) for p in params]


def _eager(steps, device="cuda", absent=()):
    params = _model(device)
    optimizer = _optimizer(params)
    for step in range(steps):
        for i, (p, g) in enumerate(zip(params, _grads(params, step), strict=True)):
            p.grad = None if i in absent and step > 0 else g
        optimizer.step()
    return params


@pytest.mark.parametrize("absent", [(), (1, 3)], ids=["all-gradients", "absent-gradients"])
def test_a_captured_graph_follows_an_eager_loop_with_annealing(absent):
    params = _model()
    optimizer = _optimizer(params, capturable=True)
    for p, g in zip(params, _grads(params, 0), strict=True):
        p.grad = g
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        optimizer.step()  # step 0, and the warm-up
    torch.cuda.current_stream().wait_stream(side)
    for i in absent:
        params[i].grad = None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    for step in range(1, 8):
        for p, g in zip(params, _grads(params, step), strict=True):
            if p.grad is not None:
                p.grad.copy_(g)
        graph.replay()
    for actual, expected in zip(params, _eager(8, absent=absent), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


def test_a_stream_of_its_own():
    expected = _eager(3)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        actual = _eager(3)
    side.synchronize()
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a, b)


def test_a_second_device():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two devices")
    for a, b in zip(_eager(3, "cuda:1"), _eager(3, "cuda:0"), strict=True):
        assert torch.equal(a.cpu(), b.cpu())
