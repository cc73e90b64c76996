"""Names of other libraries are answered with ours; timm's tags of weights are taken."""

import pytest

from qswin.models.registry import build_model, family_of
from tests.helpers import SMALL, V1


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("swin_t", "swin_tiny_patch4_window7_224"),
        ("Swin-T", "swin_tiny_patch4_window7_224"),
        ("swin_v2_b", "swinv2_base_window8_256"),
        ("vit_b_16", "vit_base_patch16_224"),
        ("microsoft/swin-base-patch4-window12-384", "swin_base_patch4_window12_384"),
        ("microsoft/swin-large-patch4-window7-224-in22k", "swin_large_patch4_window7_224"),
        ("microsoft/swinv2-tiny-patch4-window8-256", "swinv2_tiny_window8_256"),
        ("google/vit-base-patch16-224", "vit_base_patch16_224"),
        ("facebook/deit-tiny-patch16-224", "deit_tiny_patch16_224"),
        ("microsoft/cvt-13-384", "cvt-13"),
        ("CvT-21", "cvt-21"),
    ],
)
def test_other_libraries_names(theirs, ours):
    with pytest.raises(ValueError, match=rf"is called {ours} here"):
        family_of(theirs)
    assert ours in family_of(ours).names()


def test_the_hub_is_not_asked():
    with pytest.raises(ValueError, match="nothing is downloaded from there; download its folder"):
        family_of("hf_hub:timm/swin_tiny_patch4_window7_224.ms_in1k")


def test_timms_tag_of_weights():
    assert family_of(f"{V1}.ms_in1k").name == "swin"
    assert build_model(f"{V1}.ms_in1k", 5, **SMALL).num_classes == 5
    with pytest.raises(ValueError, match="nearest names"):
        family_of("resnet50.a1_in1k")
