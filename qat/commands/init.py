"""`qswin init`."""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Looks at trained weights of any library, says what they are, and writes a config for them that the other"
        " commands take."
    )
    parser.epilog = "example:\n  qswin init swin_t.pth --data DIR --out swin_t.yaml"
    parser.add_argument("file", type=Path, metavar="FILE", help="weights, or a folder that save_pretrained wrote")
    parser.add_argument(
        "--backbone", action="store_true", help="its feature maps are wanted, for a detector or a segmentor; no head"
    )
    parser.add_argument("--data", type=Path, help="folder with train and val, for the config; its classes are counted")
    parser.add_argument("--out", type=Path, help="the YAML file to write; default: FILE's name with .yaml, here")
    parser.add_argument("--json", type=Path, help="write what was found as JSON; - is standard output")


def main(args: argparse.Namespace) -> None:
    from absl import logging

    from qswin.calib.files import check_suffix, write_atomic, write_result
    from qswin.qat.foreign.first_config import config_text, describe, look_at

    out = args.out or Path(f"{args.file.resolve().stem}.yaml")
    check_suffix("--out", out, (".yaml", ".yml"))
    if out.exists():
        raise ValueError(f"{out}: is there already; give another --out, or delete it")
    found = look_at(args.file, args.data, args.backbone)
    write_atomic(out, config_text(found, out).encode())
    if args.json:
        write_result(args.json, "checkpoint description", found.facts())
    print(describe(found))
    logging.info("%s: written", out)
