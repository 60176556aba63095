"""Hugging Face's Trainer: whole layers are dropped, cost nothing while they are, and the log says how many.

Shows: graddrop_optimizer, GradDropCallback. The Trainer's own learning_rate, weight_decay and schedule hold.
Run:   python examples/hf_trainer.py
"""

import tempfile

import torch
import transformers

from graddrop_fused.trainer import GradDropCallback, graddrop_optimizer

torch.manual_seed(0)
config = transformers.BertConfig(
    vocab_size=100, hidden_size=64, num_hidden_layers=4, num_attention_heads=4, intermediate_size=128
)
model = transformers.BertForSequenceClassification(config)  # from_pretrained(...) in earnest
rows = torch.randint(0, 100, (256, 8))
data = [{"input_ids": row, "labels": row[0] % 2} for row in rows]

args = transformers.TrainingArguments(
    output_dir=tempfile.mkdtemp(),
    num_train_epochs=3,
    per_device_train_batch_size=32,
    learning_rate=1e-3,
    logging_strategy="epoch",
    save_strategy="no",
    report_to="none",
    disable_tqdm=True,
    use_cpu=True,
    dataloader_pin_memory=False,
    max_grad_norm=0,  # skipping needs it: a norm of all gradients would lack those of dropped layers
)
trainer = transformers.Trainer(
    model,
    args,
    train_dataset=data,
    optimizer_cls_and_kwargs=graddrop_optimizer(args, drop="layer-graddrop:p=0.5", seed=0),
    callbacks=[GradDropCallback(skip_dropped_layers=True)],
)
trainer.train()
