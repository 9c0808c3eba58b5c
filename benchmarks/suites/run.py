"""Run one suite through the whole pipeline, record its figures, and write benchmarks/README.md and the README's headline.

python benchmarks/suites/run.py fashion-mnist --out runs/fashion-mnist
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import click

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
RESULTS = HERE / "results"
SUITES = ("fashion-mnist", "efficientnet-lite0")
AGREEMENT = ("agreement, validation", "agreement, test")


@click.command()
@click.argument("suite", type=click.Choice(SUITES))
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), help="Run directory; run again to resume.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override the suite's plan, for a taste of it.")
def main(suite: str, out: Path | None, overrides: tuple[str, ...]) -> None:
    """Run SUITE and record it; with overrides the figures are printed and not recorded."""
    from fofa_deploy.config import load_plan
    from fofa_deploy.pipeline import compress_and_export
    from fofa_deploy.progress import Terminal

    out = out or ROOT / "runs" / suite
    started = time.monotonic()
    plan = load_plan(str(HERE / f"{suite}.toml"), [*_prepare(suite, out), *overrides])
    report = compress_and_export(plan, out, Terminal())
    text = report.model_dump_json()
    result = {
        "suite": suite,
        "environment": report.environment.model_dump(mode="json"),
        "seconds_this_time": round(time.monotonic() - started, 1),
        "seconds_in_stages": _stage_seconds(out),
        "report": json.loads(text),
        "goals": _goals(suite, json.loads(text), _stage_seconds(out)),
    }
    if overrides:
        click.echo(json.dumps(result["goals"], indent=1))
        return
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{suite}.json").write_text(json.dumps(result, indent=1, allow_nan=False) + "\n")
    write_pages()


def _prepare(suite: str, out: Path) -> list[str]:
    if suite != "efficientnet-lite0":
        return []
    from efficientnet_lite0 import write_photographs, write_weights

    inputs = out.with_name(f"{out.name}-inputs")
    photographs, weights = inputs / "photographs", inputs / "efficientnet-lite0.safetensors"
    if not weights.is_file():
        write_photographs(photographs)
        write_weights(weights)
    return [f"data.root={photographs.absolute()}", f"student.checkpoint={weights.absolute()}"]


def _stage_seconds(out: Path) -> float:
    """Time in stages of all runs that led to the directory's content; training counts what an interrupted run had done, too."""
    from fofa_deploy.distill.job import read_curve
    from fofa_deploy.store import manifests

    trained = {stage: sum(epoch.seconds for epoch in read_curve(out / stage)) for stage in ("teacher", "student")}
    return round(sum(max(manifest.seconds, trained.get(manifest.stage, 0.0)) for manifest in manifests(out)), 1)


# --- goals ----------------------------------------------------------------------------------------------------


def _goals(suite: str, report: dict, seconds: float) -> list[dict]:
    goals = [_status_goal(report, target) for target in ("cpu-onnxruntime", "cpu-openvino", "rtx-desktop")]
    if suite == "fashion-mnist":
        teacher, student = report["teacher"], report["student"]
        goals += [
            _goal("teacher parameters", ">=", 4_000_000, teacher["params"], ""),
            _goal("teacher test top-1", ">=", 0.92, teacher["top1"], "fraction"),
            _goal("teacher parameters / student parameters", ">=", 10, teacher["params"] / student["params"], "x"),
            _goal("time in stages", "<=", 2400, seconds, "s"),
        ]
    return goals


def _goal(name: str, sign: str, goal: float, measured: float | None, unit: str) -> dict:
    met = measured is not None and (measured >= goal if sign == ">=" else measured <= goal)
    return {"name": name, "goal": f"{sign} {goal:g}", "measured": measured, "unit": unit, "met": met}


def _status_goal(report: dict, target: str) -> dict:
    rows = [row for row in report["targets"] if row["target"] == target]
    chosen = next((row for row in rows if row["chosen"]), None)
    runnable = any(row["status"] == "verified" for row in rows)
    wanted = "verified" if target != "rtx-desktop" or runnable else "built-not-run"
    found = chosen["status"] if chosen else ", ".join(sorted({row["status"] for row in rows}))
    met = bool(chosen) if wanted == "verified" else "built-not-run" in found
    return {"name": f"status of {target}", "goal": wanted, "measured": found, "unit": "", "met": met}


# --- pages ----------------------------------------------------------------------------------------------------


def write_pages() -> None:
    """benchmarks/README.md, and the block between the headline marks of README.md, from the recorded results alone."""
    results = [json.loads((RESULTS / f"{suite}.json").read_text()) for suite in SUITES if (RESULTS / f"{suite}.json").is_file()]
    parts = ["# Benchmarks", "", "Written by `python benchmarks/suites/run.py SUITE`; nothing here is typed by hand.", ""]
    for result in results:
        parts += _suite_page(result)
    (ROOT / "benchmarks" / "README.md").write_text("\n".join(parts).rstrip() + "\n")
    readme = ROOT / "README.md"
    before, mark, rest = readme.read_text().partition("<!-- headline -->\n")
    _, end, after = rest.partition("<!-- /headline -->")
    if mark and end:
        readme.write_text(before + mark + "\n".join(_headline(results)) + "\n" + end + after)


