"""PEFT: masks on the adapters' weights, and masks on base weights that train beside them.

Shows: one policy for LoRA's matrices, another for the last block's own weights, none for the new head.
Run:   python examples/peft_lora.py                 (needs peft)
"""

import peft
import torch
import transformers

from graddrop_fused import GradDrop, GradDropAdamW

torch.manual_seed(0)
config = transformers.BertConfig(
    vocab_size=100, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128
)
model = transformers.BertForSequenceClassification(config)  # from_pretrained(...) in earnest
lora = peft.LoraConfig(task_type="SEQ_CLS", r=8, target_modules=["query", "value"], modules_to_save=["classifier"])
model = peft.get_peft_model(model, lora)
for name, param in model.named_parameters():
    if ".encoder.layer.1.output.dense." in name:  # a base weight that is trained, too
        param.requires_grad_(True)

adapters, base, head = [], [], []
for name, param in model.named_parameters():
    if param.requires_grad:
        where = adapters if "lora_" in name else head if "classifier" in name else base
        where.append((name, param))
optimizer = GradDropAdamW(
    [
        {"params": adapters, "drop": GradDrop(p=0.1)},
        {"params": base, "drop": GradDrop(p=0.9), "effect": "freeze", "lr": 5e-4},
        {"params": head},  # no policy: it is new and must learn
    ],
    lr=3e-3,
    seed=0,
)
print(f"{len(adapters)} adapter, {len(base)} base and {len(head)} head tensors")

model.train()
for step in range(61):
    tokens = torch.randint(0, 100, (32, 8))
    loss = model(input_ids=tokens, labels=tokens[:, 0] % 2).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if step % 20 == 0:
        print(f"step {step:2d}: loss {loss.item():.3f}")
for kind, group in zip(("adapters", "base", "head"), optimizer.param_groups, strict=True):
    kept = torch.cat([optimizer.keep_mask(p).flatten() for p in group["params"]]).float().mean()
    print(f"{kind}: {kept:.0%} of the elements move in the coming step")
