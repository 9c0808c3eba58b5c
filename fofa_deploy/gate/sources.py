"""What is compared: run directories, baselines, artifact folders and bundles, all as the same few files per target."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Sequence, Set
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fofa_deploy.backend import check_origin
from fofa_deploy.config import RunPlan, load_plan, size_name
from fofa_deploy.data.splits import ORIGIN
from fofa_deploy.errors import DataError, IntegrityError, UserError
from fofa_deploy.gate.answers import classes_of
from fofa_deploy.gate.baseline import BaselineTarget, Kept, Said, baseline_file, kept_files, read_baseline
from fofa_deploy.measure import Candidate
from fofa_deploy.profile import find_profile
from fofa_deploy.recorded import recorded_profiles
from fofa_deploy.report import read_report
from fofa_deploy.results import Environment, RunReport, TargetRow
from fofa_deploy.runner.receive import RefusedError, unpack
from fofa_deploy.store import digest
from fofa_deploy.types import Artifact, HardwareProfile, Status, digest_file

PLAN, ARTIFACT, GOLDEN = "plan.json", "artifact.json", "golden.npz"
SPLITS = ("test", "validation")
"""Images to compare answers on; the first of them that a run has."""


@dataclass(frozen=True)
class Images:
    """A split: uint8 images (N,C,H,W), labels (N,), and PyTorch's logits (N,K) on them."""

    folder: Path
    logits: Path
    labelled: bool

    @cached_property
    def pytorch(self) -> NDArray[np.int64]:
        """The top-1 class of the model that the artifact came from, per image."""
        return classes_of(np.load(self.logits, allow_pickle=False))

    @cached_property
    def truth(self) -> NDArray[np.int64]:
        """The class that counts as right: the label, or without labels PyTorch's."""
        return np.load(self.folder / "labels.npy", allow_pickle=False) if self.labelled else self.pytorch

    @cached_property
    def digest(self) -> str:
        """Equal for two runs whose answers can be paired image by image; the images themselves may differ in size."""
        origin = self.folder / ORIGIN
        if not origin.is_file():
            return digest_file(self.folder / ("labels.npy" if self.labelled else "images.npy"))
        return digest([digest_file(self.folder / "labels.npy") if self.labelled else "", origin.read_text()])


@dataclass(frozen=True)
class Subject:
    """One target's artifact, and what it is judged on."""

    target: str
    artifact: Artifact
    profile: HardwareProfile | None
    golden: Path | None
    images: Images | None = None
    said: Said | None = None
    """A baseline's answers."""

    @property
    def identity(self) -> str:
        """Equal for artifacts that are the same computation on the same input: files, preprocessing and options."""
        artifact = self.artifact
        return digest([artifact.backend, artifact.sha256, artifact.sidecar, artifact.recipe.options])

    @property
    def model_says(self) -> Sequence[int] | NDArray[np.int64] | None:
        """The class per image of the model that the artifact came from; without labels, its answers are right by that."""
        if self.images:
            return self.images.pytorch
        return self.said.reference if self.said else None

    def runnable(self, profile: HardwareProfile, golden: Path) -> Candidate:
        return Candidate(artifact=self.artifact.folder, profile=profile, golden=golden, batch=profile.execution.batch_sizes[0])

    def kept(self, golden: Path, classes: tuple[int, ...] | None, holder: object) -> Kept:
        """What a new baseline keeps of it, with the classes that it answered to its images, if it was asked."""
        said = self.said
        if self.images and classes is not None:
            reference = None if self.images.labelled else tuple(self.images.pytorch.tolist())
            said = Said(classes, self.images.digest, reference)
        return Kept(self.artifact.folder, golden, said, holder)


@dataclass(frozen=True)
class Source:
    """One side of a comparison. ``environment`` is where its figures were taken; None for a bare artifact."""

    path: Path
    subjects: dict[str, Subject]
    environment: Environment | None = None
    plan: RunPlan | None = None
    recorded: dict[str, BaselineTarget] | None = None
    unmet: dict[str, str] = field(default_factory=dict)
    """A run's targets for which nothing that was tried is good enough, and why."""
    untried: dict[str, str] = field(default_factory=dict)
    """A run's targets that nothing could be tried on, and why."""


