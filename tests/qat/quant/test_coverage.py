"""What quantize says of a model: how much is covered, what is not, and that something is."""

import logging

import pytest
import timm
import torch
import torchvision
from torch import nn

import qswin
from qswin.qat.quant.coverage import coverage
from qswin.qat.quant.quantizers import quantizers
from qswin.qat.quant.recipe import Recipe, Rule, named_recipe
from qswin.qat.quant.rewrite import quantize
from tests.helpers import SMALL, V1, V2, VARIANTS, small_swin
from tests.models.checkpoints.test_logits import SMALL as LOADED
from tests.models.checkpoints.test_logits import torchvision_swin


@pytest.fixture
def messages(caplog):
    """The messages of quantize, by level."""
    caplog.set_level(logging.INFO, logger="absl")

    def of(level: int) -> list[str]:
        return [record.getMessage() for record in caplog.records if record.levelno == level]

    return of


@pytest.mark.parametrize("name", ["gemm", "full"])
def test_a_recipe_that_quantizes_nothing_is_refused(name):
    with pytest.raises(ValueError, match=rf"'{name}' quantizes nothing of this ResNet.*\(conv1, layer1") as error:
        quantize(torchvision.models.resnet18(), named_recipe(name))
    assert "\n" not in str(error.value)


def test_rules_for_its_layers_quantize_it():
    twin = quantize(torchvision.models.resnet18(), Recipe("mine", (Rule("layer1", quantize=True),)))
    covered = coverage(twin)
    assert covered.convolutions == (4, 20) and covered.linears == (0, 1) and len(covered.in_float) == 17


@pytest.mark.parametrize(("recipe", "matmuls"), [("gemm", 0), ("attention", 8), ("full", 8)])
def test_a_swin_is_covered(messages, recipe, matmuls):
    covered = coverage(quantize(small_swin(V1), named_recipe(recipe)))
    adds = 8 if recipe == "full" else 0
    assert (covered.linears, covered.convolutions) == ((18, 18), (1, 1))
    assert (covered.matmuls, covered.adds) == ((matmuls, 8), (adds, 8))
    assert not covered.in_float and not covered.attention
    (line,) = messages(logging.INFO)
    assert line == (
        f"recipe {recipe}: 18 of 18 linears, 1 of 1 convolutions, {matmuls} of 8 matmuls, {adds} of 8 adds are"
        " quantized; no layer with weights stays in float"
    )
    assert not messages(logging.WARNING)


def test_layers_that_stay_in_float_are_counted_and_named():
    """V2's position MLPs, two linears a block."""
    covered = coverage(quantize(small_swin(V2), named_recipe("full")))
    assert covered.linears == (18, 26) and len(covered.in_float) == 8
    assert "in float stay 8 layers with weights (layers.0.blocks.0.attn.cpb_mlp.0, " in str(covered)
    assert str(covered).endswith(", ...)")


@pytest.mark.parametrize("variant", ["vit, class token", "cvt", "swin-unet"])
def test_attention_with_a_twin_is_no_matter_for_a_warning(messages, variant):
    """CvT's twin stands inside a module of transformers that is called attention too."""
    twin = quantize(VARIANTS[variant].build(), named_recipe("gemm"))
    assert not coverage(twin).attention and not messages(logging.WARNING)


def test_a_recipe_of_ones_own_quantizes_a_swin_of_another_library_in_part(messages):
    """All its linears are quantized; its attention has no twin."""
    transformers = pytest.importorskip("transformers")
    sizes = {"image_size": 32, "patch_size": 2, "embed_dim": 16, "window_size": 4, "num_heads": [1, 2, 4, 8]}
    config = transformers.SwinConfig(**sizes, depths=[2, 2, 6, 2])
    recipe = Recipe("mine", (Rule("*", quantize=True),))
    covered = coverage(quantize(transformers.SwinForImageClassification(config), recipe))
    quantized, layers = (sum(pair) for pair in zip(covered.linears, covered.convolutions, strict=True))
    assert quantized == layers == 77 and covered.matmuls == (0, 0)
    assert "SwinAttention" in covered.attention
    assert covered.attention["SwinAttention"].startswith("swin.encoder.layers.0.blocks.0.attention")
    warning = next(line for line in messages(logging.WARNING) if line.startswith("SwinAttention "))
    assert "swin.encoder.layers.0.blocks.0.attention" in warning and "no quantized twin" in warning


def test_torchs_own_attention_is_named(messages):
    """Its weight is a parameter of its own, and its projection a class that is not nn.Linear."""
    model = nn.ModuleDict({"encoder": nn.TransformerEncoderLayer(16, 2, 32), "head": nn.Linear(16, 3)})
    covered = coverage(quantize(model, named_recipe("gemm")))
    assert covered.attention == {"MultiheadAttention": "encoder.self_attn"}
    assert covered.linears == (1, 5) and {"encoder.self_attn", "encoder.self_attn.out_proj"} < set(covered.in_float)
    assert ["MultiheadAttention (first at encoder.self_attn)" in line for line in messages(logging.WARNING)] == [True]


