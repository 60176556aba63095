"""What users would pick instead. Each is one declaration: add a peer here.

Peers other than torch's own are optional: benchmarks/requirements-peers.txt installs those that run on a CPU.
"""

import torch
from torch.nn import functional as F

from benchmarks.contestant import LR, Contestant, P, one_pass
from benchmarks.gate import Claim, MaskClaim
from benchmarks.tensors import Tensors

BASE = "torch fused"
COMPOSED = "torch.bernoulli, then torch fused"
MASKED = Claim(p=P)
# Magma: a whole tensor moves or not, with probability 1/2; one that moves does so by 0.9 + 0.1 * sigmoid(cos / 2), in
# its first step with cos = 1; moments take the whole gradient
MAGMA = Claim(p=0.5, rescale=0.9 + 0.1 * torch.sigmoid(torch.tensor(0.5, dtype=torch.float64)).item(), effect="update")
MAGMA_TENSORS = Claim(MAGMA.p, MAGMA.rescale, MAGMA.effect, unit=None)


def adamw(tensors: Tensors, **arguments):
    return tensors.give(torch.optim.AdamW(tensors.params, lr=LR, **arguments))


def fused(tensors: Tensors):
    # torch's fused step wants its counts on the device, foreach and the for-loop on the host
    optimizer = torch.optim.AdamW(tensors.params, lr=LR, fused=True)
    return tensors.give(optimizer, lambda count: torch.tensor(count, device=tensors.device))


def masked_by(mask):
    """``mask(gradient)`` in place for every gradient, then torch's fused step."""

    def build(tensors: Tensors):
        optimizer = fused(tensors)

        def step():
            for param in tensors.params:
                mask(param.grad)
            optimizer.step()

        return step

    return build


def bernoulli(grad):
    grad.mul_(torch.bernoulli(torch.full_like(grad, 1 - P))).div_(1 - P)


def dropout(grad):
    F.dropout(grad, P, training=True, inplace=True)


def child_tuning(grad):
    """As in Child-Tuning-F: a sample of torch.distributions.Bernoulli, divided by what is reserved."""
    grad.mul_(torch.distributions.Bernoulli(grad.new_full(grad.shape, 1 - P)).sample() / (1 - P))


def dropgrad(tensors: Tensors):
    from dropgrad import DropGrad

    return DropGrad(fused(tensors), drop_rate=P).step


def magma_optimizer(tensors: Tensors):
    from magma import Magma

    return Magma(fused(tensors)).step


def pytorch_optimizer(tensors: Tensors):
    from pytorch_optimizer.optimizer.magma import Magma

    return Magma(fused(tensors)).step


def deepspeed(tensors: Tensors):
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    return tensors.give(DeepSpeedCPUAdam(tensors.params, lr=LR, weight_decay=1e-2), count=int).step


def apex(tensors: Tensors):
    from apex.optimizers import FusedAdam

    return FusedAdam(tensors.params, lr=LR, weight_decay=1e-2, adam_w_mode=True).step


def flashoptim(tensors: Tensors):
    from flashoptim import FlashAdamW

    # it keeps corrections to low-precision parameters, and refuses to for float32 ones
    bits = None if tensors.dtype == torch.float32 else 24
    return FlashAdamW(tensors.params, lr=LR, weight_decay=1e-2, master_weight_bits=bits).step


def torchao(tensors: Tensors):
    from torchao.optim import AdamW8bit

    return AdamW8bit(tensors.params, lr=LR, weight_decay=1e-2).step


def bitsandbytes(tensors: Tensors):
    from bitsandbytes.optim import AdamW8bit

    return AdamW8bit(tensors.params, lr=LR, weight_decay=1e-2).step


CPU, GPU = ("cpu",), ("cuda",)
OWN = Claim(own_state=True)

PEERS = [
    Contestant(BASE, lambda t: fused(t).step, traffic=one_pass),
    Contestant("torch fused, state like parameters", lambda t: fused(t).step, own_moments=True, traffic=one_pass),
    Contestant("torch foreach", lambda t: adamw(t, foreach=True).step),
    Contestant("torch for-loop", lambda t: adamw(t, foreach=False, fused=False).step),
    Contestant(COMPOSED, masked_by(bernoulli), MASKED, spoils_gradients=True),
    Contestant("F.dropout, then torch fused", masked_by(dropout), MASKED, spoils_gradients=True),
    Contestant("Child-Tuning-F, then torch fused", masked_by(child_tuning), MASKED, spoils_gradients=True),
    Contestant(
        "dropgrad, torch fused",
        dropgrad,
        MASKED,
        spoils_gradients=True,
        module="dropgrad",
        install="pip install --no-deps dropgrad==0.1.0",  # it asks for a package called pytorch, which does not install
    ),
    Contestant(
        "magma-optimizer, torch fused",
        magma_optimizer,
        MAGMA_TENSORS,
        module="magma",
        install="pip install magma-optimizer==0.1.1",
    ),
    Contestant(
        "pytorch-optimizer's Magma, torch fused",
        pytorch_optimizer,
        MAGMA_TENSORS,
        module="pytorch_optimizer",
        install="pip install pytorch-optimizer==4.1.0",
    ),
    Contestant(
        "DeepSpeedCPUAdam",
        deepspeed,
        devices=CPU,
        module="deepspeed",
        install="pip install deepspeed==0.19.8",
        traffic=one_pass,
    ),
    Contestant(
        "apex FusedAdam",
        apex,
        OWN,
        devices=GPU,
        module="apex.optimizers",
        install="build it from https://github.com/NVIDIA/apex (the package apex of PyPI is another)",
    ),
    Contestant(
        "FlashOptim FlashAdamW",
        flashoptim,
        OWN,
        devices=GPU,
        module="flashoptim",
        install="pip install flashoptim==0.1.4",
    ),
    Contestant("torchao AdamW8bit", torchao, OWN, devices=GPU, module="torchao", install="pip install torchao==0.18.0"),
    Contestant(
        "bitsandbytes AdamW8bit",
        bitsandbytes,
        OWN,
        devices=GPU,
        module="bitsandbytes",
        install="pip install bitsandbytes==0.50.2",
    ),
]


def _in_place(draw):
    """Draws into tensors made once."""

    def build(tensors: Tensors):
        outs = [torch.empty_like(p, requires_grad=False) for p in tensors.params]

        def step():
            for out in outs:
                draw(out)
            return outs

        return step

    return build


def _rand_compare(tensors: Tensors):
    return lambda: [torch.rand_like(p, requires_grad=False) >= P for p in tensors.params]


def _bool_bernoulli(tensors: Tensors):
    outs = [torch.empty(p.shape, dtype=torch.bool) for p in tensors.params]

    def step():
        for out in outs:
            out.bernoulli_(1 - P)
        return outs

    return step


MASKS = [
    Contestant("Tensor.bernoulli_, float32", _in_place(lambda out: out.bernoulli_(1 - P)), MaskClaim(P)),
    Contestant("Tensor.bernoulli_, bool", _bool_bernoulli, MaskClaim(P)),
    Contestant("torch.rand >= p", _rand_compare, MaskClaim(P)),
]
