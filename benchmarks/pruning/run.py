"""Does structured pruning win on measured latency, and against the same network scaled in width to as many multiplications?

python benchmarks/pruning/run.py            # run again to resume; --quick for a taste, which is printed and not recorded
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import click
import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from fofa_deploy import environment
from fofa_deploy.backend import float_recipe, get_backend
from fofa_deploy.capture import capture
from fofa_deploy.config import DataPlan, LimitsPlan, MeasurePlan, ModelPlan
from fofa_deploy.data import Split
from fofa_deploy.data.sources import ArraySource
from fofa_deploy.measure import NOISY, Candidate, measure
from fofa_deploy.models import build_model, parameter_count
from fofa_deploy.profile import find_profile
from fofa_deploy.progress import Quiet
from fofa_deploy.results import Measurement
from fofa_deploy.roofline import work
from fofa_deploy.select.variants import grid, pruned
from fofa_deploy.types import Graph, Preprocessing

HERE = Path(__file__).parent
MODELS = {"timm:resnet18": 64, "timm:mobilenetv3_small_100": 96, "timm:vit_tiny_patch16_224": 64}
TARGETS = ("cpu-onnxruntime", "cpu-openvino")
SHARES = (0.25, 0.5)
FACTORS = tuple(number / 40 for number in range(8, 40))
CLASSES, SECONDS, THREADS = 10, 5.0, 1
FASTER, LEVEL = 0.75, 1.05
"""Goals, set before measuring: half the channels gone leaves at most this share of p50; pruned takes at most so much of scaled."""
PACKAGES = ("torch", "timm", "torch-pruning", "onnxruntime", "openvino")


@click.command()
@click.option("--work", "place", type=click.Path(path_type=Path), default=HERE.parent.parent / "runs" / "pruning")
@click.option("--quick", is_flag=True, help="One model on one target, printed and not recorded.")
def main(place: Path, quick: bool) -> None:
    """Measure every variant of a model side by side, one interleaved run per model and target."""
    models, targets, seconds = (list(MODELS)[:1], TARGETS[:1], 0.5) if quick else (list(MODELS), TARGETS, SECONDS)
    rows = [row for model in models for row in _rows(place / model.partition(":")[2], model, targets, seconds)]
    if quick:
        click.echo(json.dumps({"rows": rows, "goals": _goals(rows)}, indent=1))
        return
    described = environment.describe().model_dump(mode="json")
    versions = environment.package_versions(PACKAGES)
    recorded = datetime.now(UTC).isoformat(timespec="seconds")
    result = {"environment": described, "versions": versions, "recorded_at": recorded, "rows": rows, "goals": _goals(rows)}
    (HERE / "results.json").write_text(json.dumps(result, indent=1, allow_nan=False) + "\n")
    (HERE / "README.md").write_text(_page(result))


# --- the variants -------------------------------------------------------------------------------------------------


def _made(plan: ModelPlan, side: int) -> torch.nn.Module:
    torch.manual_seed(0)
    return build_model(plan, CLASSES, 3, (side, side)).eval()


def _variants(folder: Path, model: str) -> dict[str, ModelPlan]:
    """The plans of a model's variants by name; found once."""
    kept = folder / "variants.json"
    if not kept.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        kept.write_text(json.dumps({name: plan.model_dump(mode="json") for name, plan in _found(model).items()}))
    return {name: ModelPlan.model_validate(plan) for name, plan in json.loads(kept.read_text()).items()}


def _found(model: str) -> dict[str, ModelPlan]:
    """The whole network, each pruned one, and for each the narrower one whose multiplications are nearest to its."""
    whole, side = ModelPlan(model=model), MODELS[model]
    found = {"whole": whole}
    scaled = [(plan, _operations(plan, side)) for plan in grid(whole, widths=FACTORS)]
    for share, plan in zip(SHARES, pruned(whole, SHARES), strict=True):
        wanted = _operations(plan, side)
        found[f"pruned {share:.0%}"] = plan
        found[f"scaled as {share:.0%}"] = min(scaled, key=lambda pair: abs(pair[1] - wanted))[0]
    return found


def _operations(plan: ModelPlan, side: int) -> int:
    network = _made(plan, side)  # outside: pruning runs it, too
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(torch.zeros(1, 3, side, side))
    return int(counter.get_total_flops())


def _graph(folder: Path, name: str, plan: ModelPlan, side: int) -> Path:
    """The captured network with seeded weights, whose values do not change its speed; written once."""
    if (folder / "plan.json").is_file() and (folder / "plan.json").read_text() == plan.model_dump_json():
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (16, side, side, 3), np.uint8)
    names = tuple(map(str, range(CLASSES)))
    source = ArraySource(pixels, np.zeros(16, np.int64), names, DataPlan(name="images", image_size=side), "noise")
    preprocessing = Preprocessing(image_size=(side, side), channels=3, mean=(0.5,) * 3, std=(0.5,) * 3)
    network = _made(plan, side)
    capture(network, name, preprocessing, names, Split(source, np.arange(16)), folder)
    (folder / "parameters.json").write_text(json.dumps(parameter_count(network)))
    (folder / "plan.json").write_text(plan.model_dump_json())
    return folder


def _candidate(graph: Path, target: str) -> Candidate:
    """Its fp32 artifact for a target, built once."""
    profile, artifact = find_profile(target), graph / target
    # Two threads on a machine that has other work wait for each other, and tell of that work.
    profile = profile.model_copy(update={"execution": profile.execution.model_copy(update={"threads": THREADS})})
    if not (artifact / "artifact.json").is_file():
        shutil.rmtree(artifact, ignore_errors=True)
        artifact.mkdir()
        backend, source = get_backend(profile.runtime), Graph.load(graph)
        backend.build(source, float_recipe(backend, profile, source), None, artifact)
    return Candidate(artifact=artifact, profile=profile, golden=graph / "golden.npz")


