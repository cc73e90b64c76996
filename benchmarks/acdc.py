"""ACDC slices from one .npz file to the folders that qswin reads. python -m benchmarks.acdc --npz FILE --out DIR"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = ("background", "right ventricle", "myocardium", "left ventricle")


def unpack(npz: Path, out: Path) -> None:
    """Writes {train,val}_{image,label,name} as {train,val}/{images,masks}/NAME.png, and classes.txt."""
    arrays = np.load(npz)
    for split in ("train", "val"):
        for kind, folder in (("image", "images"), ("label", "masks")):
            (out / split / folder).mkdir(parents=True, exist_ok=True)
            for pixels, name in zip(arrays[f"{split}_{kind}"], arrays[f"{split}_name"], strict=True):
                Image.fromarray(pixels).save(out / split / folder / f"{name}.png")
    (out / "classes.txt").write_text("\n".join(CLASSES) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--npz", required=True, type=Path)
    parser.add_argument("--out", required=True, type=Path)
    unpack(**vars(parser.parse_args()))
