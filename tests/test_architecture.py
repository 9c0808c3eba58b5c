"""The house rules, kept by a machine: ARCHITECTURE.md tells them, this file holds the code to them."""

from __future__ import annotations

import ast
import re
import resource
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = {"fofa_deploy": ROOT / "fofa_deploy", "fofa_exporters": ROOT / "exporters" / "fofa_exporters"}
ARCHITECTURE = (ROOT / "ARCHITECTURE.md").read_text()

# A part may import parts of the lines above its own, and itself. A package is one part.
ORDER = """
    errors mistakes progress runner
    types schema isolate
    results backend profile training prune timm_entry pixels
    config store metrics serving
    environment recorded verify measure data models
    roofline
    layers
    diagnosis judge inference report
    distill capture tune gate
    files
    remote recovery
    select adopt
    lookup
    pipeline
    cli
"""
LINES = [line.split() for line in ORDER.strip().splitlines()]
RANK = {part: number for number, line in enumerate(LINES) for part in line}

TORCH = {"models", "inference", "capture", "distill", "prune", "timm_entry"}
FRAMEWORKS = {"torch", "timm", "torchvision", "accelerate"}
LAZY_TIMM = {"data", "select"}  # timm.data opens data sets, timm.list_models expands patterns, each inside one function
PARTS = "__init__ observed prepare ranges recipes recover scheme sensitivity statistics writer"
RUNTIMES = {
    "_cuda": {"cuda"},
    "_device": set(),
    "_engine": {"onnx"},
    "_fused": {"onnx"},
    "_onnx": {"onnx", "onnxruntime"},
    "_normal": {"onnx"},
    "_onnxruntime_recipes": {"onnx"},
    "_rewrite": {"onnx"},
    "onnxruntime": {"onnx", "onnxruntime"},
    "_nncf": {"nncf"},
    "openvino": {"onnx", "openvino", "nncf"},
    "_typed": {"onnx"},
    "_openvino_session": set(),
    "_words": set(),
    "_kernels": {"onnx"},
    **{f"_quantization.{part}": {"onnx", "onnxruntime"} for part in PARTS.split()},
    "reference": {"onnx"},
    "tensorrt": {"onnx", "onnxruntime", "tensorrt", "tensorrt_rtx", "cuda"},
}
COMMON = {"numpy", "google"}  # google.protobuf is what onnx raises
BOUNDARIES = {
    ("fofa_deploy/isolate.py", "_guarded"),
    ("fofa_deploy/models.py", "_resolve"),
    ("fofa_deploy/distill/engine.py", "tracking"),  # MLflow and W&B have error trees of their own, and may be absent
}
"""Where an unexpected exception may be caught: it is handed on as what it is. Beside these, only a back end's probe()."""


def modules(package: str) -> dict[str, Path]:
    """Dotted name below the package -> file."""
    folder = PACKAGES[package]
    return {".".join(p.relative_to(folder).with_suffix("").parts): p for p in sorted(folder.rglob("*.py"))}


FILES = [path for package in PACKAGES for path in modules(package).values()]


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def functions(node: ast.AST, name: str = "") -> list[tuple[str, ast.FunctionDef]]:
    found = []
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            found.append((child.name, child))
        found += functions(child)
    return found


def imports(path: Path, top_level_only: bool = False) -> set[str]:
    """Full names of all that a file imports, wherever in it; ``from a import b`` counts as ``a.b``."""
    nodes = tree(path).body if top_level_only else ast.walk(tree(path))
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def roots(names: set[str]) -> set[str]:
    return {name.partition(".")[0] for name in names}


def parts_used(path: Path) -> set[str]:
    """The parts of the core that a file imports."""
    ours = (name.split(".")[1] for name in imports(path) if name.startswith("fofa_deploy."))
    return {name for name in ours if name != "__version__"}


CORE = {name: path for name, path in modules("fofa_deploy").items() if name not in ("__init__", "__main__")}


# --- imports


def test_every_part_has_its_place_in_the_order():
    assert {name.split(".")[0] for name in CORE} == set(RANK)
    assert sum(len(line) for line in LINES) == len(RANK)


def test_imports_point_one_way():
    uses = [(name, name.split(".")[0], used) for name, path in CORE.items() for used in parts_used(path)]
    assert len(uses) > 150
    assert [f"{name} imports {used}" for name, part, used in uses if used != part and RANK[used] >= RANK[part]] == []


def test_there_are_no_import_cycles_between_modules():
    """Also inside a package, where the order above does not look."""
    known = {f"fofa_deploy.{name}".removesuffix(".__init__"): path for name, path in modules("fofa_deploy").items()}
    edges = {}
    for name, path in known.items():
        used = {target if target in known else target.rpartition(".")[0] for target in imports(path, top_level_only=True)}
        edges[name] = {target for target in used if target in known and target != "fofa_deploy"}
    while edges:
        leaves = {name for name, targets in edges.items() if not targets & edges.keys() - {name}}
        assert leaves, f"a cycle among {sorted(edges)}"
        edges = {name: targets for name, targets in edges.items() if name not in leaves}