def open_source(path: Path, profile: str | None = None, *, trusted: bool = False) -> Source:
    """Whatever ``path`` is: a run directory, a baseline (folder or JSON), an artifact's folder, or a bundle.

    Args:
        profile: name or path of the hardware profile of a bare artifact, a bundle or a baseline's target; a run brings its own,
            and takes another one of a target's name in its place.
        trusted: machine code of whatever is no run directory, which its user made or asked for, may be opened.

    Raises:
        UserError: it is none of these, or holds files that are not the recorded ones.
        IntegrityError: it brings machine code that nobody said is trusted.
        GraphError: it brings a file that is malformed or unsafe.
    """
    source = _opened(path, profile)
    if source.plan is None:
        for subject in source.subjects.values():
            check_origin(subject.artifact, trusted)
    return source


def _opened(path: Path, profile: str | None) -> Source:
    if not path.exists():
        raise UserError(f"{path} does not exist", "check the path")
    if file := baseline_file(path):
        return _baseline(file, profile)
    if path.suffix == ".zip":
        return _bundle(path, profile)
    if (path / PLAN).is_file():
        return _run(path, profile)
    if (path / ARTIFACT).is_file():
        return _artifact(path, profile)
    raise UserError(
        f"{path} is no run directory, baseline, artifact folder or bundle",
        f"give a folder with {PLAN}, baseline.json or {ARTIFACT}, or a bundle's .zip",
    )


def _run(root: Path, given: str | None) -> Source:
    plan, report = load_plan(str(root / PLAN)), read_report(root)
    profiles = {profile.name: profile for profile in recorded_profiles(root, plan)}
    if given and (instead := find_profile(given)).name in profiles:
        profiles[instead.name] = instead
    # Rows of devices and profiles that the plan does not name are there, too: `profile` keeps what it measured.
    rows = {name: [row for row in report.targets if row.target == name] for name in profiles}
    chosen = {name: row for name, tried in rows.items() for row in tried if row.chosen and row.artifact}
    subjects = {}
    for target, row in chosen.items():
        artifact = Artifact.load(_below(root, str(row.artifact)))
        if artifact.sha256 != row.sha256:
            raise IntegrityError(f"{artifact.path} is not the artifact of {root}/report.json", "finish the run again")
        subjects[target] = Subject(target, artifact, profiles[target], *_evidence(root, plan, artifact))
    unmet, untried = {}, {}
    for target in [name for name in profiles if name not in chosen]:
        tried = rows[target]
        wanting = [row for row in tried if row.status in (Status.REJECTED, Status.FAILED)]
        if wanting and _was_there(profiles[target], tried):
            unmet[target] = _told(wanting)
        else:
            untried[target] = _told(tried) or "the run has no word of it"
    here = {name for name, profile in profiles.items() if not profile.device.host}
    return Source(root, subjects, _environment(report, here), plan, unmet=unmet, untried=untried)


def _was_there(profile: HardwareProfile, rows: Sequence[TargetRow]) -> bool:
    """Whether recipes could run: what a device has yet to run may be good enough, whatever failed to build beside it."""
    if any(row.status is Status.REJECTED for row in rows):
        return True
    return not profile.device.host and all(row.status is not Status.BUILT_NOT_RUN for row in rows)


def _told(rows: Sequence[TargetRow]) -> str:
    return "; ".join(f"{row.recipe}: {row.reason}" for row in rows)


def _environment(report: RunReport, here: Set[str]) -> Environment:
    """Where a run's figures were taken; those of devices elsewhere are told by no machine that a check runs on."""
    return next(
        (row.environment for row in report.targets if row.chosen and row.environment and row.target in here), report.environment
    )


def _evidence(root: Path, plan: RunPlan, artifact: Artifact) -> tuple[Path, Images | None]:
    """Golden inputs, and images at the size that the artifact takes."""
    size = artifact.sidecar.preprocessing.image_size
    data = root / ("data" if size == plan.data.image_size else f"data-{size_name(size)}")
    found = (Images(data / name, root / "expected" / f"{name}.npy", plan.data.labelled) for name in SPLITS)
    images = next((i for i in found if (i.folder / "images.npy").is_file() and i.logits.is_file()), None)
    return root / "graph" / GOLDEN, images


def _below(root: Path, relative: str) -> Path:
    folder = (root / relative).resolve()
    if root.resolve() not in folder.parents:
        raise UserError(f"{root}/report.json names {relative!r}, which leaves the run directory", "finish the run again")
    return folder


