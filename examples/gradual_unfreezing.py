"""Gradual unfreezing: the head alone in the first epoch, and one more layer from the top in each that follows.

Shows: GradFreeze over the model's layers, and skip_dropped_layers, by which frozen layers cost no gradients.
Run:   python examples/gradual_unfreezing.py
"""

import torch
import transformers

from graddrop_fused import GradDropAdamW, GradFreeze, param_groups, skip_dropped_layers

torch.manual_seed(0)
config = transformers.BertConfig(
    vocab_size=100, hidden_size=64, num_hidden_layers=3, num_attention_heads=4, intermediate_size=128
)
model = transformers.BertForSequenceClassification(config).train()  # from_pretrained(...) in earnest
groups = param_groups(model, drop=GradFreeze("top-down"))
optimizer = GradDropAdamW(groups, lr=1e-3, seed=0)

with skip_dropped_layers(model, optimizer):
    for epoch in range(5):
        optimizer.set_epoch(epoch)
        for _ in range(10):
            tokens = torch.randint(0, 100, (32, 8))
            loss = model(input_ids=tokens, labels=tokens[:, 0] % 2).loss
            loss.backward()
            with_gradient = sum(p.grad is not None for p in model.parameters())
            optimizer.step()
            optimizer.zero_grad()
        frozen = set(optimizer.dropped_layers())
        active = dict.fromkeys(g["layer"] for g in groups if not frozen.issuperset(p for _, p in g["params"]))
        print(f"epoch {epoch}: loss {loss.item():.3f}, {with_gradient} gradients, active: {', '.join(active)}")
