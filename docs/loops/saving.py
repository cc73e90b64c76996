"""Stopping in the middle of training and going on: the state dicts of PyTorch, as for a float model."""

import torch
from torch.nn.functional import cross_entropy

import qswin

model, description = qswin.load_checkpoint("ptq.safetensors")
optimizer = torch.optim.AdamW(model.train().parameters(), lr=1e-4)
cross_entropy(model(torch.randn(2, 3, *description.preprocessing.size)), torch.tensor([0, 1])).backward()
optimizer.step()
torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, "state.pt")

# Later, in another process: a model that was never calibrated takes its ranges from the state dict, and is on.
again = qswin.quantize(qswin.build_model(**description.model), description.recipe)
optimizer = torch.optim.AdamW(again.train().parameters(), lr=1e-4)
state = torch.load("state.pt")
again.load_state_dict(state["model"])
optimizer.load_state_dict(state["optimizer"])
