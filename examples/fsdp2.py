"""FSDP2: parameters sharded over processes. Every shard draws its part of the one mask; nothing is communicated for it.

Shows: fully_shard, named_parameters, and a checkpoint that another number of processes can load.
Run:   torchrun --nproc-per-node=2 examples/fsdp2.py
"""

import tempfile
import time

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from graddrop_fused import GradDropAdamW, GradDropEpoch

dist.init_process_group("gloo")
rank, world = dist.get_rank(), dist.get_world_size()
mesh = init_device_mesh("cpu", (world,))

torch.manual_seed(0)
layers = [torch.nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True) for _ in range(2)]
model = torch.nn.Sequential(torch.nn.Embedding(100, 32), *layers, torch.nn.Flatten(), torch.nn.Linear(8 * 32, 2))
for layer in layers:
    fully_shard(layer, mesh=mesh)
fully_shard(model, mesh=mesh)

optimizer = GradDropAdamW(model.named_parameters(), lr=1e-3, drop=GradDropEpoch(p=0.5), seed=0)
data = torch.randint(0, 100, (20, 64, 8), generator=torch.Generator().manual_seed(1))


def train(epoch: int) -> float:
    optimizer.set_epoch(epoch)
    for batch in data:
        own = batch.chunk(world)[rank]
        loss = torch.nn.functional.cross_entropy(model(own), own[:, 0] % 2)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return loss.item()


for epoch in range(2):
    loss = train(epoch)
    if rank == 0:
        print(f"epoch {epoch}: loss {loss:.3f} on the first process")

folder = [tempfile.mkdtemp()]
dist.broadcast_object_list(folder)
model_state, optimizer_state = get_state_dict(model, optimizer)
saving = dcp.async_save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=folder[0])
saving.result()  # training could go on meanwhile

first = train(2)
model_state, optimizer_state = get_state_dict(model, optimizer)
dcp.load({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=folder[0])
set_state_dict(model, optimizer, model_state_dict=model_state, optim_state_dict=optimizer_state)
again = train(2)
if rank == 0:
    print(f"epoch 2: loss {first:.6f}, and again from the checkpoint {again:.6f}")
assert first == again
time.sleep(0.5)  # gloo's threads free what the last backward pass left, before Python ends (docs/distributed.md)
dist.destroy_process_group()
