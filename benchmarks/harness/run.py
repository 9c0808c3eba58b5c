"""Does our stopwatch agree with OpenVINO's own, and what does it cost? Writes results.json and README.md beside itself.

python benchmarks/harness/run.py            # run again to resume; --quick for a taste, which is printed and not recorded
"""

from __future__ import annotations

import json
import re
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import click
import numpy as np

from fofa_deploy import environment
from fofa_deploy.backend import float_recipe, get_backend
from fofa_deploy.config import LimitsPlan, MeasurePlan, ready_made
from fofa_deploy.measure import Candidate, measure
from fofa_deploy.pipeline import opened
from fofa_deploy.profile import find_profile
from fofa_deploy.progress import Quiet
from fofa_deploy.results import Measurement
from fofa_deploy.runner.timing import timed
from fofa_deploy.types import Graph

HERE = Path(__file__).parent
MODELS = ("timm:resnet18", "timm:mobilenetv3_small_100", "timm:vit_tiny_patch16_224")
SIDE, CLASSES = 224, 10
AGREEMENT, OVERHEAD_US = 0.05, 20.0


@click.command()
@click.option("--work", type=click.Path(path_type=Path, file_okay=False), default=HERE.parent.parent / "runs" / "harness")
@click.option("--quick", is_flag=True, help="One model, two short rounds, printed and not recorded.")
def main(work: Path, quick: bool) -> None:
    """Interleave both stopwatches on the same models and threads, and time a session that does nothing."""
    models, rounds, seconds = (MODELS[1:2], 2, 2) if quick else (MODELS, 8, 5)
    threads = (1,) if quick else (1, len(environment.describe().affinity))
    work.mkdir(parents=True, exist_ok=True)
    rows = [_compared(_candidate(work, model, count), model, count, rounds, seconds, work) for model in models for count in threads]
    overhead = _overhead_us()
    result = {"environment": environment.describe().model_dump(mode="json"), "rows": rows, "overhead_us": overhead}
    result["goals"] = _goals(rows, overhead)
    if quick:
        click.echo(json.dumps({"rows": rows, "goals": result["goals"]}, indent=1))
        return
    (HERE / "results.json").write_text(json.dumps(result, indent=1, allow_nan=False) + "\n")
    (HERE / "README.md").write_text(_page(result))


# --- the models ---------------------------------------------------------------------------------------------------


def _candidate(work: Path, model: str, threads: int) -> Candidate:
    """An fp32 OpenVINO artifact of a model with seeded weights, whose values do not change its speed; built once."""
    folder = work / model.partition(":")[2]
    with opened(ready_made(*_ingredients(folder, model)), folder / "run", Quiet()) as run:
        graph = run.graph
    profile = find_profile("cpu-openvino")
    profile = profile.model_copy(update={"execution": profile.execution.model_copy(update={"threads": threads})})
    artifact = folder / "artifact"
    if not (artifact / "artifact.json").is_file():
        shutil.rmtree(artifact, ignore_errors=True)
        artifact.mkdir()
        backend, source = get_backend("openvino"), Graph.load(graph)
        backend.build(source, float_recipe(backend, profile, source), None, artifact)
    return Candidate(artifact=artifact, profile=profile, golden=graph / "golden.npz")


def _ingredients(folder: Path, model: str) -> tuple[Path, str, int, Path, list[str]]:
    """What `ready_made` takes: seeded weights and a few images of noise, written once."""
    import timm
    import torch
    from PIL import Image
    from safetensors.torch import save_file

    weights, images = folder / "weights.safetensors", folder / "images"
    if not weights.is_file():
        images.mkdir(parents=True, exist_ok=True)
        rng = np.random.default_rng(0)
        for number in range(16):
            Image.fromarray(rng.integers(0, 256, (SIDE, SIDE, 3), np.uint8)).save(images / f"{number}.png")
        torch.manual_seed(0)
        save_file(timm.create_model(model.partition(":")[2], num_classes=CLASSES).state_dict(), weights)
    return weights, model, CLASSES, images, [f"data.image_size={SIDE}"]


# --- both stopwatches ---------------------------------------------------------------------------------------------


