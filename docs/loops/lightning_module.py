"""QAT in Lightning."""

import dataclasses

import lightning
import torch
from photos import photos
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

import qswin


class Quantized(lightning.LightningModule):
    def __init__(self, checkpoint="ptq.safetensors"):
        super().__init__()
        self.model, self.description = qswin.load_checkpoint(checkpoint)
        self.model.train()  # Lightning trains a module in the mode that it is in

    def forward(self, images):
        return self.model(images)

    def training_step(self, batch, index):
        images, labels = batch
        loss = cross_entropy(self(images), labels)
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-4, weight_decay=0.0)


module = Quantized()
loader = DataLoader(photos(module.description.preprocessing), batch_size=8, shuffle=True, drop_last=True)
trainer = lightning.Trainer(max_epochs=4, default_root_dir="lightning")
trainer.fit(module, loader)

description = dataclasses.replace(module.description, stage="qat")
qswin.save_checkpoint("lightning.safetensors", module.model, description)
# Lightning's own checkpoints load too: Quantized.load_from_checkpoint(FILE)