def test_no_rules_are_no_matter_for_a_word(messages):
    quantize(torchvision.models.resnet18(), named_recipe("none"))
    assert not messages(logging.INFO) and not messages(logging.WARNING)


class Detector(nn.Module):
    """A model of a user's own around a timm Swin."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = timm.create_model(V1, num_classes=5, **SMALL)
        self.boxes = nn.Linear(5, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.boxes(self.backbone(x))


@torch.no_grad()
def test_a_swin_within_another_model_is_rewritten_too(images):
    """The sites are the Swin's own behind the path to it, and recipes find them."""
    model = Detector().eval()
    twin = quantize(model, named_recipe("full"))
    torch.testing.assert_close(twin(images), model(images), rtol=1e-5, atol=1e-6)
    alone = {quantizer.site for quantizer in quantizers(quantize(model.backbone, named_recipe("full")))}
    assert {quantizer.site for quantizer in quantizers(twin)} == {f"backbone.{site}" for site in alone}
    assert {"backbone.patch_embed", "backbone.head", "backbone.layers.0.blocks.0.attn.qkv.weight"} < {
        quantizer.site for quantizer in quantizers(twin)
    }
    assert coverage(twin).in_float == ("boxes",)


class Nested(nn.Module):
    """A Swin somewhere in lists and dicts of modules, as users' models have it."""

    def __init__(self) -> None:
        super().__init__()
        swin = timm.create_model(V2, num_classes=5, **SMALL)
        self.parts = nn.ModuleDict({"trunk": nn.ModuleList([nn.Identity(), nn.Sequential(swin)])})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for part in self.parts["trunk"]:
            x = part(x)
        return x


@torch.no_grad()
def test_a_swin_is_found_at_any_depth_calibrated_and_enabled(images):
    model = Nested().eval()
    twin = qswin.quantize(model, named_recipe("full"))
    torch.testing.assert_close(twin(images), model(images), rtol=1e-5, atol=1e-6)
    for parameter in twin.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))  # V2's norms start at 0
    qswin.calibrate(twin, [images])
    qswin.enable(twin)
    assert all("parts.trunk.1.0." in quantizer.site for quantizer in quantizers(twin))
    assert not torch.equal(twin(images), model(images))


@pytest.mark.parametrize("build", [torchvision.models.swin_t, torchvision.models.swin_v2_t])
@pytest.mark.parametrize("nested", [False, True])
def test_torchvisions_swin_is_refused_with_what_to_do(build, nested):
    """It would be left in float: its attention multiplies by its linears' weights itself."""
    model = nn.Sequential(build()) if nested else build()
    words = "SwinTransformer of torchvision.*has no quantized twins.*qswin.build_model.*checkpoint=FILE"
    with pytest.raises(ValueError, match=words):
        quantize(model, named_recipe("full"))


@pytest.mark.parametrize("recipe", ["gemm", "full", "attention-fp8"])
@pytest.mark.parametrize("kind", ["Swin", "Swinv2", "ViT", "DeiT"])
def test_transformers_modules_are_refused_with_what_to_do(kind, recipe):
    """They would be left in float in part: their attention has no twin, and recipes do not know all their names."""
    transformers = pytest.importorskip("transformers")
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    small = {"embed_dim": 16, "depths": [1], "num_heads": [2]} if "Swin" in kind else small
    config = getattr(transformers, f"{kind}Config")(**small)
    model = nn.ModuleDict({"encoder": getattr(transformers, f"{kind}Model")(config)})
    words = f"{kind}Model of transformers \\(encoder\\) has no quantized twins.*qswin.build_model.*checkpoint=FILE"
    with pytest.raises(ValueError, match=words):
        quantize(model, named_recipe(recipe))


def test_torchvisions_vit_is_refused_with_what_to_do():
    model = nn.Sequential(torchvision.models.VisionTransformer(32, 8, 1, 2, 32, 64))
    with pytest.raises(ValueError, match="VisionTransformer of torchvision .*build_model.*checkpoint=FILE"):
        quantize(model, named_recipe("full"))


def test_the_advice_is_right(images, tmp_path):
    """The refused Swin's weights in timm's model, in its place in the user's own: the same outputs, quantized."""
    theirs = torchvision_swin(True)
    with pytest.raises(ValueError, match="qswin.build_model"):
        quantize(nn.Sequential(theirs, nn.Linear(5, 2)), named_recipe("full"))
    head = nn.Linear(5, 2)
    torch.save(theirs.state_dict(), tmp_path / "swin.pth")
    ours = nn.Sequential(qswin.build_model(V2, 5, tmp_path / "swin.pth", **LOADED), head).eval()
    twin = quantize(ours, named_recipe("full"))
    with torch.no_grad():
        torch.testing.assert_close(twin(images), head(theirs(images)), rtol=1e-4, atol=1e-4)
    assert coverage(twin).matmuls[0] == 8 and not coverage(twin).attention
