"""A small transformer of awkward sizes, its data, and the ways to spread it over ranks."""

import re

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

VOCABULARY, WIDTH, HIDDEN, HEADS = 37, 12, 30, 3
BATCH, LENGTH = 24, 5  # 24 sequences: the same number on each of 1, 2, 3, 4 or 8 ranks


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.attention = nn.Linear(WIDTH, 3 * WIDTH)
        self.up = nn.Linear(WIDTH, HIDDEN)
        self.down = nn.Linear(HIDDEN, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        heads = self.attention(self.norm(x)).unflatten(-1, (3, HEADS, -1)).transpose(1, 3)  # (batch, heads, 3, ...)
        x = x + scaled_dot_product_attention(*heads.unbind(2)).transpose(1, 2).flatten(2)
        return x + self.down(torch.relu(self.up(x)))


class Transformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x).clone()  # FSDP2 warns of views


def model(dtype: torch.dtype = torch.float32) -> Transformer:
    torch.manual_seed(0)
    return Transformer().to(dtype)


def batch(step: int) -> Tensor:
    """The batch of step ``step``: tokens, (24, 6)."""
    return torch.randint(0, VOCABULARY, (BATCH, LENGTH + 1), generator=torch.Generator().manual_seed(step))


def loss(of: nn.Module, step: int, part: int = 0, parts: int = 1) -> Tensor:
    """Mean loss over part ``part`` of ``parts`` of the batch of step ``step``."""
    return loss_of(of, batch(step).chunk(parts)[part])


def loss_of(of: nn.Module, tokens: Tensor) -> Tensor:
    return cross_entropy(of(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())


def groups(of: nn.Module) -> list[dict]:
    """One group, and layer, per block; embedding and head are layers of their own."""
    layers: dict[str, list] = {}
    for name, param in of.named_parameters():
        layer = re.match(r"(module\.)?(blocks\.\d|\w+)", name)[0]
        layers.setdefault(layer, []).append((name, param))
    return [{"params": params, "layer": layer} for layer, params in layers.items()]


def whole_index(of: nn.Module) -> None:
    """Let every parameter's elements be their own global indices, before the model is sharded."""
    for param in of.parameters():
        param.data.copy_(torch.arange(param.numel()).reshape(param.shape))


WAYS = {1: 1, 2: 2, 3: 3, 4: 2, 8: 2}  # world size -> size of the mesh dimension beside FSDP2's own


def fsdp(of: nn.Module, world: int) -> tuple[int, int]:
    """FSDP2. Returns (data-parallel rank, data-parallel size), as the others do."""
    mesh = init_device_mesh("cpu", (world,))
    _fully_shard(of, mesh)
    return mesh.get_local_rank(), world


def hsdp(of: nn.Module, world: int) -> tuple[int, int]:
    """FSDP2 within groups, replicas across them."""
    mesh = init_device_mesh("cpu", (WAYS[world], world // WAYS[world]), mesh_dim_names=("replicate", "shard"))
    _fully_shard(of, mesh)
    return torch.distributed.get_rank(), world


def fsdp_over_tensor_parallel(of: nn.Module, world: int) -> tuple[int, int]:
    mesh = init_device_mesh("cpu", (world // WAYS[world], WAYS[world]), mesh_dim_names=("data", "tensor"))
    plan = {
        "embedding": RowwiseParallel(input_layouts=Replicate()),
        "head": ColwiseParallel(output_layouts=Replicate()),
    }
    for block in ("blocks.0", "blocks.1"):
        plan |= {f"{block}.up": ColwiseParallel(), f"{block}.down": RowwiseParallel()}
    parallelize_module(of, mesh["tensor"], plan)
    _fully_shard(of, mesh["data"])
    return mesh["data"].get_local_rank(), mesh["data"].size()


def _fully_shard(of: nn.Module, mesh: DeviceMesh) -> None:
    for block in of.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(of, mesh=mesh)


SHARDINGS = {f.__name__: f for f in (fsdp, hsdp, fsdp_over_tensor_parallel)}