def _artifact(folder: Path, profile: str | None) -> Source:
    """A bare artifact folder; one in its place inside a run directory is compared with that run's images."""
    place = folder.resolve()
    root = place.parents[2] if len(place.parents) > 2 else place
    if place.parent.parent.name != "artifacts" or not (root / PLAN).is_file():
        return _bare(folder, profile)
    artifact, plan, target = Artifact.load(folder), load_plan(str(root / PLAN)), place.parent.name
    given = [find_profile(profile)] if profile else []
    profiles = {found.name: found for found in (*recorded_profiles(root, plan), *given)}
    hardware = profiles.get(target)
    return Source(folder, {target: Subject(target, artifact, hardware, *_evidence(root, plan, artifact))}, plan=plan)


def _bare(folder: Path, profile: str | None) -> Source:
    hardware = find_profile(profile) if profile else None
    target, golden = hardware.name if hardware else "", folder / GOLDEN
    subject = Subject(target, Artifact.load(folder), hardware, golden if golden.is_file() else None)
    return Source(folder, {target: subject})


def _bundle(file: Path, profile: str | None) -> Source:
    """The artifact and the golden inputs of a bundle, in a folder that lasts as long as the source; nothing of it is run."""
    folder = Path(tempfile.mkdtemp(prefix="fofa-bundle-"))
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        try:
            unpack(file, folder)
            np.savez(folder / GOLDEN, images=np.load(folder / "golden.npy", allow_pickle=False))
        except (RefusedError, OSError, ValueError) as error:
            raise DataError(f"{file} is no bundle: {error}", "make it again with fofa-deploy bundle") from error
        source = _bare(folder, profile)
        weakref.finalize(source, stack.pop_all().close)
    return source


def _baseline(file: Path, profile: str | None) -> Source:
    baseline, given = read_baseline(file), find_profile(profile) if profile else None
    subjects = {}
    for target, entry in baseline.targets.items():
        kept = kept_files(file, target, entry)
        artifact = Artifact.load(kept.artifact)
        if artifact.sha256 != entry.figures.sha256:
            raise IntegrityError(f"{artifact.path} is not the artifact that {file} records", "write the baseline again")
        hardware = given if given and given.name == target else None
        subjects[target] = Subject(target, artifact, hardware, kept.golden, said=kept.said)
    return Source(file, subjects, baseline.environment, recorded=dict(baseline.targets))


@dataclass(frozen=True)
class Pair:
    """A target's two sides, under one profile, on the same inputs; alone where nothing is compared.

    ``golden`` is the candidate's; ``baseline_golden`` is the same file where the baseline takes images of the same form.
    """

    target: str
    candidate: Subject
    baseline: Subject | None
    profile: HardwareProfile
    golden: Path
    baseline_golden: Path

    @property
    def same(self) -> bool:
        return self.baseline is not None and self.baseline.identity == self.candidate.identity


def pair_up(candidate: Source, baseline: Source | None) -> tuple[list[Pair], list[str]]:
    """Every target of the candidate beside the baseline's of the same name; and the targets that only the baseline has.

    Raises:
        DataError: neither side of a target brings inputs to run it on, or its profile.
    """
    others = dict(baseline.subjects) if baseline else {}
    subjects = candidate.subjects
    if len(subjects) == len(others) == 1 and "" in {*subjects, *others}:
        name = next(iter(subjects)) or next(iter(others))
        subjects, others = ({name: next(iter(side.values()))} for side in (subjects, others))
    pairs = [_pair(subject, others.pop(target, None)) for target, subject in subjects.items()]
    return pairs, sorted(others)


def _pair(subject: Subject, other: Subject | None) -> Pair:
    profile = subject.profile or (other.profile if other else None)
    alike = other is None or _form(other) == _form(subject)
    golden = subject.golden or (other.golden if other and alike else None)
    others = other.golden if other and not alike else golden
    if profile is None:
        named = f"its hardware profile, {subject.target}," if subject.target else "its hardware profile"
        raise DataError(f"{subject.artifact.folder} does not say which device it is for", f"give {named} with --profile")
    if golden is None or others is None:
        action = "let one side be a run directory or a baseline: these bring inputs"
        lacking = subject if golden is None or other is None else other
        raise DataError(f"there is nothing to run {lacking.artifact.folder} on", action)
    if subject.images is None and other is not None and other.images is not None:
        subject = replace(subject, images=other.images)
    elif other is not None and other.images is None and other.said is None and subject.images is not None:
        other = replace(other, images=subject.images)
    return Pair(profile.name, subject, other, profile, golden, others)


def _form(subject: Subject) -> tuple[object, ...]:
    """Of the arrays that an artifact takes."""
    told = subject.artifact.sidecar.input
    return told.shape, told.dtype
