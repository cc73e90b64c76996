"""Which architecture a checkpoint is of: timm's names by the shapes of timm's own models, which are not filled."""

import pytest
import timm
import torch

from qswin.models import swin, vit
from qswin.models.checkpoints.recognize_swin import recognize_swin
from qswin.models.checkpoints.recognize_vit import recognize_vit
from qswin.models.checkpoints.weights import Weights
from qswin.models.registry import build_model, recognize
from tests.helpers import SMALL, V1, V2, VARIANTS, small_swin
from tests.models.checkpoints.test_logits import HF_CASES, save_pretrained


def shapes(name: str, **settings) -> Weights:
    with torch.device("meta"):
        return Weights(timm.create_model(name, **settings).state_dict(), "timm")


@pytest.mark.parametrize("name", [name for name in swin.names() if name.startswith("swin_")])
def test_the_tables_of_a_swin_tell_its_name(name):
    found = recognize_swin(shapes(name), swin.names())
    if name == "swin_s3_base_224":  # whose depth is its own
        assert (found.name, found.settings["window_size"]) == ("swin_tiny_patch4_window7_224", [7, 7, 14, 7])
    else:
        assert (found.name, found.num_classes, found.settings) == (name, 1000, {})
    assert "images of" in found.assumed[0] and "which no tensor tells" in found.assumed[0]


@pytest.mark.parametrize("window, side", [(8, 256), (16, 256)])
def test_what_a_file_tells_of_a_swin_v2_is_used(window, side):
    weights = shapes(f"swinv2_small_window{window}_{side}")
    told = Weights(weights.state, "the original repository", told={"window_size": window, "img_size": side})
    found = recognize_swin(told, swin.names())
    assert (found.name, found.assumed) == (f"swinv2_small_window{window}_{side}", ())


def test_a_window_that_grew_is_told_by_config_json():
    weights = shapes("swinv2_base_window12to16_192to256")
    settings = {"window_size": 16, "img_size": 256, "pretrained_window_sizes": [12, 12, 12, 6]}
    found = recognize_swin(Weights(weights.state, "Hugging Face", settings), swin.names())
    assert (found.name, found.assumed) == ("swinv2_base_window12to16_192to256", ())


def test_a_swin_v2_that_tells_nothing_says_what_is_assumed():
    found = recognize_swin(shapes("swinv2_tiny_window8_256"), swin.names())
    assert found.name == "swinv2_tiny_window8_256" and "windows of 8" in found.assumed[0]


@pytest.mark.parametrize(
    "name",
    [
        *("vit_tiny_patch16_224", "vit_small_patch32_384", "vit_base_patch32_224", "vit_large_patch16_384"),
        *("deit_base_distilled_patch16_224", "deit_base_distilled_patch16_384", "deit3_small_patch16_224"),
    ],
)
def test_the_tensors_of_a_vit_tell_its_name(name):
    found = recognize_vit(shapes(name), vit.names())
    built = timm.get_pretrained_cfg(found.name)
    assert found.name.split("_patch")[0] == name.split("_patch")[0] and found.num_classes == 1000
    assert found.settings.get("img_size", built.input_size[1]) == int(name.rpartition("_")[2])
    assert "heads of 64" in found.assumed[0]


@pytest.mark.parametrize("case", ["swin", "swin v2 of a larger window", "vit of other heads", "deit"])
def test_what_is_found_in_a_folder_builds_its_model(tmp_path, case):
    kind, theirs, _, _ = HF_CASES[case]
    save_pretrained(kind, tmp_path, **theirs)
    weights, found = recognize(tmp_path)
    assert found.num_classes == 5
    build_model(found.name, found.num_classes, weights, **found.settings)


@pytest.mark.parametrize("name", [V1, V2])
def test_odd_sizes_become_settings(tmp_path, name):
    torch.save(small_swin(name).state_dict(), tmp_path / "a.pth")
    weights, found = recognize(tmp_path / "a.pth")
    assert {key: found.settings[key] for key in ("patch_size", "embed_dim", "depths", "num_heads")} == {
        key: SMALL[key] for key in ("patch_size", "embed_dim", "depths", "num_heads")
    }
    build_model(found.name, found.num_classes, weights, **found.settings)


@pytest.mark.parametrize("variant", ["swin-unet", "cvt"])
def test_other_families_are_told_apart(tmp_path, variant):
    torch.save(VARIANTS[variant].build().state_dict(), tmp_path / "a.pth")
    if variant == "cvt":
        with pytest.raises(ValueError, match=r"a.pth: a CvT of \[1, 2, 3\] layers; only those of \[1, 2, 10\]"):
            recognize(tmp_path / "a.pth")
    else:
        assert recognize(tmp_path / "a.pth")[1].name == "swin_unet_tiny_patch4_window7_224"
