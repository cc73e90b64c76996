"""`qswin search`."""

import argparse
from pathlib import Path

from qswin.qat.commands.arguments import add_probe_arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Finds which sites to leave in float for a budget; writes a recipe file for recipe=FILE."
    parser.epilog = (
        "example:\n  qswin search --checkpoint runs/x/ptq.safetensors --data DIR/train"
        " --sensitivity runs/x/sensitivity.json --budget 'acc1_drop<=0.1' --recipe runs/x/mixed.yaml"
    )
    add_probe_arguments(parser)
    parser.add_argument("--sensitivity", required=True, type=Path, help="what qswin sensitivity wrote for this checkpoint")
    parser.add_argument("--budget", required=True, help="acc1_drop<=X, dice_drop<=X, kl<=X, bops<=SHARE or latency<=MS")
    parser.add_argument("--json", type=Path, help="write the groups that stay in float and those that do not here too")
    parser.add_argument("--runtime", choices=("onnxruntime", "tensorrt"), default="onnxruntime", help="of latency")
    parser.add_argument("--batch", type=int, default=1, help="that latency is measured of")
    parser.add_argument("--recipe", required=True, type=Path, help="the YAML file to write")


def main(args: argparse.Namespace) -> None:
    import json

    import torch
    import yaml

    from qswin.calib.files import sha256, write_atomic, write_json
    from qswin.qat.checkpoint import read_description
    from qswin.qat.distributed import process_group
    from qswin.qat.mixed_precision.search import (
        bit_operations,
        candidates,
        cost_of,
        least_in_float,
        mixed_recipe,
        most_in_float,
        parse_budget,
        share_of_operations,
    )
    from qswin.qat.mixed_precision.sensitivity import open_probe

    report = json.loads(args.sensitivity.read_text())
    if report["job"]["checkpoint"] != sha256(args.checkpoint):
        raise ValueError(f"{args.sensitivity}: of another checkpoint than {args.checkpoint}; run qswin sensitivity on it")
    description = read_description(args.checkpoint)
    assert description.recipe is not None
    with process_group(args.device) as ranks:
        probe = open_probe(args, str(ranks.device))
        reference = probe.measure([])
        budget = parse_budget(args.budget, next(iter(reference)))
        image = torch.from_numpy(probe.batches[0].images[:1]).to(ranks.device)
        groups = candidates(report, bit_operations(probe.model, image))
        if budget.name in ("bops", "latency"):
            floats = most_in_float(cost_of(budget, probe.model, description, groups, args), budget, len(groups))
        else:
            floats = least_in_float(probe, groups, budget, reference)
    mixed = mixed_recipe(description.recipe, groups, floats)
    write_atomic(args.recipe, yaml.safe_dump(mixed.to_dict(), sort_keys=False).encode())
    share = share_of_operations(groups, floats)
    print(f"{args.recipe}: {floats} of {len(groups)} groups stay in float; {share:.3f} of the float model's bit operations")
    for group in groups[:floats]:
        print(f"  {group.name}  (KL {group.kl:.4g})")
    if args.json:
        names = [group.name for group in groups]
        found = {"in_float": names[:floats], "quantized": names[floats:], "share_of_bit_operations": share}
        write_json(args.json, {"recipe": str(args.recipe), "budget": args.budget, **found})
