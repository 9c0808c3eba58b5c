"""Every timm model family captured, built and verified for every target: what works, what does not, and why.

python benchmarks/zoo/run.py                    # all families, resuming; what failed is tried again
python benchmarks/zoo/run.py --precision fp32   # only this precision; the others can follow in another run
python benchmarks/zoo/run.py --only levit --only swin_transformer
python benchmarks/zoo/run.py --quick            # a handful, printed and not recorded
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory

import click

HERE = Path(__file__).parent
FOLDERS = [HERE, HERE.parent / "zoo-distill", HERE.parent / "suites"]
sys.path[:0] = map(str, FOLDERS[1:])

from keeper import Keeper, conditions, described, load, save, table  # noqa: E402

from fofa_deploy.errors import FofaError  # noqa: E402
from fofa_deploy.types import Precision, Status  # noqa: E402

RESULTS = HERE / "results.json"
CHOICES = HERE.parent / "zoo-distill" / "results.json"
QUICK = ("resnet", "vision_transformer", "swin_transformer", "mlp_mixer", "levit", "maxxvit")
TARGETS = {"cpu-onnxruntime": "ONNX Runtime", "cpu-openvino": "OpenVINO", "rtx-desktop": "TensorRT-RTX"}
PRECISIONS = (Precision.FP32, Precision.FP16, Precision.BF16, Precision.INT8)
"""In the order in which they are tried: the cheapest first."""
SHOWN = [(target, precision) for precision in PRECISIONS for target in TARGETS]
WORDS = {
    Status.VERIFIED: "verified",
    Status.BUILT_NOT_RUN: "built",
    Status.REJECTED: "**rejected**",
    Status.FAILED: "**failed**",
}
RANK = list(WORDS)
CAUSES = {
    ("efficientvim", "cpu-openvino"): "OpenVINO's CPU plugin computes a depthwise convolution minus a tensor, times a vector, wrong"
    " where the batch is dynamic and 1 and the map one pixel; a static batch, another batch or a larger map is right",
    ("sequencer", "rtx-desktop"): "its 36 LSTMs hold most of its layers with weights, and TensorRT has no LSTM in int8",
}
"""What was found out about failures, by family and target."""
PACKAGES = ("torch", "timm", "onnx", "onnxruntime", "openvino", "nncf", "tensorrt-rtx", "fofa-deploy")
METHOD = """
A family is a module of `timm.models`, as `timm.list_modules()` names them. Each sends its classifier with the fewest parameters
(timm's `test_*` miniatures left out) at the smallest square image of 64 px or more that it takes (* = told to its constructor),
six of them with four blocks for the sake of memory (depth=4), with 5 classes, the same as in
[zoo-distill](../zoo-distill/README.md). Weights are random, seeded, and fitted to images so that every layer is alive and each
logit has mean 0 and variance 1 over 32 images (`lively.py`). Images are crops of real photographs.

- **Captured**: exported with a dynamic batch, and the graph says the same as PyTorch in ONNX Runtime at batches of 1, 2 and 8
  (relative error of the logits 1e-3 at most; *error* is what it was). TorchScript is the exporter of what torch.export takes
  and cannot write as ONNX.
- **verified**: built, the runtime's own layer table shows the precision that was asked for, and the logits are PyTorch's at
  batches of 1, 2 and 8 (fp32 1e-3, fp16 5e-2, bf16 2e-1).
- **built**: built and the precision shown, on a machine without the device: nothing has run.
- **int8**: built, the precision shown, and run; the percentage is how many of 64 images keep PyTorch's top-1 class, of the
  closest recipe. The weights are random: it tells rounding, not accuracy, and nothing here is rejected for it. Of recipes that
  run the same kernels the first is tried, min-max ranges without learned rounding; those that leave layers in float are not.

Each recipe is built and run in a child process with limits on time and memory; one that crashes costs itself.
"""


@click.command()
@click.option("--only", multiple=True, metavar="FAMILY", help="Try this family again, whatever is recorded.")
@click.option(
    "--precision", "precisions", multiple=True, type=click.Choice([str(name) for name in PRECISIONS]), help="All when absent."
)
@click.option("--quick", is_flag=True, help=f"Only {', '.join(QUICK)}; nothing is recorded.")
@click.option("--seconds", default=240.0, help="Time limit of one family; what is left of it is tried by the next run.")
@click.option("--memory-gib", default=8.0, help="Memory limit of the child process.")
@click.option("--work", type=click.Path(path_type=Path), help="Keep captured graphs here for the next run.")
def main(
    only: tuple[str, ...], precisions: tuple[str, ...], quick: bool, seconds: float, memory_gib: float, work: Path | None
) -> None:
    """Put the families through their trials, recording each step as it finishes."""
    import timm
    from efficientnet_lite0 import write_photographs

    families = load(RESULTS)["families"]
    chosen = QUICK if quick else only or timm.list_modules()
    limits = seconds, int(memory_gib * 2**30)
    with nullcontext(work) if work else TemporaryDirectory() as folder:
        place = Path(folder).absolute()
        if not (place / "photographs").is_dir():
            write_photographs(place / "photographs")
        with _child(limits) as zoo:
            entries = {family: _entry(zoo, family, {} if only or quick else families) for family in chosen}
        if not quick:
            save(RESULTS, {family: entry for family, entry in entries.items() if family not in families}, page)
        for family, entry in sorted(entries.items(), key=_effort):
            with _child(limits) as zoo:
                for step in _Trial(zoo, entry, place, set(precisions or PRECISIONS), seconds).steps():
                    click.echo(f"{family} {step}")
                    if not quick:
                        save(RESULTS, {family: entry}, page)


def _child(limits: tuple[float, int]) -> Keeper:
    """A new one for each family: what the heap of an old one has gathered would count towards the limit of the next."""
    return Keeper("specimens:Specimens", FOLDERS, *limits)


def _entry(zoo: Keeper, family: str, recorded: dict) -> dict:
    """What is recorded of a family; at first, the model that the benchmark of distillation has found."""
    if family in recorded:
        return recorded[family]
    known = load(CHOICES)["families"].get(family, {})
    found = {name: known[name] for name in ("smallest", "candidate") if name in known}
    return found or {"smallest": zoo.ask("smallest", family=family)}


def _effort(item: tuple[str, dict]) -> tuple[bool, int]:
    """What failed before comes last, then the smaller model first."""
    return "failed" in item[1].get("capture", {}), item[1]["smallest"]["params"]


class _Trial:
    """One family's, as far as it has not been done before.

    Args:
        entry: the family's part of the record, which this fills.
        folder: where photographs and captured graphs lie.
    """

    def __init__(self, zoo: Keeper, entry: dict, folder: Path, precisions: set[str], seconds: float) -> None:
        self.entry, self._zoo, self._precisions = entry, zoo, precisions
        self._photographs, self._graph = folder / "photographs", folder / entry["smallest"]["name"]
        self._end = time.monotonic() + seconds
        entry.setdefault("rows", {})

    def steps(self) -> Iterator[str]:
        """Takes one after the other, and tells how each ended."""
        asked = [row for row in self.entry["rows"].values() if row["precision"] in self._precisions]
        if _captured(self.entry) and self._precisions <= set(self.entry.get("tried", ())) and all(map(_settled, asked)):
            return
        if not _captured(self.entry) or not (self._graph / "validation.npy").is_file():
            yield self._capture()
        if not _captured(self.entry):
            return
        try:
            wanted = self._wanted()
        except FofaError as error:
            yield f"offer: {_first_line(error)}"
            return
        for target, offered, recipe in wanted:
            if time.monotonic() > self._end:
                yield "stopped: its time is up"
                return
            yield self._attempt(target, offered, recipe)
        self.entry["tried"] = sorted({*self.entry.get("tried", ()), *self._precisions})
        yield "done"

    def _capture(self) -> str:
        where = {"photographs": str(self._photographs), "folder": str(self._graph)}
        try:
            self.entry["capture"] = self._zoo.ask("capture", candidate=self._zoo.candidate(self.entry), **where)
        except FofaError as error:
            self.entry["capture"] = {"failed": _first_line(error)}
        return f"capture: {self.entry['capture']}"

    def _wanted(self) -> list[tuple[str, dict, dict]]:
        """What the back ends offer and has not been done: target, offer and recipe, the cheapest first."""
        offers = {target: self._zoo.ask("offer", folder=str(self._graph), target=target) for target in TARGETS}
        everything = [(target, offered["probe"], recipe) for target, offered in offers.items() for recipe in offered["recipes"]]
        whole = [told for told in everything if _speaks_for_itself(told[2])]
        done = {key for key, row in self.entry["rows"].items() if _settled(row)}
        left = [told for told in whole if told[2]["precision"] in self._precisions and _key(told[0], told[2]) not in done]
        return sorted(left, key=lambda told: PRECISIONS.index(told[2]["precision"]))

    def _attempt(self, target: str, probe: dict, recipe: dict) -> str:
        told = {"recipe": recipe, "can_run": probe["can_run"], "reason": probe["reason"]}
        try:
            row = self._zoo.ask("attempt", folder=str(self._graph), target=target, **told)
        except FofaError as error:
            row = {"status": Status.FAILED, "reason": _first_line(error)}
        self.entry["rows"][_key(target, recipe)] = _kept(row, target, recipe)
        return f"{_key(target, recipe)}: {row['status']} {row['reason']}"


def _speaks_for_itself(recipe: dict) -> bool:
    """Others run the same kernels with other numbers, or fewer layers in int8, or the layers that are not in another float."""
    first, whole = recipe["family"] in ("", recipe["name"]), not (recipe["options"].get("float_share") or recipe.get("on_request"))
    return first and whole and recipe.get("rest") in (None, Precision.FP32)


def _settled(row: dict) -> bool:
    """There is nothing to try again: what rounds more than fp32 rounds as much the next time."""
    return row["status"] in (Status.VERIFIED, Status.BUILT_NOT_RUN) or (
        row["status"] == Status.REJECTED and row["precision"] != Precision.FP32
    )


def _works(row: dict) -> bool:
    """int8 of random weights may differ, floats may not."""
    return row["status"] in (Status.VERIFIED, Status.BUILT_NOT_RUN) or (_settled(row) and row["precision"] == Precision.INT8)


def _key(target: str, recipe: dict) -> str:
    return f"{target} {recipe['name']}"


def _kept(row: dict, target: str, recipe: dict) -> dict:
    """Of a row of the report, what this benchmark is about."""
    told = {"target": target, "recipe": recipe["name"], "precision": recipe["precision"]}
    judged = {"status": row["status"], "reason": row["reason"], "layers": row.get("precision", {})}
    golden, validation = row.get("golden") or {}, row.get("validation") or {}
    return {**told, **judged, "relative_error": golden.get("relative_error"), "agreement": validation.get("agreement")}


def _first_line(error: FofaError) -> str:
    return error.message.splitlines()[0]


def _captured(entry: dict) -> bool:
    return "exporter" in entry.get("capture", {})


# --- page -----------------------------------------------------------------------------------------------------


def page(record: dict) -> str:
    """README.md, from the record alone."""
    families = record["families"]
    shown = [pair for pair in SHOWN if any(_rows(entry, *pair) for entry in families.values())]
    titles = [f"{TARGETS[target]} {precision}" for target, precision in shown]
    columns = ["family", "smallest model", "M parameters", "px", "captured by", "error", *titles]
    cells = [[_cell(entry, *pair) for pair in shown] for entry in families.values()]
    lines = [
        "# Every timm family on every target",
        "",
        "Written by `python benchmarks/zoo/run.py`; nothing here is typed by hand.",
        "",
        f"{sum(map(_captured, families.values()))} of {len(families)} families are captured. Of these work:",
        "",
        *table(titles, [[_tally(column) for column in zip(*cells, strict=True)]]),
        "",
        conditions(record["environment"], PACKAGES),
        "",
        *METHOD.strip().splitlines(),
        "",
        *table(columns, [[*_told(family, families[family]), *row] for family, row in zip(families, cells, strict=True)]),
        "",
        "## What does not work",
        "",
        *([line for family, entry in families.items() for line in _complaints(family, entry)] or ["Nothing."]),
    ]
    return "\n".join(lines) + "\n"


def _rows(entry: dict, target: str, precision: str) -> list[dict]:
    return [row for row in entry.get("rows", {}).values() if (row["target"], row["precision"]) == (target, precision)]


def _cell(entry: dict, target: str, precision: str) -> str:
    """The best of a target's recipes of one precision."""
    rows = _rows(entry, target, precision)
    if not rows:
        return ""
    best = min(rows, key=lambda row: (RANK.index(row["status"]), -(row["agreement"] or 0)))
    if precision == Precision.INT8 and best["agreement"] is not None:
        return f"{best['agreement']:.0%}"
    return WORDS[best["status"]]


def _tally(cells: Sequence[str]) -> str:
    tried = [cell for cell in cells if cell]
    return f"{sum(not cell.startswith('*') for cell in tried)} of {len(tried)}"


def _told(family: str, entry: dict) -> list[str]:
    found = entry.get("capture", {})
    if not _captured(entry):
        return [family, *described(entry), "**no**" if found else "", ""]
    return [family, *described(entry), found["exporter"], f"{found['relative_error']:.0e}"]


def _complaints(family: str, entry: dict) -> list[str]:
    if "failed" in entry.get("capture", {}):
        return [f"- {family}, capture: {entry['capture']['failed']}"]
    rows = [row for row in entry.get("rows", {}).values() if not _works(row)]
    told = [f"- {family}, {TARGETS[row['target']]}, {row['recipe']}: {row['status']}, {row['reason']}" for row in rows]
    causes = [CAUSES.get((family, row["target"])) for row in rows]
    return [f"{line} ({cause})" if cause else line for line, cause in zip(told, causes, strict=True)]


if __name__ == "__main__":
    main()
