"""One recipe: build it, prove its precision, hold it to PyTorch. Building and running happen in child processes."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

from fofa_deploy import environment
from fofa_deploy.backend import get_backend
from fofa_deploy.errors import DataError, IntegrityError, StageError, UnavailableError, UserError
from fofa_deploy.isolate import run_isolated
from fofa_deploy.judge import accuracy_problem, precision_problem
from fofa_deploy.progress import Progress
from fofa_deploy.results import TargetRow
from fofa_deploy.serving import write_example
from fofa_deploy.store import Store, digest, manifests
from fofa_deploy.tune.evidence import Evidence, Settings
from fofa_deploy.tune.rows import first_line, row_of, with_artifact
from fofa_deploy.types import Artifact, Calibration, Frozen, Graph, HardwareProfile, Probe, Recipe, Status
from fofa_deploy.verify import Verification, VerifyRequest

OBSERVED = ("statistics", "sensitivity")
"""What recipes share, in the order in which it is found out."""


def sensitivity(root: Path) -> dict[str, float]:
    """What quantizing each layer alone does to the logits of a run's student, the worst first; empty where no recipe asked.

    What an earlier student of the run was asked is nothing of this one.
    """
    folder, graph = root / "observed" / "graph" / "sensitivity", root / "graph" / "model.onnx"
    if not graph.is_file() or digest(graph) not in {manifest.inputs["graph"] for manifest in manifests(folder)}:
        return {}
    found: dict[str, float] = json.loads((folder / "sensitivity.json").read_bytes())
    return dict(sorted(found.items(), key=lambda item: -item[1]))


class BuildRequest(Frozen):
    graph: Path
    profile: HardwareProfile
    recipe: Recipe
    calibration: Calibration | None
    out: Path


class Built(Frozen):
    """All that has to come back from the child: the rest is on disk, and is digested when it is read."""

    sha256: str


class ObserveRequest(Frozen):
    graph: Path
    calibration: Calibration
    out: Path


class Observed(Frozen):
    """The files are the answer."""


def build(request: BuildRequest) -> Built:
    """Runs in a child process."""
    backend = get_backend(request.profile.runtime)
    artifact = backend.build(Graph.load(request.graph), request.recipe, request.calibration, request.out)
    write_example(artifact)
    return Built(sha256=artifact.sha256)


@dataclass(frozen=True)
class Workbench:
    """Everything that building and verifying needs.

    Args:
        folder: of the captured graph.
        calibration: folder with ``images.npy``, or None: then only recipes without calibration are built.
    """

    store: Store
    folder: Path
    evidence: Evidence
    calibration: Path | None
    settings: Settings
    progress: Progress
    graph: Graph
    known: dict[str, Path] = field(default_factory=dict)
    """What has been observed already, by name."""

    def attempt(self, profile: HardwareProfile, recipe: Recipe, probe: Probe) -> TargetRow:
        """Build, prove, verify; what fails is a row with its reason."""
        self.progress.say(f"{profile.name}: {recipe.name}")
        row = row_of(profile, recipe, Status.FAILED, "")
        root = self.store.root
        try:
            artifact = self.build(profile, recipe, probe)
            if problem := precision_problem(artifact):
                return with_artifact(row.model_copy(update={"reason": problem}), artifact, None, root)
            if not probe.can_run:
                away = {"status": Status.BUILT_NOT_RUN, "reason": probe.reason}
                return with_artifact(row.model_copy(update=away), artifact, None, root)
            found = self.verify(profile, artifact, "validation")
        except (StageError, UserError, UnavailableError) as error:
            return row.model_copy(update={"reason": first_line(error)})
        reason = accuracy_problem(recipe.precision, found, self.settings.accuracy)
        status = Status.REJECTED if reason else Status.VERIFIED
        judged = row.model_copy(update={"status": status, "reason": reason or "inside the accuracy budget"})
        return with_artifact(judged, artifact, found, root)

    @property
    def name(self) -> str:
        """Of the graph in its run; a run may have several."""
        return self.folder.relative_to(self.store.root).as_posix()

    # --- building -------------------------------------------------------------------------------------------------

    def is_built(self, profile: HardwareProfile, recipe: Recipe) -> bool:
        return (self.store.root / _stage(profile, recipe)).is_dir()

    def build(self, profile: HardwareProfile, recipe: Recipe, probe: Probe) -> Artifact:
        """The artifact, made at most once.

        Raises:
            FofaError: it cannot be built, or may not be and is not there.
        """
        stage = _stage(profile, recipe)
        if not self.settings.build:
            if not self.is_built(profile, recipe):
                raise DataError("not built yet; fofa-deploy quantize builds it", "run fofa-deploy quantize first")
            artifact = Artifact.load(self.store.existing(stage))
            if artifact.graph_sha256 != self.graph.sha256:
                raise IntegrityError(f"{artifact.folder} was built from another graph than {self.name}", "run fofa-deploy quantize")
            return artifact
        calibration = self._calibrated(recipe)
        inputs = {
            "graph": self.graph.path,
            "sidecar": self.graph.sidecar,
            "recipe": recipe,
            "profile": profile,
            "versions": probe.versions,
            "calibration": calibration.images if calibration else None,
            "machine": environment.describe().fingerprint,
        }

        def work(out: Path) -> None:
            request = BuildRequest(graph=self.folder, profile=profile, recipe=recipe, calibration=calibration, out=out)
            limits = self.settings.limits
            child = "fofa_deploy.tune.workbench:build"
            run_isolated(child, request, Built, seconds=limits.build_seconds, memory_bytes=limits.memory_bytes)

        return Artifact.load(self.store.run(stage, inputs, work))

    def _calibrated(self, recipe: Recipe) -> Calibration | None:
        """The images, with what has been found out on them that the recipe wants to know."""
        if not recipe.needs_calibration:
            return None
        if self.calibration is None:
            problem = f"recipe {recipe.name} needs calibration images: of an ONNX file, give real ones with --images"
            raise DataError(problem, "or ask for a recipe that needs none")  # a row has room for the problem alone
        found = Calibration(images=self.calibration / "images.npy", sidecar=self.graph.sidecar)
        for name in () if recipe.observes == "nothing" else OBSERVED:
            if name not in self.known:
                self.known[name] = self._observed(name, found)
            found = found.model_copy(update={name: self.known[name]})
            if name == recipe.observes:
                break
        return found

    def _observed(self, name: str, calibration: Calibration) -> Path:
        versions = environment.package_versions(("numpy", "onnx", "onnxruntime", "onnxruntime-gpu"))
        inputs = {"graph": self.graph.path, "images": calibration.images, "sidecar": self.graph.sidecar, "versions": versions}

        def work(out: Path) -> None:
            self.progress.say(
                f"observe: {name} of the activations" if name == "statistics" else "observe: sensitivity of the layers"
            )
            request = ObserveRequest(graph=self.folder, calibration=calibration, out=out)
            limits = self.settings.limits
            child = f"fofa_exporters._quantization.observed:write_{name}"
            run_isolated(child, request, Observed, seconds=limits.build_seconds, memory_bytes=limits.memory_bytes)

        return self.store.run(f"observed/{self.name}/{name}", inputs, work)

    # --- verifying ------------------------------------------------------------------------------------------------

    def verify(self, profile: HardwareProfile, artifact: Artifact, split: str) -> Verification:
        """The artifact against PyTorch on a split, run at most once unless the settings want it fresh.

        Raises:
            FofaError: it does not run.
        """
        golden = self.evidence.golden
        images, expected = self.evidence.split(split) or (None, None)
        request = VerifyRequest(
            artifact=artifact.folder,
            profile=profile,
            golden=golden,
            split=images,
            expected=expected,
            labelled=self.evidence.labelled,
            budget=self.settings.accuracy if split == "validation" else None,
        )
        inputs = {
            "artifact": artifact.sha256,
            "options": artifact.recipe.options,  # the same file runs otherwise in another precision
            "profile": profile,
            "golden": golden,
            "images": images,
            "expected": expected,
            "budget": request.budget,
            "machine": environment.describe().fingerprint,
        }
        if self.settings.fresh:
            return self._run_verify(request)

        def work(out: Path) -> None:
            (out / "verification.json").write_text(self._run_verify(request).model_dump_json(indent=1))

        stage = f"verification/{profile.name}/{artifact.recipe.name}/{split}"
        return Verification.model_validate_json((self.store.run(stage, inputs, work) / "verification.json").read_bytes())

    def _run_verify(self, request: VerifyRequest) -> Verification:
        limits = self.settings.limits
        child = "fofa_deploy.verify:verify"
        return run_isolated(child, request, Verification, seconds=limits.run_seconds, memory_bytes=limits.memory_bytes)


def _stage(profile: HardwareProfile, recipe: Recipe) -> str:
    return f"artifacts/{profile.name}/{recipe.name}"
