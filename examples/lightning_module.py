"""Lightning: GradDropAdamW from configure_optimizers, and a callback that tells it the epoch.

Shows: GradDropCallback of graddrop_fused.lightning, with a learning-rate schedule beside it.
Run:   python examples/lightning_module.py          (needs lightning)
"""

import lightning.pytorch as pl
import torch
import transformers

from graddrop_fused import GradDropAdamW, GradDropEpoch, param_groups
from graddrop_fused.lightning import GradDropCallback


class Classifier(pl.LightningModule):
    def __init__(self):
        super().__init__()
        config = transformers.BertConfig(
            vocab_size=100, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128
        )
        self.model = transformers.BertForSequenceClassification(config)  # from_pretrained(...) in earnest

    def training_step(self, batch, index):
        loss = self.model(input_ids=batch, labels=batch[:, 0] % 2).loss
        self.log("loss", loss)
        return loss

    def on_train_epoch_end(self):
        loss = self.trainer.callback_metrics["loss"]
        print(f"epoch {self.current_epoch}: loss {loss:.3f}, optimizer in epoch {self.optimizers().optimizer.epoch}")

    def configure_optimizers(self):
        groups = param_groups(self.model, weight_decay=0.01, drop=GradDropEpoch(p=0.5))
        optimizer = GradDropAdamW(groups, lr=1e-3, seed=0)
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.8)}


if __name__ == "__main__":
    pl.seed_everything(0)
    data = torch.utils.data.DataLoader(torch.randint(0, 100, (256, 8)), batch_size=32)
    trainer = pl.Trainer(
        max_epochs=3,
        accelerator="cpu",
        precision="bf16-mixed",
        gradient_clip_val=1.0,
        callbacks=[GradDropCallback()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    trainer.fit(Classifier(), data)
