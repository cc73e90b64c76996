"""QAT by the Trainer of transformers. The model stays bare: the Trainer is told how to batch, and what to minimize."""

import dataclasses

import torch
from photos import photos
from torch.nn.functional import cross_entropy
from transformers import Trainer, TrainingArguments

import qswin


def collate(samples):
    images, labels = zip(*samples, strict=True)
    return {"x": torch.stack(images), "labels": torch.tensor(labels)}  # x is what the model's forward calls it


def loss(logits, labels, num_items_in_batch):
    return cross_entropy(logits, labels, reduction="sum") / num_items_in_batch  # of all ranks and accumulated steps


model, description = qswin.load_checkpoint("ptq.safetensors")
arguments = TrainingArguments(
    "hugging_face",
    num_train_epochs=4,
    per_device_train_batch_size=8,
    learning_rate=1e-4,
    lr_scheduler_type="constant",
    max_grad_norm=0.0,
    remove_unused_columns=False,
    report_to="none",
)
trainer = Trainer(
    model,
    arguments,
    data_collator=collate,
    train_dataset=photos(description.preprocessing),
    compute_loss_func=loss,
)
trainer.train()

qswin.save_checkpoint("hugging_face.safetensors", model, dataclasses.replace(description, stage="qat"))
