"""A training loop of one's own: a transformers model, masks that change with the epoch, clipping, a schedule.

Shows: param_groups (no decay on biases and norms, layers by name), policies from the command line, set_epoch.
Run:   python examples/own_loop.py --drop graddrop-epoch:p=0.75
"""

import argparse

import torch
import transformers

from graddrop_fused import GradDropAdamW, param_groups, policy

parser = argparse.ArgumentParser()
parser.add_argument("--drop", type=policy, default="graddrop-epoch:p=0.75", help="a policy, such as graddrop:p=0.1")
parser.add_argument("--epochs", type=int, default=4)
options = parser.parse_args()

# A little text, one byte a token: which language is it?
ENGLISH = ["the cat sat on the mat", "where are you going", "it is raining again", "she reads a good book"]
FRENCH = ["le chat dort sur le lit", "ou est la gare", "il pleut encore", "elle lit un bon livre"]
texts = [text[: start + 12][start:] for text in ENGLISH + FRENCH for start in range(3)]
tokens = torch.tensor([list(text.ljust(12).encode()) for text in texts])
labels = torch.tensor([0] * 12 + [1] * 12)

torch.manual_seed(0)
config = transformers.BertConfig(
    vocab_size=256, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128
)
model = transformers.BertForSequenceClassification(config)  # from_pretrained(...) in earnest

optimizer = GradDropAdamW(param_groups(model, weight_decay=0.01, drop=options.drop), lr=2e-3, seed=0)
batches = 4
schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=options.epochs * batches)

for epoch in range(options.epochs):
    optimizer.set_epoch(epoch)  # policies that follow epochs must know; others take no notice
    model.train()
    total = 0.0
    for batch in torch.randperm(len(tokens)).chunk(batches):
        loss = model(input_ids=tokens[batch], labels=labels[batch]).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)  # of the whole gradient, before the masks
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        total += loss.item()
    kept = optimizer.keep_mask(model.bert.encoder.layer[0].attention.self.value.weight)
    print(f"epoch {epoch}: loss {total / batches:.3f}, {kept.float().mean():.0%} of a matrix active")

model.eval()
with torch.no_grad():
    accuracy = (model(input_ids=tokens).logits.argmax(1) == labels).float().mean()
print(f"accuracy on what it has seen: {accuracy:.2f}")
