"""Accelerate's own loop with fsdp_version 2 on CPUs, for torchrun: python accelerate_fsdp2.py FOLDER PROCESSES.

One process trains without FSDP. Rank 0 leaves FOLDER/PROCESSES.pt: draw, masks of two epochs and parameters, all whole.
"""

import sys
import warnings

import ranks
import sharded_transformer
import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from torch.utils.data import DataLoader

from graddrop_fused import GradDropAdamW, GradDropEpoch


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def main(folder: str, processes: int) -> None:
    plugin = None
    if processes > 1:
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2, reshard_after_forward=True, auto_wrap_policy="no_wrap", cpu_ram_efficient_loading=False
        )
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
    assert accelerator.num_processes == processes
    model = sharded_transformer.model(torch.float64)
    opt = GradDropAdamW(sharded_transformer.groups(model), lr=1e-2, drop=GradDropEpoch(0.6, toggle=True), seed=3)
    tokens = torch.randint(0, sharded_transformer.VOCABULARY, (24, 6), generator=torch.Generator().manual_seed(0))
    model, wrapped, loader = accelerator.prepare(model, opt, DataLoader(tokens, batch_size=8 // processes))
    masks = []
    for epoch in range(2):
        opt.set_epoch(epoch)
        for batch in loader:
            accelerator.backward(sharded_transformer.loss_of(model, batch))
            wrapped.step()
            wrapped.zero_grad()
        masks += [whole(opt.keep_mask(p)) for p in model.parameters()]
    parameters = [whole(p.detach()) for p in model.parameters()]
    if accelerator.is_main_process:
        torch.save((opt.draw, masks, parameters), f"{folder}/{processes}.pt")
    ranks.rest()
    accelerator.end_training()


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main(sys.argv[1], int(sys.argv[2]))
