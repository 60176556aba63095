"""The Trainer in each of its ways with GradDropAdamW, for launchers: python trainer_loop.py FOLDER PROCESSES.

Every process leaves FOLDER/PROCESSES-RANK.pt there: {way: (draw, epoch, masks, parameters)}.
"""

import sys
import warnings

import ranks
import torch
import transformers as hf

from graddrop_fused import GradDrop, GradDropAdamW, GradDropEpoch, GradFreeze, LayerGradDrop
from graddrop_fused.skip import unwrap
from graddrop_fused.trainer import GradDropCallback, graddrop_optimizer

LAYERS = LayerGradDrop(p=0.5)
# policy, skip, resume, further training arguments. "plain" is the class with keywords, over the Trainer's own groups.
WAYS = {
    "every step": (GradDrop(p=0.3), False, False, {}),
    "text, every epoch": ("graddrop-epoch:p=0.6,toggle", False, False, {}),
    "plain class": ("plain", False, False, {}),
    "layers": (LAYERS, False, False, {}),
    "layers, skipped": (LAYERS, True, False, {}),
    "layers, skipped, checkpointing": (LAYERS, True, False, {"gradient_checkpointing": True}),
    "unfreezing, skipped, resumed": (GradFreeze("top-down"), True, True, {}),
    "accumulated": (LAYERS, True, False, {"gradient_accumulation_steps": 2}),
}


class Stop(hf.TrainerCallback):
    def on_step_end(self, args, state, control, **_):
        control.should_training_stop = state.global_step == 4


def trainer(folder: str, processes: int, way: str, *more) -> hf.Trainer:
    drop, skip, _, options = WAYS[way]
    torch.manual_seed(0)
    config = hf.BertConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, vocab_size=40,
        max_position_embeddings=20, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    ids = torch.randint(2, 40, (24, 8), generator=torch.Generator().manual_seed(1))
    arguments = {
        "per_device_train_batch_size": 4 // processes,
        "num_train_epochs": 2,
        "learning_rate": 1e-2,
        "save_steps": 4,
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "max_grad_norm": 0.0 if skip else 1.0,
        "ddp_find_unused_parameters": True,
        "logging_steps": 3,
        "average_tokens_across_devices": False,  # True doubles the gradients of two processes here
        **options,
    }
    args = hf.TrainingArguments(output_dir=f"{folder}/{processes}-{way}", **arguments)
    made = graddrop_optimizer(args, drop=None if drop == "plain" else drop, seed=7)
    if drop == "plain":
        made = GradDropAdamW, {"lr": 1e-2, "drop": GradDropEpoch(p=0.5), "seed": 7}
    return hf.Trainer(
        hf.BertForSequenceClassification(config).double(),  # AdamW makes whole steps of float32's noise
        args,
        train_dataset=[{"input_ids": row, "labels": row.sum() % 2} for row in ids],
        optimizer_cls_and_kwargs=made,
        callbacks=[GradDropCallback(skip_dropped_layers=skip), *more],
    )


def main(folder: str, processes: int) -> None:
    results = {}
    for way, (_, _, resume, _) in WAYS.items():
        if resume:
            trainer(folder, processes, way, Stop()).train()
        run = trainer(folder, processes, way)
        run.train(resume_from_checkpoint=resume or None)
        assert run.args.world_size == processes
        opt = unwrap(run.optimizer)
        masks = [opt.keep_mask(p) for group in opt.param_groups for p in group["params"]]
        assert all(p.requires_grad for p in run.model.parameters())
        results[way] = opt.draw, opt.epoch, masks, [p.detach() for p in run.model.parameters()]
    torch.save(results, f"{folder}/{processes}-{run.args.process_index}.pt")
    if torch.distributed.is_initialized():
        ranks.rest()
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    warnings.simplefilter("ignore")  # DDP and the collator have much to say; what counts is compared
    main(sys.argv[1], int(sys.argv[2]))
