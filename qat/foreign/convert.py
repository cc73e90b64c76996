"""Checkpoints that pytorch-quantization or ModelOpt calibrated, as a checkpoint of qswin."""

import dataclasses
import hashlib
import re
from collections.abc import Mapping
from pathlib import Path

from absl import logging
from torch import Tensor, nn

from qswin.models.checkpoints.state_dicts import read_content, read_state, rename
from qswin.models.family import Family
from qswin.models.registry import family_of
from qswin.qat.checkpoint import Description, load_state, save_checkpoint
from qswin.qat.float_model import build_float_model
from qswin.qat.quant.quantizers import SCALE_KEY, quantizers
from qswin.qat.quant.recipe_file import read_recipe
from qswin.qat.quant.rewrite import quantize
from qswin.qat.runs import PTQ, Run
from qswin.qat.schema import Config

# Quantizers of FasterTransformer and the first Swin systems on matmuls and residual adds, and where they are here.
RENAMES = (
    (r"\.attn\.matmul_q_input_quantizer\.", ".attn.qk._input_quantizer."),
    (r"\.attn\.matmul_k_input_quantizer\.", ".attn.qk._other_quantizer."),
    (r"\.attn\.matmul_a_input_quantizer\.", ".attn.av._input_quantizer."),
    (r"\.attn\.matmul_v_input_quantizer\.", ".attn.av._other_quantizer."),
    (r"\.(?:add1_residual|shortcut)_input_quantizer\.", ".add1._input_quantizer."),
    (r"\.drop_path_input_quantizer\.", ".add1._other_quantizer."),
    (r"\.add2_residual_input_quantizer\.", ".add2._input_quantizer."),
    (r"\.drop_path_2_input_quantizer\.", ".add2._other_quantizer."),
    (r"\.(input|weight)_quantizer\.", r"._\1_quantizer."),  # ModelOpt's have no underscore before
)
# What is float here: outputs of GEMMs and softmax's input (FasterTransformer), inputs of normalizations (ModelOpt).
UNUSED = r"_aftergemm_quantizer|softmax_input_quantizer|output_quantizer|norm\d?\._input_quantizer"


def convert_ranges(state: dict[str, Tensor], model: nn.Module, path: Path) -> dict[str, Tensor]:
    """A foreign state under the names, and with the shapes, of a rewritten model.

    Args:
        state: weights, ranges under `<quantizer>._amax`, and SmoothQuant's scales of a layer's input channels, by which
            its weight is divided already, under `<quantizer>._pre_quant_scale`; all with the names of the float model.
        model: made by `quantize` with the recipe that the ranges were calibrated for.

    Raises:
        ValueError: a site of the recipe has no range in the file, or the file has a range or scales for no site of it.
    """
    expected = model.state_dict()
    converted: dict[str, Tensor] = {}
    left = 0
    for key, value in state.items():
        key = rename(key, RENAMES)
        if key.endswith(f"_quantizer.{SCALE_KEY}"):
            converted |= _channel_scales(key, value, expected, path)
            continue
        if re.search(UNUSED, key) or ("_quantizer." in key and not key.endswith("._amax")):
            left += key.endswith("._amax")
            continue
        known = key in expected and key.endswith("._amax") and value.numel() == expected[key].numel()
        converted[key] = value.reshape(expected[key].shape) if known else value
    if left:
        logging.warning("%s: %d ranges are of sites that stay in float here, and are left out", path, left)
    ranges = {key for key in expected if key.endswith("._amax")}
    for key in sorted(ranges ^ {key for key in converted if key.endswith("._amax")}):
        where = "has no range in the file" if key in ranges else "is in the file, but not in the recipe"
        raise ValueError(f"{path}: {key} {where}; give the recipe that it was calibrated for")
    return converted


def _channel_scales(key: str, value: Tensor, expected: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """ModelOpt's scales of a linear's input, (C,) or (1, C), as (C,); nothing where all are 1.

    ModelOpt multiplies a quantizer's input by them before all else, also where the quantizer is disabled; the range is
    of the product (`apply_pre_quant_scale_and_smooth` in its model_calib.py).

    Raises:
        ValueError: nothing reads them here, though the layer's weight is divided by them.
    """
    if bool((value == 1).all()):
        return {}
    quantizer = key.removesuffix(f".{SCALE_KEY}")
    if not quantizer.endswith("._input_quantizer") or f"{quantizer}._amax" not in expected:
        what = "has no quantized input of a layer to scale here, and the weight is divided by it"
        raise ValueError(f"{path}: {key} {what}; give the recipe that it was calibrated for")
    return {key: value.flatten()}


def convert(config: Config) -> Path:
    """Writes <run>/ptq.safetensors from the foreign `model.checkpoint`; returns its path. Raises ValueError."""
    if config.model.checkpoint is None:
        raise ValueError("model.checkpoint is not set: give the calibrated checkpoint to convert")
    path, recipe = Path(config.model.checkpoint), read_recipe(config.recipe)
    run = Run.of(config, "convert")
    out = run.folder / PTQ
    if run.finished(PTQ) is not None:
        logging.info("%s: already converted; resume=never starts over", out)
        return out
    # The weights come with the ranges: the float model has any.
    architecture = dataclasses.replace(config.model, checkpoint=None, pretrained=False)
    floating = build_float_model(architecture, config.data.preprocessing)
    twin = quantize(floating.model, recipe)
    digest = load_foreign(twin, floating.model, family_of(config.model.name), path)
    description = Description(floating.arguments, "ptq", floating.preprocessing, recipe=recipe, parent=digest)
    run.claim()
    save_checkpoint(out, twin, description)
    logging.info("%s: %d quantizers from %s", out, len(list(quantizers(twin))), path)
    return out


def load_foreign(twin: nn.Module, model: nn.Module, family: Family, path: Path) -> str:
    """Loads a foreign checkpoint's weights and ranges into `twin`, the rewritten `model`.

    Returns:
        The SHA-256 of the file, which is read once.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it does not fit.
    """
    data = read_content(path)
    state = read_state(path, data)
    # timm resizes whatever begins like the patch embedding's weight; its ranges have the same name everywhere.
    aside = {key: state.pop(key) for key in list(state) if key.startswith("patch_embed.") and key.endswith("._amax")}
    state = convert_ranges({**family.convert_state(state, model), **aside}, twin, path)
    load_state(twin, state, path)
    return hashlib.sha256(data).hexdigest()
