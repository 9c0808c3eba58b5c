"""What artifacts are held to, and the parts of the plan that decide a target."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fofa_deploy.config import AccuracyPlan, LimitsPlan, MeasurePlan
from fofa_deploy.types import Budget, HardwareProfile


@dataclass(frozen=True)
class Evidence:
    """Files that artifacts are held to: golden inputs, and where there are any, whole splits with PyTorch's logits on them."""

    golden: Path
    splits: Path | None = None
    expected: Path | None = None
    labelled: bool = False

    def split(self, name: str) -> tuple[Path, Path] | None:
        """The folder of a split's images and labels, and the file of PyTorch's logits."""
        if self.splits is None or self.expected is None or not (self.splits / name).is_dir():
            return None
        return self.splits / name, self.expected / f"{name}.npy"


@dataclass(frozen=True)
class Settings:
    """The parts of the plan that decide a target."""

    accuracy: AccuracyPlan
    measure: MeasurePlan
    limits: LimitsPlan
    budget: Budget
    seed: int
    recipe: str | None = None
    fresh: bool = False
    """Verify again what has been verified before."""
    build: bool = True
    """False: only what has been built before, as it is."""
    batches: tuple[int, ...] = ()
    """Batch sizes to measure, instead of the profile's."""
    threads: tuple[int, ...] = ()
    """Numbers of threads to measure, instead of the profile's."""

    def lines(self, profile: HardwareProfile) -> list[tuple[int, int]]:
        """Every (batch size, threads) to measure; recipes are chosen by the first."""
        own = profile.execution
        return [(batch, count) for count in self.threads or (own.threads,) for batch in self.batches or own.batch_sizes]
