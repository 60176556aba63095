"""Two epochs of Accelerate's own loop, for launchers: python accelerate_loop.py FOLDER PROCESSES. Every process leaves
FOLDER/PROCESSES-RANK.pt there, with its masks and parameters."""

import sys

import ranks
import sharded_transformer
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader

from graddrop_fused import GradDropAdamW, GradDropEpoch


def main(folder: str, processes: int) -> None:
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    assert accelerator.num_processes == processes
    model = sharded_transformer.model(torch.float64)
    opt = GradDropAdamW(sharded_transformer.groups(model), lr=1e-2, drop=GradDropEpoch(0.6, toggle=True), seed=3)
    tokens = torch.randint(0, sharded_transformer.VOCABULARY, (48, 6), generator=torch.Generator().manual_seed(0))
    loader = DataLoader(tokens, batch_size=8 // processes)
    model, wrapped, loader = accelerator.prepare(model, opt, loader)
    masks = []
    for epoch in range(2):
        opt.set_epoch(epoch)
        for batch in loader:
            with accelerator.accumulate(model):
                accelerator.backward(sharded_transformer.loss_of(model, batch))
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                wrapped.step()
                wrapped.zero_grad()
        masks.append([opt.keep_mask(p) for p in model.parameters()])
    parameters = [p.detach() for p in model.parameters()]
    torch.save((opt.draw, masks, parameters), f"{folder}/{processes}-{accelerator.process_index}.pt")
    ranks.rest()
    accelerator.end_training()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