def _suite_page(result: dict) -> list[str]:
    report, environment = result["report"], result["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items())
    lines = [
        f"## {result['suite']}",
        "",
        f"{environment['cpu']}, {environment['cores']} cores, {environment['os']}, Python {environment['python']}; {versions}.",
        f"Recorded {report['created_at']}; {result['seconds_in_stages']:.0f} s in stages. Data: {report['data']['name']},"
        f" {report['data']['train']} training, {report['data']['validation']} validation, {report['data']['test']} test images.",
        "",
    ]
    lines += [*_table(("model", "parameters", "test top-1"), _model_rows(report)), ""]
    columns = ("target", "recipe", "status", "test top-1", *AGREEMENT, "KiB", "p50 ms", "p90", "p99", "factor", "why")
    lines += _table(columns, [_target_row(row) for row in report["targets"]])
    lines += ["", "Validation images decide; test images are for what they chose."]
    lines += ["Factors are against the reference above, interleaved in one run with the artifact.", ""]
    return [*lines, *_table(("goal", "wanted", "measured", "met"), [_goal_row(goal) for goal in result["goals"]]), ""]


def _named(report: dict) -> list[tuple[str, dict]]:
    return [(kind, report[kind]) for kind in ("teacher", "student") if report[kind]]


def _model_rows(report: dict) -> list[Sequence[str]]:
    rows = [(f"{kind}: {model['model']}", f"{model['params']:,}", _percent(model["top1"])) for kind, model in _named(report)]
    reference = report["reference"]
    if reference is None:
        return rows
    name = f"reference: {reference['description']}, p50 {_ms(reference)} ms, {_kib(reference)} KiB"
    return [*rows, (name, "", _percent(reference["top1"]))]


def _target_row(row: dict) -> Sequence[str]:
    latency = row["latency_ms"] or {}
    accuracy = row["top1"] if row["chosen"] else None
    return (
        row["target"],
        f"**{row['recipe']}**" if row["chosen"] else row["recipe"],
        row["status"],
        _percent(accuracy),
        _percent((row["validation"] or {}).get("agreement")),
        _percent(row["agreement"] if row["chosen"] else None),
        "" if row["size_bytes"] is None else f"{row['size_bytes'] / 1024:.0f}",
        *("" if latency.get(name) is None else f"{latency[name]:.3f}" for name in ("p50", "p90", "p99")),
        "" if row["speedup"] is None else f"{row['speedup']:.2f}x",
        row["reason"],
    )


def _goal_row(goal: dict) -> Sequence[str]:
    measured = goal["measured"] if isinstance(goal["measured"], str) else f"{goal['measured']:.6g}"
    return goal["name"], f"{goal['goal']} {goal['unit']}".strip(), measured, "yes" if goal["met"] else "**no**"


def _headline(results: Sequence[dict]) -> list[str]:
    """The chosen deployment of each target, for every suite."""
    lines = []
    for result in results:
        if result["report"]["reference"] is not None:
            columns = ("deployment", _measure(result["report"]), "size KiB", "p50 ms", "factor")
            lines += [_lead(result), "", *_table(columns, _deployments(result["report"])), ""]
    return lines[:-1]


def _measure(report: dict) -> str:
    return "test top-1" if report["teacher"] else f"agreement with PyTorch, {report['data']['test']} test images"


def _lead(result: dict) -> str:
    models = " -> ".join(f"{model['model']} ({model['params']:,} parameters)" for _, model in _named(result["report"]))
    return f"{result['suite']}, {models}, {result['environment']['cpu']}, {result['environment']['cores']} cores:"


def _deployments(report: dict) -> list[Sequence[str]]:
    reference, measure = report["reference"], "top1" if report["teacher"] else "agreement"
    name = f"{'teacher, ' if report['teacher'] else ''}fp32, ONNX Runtime"
    rows = [(name, _percent(reference[measure]), _kib(reference), _ms(reference), "1")]
    for row in report["targets"]:
        name = f"{row['recipe']}, {row['runtime']}"
        if row["chosen"]:
            rows.append((name, _percent(row[measure]), _kib(row), _ms(row), _factor(row)))
        elif row["status"] == "built-not-run":
            rows.append((name, row["reason"], _kib(row), "", ""))
    return rows


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.2%}"


def _factor(row: dict) -> str:
    return "" if row["speedup"] is None else f"{row['speedup']:.1f}x"


def _kib(row: dict) -> str:
    return f"{row['size_bytes'] / 1024:.0f}"


def _ms(row: dict) -> str:
    return "" if row["latency_ms"] is None else f"{row['latency_ms']['p50']:.3f}"


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    cells = [columns, ["---"] * len(columns), *rows]
    return ["| " + " | ".join(str(cell).replace("|", "\\|") for cell in row) + " |" for row in cells]


if __name__ == "__main__":
    sys.path.insert(0, str(HERE))
    main()
