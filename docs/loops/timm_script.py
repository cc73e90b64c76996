"""QAT in timm's train.py: its calls in its order, shortened. What is added ends in `# qswin`: three lines."""

import argparse
import dataclasses

import torch
from photos import photos
from timm import utils
from timm.models import create_model
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from torch.utils.data import DataLoader

import qswin

args = argparse.Namespace(model="swin_tiny_patch4_window7_224", epochs=4, batch_size=8, lr=1e-4)

model = create_model(args.model)
model, description = qswin.load_checkpoint("ptq.safetensors")  # qswin
optimizer = create_optimizer_v2(model, opt="adamw", lr=args.lr, weight_decay=0.0)
model_ema = utils.ModelEmaV3(model, decay=0.9998)
loader = DataLoader(photos(description.preprocessing), batch_size=args.batch_size, shuffle=True, drop_last=True)
train_loss_fn = torch.nn.CrossEntropyLoss()
saver = utils.CheckpointSaver(model, optimizer, args, model_ema)
lr_scheduler, num_epochs = create_scheduler_v2(optimizer, sched="none", num_epochs=args.epochs)

for epoch in range(num_epochs):
    model.train()
    for step, (images, labels) in enumerate(loader):
        loss = train_loss_fn(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        model_ema.update(model, step=epoch * len(loader) + step)
    saver.save_checkpoint(epoch, metric=loss.item())

description = dataclasses.replace(description, stage="qat")  # qswin
qswin.save_checkpoint("timm.safetensors", model, description)  # qswin
qswin.save_checkpoint("timm_ema.safetensors", model_ema, description)
