"""What other libraries call the models: their names, answered with ours."""

import re
from collections.abc import Collection

SIZES = {"t": "tiny", "s": "small", "b": "base", "l": "large"}
HUB = re.compile(r"hf[-_]hub:")
RENAMES = (  # (pattern of a whole name in lower case with underscores, ours; \g<s> is the size)
    (r"swin_(?P<s>[tsbl])", r"swin_\g<s>_patch4_window7_224"),
    (r"swin_?v2_(?P<s>[tsbl])", r"swinv2_\g<s>_window8_256"),
    (r"vit_(?P<s>[bl])_(?P<patch>16|32)", r"vit_\g<s>_patch\g<patch>_224"),
    (r"swinv2_(?P<s>tiny|small|base|large)_patch4_(?P<rest>window.*)", r"swinv2_\g<s>_\g<rest>"),
    (r"(?P<s>swin_.*?|vit_.*?|deit_.*?)(_in22k|_in21k)", r"\g<s>"),
    (r"cvt_(?P<s>13|21)(_.*)?", r"cvt-\g<s>"),
)


def name_here(name: str, known: Collection[str]) -> str | None:
    """What a model of another library is called here: `swin_t`, `Swin-T`, `microsoft/swin-tiny-patch4-window7-224`.

    Args:
        known: our names.
    """
    plain = name.rpartition("/")[2].lower().replace("-", "_")
    matches = ((re.fullmatch(pattern, plain), ours) for pattern, ours in RENAMES)
    renamed = [_of_size(match.expand(ours), match) for match, ours in matches if match]
    return next((found for found in (plain, *renamed) if found in known and found != name), None)


def _of_size(text: str, match: re.Match[str]) -> str:
    """`tiny` in place of `t`."""
    letter = match["s"]
    return text.replace(f"_{letter}_", f"_{SIZES[letter]}_", 1) if letter in SIZES else text