# --- the race -----------------------------------------------------------------------------------------------------


def _rows(folder: Path, model: str, targets: Sequence[str], seconds: float) -> list[dict]:
    """One row per target and variant; what was measured by an earlier run of this command is taken from there."""
    rows = []
    plans = _variants(folder, model)
    graphs = {name: _graph(folder / name.replace(" ", "-").rstrip("%"), model, plan, MODELS[model]) for name, plan in plans.items()}
    for target in targets:
        kept = folder / f"{target}-{seconds:g}.json"
        if not kept.is_file():
            kept.write_text(json.dumps(_race(graphs, target, seconds)))
        times = json.loads(kept.read_text())
        rows += [_row(model, target, name, plans[name], graphs[name], times) for name in plans]
    return rows


def _race(graphs: dict[str, Path], target: str, seconds: float) -> dict[str, dict]:
    candidates = [_candidate(graph, target) for graph in graphs.values()]
    found = measure(candidates, MeasurePlan(seconds=seconds, max_seconds=seconds), LimitsPlan(), 0, Quiet())
    for one in found:
        if not isinstance(one, Measurement):
            raise one
    return {name: one.model_dump(mode="json") for name, one in zip(graphs, found, strict=True) if isinstance(one, Measurement)}


def _row(model: str, target: str, name: str, plan: ModelPlan, graph: Path, times: dict[str, dict]) -> dict:
    taken, whole = times[name], times["whole"]
    return {
        "model": model,
        "target": target,
        "variant": name,
        "arguments": plan.arguments,
        "prune": plan.prune,
        "parameters": json.loads((graph / "parameters.json").read_text()),
        "macs": sum(node.macs for node in work(graph / "model.onnx").values()),
        "of_whole": taken["latency_ms"]["p50"] / whole["latency_ms"]["p50"],
        "least_of_whole": taken["latency_ms"]["min"] / whole["latency_ms"]["min"],
        "measurement": taken,
    }


# --- the record ---------------------------------------------------------------------------------------------------


def _goals(rows: list[dict]) -> list[dict]:
    p50 = {(row["model"], row["target"], row["variant"]): row["measurement"]["latency_ms"]["p50"] for row in rows}
    goals = []
    for model, target in dict.fromkeys((row["model"], row["target"]) for row in rows):
        half = p50[model, target, "pruned 50%"]
        goals.append(_goal(f"{model} on {target}: p50 of pruned 50% / whole", FASTER, half / p50[model, target, "whole"]))
        for share in SHARES:
            ratio = p50[model, target, f"pruned {share:.0%}"] / p50[model, target, f"scaled as {share:.0%}"]
            goals.append(_goal(f"{model} on {target}: p50 of pruned {share:.0%} / scaled to as many MACs", LEVEL, ratio))
    return goals


def _goal(name: str, limit: float, measured: float) -> dict:
    return {"name": name, "goal": f"<= {limit}", "measured": measured, "unit": "x", "met": measured <= limit}


def _page(result: dict) -> str:
    place, versions = result["environment"], result["versions"]
    met = sum(goal["met"] for goal in result["goals"])
    lines = [
        "# Does structured pruning win on measured latency?",
        "",
        "Written by `python benchmarks/pruning/run.py`; nothing here is typed by hand.",
        "",
        f"{place['cpu']}, {place['cores']} cores, load average {place['load_average']:.1f}, {place['os']}; "
        f"{', '.join(f'{name} {versions[name]}' for name in PACKAGES)}. Recorded {result['recorded_at']}.",
        "",
        f"fp32, batch 1, {THREADS} thread, random weights: latency alone is compared. The variants of a model are measured for "
        f"{SECONDS:g} s each in one interleaved run per target. *Scaled as* is the network of the same family, made narrower by "
        "timm's arguments, whose multiplications are nearest to the pruned one's.",
        "",
        "| model | target | variant | parameters | MMACs | p50 ms | of whole | min ms | of whole | runs vary by |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
        *(_line(row) for row in result["rows"]),
        "",
        *_noise(result["rows"]),
        f"{met} of {len(result['goals'])} goals are met. They are about p50, and were set before measuring.",
        "",
        "| goal | wanted | measured | met |",
        "| --- | --- | --- | --- |",
        *(
            f"| {g['name']} | {g['goal']} {g['unit']} | {g['measured']:.3f} | {'yes' if g['met'] else 'no'} |"
            for g in result["goals"]
        ),
    ]
    return "\n".join(lines) + "\n"


def _noise(rows: list[dict]) -> list[str]:
    """Which of the figures to trust, where the machine had other work."""
    noisy = sum(row["measurement"]["variation"] > NOISY for row in rows)
    if not noisy:
        return []
    return [
        f"**The machine had other work**: the runs of {noisy} of {len(rows)} rows vary by more than {NOISY:.0%}. A long run is hit "
        "by it more often than a short one, which flatters small networks in p50; the ratios of the least times are safer.",
        "",
    ]


def _line(row: dict) -> str:
    taken = row["measurement"]
    given = "; ".join(f"{key} = {value}" for key, value in row["arguments"].items())
    variant = f"{row['variant']} ({given})" if given else row["variant"]
    least = f"{taken['latency_ms']['min']:.3f} | {row['least_of_whole']:.2f}"
    sizes = f"{row['parameters']:,} | {row['macs'] / 1e6:.1f}"
    times = f"{taken['latency_ms']['p50']:.3f} | {row['of_whole']:.2f} | {least} | {taken['variation']:.0%}"
    return f"| {row['model']} | {row['target']} | {variant} | {sizes} | {times} |"


if __name__ == "__main__":
    main()
