"""`qswin search`."""

import argparse
from pathlib import Path

from qswin.qat.commands.arguments import add_probe_arguments, positive


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Finds which sites to leave in float for a budget; writes a recipe file for recipe=FILE. Images without labels"
        " will do, but for a budget on a metric."
    )
    parser.epilog = (
        "example:\n  qswin search --checkpoint runs/x/ptq.safetensors --data DIR/train"
        " --sensitivity runs/x/sensitivity.json --budget 'acc1_drop<=0.1' --recipe runs/x/mixed.yaml"
    )
    add_probe_arguments(parser)
    parser.add_argument(
        "--sensitivity", required=True, type=Path, help="what qswin sensitivity wrote for this checkpoint"
    )
    parser.add_argument("--budget", required=True, help="acc1_drop<=X, dice_drop<=X, kl<=X, bops<=SHARE or latency<=MS")
    parser.add_argument("--recipe", required=True, type=Path, help="the YAML file to write")
    parser.add_argument(
        "--runtime", choices=("onnxruntime", "tensorrt"), default="onnxruntime", help="where latency is measured"
    )
    parser.add_argument("--latency-batch-size", type=positive, default=1, help="batch size whose latency is measured")
    parser.add_argument("--json", type=Path, help="write which groups stay in float and which do not")


def main(args: argparse.Namespace) -> None:
    from qswin.calib.files import check_suffix, write_result
    from qswin.qat.mixed_precision.probe import ProbeImages
    from qswin.qat.mixed_precision.search import SUFFIXES, Target, plan_search, save_recipe, search_recipe

    check_suffix("--recipe", args.recipe, SUFFIXES)
    images = ProbeImages(args.data, args.images, args.seed, args.batch_size, args.workers, args.skip_unreadable)
    if args.dry_run:
        outputs = [args.recipe, *([args.json] if args.json else [])]
        print(plan_search(args.checkpoint, images, args.sensitivity, args.budget, outputs, args.device))
        return
    target = Target(args.runtime, args.latency_batch_size, args.recipe.with_name("timing.cache"))
    found = search_recipe(args.checkpoint, images, args.sensitivity, args.budget, target, args.device)
    save_recipe(args.recipe, found.recipe)
    print(f"{args.recipe}: {found}")
    if args.json:
        write_result(args.json, "search", {"recipe": str(args.recipe), "budget": args.budget, **found.to_dict()})