def test_the_starred_parts_and_no_others_know_pytorch():
    def knowing(**options) -> set[str]:
        return {name.split(".")[0] for name, path in CORE.items() if roots(imports(path, **options)) & FRAMEWORKS}

    assert knowing() == TORCH | LAZY_TIMM
    assert knowing(top_level_only=True) == TORCH


@pytest.mark.parametrize("name", RUNTIMES)
def test_an_exporter_knows_the_seam_and_its_runtime_alone(name):
    path = modules("fofa_exporters")[name]
    assert parts_used(path) <= {"types", "errors"}
    others = roots(imports(path)) - set(sys.stdlib_module_names) - {"fofa_deploy", "fofa_exporters"} - COMMON
    assert others <= RUNTIMES[name]
    siblings = {used for used in imports(path) if used.startswith("fofa_exporters.")}
    assert all(used.split(".")[1].startswith("_") for used in siblings), "back ends share private modules, not each other"


def test_every_exporter_is_looked_at():
    assert modules("fofa_exporters").keys() == RUNTIMES.keys() | {"__init__"}


@pytest.mark.parametrize("name", [name for name in RANK if name not in TORCH | {"adopt", "lookup", "pipeline", "cli"}])
def test_importing_a_part_without_a_star_loads_no_framework(name):
    code = f"import sys, fofa_deploy.{name}; print({FRAMEWORKS} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "set()\n"


# --- size and shape


def test_files_are_short_and_named_for_what_they_do():
    assert {str(path): n for path in FILES if (n := len(path.read_text().splitlines())) > 400} == {}
    assert [path for path in FILES if path.stem in ("utils", "util", "helpers", "common", "misc")] == []


def test_a_function_fits_a_screen_and_most_are_much_shorter():
    lengths = {f"{path}:{name}": node.end_lineno - node.lineno + 1 for path in FILES for name, node in functions(tree(path))}
    assert {where: lines for where, lines in lengths.items() if lines > 60} == {}
    ordered = sorted(lengths.values())
    assert ordered[len(ordered) // 2] < 12
    assert ordered[int(0.9 * len(ordered))] < 30


def broad_handlers(path: Path) -> set[str]:
    """Names of the functions in which everything is caught."""
    found = set()
    for name, function in functions(tree(path)):
        for handler in (node for node in ast.walk(function) if isinstance(node, ast.ExceptHandler)):
            kinds = {node.id for node in ast.walk(handler.type) if isinstance(node, ast.Name)} if handler.type else {"Exception"}
            swallows = not isinstance(handler.body[-1], ast.Raise)
            if "Exception" in kinds or ("BaseException" in kinds and swallows):
                found.add(name)
    return found


def test_no_exception_is_swallowed():
    found = {(str(path.relative_to(ROOT)), name) for path in FILES for name in broad_handlers(path)}
    probes = {(file, name) for file, name in found if file.startswith("exporters/") and name == "probe"}
    assert found - probes == BOUNDARIES


# --- the command line answers at once


def test_help_is_fast_and_imports_no_framework():
    code = "import sys; from fofa_deploy.cli import cli; cli.main(['--help'], standalone_mode=False); print(sorted(sys.modules))"
    took, shown = [], ""
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60).stdout
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        # Processor time: how long it takes by the clock tells of the machine's other work.
        took.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert "compress-and-export" in shown
    loaded = set(ast.literal_eval(shown.splitlines()[-1]))
    assert not loaded & {"torch", "numpy", "pydantic", "onnx", "onnxruntime", "openvino", "rich", "timm", "jinja2"}
    assert min(took) < 0.3


# --- ARCHITECTURE.md


def test_the_page_tells_the_import_order():
    block = ARCHITECTURE.partition("## Import direction")[2].partition("```")[2].partition("```")[0]
    told = [re.findall(r"\w+", line) for line in block.strip().splitlines()]
    assert told == LINES


def test_the_page_stars_what_may_import_pytorch():
    assert set(re.findall(r"^  (\w+)(?:\.py|/) \*", ARCHITECTURE, flags=re.MULTILINE)) == TORCH


def test_every_module_is_on_the_page_and_every_name_there_is_one():
    listed = set(
        re.findall(r"^  (\w+(?:\.py|/))", ARCHITECTURE.partition("fofa_deploy/ ")[2].partition("exporters/")[0], flags=re.M)
    )
    there = {p.name if p.is_file() else f"{p.name}/" for p in PACKAGES["fofa_deploy"].iterdir()}
    assert listed == {name for name in there if name.endswith((".py", "/")) and not name.startswith("__")}


def test_every_path_on_the_page_exists():
    named = set(re.findall(r"`((?:fofa_deploy|exporters|profiles|tests)/[\w./-]+)`", ARCHITECTURE))
    assert named
    assert {name for name in named if not (ROOT / name).exists()} == set()
    backends = set(re.search(r"fofa_exporters/\{([\w,]+)\}\.py", ARCHITECTURE)[1].split(","))
    assert backends | {"_quantization"} == {name.partition(".")[0] for name in RUNTIMES}


def test_the_page_is_one_page():
    assert len(ARCHITECTURE.splitlines()) <= 140
