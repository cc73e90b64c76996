"""QAT in a plain loop of PyTorch, compiled as one graph."""

import dataclasses

import torch
from photos import photos
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

import qswin

model, description = qswin.load_checkpoint("ptq.safetensors")  # of qswin calibrate; its quantizers are on
loader = DataLoader(photos(description.preprocessing), batch_size=8, shuffle=True, drop_last=True)
network = torch.compile(model.train(), fullgraph=True)
optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, weight_decay=0.0)

for epoch in range(4):
    for images, labels in loader:
        loss = cross_entropy(network(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(f"epoch {epoch}: loss {loss.item():.4f}")

qswin.save_checkpoint("plain.safetensors", network, dataclasses.replace(description, stage="qat"))
