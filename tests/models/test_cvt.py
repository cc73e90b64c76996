"""CvT's wrapper against transformers' own forward; the original repository's state-dict names."""

import pytest
import torch
from torch import nn

from qswin.models.registry import build_model
from tests.helpers import CVT, VARIANTS

PROJECTIONS = {"q": "query", "k": "key", "v": "value"}


def test_logits_are_transformers():
    transformers = pytest.importorskip("transformers")
    small = VARIANTS["cvt"]
    model, images = small.build(), small.images()
    theirs = transformers.CvtForImageClassification(transformers.CvtConfig(**CVT, num_labels=5)).eval()
    theirs.load_state_dict(model.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(model(images), theirs(images).logits)


def microsofts(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A state under the names of microsoft/CvT, lib/models/cls_cvt.py, written out for each module."""
    names = {"layernorm.": "norm.", "classifier.": "head."}
    for stage, depth in enumerate(CVT["depth"]):
        ours, theirs = f"cvt.encoder.stages.{stage}.", f"stage{stage}."
        names[ours + "cls_token"] = theirs + "cls_token"
        names[ours + "embedding.convolution_embeddings.projection."] = theirs + "patch_embed.proj."
        names[ours + "embedding.convolution_embeddings.normalization."] = theirs + "patch_embed.norm."
        for block in range(depth):
            layer, theirs_block = f"{ours}layers.{block}.", f"{theirs}blocks.{block}."
            for short, long in PROJECTIONS.items():
                conv = f"{layer}attention.attention.convolution_projection_{long}.convolution_projection."
                names[conv + "convolution."] = f"{theirs_block}attn.conv_proj_{short}.conv."
                names[conv + "normalization."] = f"{theirs_block}attn.conv_proj_{short}.bn."
                names[f"{layer}attention.attention.projection_{long}."] = f"{theirs_block}attn.proj_{short}."
            names[layer + "attention.output.dense."] = theirs_block + "attn.proj."
            names[layer + "intermediate.dense."] = theirs_block + "mlp.fc1."
            names[layer + "output.dense."] = theirs_block + "mlp.fc2."
            names[layer + "layernorm_before."] = theirs_block + "norm1."
            names[layer + "layernorm_after."] = theirs_block + "norm2."
    return {
        next(new + key[len(old) :] for old, new in names.items() if key.startswith(old)): v for key, v in state.items()
    }


def test_the_original_repositorys_checkpoint_loads(tmp_path):
    state = VARIANTS["cvt"].build().state_dict()
    torch.save(microsofts(state), tmp_path / "CvT.pth")
    model = build_model("cvt-13", 5, tmp_path / "CvT.pth", activation="quick_gelu", **CVT)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert not any(type(module) is nn.GELU for module in model.modules())
    x = torch.randn(9)
    activation = model.cvt.encoder.stages[0].layers[0].intermediate.activation
    torch.testing.assert_close(activation(x), x * torch.sigmoid(1.702 * x))


def test_its_weights_with_the_other_activation_are_refused(tmp_path):
    torch.save(microsofts(VARIANTS["cvt"].build().state_dict()), tmp_path / "CvT.pth")
    with pytest.raises(ValueError, match="activation=quick_gelu"):
        build_model("cvt-13", 5, tmp_path / "CvT.pth", **CVT)


@pytest.mark.parametrize(
    ("settings", "words"),
    [({"activation": "relu"}, "gelu or quick_gelu"), ({"widths": 3}, "'widths' is not a setting of the architecture")],
)
def test_wrong_settings_are_named(settings, words):
    with pytest.raises(ValueError, match=words):
        build_model("cvt-13", **settings)


def test_weights_that_cannot_be_downloaded_say_so(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # it tries again and again otherwise
    with pytest.raises(ValueError, match="cannot be downloaded.*model.checkpoint=FILE"):
        build_model("cvt-13", pretrained=True)
