"""A run that is interrupted in the middle of an epoch goes on as if nothing had happened: same masks, same parameters.

Shows: state_dict and load_state_dict. Seed, draw, epoch and policy come back from the checkpoint, as plain numbers.
Run:   python examples/resuming.py
"""

import tempfile
from pathlib import Path

import torch

from graddrop_fused import GradDrop, GradDropAdamW, GradDropEpoch

EPOCHS, STEPS = 3, 10
checkpoint = Path(tempfile.mkdtemp()) / "checkpoint.pt"
data = torch.randint(0, 100, (EPOCHS, STEPS, 64, 8), generator=torch.Generator().manual_seed(1))


def build(drop):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Embedding(100, 32), torch.nn.Flatten(), torch.nn.Linear(8 * 32, 2))
    return model, GradDropAdamW(model.named_parameters(), lr=1e-2, drop=drop, seed=7)


def train(model, optimizer, begin=0, end=EPOCHS * STEPS):
    for step in range(begin, end):
        epoch, batch = divmod(step, STEPS)
        optimizer.set_epoch(epoch)
        tokens = data[epoch, batch]
        torch.nn.functional.cross_entropy(model(tokens), tokens[:, 0] % 2).backward()
        optimizer.step()
        optimizer.zero_grad()


whole, optimizer = build(GradDropEpoch(p=0.5, toggle=True))
train(whole, optimizer)

model, optimizer = build(GradDropEpoch(p=0.5, toggle=True))
train(model, optimizer, end=15)
torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": 15}, checkpoint)
del model, optimizer  # the process ends here, say

model, optimizer = build(GradDrop(p=0.1))  # the checkpoint's policy wins over this one
saved = torch.load(checkpoint, weights_only=True)
model.load_state_dict(saved["model"])
optimizer.load_state_dict(saved["optimizer"])
print(f"resumed at step {optimizer.draw} in epoch {optimizer.epoch} with {optimizer.param_groups[0]['drop']}")
train(model, optimizer, begin=saved["step"])

same = all(map(torch.equal, whole.parameters(), model.parameters()))
print(f"the same parameters, bit for bit: {same}")
assert same
