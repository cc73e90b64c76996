# %% [markdown]
# # Your own Swin in INT8, in Python
#
# The steps of [the tutorial](tutorial.md) as calls of the [Python API](api.md): load, quantize, calibrate, compare,
# save, load again, export, and run in ONNX Runtime. Nothing is downloaded. It takes about a minute on one core.
# Install qswin with scikit-learn, which has the images: `pip install '.[demo]'`.
#
# Run it in an empty folder. It writes `mine.pth`, `ptq.safetensors` with its sidecar, and `int8.onnx` there.

# %% [markdown]
# ## Images and a float model
#
# 1,797 handwritten digits of 8x8 pixels stand in for your photos. A small Swin stands in for the model that you
# trained.

# %%
import numpy as np
import torch
from sklearn.datasets import load_digits
from torch.nn.functional import cross_entropy, interpolate

from qswin import Preprocessing, build_model

torch.manual_seed(0)
preprocessing = Preprocessing(size=(32, 32), mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), crop_pct=1.0)
digits = load_digits()
pixels = torch.tensor(digits.images / 16, dtype=torch.float32)[:, None].expand(-1, 3, -1, -1)
images = interpolate((pixels - 0.5) / 0.5, preprocessing.size, mode="bicubic")  # (1797, 3, 32, 32)
labels = torch.tensor(digits.target)
order = torch.randperm(len(images))
train, val = order[:1347], order[1347:]

# %%
settings = {"img_size": 32, "patch_size": 4, "window_size": 4, "embed_dim": 32, "depths": [1, 1], "num_heads": [2, 4]}
settings["drop_path_rate"] = 0.0
name = "swin_tiny_patch4_window7_224"
model = build_model(name, num_classes=10, **settings)
batches = [batch for _ in range(8) for batch in train[torch.randperm(len(train))].split(32)]
optimizer = torch.optim.AdamW(model.parameters())
schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=4e-3, total_steps=len(batches))
for batch in batches:
    optimizer.zero_grad()
    cross_entropy(model(images[batch]), labels[batch]).backward()
    optimizer.step()
    schedule.step()
torch.save(model.state_dict(), "mine.pth")

# %% [markdown]
# ## Load
#
# `build_model` reads your checkpoint into the model of that name. Leave `settings` out where the model is timm's own.

# %%
model = build_model(name, num_classes=10, checkpoint="mine.pth", **settings).eval()


def accuracy(predict) -> float:
    """Acc@1 in per cent on the images that were not trained on."""
    found = torch.cat([torch.as_tensor(predict(images[batch])).argmax(1) for batch in val.split(64)])
    return 100 * (found == labels[val]).float().mean().item()


with torch.no_grad():
    in_float = accuracy(model)
print(f"float: {in_float:.1f} %")

# %% [markdown]
# ## Quantize and calibrate
#
# `quantize` puts quantizers into the model. `calibrate` finds their ranges with some training images, without labels.
# The [recipes](recipes.md) say what is quantized; `auto` is the default of the commands.

# %%
from qswin import calibrate, named_recipe, quantize

model = quantize(model, named_recipe("auto"))
seen = calibrate(model, [images[batch] for batch in train[:256].split(64)])
print(f"calibrated on {seen} images")

# %% [markdown]
# ## Compare with float
#
# `Comparison` runs the model with and without its quantizers, on images that it was not calibrated on. If the verdict
# is bad, it names the sites to blame.

# %%
from qswin.qat.ptq.verdict import Comparison

with torch.no_grad():
    verdict = Comparison(model, [images[batch] for batch in val.split(64)]).verdict()
    in_int8 = accuracy(model)
print(verdict)
print(f"INT8: {in_int8:.1f} %, float: {in_float:.1f} %")

# %% [markdown]
# ## Save, and load again
#
# A checkpoint is a `.safetensors` file and a sidecar, `ptq.safetensors.json`, that says what the model is. Every
# command takes it, as in `qswin inspect --model ptq.safetensors`. To fine-tune it, see
# [training loops](training-loops.md).

# %%
from qswin import Description, load_checkpoint, save_checkpoint

description = Description({"name": name, "num_classes": 10, **settings}, "ptq", preprocessing, recipe=model.recipe)
save_checkpoint("ptq.safetensors", model, description)
model, description = load_checkpoint("ptq.safetensors")

# %% [markdown]
# ## Export
#
# `int8.onnx` holds INT8 weights, and a scale for each quantizer. `export_onnx(model, description, "fp32")` gives the
# same model in float.

# %%
from qswin import export_onnx, save_onnx

graph = export_onnx(model, description)
save_onnx("int8.onnx", graph, description.to_dict() | {"precision": "int8"})

# %% [markdown]
# ## Run in ONNX Runtime
#
# The input is `input`, (N, 3, height, width) float32; the output is `logits`.
# [Now what do I do with int8.onnx?](after_export.md) goes on from here.

# %%
import onnxruntime

onnxruntime.set_default_logger_severity(3)  # errors only
session = onnxruntime.InferenceSession("int8.onnx")
in_onnx = accuracy(lambda batch: session.run(["logits"], {"input": batch.numpy()})[0])
with torch.no_grad():
    ours = model(images[val]).numpy()
theirs = session.run(["logits"], {"input": images[val].numpy()})[0]
same = 100 * np.mean(ours.argmax(1) == theirs.argmax(1))
print(f"int8.onnx: {in_onnx:.1f} %; the same class as in PyTorch for {same:.1f} % of {len(val)} images")
