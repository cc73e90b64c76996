"""What comes with a checkpoint: its library's preprocessing and settings, in the sidecar and before evaluation."""

import json

import numpy as np
import pytest
import timm
import torch
import torchvision
from PIL import Image

from qswin.calib.data.images import Preprocessing, load_image
from qswin.models.registry import build_model, read_checkpoint
from qswin.qat.checkpoint import Description, load_checkpoint, save_checkpoint
from qswin.qat.config import load_config
from qswin.qat.float_model import adapted, build_float_model
from qswin.qat.ptq.ranges import find_ranges
from qswin.qat.quant.quantizers import quantizers
from qswin.qat.quant.recipe import named_recipe
from qswin.qat.quant.rewrite import quantize
from tests.helpers import SMALL, V1, VIT, fails, invoke
from tests.models.checkpoints.test_logits import HF_CASES, HF_VIT, lively, save_pretrained

OWN = {"size": (224, 224), **{k: v for k, v in Preprocessing().to_dict().items() if k != "size"}}


@pytest.fixture
def picture(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (300, 420, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    return tmp_path / "a.png"


@pytest.mark.parametrize(
    ("name", "weights"),
    [
        ("swin_tiny_patch4_window7_224", "Swin_T_Weights"),
        ("swin_small_patch4_window7_224", "Swin_S_Weights"),
        ("swin_base_patch4_window7_224", "Swin_B_Weights"),
        ("swinv2_tiny_window8_256", "Swin_V2_T_Weights"),
        ("swinv2_small_window8_256", "Swin_V2_S_Weights"),
        ("swinv2_base_window8_256", "Swin_V2_B_Weights"),
    ],
)
def test_torchvisions_images_are_prepared_as_torchvision_does(tmp_path, picture, name, weights):
    """The small tensors of a checkpoint of the published size are enough to know it by."""
    published = torchvision.models.get_weight(f"{weights}.IMAGENET1K_V1")
    with torch.device("meta"):
        state = torchvision.models.get_model(weights.removesuffix("_Weights").lower()).state_dict()
    kept = {key: torch.zeros(value.shape) for key, value in state.items() if value.numel() < 50_000}
    torch.save(kept, tmp_path / "a.pth")
    taken = read_checkpoint(name, tmp_path / "a.pth").preprocessing
    size = published.transforms().crop_size * 2
    ours = load_image(picture, adapted({**OWN, **taken, "size": size}, {}))
    theirs = published.transforms()(Image.open(picture))
    torch.testing.assert_close(torch.from_numpy(ours), theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("processor", "settings"),
    [
        ("ViTImageProcessor", {"size": {"height": 64, "width": 64}}),
        ("ViTImageProcessor", {"size": {"height": 64, "width": 64}, "resample": 3, "image_mean": [0.4, 0.5, 0.6]}),
        ("DeiTImageProcessor", {"size": {"height": 73, "width": 73}, "crop_size": {"height": 64, "width": 64}}),
    ],
)
def test_hugging_faces_images_are_prepared_as_its_processor_does(tmp_path, picture, processor, settings):
    """Its processors squash a picture to a square. Those on tensors round otherwise than Pillow, by a level or two."""
    transformers = pytest.importorskip("transformers")
    save_pretrained("ViT", tmp_path, **HF_VIT, num_attention_heads=2)
    made = getattr(transformers, processor)(**settings)
    made.save_pretrained(tmp_path)
    weights = read_checkpoint("vit_tiny_patch16_224", tmp_path)
    assert weights.preprocessing_from == "preprocessor_config.json"
    ours = load_image(picture, adapted({**OWN, **weights.preprocessing, "size": (64, 64)}, {}))
    theirs = made(Image.open(picture), return_tensors="np")["pixel_values"][0]
    level = 1 / 255 / min(made.image_std)
    assert np.abs(ours - theirs).max() < 2.5 * level and np.abs(ours - theirs).mean() < 0.3 * level


def write_config(tmp_path, data, name, **model):
    text = {
        "model": {"name": name, "num_classes": 5, **model},
        "data": {"root": str(data), "workers": 0},
        "calibration": {"images": 8, "batch_size": 4, "equalize": False},
        "train": {"batch_size": 4},
        "recipe": "gemm",
        "run": str(tmp_path / "run"),
        "device": "cpu",
    }
    file = tmp_path / "hf.yaml"
    file.write_text(json.dumps(text))
    return file


@pytest.fixture
def deit(tmp_path, data):
    """A config for a DeiT that save_pretrained wrote, with a processor."""
    save_pretrained("DeiT", tmp_path / "deit", **HF_CASES["deit"][1])
    processor = {"size": {"height": 40, "width": 40}, "crop_size": 32, "do_center_crop": True, "resample": 3}
    (tmp_path / "deit" / "preprocessor_config.json").write_text(json.dumps(processor))
    kwargs = {"patch_size": 8, "embed_dim": 32, "depth": 2}
    return write_config(tmp_path, data, "deit_tiny_patch16_224", checkpoint=str(tmp_path / "deit"), kwargs=kwargs)


def test_calibration_says_what_it_took_and_the_sidecar_builds_the_same_model(tmp_path, deit):
    assert invoke("calibrate", "--config", deit) == 0
    model, description = load_checkpoint(tmp_path / "run" / "ptq.safetensors")
    assert {module.eps for module in model.modules() if isinstance(module, torch.nn.LayerNorm)} == {1e-12}
    assert description.model["reg_tokens"] == 1 and description.model["img_size"] == 32
    assert description.source.library == "Hugging Face"
    assert description.source.preprocessing == "preprocessor_config.json"
    prepared = description.preprocessing
    assert (prepared.crop_mode, prepared.crop_pct, prepared.mean) == ("squash", 0.8, (0.5, 0.5, 0.5))
    training = ["train.epochs=1", f"init={tmp_path / 'run' / 'ptq.safetensors'}"]
    assert invoke("train", "--config", deit, *training) == 0


def test_a_config_goes_before_what_comes_with_the_checkpoint(deit):
    config = load_config(deit, ["data.preprocessing.crop_mode=center", "data.preprocessing.std=[1, 1, 1]"])
    floating = build_float_model(config.model, config.data.preprocessing)
    assert floating.preprocessing.crop_mode == "center" and floating.preprocessing.std == (1, 1, 1)
    assert floating.preprocessing.crop_pct == 0.8


def test_weights_for_grey_images_have_one_mean_for_all_channels(tmp_path, data):
    torch.save(timm.create_model(V1, in_chans=1, num_classes=5, **SMALL).state_dict(), tmp_path / "grey.pth")
    file = write_config(tmp_path, data, V1, checkpoint=str(tmp_path / "grey.pth"), kwargs=SMALL)
    config = load_config(file, [])
    prepared = build_float_model(config.model, {}).preprocessing
    assert prepared.mean == pytest.approx([(0.485 + 0.456 + 0.406) / 3] * 3) and len(set(prepared.std)) == 1
    assert build_float_model(config.model, {"mean": [0.2] * 3, "std": [0.3] * 3}).preprocessing.mean == (0.2, 0.2, 0.2)
    with pytest.raises(ValueError, match=r"grey.pth: takes grey images.*mean is \[0.1, 0.2, 0.3\]: give one value"):
        build_float_model(config.model, {"mean": [0.1, 0.2, 0.3]})


def test_a_new_head_is_trained_and_nothing_else_takes_one(tmp_path, data, capsys):
    """From there on, the float checkpoint's sidecar says what its weights need."""
    save_pretrained("ViT", tmp_path / "vit", **HF_VIT, num_attention_heads=2)
    kwargs = {"patch_size": 8, "embed_dim": 32, "depth": 2}
    file = write_config(tmp_path, data, "vit_tiny_patch16_224", checkpoint=str(tmp_path / "vit"), kwargs=kwargs)
    new = "model.new_head=true"
    for command in ("calibrate", "convert"):
        line = fails(capsys, command, "--config", file, new, f"run={tmp_path / command}")
        assert "the new head would be random here; train the float model first" in line
        assert not list((tmp_path / command).glob("*.safetensors*"))
    bare = ("--model", tmp_path / "vit" / "model.safetensors", "--config", file, "--set", new)
    assert "would be random" in fails(capsys, "evaluate", *bare, "--data", data / "val")
    run = tmp_path / "float"
    assert invoke("train", "--config", file, new, "recipe=none", f"run={run}") == 0
    _, trained = load_checkpoint(run / "float.safetensors")
    assert trained.source.settings["norm_eps"] == 1e-12
    assert invoke("calibrate", "--config", file, f"model.checkpoint={run / 'float.safetensors'}") == 0
    model, description = load_checkpoint(tmp_path / "run" / "ptq.safetensors")
    assert model.norm.eps == 1e-12 and description.source.preprocessing == "float.safetensors.json"


def test_classes_in_another_order_are_refused(tmp_path, data, capsys):
    folder = tmp_path / "vit"
    save_pretrained("ViT", folder, **HF_VIT, num_attention_heads=2)
    config = json.loads((folder / "config.json").read_text())
    config["id2label"] = {str(index): f"class{4 - index}" for index in range(5)}
    (folder / "config.json").write_text(json.dumps(config))
    kwargs = {"patch_size": 8, "embed_dim": 32, "depth": 2}
    file = write_config(tmp_path, data, "vit_tiny_patch16_224", checkpoint=str(folder), kwargs=kwargs)
    assert "class 0 is 'class0' here but 'class4' in the checkpoint" in fails(capsys, "calibrate", "--config", file)


def test_both_heads_of_a_distilled_deit_are_quantized():
    model = build_model("deit_tiny_distilled_patch16_224", 5, **VIT)
    twin = quantize(model, named_recipe("full")).eval()
    images = torch.randn(4, 3, 32, 32)
    torch.testing.assert_close(twin(images), model(images), rtol=1e-4, atol=1e-5)
    find_ranges(twin, [images])
    assert {"head.weight", "head.dist.weight"} <= {quantizer.site for quantizer in quantizers(twin)}


@pytest.mark.slow
def test_a_deit_with_two_heads_is_calibrated_exported_and_trained(tmp_path, data):
    kwargs = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
    name = "deit_tiny_distilled_patch16_224"
    torch.save(lively(timm.create_model(name, num_classes=5, **kwargs)).state_dict(), tmp_path / "a.pth")
    file = write_config(tmp_path, data, name, checkpoint=str(tmp_path / "a.pth"), kwargs=kwargs)
    assert invoke("calibrate", "--config", file, "recipe=full") == 0
    ptq = tmp_path / "run" / "ptq.safetensors"
    model, _ = load_checkpoint(ptq)
    assert hasattr(model.head_dist, "_weight_quantizer")
    assert invoke("export", "--checkpoint", ptq, "--onnx", tmp_path / "a.onnx") == 0
    assert invoke("train", "--config", file, "recipe=full", "train.epochs=1", f"init={ptq}") == 0


def test_a_foreign_checkpoint_leaves_nothing_behind(tmp_path, data, capsys):
    torch.save({"patch_embed.proj.weight": torch.zeros(96, 3, 2, 4, 4)}, tmp_path / "a.pth")
    file = write_config(tmp_path, data, V1, checkpoint=str(tmp_path / "a.pth"))
    line = fails(capsys, "calibrate", "--config", file)
    assert "a.pth: a checkpoint of Swin3D, which is not supported" in line
    assert not [path for path in (tmp_path / "run").glob("*") if not path.name.startswith(".")]


@pytest.mark.parametrize(
    ("case", "setting", "words"),
    [
        ("vit", "norm_eps", r"norm1.eps is 1e-12, not 1e-06"),
        ("vit of other heads", "num_heads", "num_heads is 4, not 2"),
        ("swin v2 of a larger window", "window_size", "window_size is .*8"),
        ("swin v2, pretrained windows", "pretrained_window_sizes", "relative_coords_table has other values"),
    ],
)
def test_a_description_without_what_the_weights_need_is_refused(tmp_path, case, setting, words):
    """Of a model that is built in Python; no tensor's shape shows it."""
    kind, theirs, name, ours = HF_CASES[case]
    save_pretrained(kind, tmp_path, **theirs)
    settings = {**ours, **read_checkpoint(name, tmp_path).settings}
    model = build_model(name, 5, tmp_path, **settings)
    said = {"name": name, "num_classes": 5, **settings}
    prepared = Preprocessing(size=(32, 32))
    save_checkpoint(tmp_path / "a.safetensors", model, Description(said, "float", prepared))
    said[setting] = {"num_heads": 2, "window_size": 4, "norm_eps": 1e-6}.get(setting, [0, 0])
    with pytest.raises(ValueError, match=f"not saved: .*{words}.*read_checkpoint"):
        save_checkpoint(tmp_path / "b.safetensors", model, Description(said, "float", prepared))
    assert not (tmp_path / "b.safetensors").exists()
