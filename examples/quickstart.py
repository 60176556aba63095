import torch

from graddrop_fused import GradDrop, GradDropAdamW

torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Embedding(100, 32), torch.nn.Flatten(), torch.nn.Linear(8 * 32, 2))
optimizer = GradDropAdamW(model.named_parameters(), lr=1e-2, drop=GradDrop(p=0.1), seed=0)

for step in range(201):
    tokens = torch.randint(0, 100, (64, 8))
    loss = torch.nn.functional.cross_entropy(model(tokens), tokens[:, 0] % 2)  # is the first token odd?
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if step % 50 == 0:
        print(f"step {step:3d}: loss {loss.item():.3f}")
