"""The names that other people's code may rely on. Changing this file is changing the contract: say so in CHANGELOG.md."""

import importlib
import inspect

import pytest

import fofa_deploy
from fofa_deploy import backend, errors, results, types
from fofa_deploy.gate import baseline, verdicts

SIGNATURES = {
    "fofa_deploy.config.load_plan": "(source, overrides=())",
    "fofa_deploy.pipeline.compress_and_export": "(plan, out, progress, force=False)",
    "fofa_deploy.gate.check.check": "(candidate, baseline, progress, options=None)",
    "fofa_deploy.gate.pytest_plugin.Gate.check": (
        "(self, candidate, baseline=None, *, quick=False, trend=False, profile=None, trust_engine=False, inconclusive='skip')"
    ),
    "fofa_deploy.distill.taps.tap": "(model, image_shape, stages=4, names=())",
    "fofa_deploy.distill.objective.Objective": "(student, teacher, plan)",
    "fofa_deploy.distill.objective.Objective.forward": "(self, images, labels, shown=None)",
    "fofa_deploy.distill.objective.Objective.diagnostics": "(self, images, labels, shown=None)",
    "fofa_deploy.distill.objective.Objective.parameter_groups": "(self, lr, weight_decay)",
    "fofa_deploy.profile.find_profile": "(name_or_path)",
    "fofa_deploy.profile.installed_profiles": "()",
    "fofa_deploy.backend.backend_names": "()",
    "fofa_deploy.backend.get_backend": "(name)",
    "fofa_deploy.report.write_report": "(report, out)",
    "fofa_deploy.report.read_report": "(path)",
    "fofa_deploy.types.Artifact.load": "(folder)",
    "fofa_deploy.types.Artifact.of": "(out, main, *, backend, recipe, graph, layers, versions)",
    "fofa_deploy.types.Graph.load": "(folder)",
    "fofa_deploy.types.Preprocessing.apply": "(self, images)",
    "fofa_deploy.types.Sidecar.prepare": "(self, images)",
    "fofa_deploy.types.Calibration.batches": "(self, size)",
    "fofa_deploy.backend.Session.run": "(self, feeds)",
    "fofa_deploy.backend.Backend.probe": "(self, profile)",
    "fofa_deploy.backend.Backend.recipes": "(self, profile, graph)",
    "fofa_deploy.backend.Backend.build": "(self, graph, recipe, calibration, out)",
    "fofa_deploy.backend.Backend.load": "(self, artifact, profile)",
    "fofa_deploy.progress.Quiet": "()",
    "fofa_deploy.progress.Terminal": "()",
}
ERRORS = {
    "FofaError": 1,
    "UserError": 2,
    "PlanError": 2,
    "DataError": 2,
    "ModelError": 2,
    "GraphError": 2,
    "IntegrityError": 2,
    "UnavailableError": 3,
    "BackendError": 3,
    "LockedError": 3,
    "StageError": 1,
    "BuildError": 1,
    "TrainingError": 1,
    "ChildError": 1,
    "InterruptedRunError": 130,
}
TYPES = {
    "Artifact": "backend recipe graph_sha256 files layers versions sidecar folder",
    "Budget": "p90_ms size_bytes peak_rss_bytes throughput_sps",
    "Calibration": "images sidecar statistics sensitivity",
    "Device": "kind name architecture features host python",
    "Execution": "threads batch_sizes spinning",
    "FileRecord": "path sha256 size_bytes",
    "Graph": "path sha256 sidecar",
    "HardwareProfile": "name description runtime precisions device execution budget",
    "Layer": "name operator precision weighted",
    "Preprocessing": "image_size channels mean std interpolation crop_fraction",
    "Probe": "can_build can_run reason versions",
    "Recipe": "name precision description needs_calibration observes family after rest dear on_request options",
    "Sidecar": "schema_version model input output preprocessing class_names layout",
    "TensorSpec": "name shape dtype",
}
REPORT = {
    "schema_version",
    "name",
    "created_at",
    "tool_version",
    "method",
    "data",
    "teacher",
    "student",
    "targets",
    "reference",
    "environment",
    "sidecar",
    "command",
    "notices",
}


def resolve(path: str):
    parts = path.split(".")
    for cut in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:cut]))
        except ModuleNotFoundError:
            continue
        for name in parts[cut:]:
            found = getattr(found, name)
        return found
    raise AssertionError(path)


def bare(signature: inspect.Signature) -> str:
    """Without annotations, which may become more precise."""
    parameters = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()]
    return str(signature.replace(parameters=parameters, return_annotation=inspect.Signature.empty))


@pytest.mark.parametrize("path", SIGNATURES)
def test_a_function_is_called_as_before(path):
    assert bare(inspect.signature(resolve(path))) == SIGNATURES[path]


def test_the_error_tree_and_its_exit_codes():
    found = {name: kind.exit_code for name, kind in vars(errors).items() if inspect.isclass(kind)}
    assert found == ERRORS
    assert all(issubclass(getattr(errors, name), errors.FofaError) for name in ERRORS)


def test_every_error_carries_a_message_and_an_action():
    for name in ERRORS:
        error = getattr(errors, name)("what", "do")
        assert (error.message, error.action, str(error)) == ("what", "do", "what\n  -> do")


@pytest.mark.parametrize("name", TYPES)
def test_the_fields_of_a_value(name):
    kind = getattr(types, name)
    assert " ".join(kind.model_fields) == TYPES[name]
    assert kind.model_config["frozen"]
    assert kind.model_config["extra"] == "forbid"


def test_the_words_of_a_report():
    assert results.RunReport.model_fields.keys() >= REPORT
    assert {status.value for status in types.Status} == {"verified", "built-not-run", "rejected", "failed", "skipped"}
    assert {precision.value for precision in types.Precision} == {"fp32", "fp16", "bf16", "int8"}
    assert list(results.Latency.model_fields) == ["min", "mean", "p50", "p90", "p95", "p99"]


def test_the_words_of_a_gate():
    assert {verdict.value: code for verdict, code in verdicts.EXIT_CODES.items()} == {
        "pass": 0,
        "improved": 0,
        "fail": 1,
        "inconclusive": 4,
    }
    assert verdicts.GateReport.model_fields.keys() >= {"schema_version", "verdict", "findings", "figures", "environment", "seconds"}
    assert verdicts.Finding.model_fields.keys() >= {"target", "metric", "verdict", "reason", "baseline", "candidate", "ratio"}
    assert baseline.Baseline.model_fields.keys() >= {"schema_version", "environment", "targets"}


def test_the_seam_is_no_wider_than_it_was():
    def members(protocol) -> set[str]:
        return {name for name in {**vars(protocol), **protocol.__annotations__} if not name.startswith("_")}

    assert members(backend.Backend) == {"name", "precisions", "probe", "recipes", "build", "load"}
    assert members(backend.Session) == {"device", "run"}
    assert backend.GROUP == "fofa_deploy.backends"


def test_the_version_is_the_distributions():
    assert fofa_deploy.__version__ == "0.1.0"
