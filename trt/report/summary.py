"""What a run came to: its findings in sentences, its models in one table. It opens the page."""

import html
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from qswin.trt.report.results import Results, Values, is_number, timing_rows
from qswin.trt.report.webpage import Cell, Part, table

FLOAT = ("fp32", "tf32", "fp16")  # precisions of models that are not quantized
METRICS = {"acc1": "Acc@1", "dice": "Dice"}
Key = tuple[str, str]  # a model's file and what runs it


class Joined(NamedTuple):
    """A model on a backend: what was evaluated and what was timed of it; {} where it was not."""

    evaluation: Values
    timing: Values

    @property
    def precision(self) -> str:
        return str(self.evaluation.get("precision") or self.timing.get("precision"))

    @property
    def is_float(self) -> bool:
        return self.precision in FLOAT

    @property
    def metric(self) -> str | None:
        return next((name for name in METRICS if is_number(self.evaluation.get(name))), None)


class Difference(NamedTuple):
    """How far a model's metric is above that of a float one."""

    reference: str
    points: float


class Finding(NamedTuple):
    """A model beside the float ones; None where none can be compared with it."""

    model: Joined
    difference: Difference | None
    times: float | None


def summary(results: Results, verdicts: Iterable[tuple[str, Values]]) -> list[Part]:
    """Sentences and a table; nothing where neither a verdict, an accuracy nor a time is there.

    Args:
        verdicts: a checkpoint's name and its verdict (qat/ptq/verdict.py), for each that has one.
    """
    joined, told = join(results), list(verdicts)
    found = {key: Finding(model, against_float(joined, model), speed_up(joined, key)) for key, model in joined.items()}
    sentences = [*map(of_verdict, told), *of_models(found)]
    if not sentences and not found:
        return []
    good = all(verdict.get("good") for _, verdict in told)
    sentences += [f"Next: {command}." for command in next_command(results, good)]
    said = "".join(f"<p>{html.escape(sentence)}</p>" for sentence in sentences)
    return [said, models(found)] if found else [said]


def of_verdict(told: tuple[str, Values]) -> str:
    """A checkpoint's verdict as a sentence."""
    name, verdict = told
    near = "is near the float model" if verdict.get("good") else "is far from the float model"
    numbers = f"{shown(verdict.get('agreement'))} % agreement, mean KL {shown(verdict.get('kl'))}"
    return f"{name} {near}: {numbers}, on {shown(verdict.get('images'))} images that it was not calibrated on."


def of_models(found: dict[Key, Finding]) -> list[str]:
    """For each quantized model its accuracy beside float's, and how many times as fast it is."""
    sentences = []
    for (name, backend), (model, difference, times) in found.items():
        said = []
        if difference is not None and model.metric is not None:
            value, points = model.evaluation[model.metric], difference.points
            said.append(f"has {shown(value)} {METRICS[model.metric]}, {points:+.2f} against {difference.reference}")
        if times is not None:
            said.append(f"is {times:.2f} times as fast as float at batch {shown(model.timing['batch'])}")
        if said:
            sentences.append(f"{name} on {backend} {' and '.join(said)}.")
    return sentences


def join(results: Results) -> dict[Key, Joined]:
    """{model and backend: its evaluation and its fastest time at the smallest batch}, in the order of the files."""
    evaluations = {
        key_of(values): values
        for values in results.get("evaluation", {}).values()
        if isinstance(values.get("model"), str)
    }
    timings: dict[Key, Values] = {}
    for row in timing_rows(results):
        best = timings.get(key := key_of(row))
        if best is None or (row["batch"], row["ms"]) < (best["batch"], best["ms"]):
            timings[key] = row
    keys = dict.fromkeys((*evaluations, *timings))
    return {key: Joined(evaluations.get(key, {}), timings.get(key, {})) for key in keys}


def key_of(values: Values) -> Key:
    """The model's file, and the first word of the backend: versions and CUDA graphs are not told apart."""
    return Path(values["model"]).name, str(values.get("backend", "")).partition(" ")[0].rstrip(",")


def against_float(joined: dict[Key, Joined], model: Joined) -> Difference | None:
    """The difference from the first float model that was evaluated on as many images; None of a float model."""
    if model.metric is None or model.is_float:
        return None
    for (name, _), other in joined.items():
        same = other.metric == model.metric and other.evaluation.get("images") == model.evaluation.get("images")
        if other.is_float and same:
            return Difference(name, round(model.evaluation[model.metric] - other.evaluation[model.metric], 2))
    return None


def speed_up(joined: dict[Key, Joined], key: Key) -> float | None:
    """The time of the fastest float model on the same backend and batch over the model's; None of a float model."""
    model = joined[key]
    if not model.timing or model.is_float:
        return None
    floats = [
        other.timing["ms"]
        for (_, backend), other in joined.items()
        if other.is_float and backend == key[1] and other.timing.get("batch") == model.timing["batch"]
    ]
    return min(floats) / model.timing["ms"] if floats and model.timing["ms"] else None


def models(found: dict[Key, Finding]) -> str:
    """A line for each model: accuracy and speed side by side."""
    rows: list[list[Cell]] = []
    for key, (model, difference, times) in found.items():
        values, points = model.evaluation, None if difference is None else difference.points
        accuracy = [values.get(model.metric or ""), values.get("acc1_error"), points, values.get("images")]
        time = [model.timing.get("batch"), model.timing.get("ms"), times]
        rows.append([*key, model.precision, *map(number, (*accuracy, *time))])
    metric = next((METRICS[each.model.metric] for each in found.values() if each.model.metric), "Acc@1")
    headings = ["model", "on", "precision", metric, "+-", "against float", "images", "batch", "ms", "times float"]
    kept = [at for at in range(len(headings)) if at < 3 or any(row[at] is not None for row in rows)]
    return table([headings[at] for at in kept], [[row[at] for at in kept] for row in rows])


def next_command(results: Results, good: bool) -> list[str]:
    """What is missing first, as a command; none where all is there."""
    steps = {
        "qswin sensitivity says which layers cost most": not good and not results.get("sensitivity"),
        "qswin evaluate --model FILE --data DIR --json RUN/eval.json says its accuracy": not results.get("evaluation"),
        "qswin bench --model FILES --json RUN/bench.json says its speed": not results.get("timing"),
    }
    return [command for command, missing in steps.items() if missing][:1]


def number(value: Any) -> Cell:
    """A number as it is; None for anything else."""
    return value if is_number(value) else None


def shown(value: Any) -> str:
    """A number with four digits; "?" for anything else."""
    return f"{value:.4g}" if is_number(value) else "?"
