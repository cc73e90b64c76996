"""QAT of a model whose parameters are sharded over processes by FSDP2: torchrun --nproc_per_node 2 fsdp2.py"""

import dataclasses

import torch
from photos import photos
from torch import distributed
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, DistributedSampler

import qswin

distributed.init_process_group()
model, description = qswin.load_checkpoint("ptq.safetensors")
dataset = photos(description.preprocessing)
sampler = DistributedSampler(dataset)
loader = DataLoader(dataset, batch_size=4, sampler=sampler, drop_last=True)
for stage in model.train().layers:
    for block in stage.blocks:
        fully_shard(block)
fully_shard(model)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.0)

for epoch in range(4):
    sampler.set_epoch(epoch)
    for images, labels in loader:
        loss = cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

# Every rank calls it, and rank 0 writes. It does the same for PyTorch's own state dict.
qswin.save_checkpoint("fsdp2.safetensors", model, dataclasses.replace(description, stage="qat"))
state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
if distributed.get_rank() == 0:
    torch.save(state, "fsdp2.pt")
distributed.destroy_process_group()