def _compared(candidate: Candidate, model: str, threads: int, rounds: int, seconds: int, work: Path) -> dict:
    """Medians of both, in turns; resumed at the round it was stopped at."""
    file = work / f"{model.partition(':')[2]}-{threads}-{rounds}x{seconds}.json"
    pairs = json.loads(file.read_text()) if file.is_file() else []
    for _ in range(len(pairs), rounds):
        pairs.append([_ours(candidate, seconds), _theirs(candidate, threads, seconds)])
        file.write_text(json.dumps(pairs))
    ours, theirs = ([pair[side] for pair in pairs] for side in (0, 1))
    ratio = statistics.median(mine / other for mine, other in pairs)
    medians = {"ours_ms": statistics.median(ours), "benchmark_app_ms": statistics.median(theirs)}
    return {"model": model, "threads": threads, "rounds": rounds, **medians, "ratio": ratio, "pairs": pairs}


def _ours(candidate: Candidate, seconds: int) -> float:
    (found,) = measure([candidate], MeasurePlan(seconds=seconds, max_seconds=seconds), LimitsPlan(), 0, Quiet())
    if not isinstance(found, Measurement):
        raise found
    return found.latency_ms.p50


def _theirs(candidate: Candidate, threads: int, seconds: int) -> float:
    """benchmark_app's median, on the same file, device, precision, streams and threads."""
    tool = Path(sys.executable).with_name("benchmark_app")
    command = [tool, "-m", candidate.artifact / "model.xml", "-d", "CPU", "-api", "sync", "-hint", "none", "-nstreams", "1"]
    shape = f"[1,3,{SIDE},{SIDE}]"
    command += ["-nthreads", str(threads), "-infer_precision", "f32", "-data_shape", shape, "-t", str(seconds)]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    median = re.search(r"Median:\s+([\d.]+) ms", shown.stdout)
    if median is None:
        raise click.ClickException(f"benchmark_app gave no median: {(shown.stdout + shown.stderr)[-1000:]}")
    return float(median[1])


class Null:
    """A session that does nothing: what is left is the harness."""

    def run(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return feeds


def _overhead_us() -> float:
    session, feeds = Null(), {"x": np.zeros((1, CLASSES), np.float32)}
    return statistics.median(timed(lambda: session.run(feeds)["x"].item(0), 20_000)) / 1e3


# --- the record ---------------------------------------------------------------------------------------------------


def _goals(rows: list[dict], overhead: float) -> list[dict]:
    worst = max(abs(row["ratio"] - 1) for row in rows)
    return [
        {
            "name": "largest difference from benchmark_app",
            "goal": f"<= {AGREEMENT}",
            "measured": worst,
            "unit": "fraction",
            "met": worst <= AGREEMENT,
        },
        {
            "name": "harness overhead per inference",
            "goal": f"< {OVERHEAD_US}",
            "measured": overhead,
            "unit": "µs",
            "met": overhead < OVERHEAD_US,
        },
    ]


def _page(result: dict) -> str:
    place = result["environment"]
    lines = [
        "# Does the stopwatch agree with OpenVINO's own?",
        "",
        "Written by `python benchmarks/harness/run.py`; nothing here is typed by hand.",
        "",
        f"{place['cpu']}, {place['cores']} cores, load average {place['load_average']:.1f}, {place['os']}; "
        f"openvino {place['versions']['openvino']}. fp32, batch 1, {SIDE} px, one stream; both in turns, medians over the rounds.",
        "",
        "| model | threads | rounds | ours, p50 ms | benchmark_app, median ms | ratio |",
        "| --- | --- | --- | --- | --- | --- |",
        *(_row(row) for row in result["rows"]),
        "",
        "| goal | wanted | measured | met |",
        "| --- | --- | --- | --- |",
        *(
            f"| {g['name']} | {g['goal']} {g['unit']} | {g['measured']:.3g} | {'yes' if g['met'] else 'no'} |"
            for g in result["goals"]
        ),
    ]
    return "\n".join(lines) + "\n"


def _row(row: dict) -> str:
    times = f"{row['ours_ms']:.3f} | {row['benchmark_app_ms']:.3f}"
    return f"| {row['model']} | {row['threads']} | {row['rounds']} | {times} | {row['ratio']:.3f} |"


if __name__ == "__main__":
    main()
