"""QAT on several processes by DistributedDataParallel: torchrun --nproc_per_node 2 ddp.py"""

import dataclasses

import torch
from photos import photos
from torch import distributed
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler

import qswin

distributed.init_process_group()  # gloo on CPUs
model, description = qswin.load_checkpoint("ptq.safetensors")
dataset = photos(description.preprocessing)
sampler = DistributedSampler(dataset)
loader = DataLoader(dataset, batch_size=4, sampler=sampler, drop_last=True)
network = DistributedDataParallel(model.train())
optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, weight_decay=0.0)

for epoch in range(4):
    sampler.set_epoch(epoch)
    for images, labels in loader:
        loss = cross_entropy(network(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

if distributed.get_rank() == 0:
    qswin.save_checkpoint("ddp.safetensors", network, dataclasses.replace(description, stage="qat"))
distributed.destroy_process_group()
