"""The latency aid: what candidates took on a device when they were last measured, kept outside of any run.

It helps to choose and is never a result: figures of a report are measured anew. A row counts only for the same device
fingerprint, graph, recipe, threads and batch; everything else is as if it had not been measured.
"""

from __future__ import annotations

import os
from datetime import UTC, datetime
from pathlib import Path

from pydantic import Field, PositiveFloat, PositiveInt, ValidationError

from fofa_deploy.store import digest, write_atomic
from fofa_deploy.types import Frozen

FOLDER = "FOFA_DEPLOY_LATENCIES"
"""The environment variable that says where the aid lies instead."""

SCHEMA_VERSION = 1


class Setting(Frozen):
    """All that decides a candidate's latency."""

    fingerprint: str = Field(description="of the device, environment.describe().fingerprint or the remote's")
    graph: str = Field(description="digest of the captured graph, whose random weights follow from the seed")
    recipe: str
    profile: str = Field(description="digest of the hardware profile")
    batch: PositiveInt = 1


class Figures(Frozen):
    """What was measured, once."""

    p50_ms: PositiveFloat
    p90_ms: PositiveFloat | None
    throughput_sps: PositiveFloat
    size_bytes: PositiveInt
    peak_rss_bytes: PositiveInt
    measured_at: str = Field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))


class Entry(Frozen):
    schema_version: int = SCHEMA_VERSION
    note: str = "an aid for choosing; not a result"
    setting: Setting
    figures: Figures


def default_folder() -> Path:
    """$FOFA_DEPLOY_LATENCIES, else fofa-deploy/latencies below the XDG cache folder."""
    if told := os.environ.get(FOLDER):
        return Path(told)
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "fofa-deploy" / "latencies"


class LatencyTable:
    """One small file per device and setting: two selections at a time do not get into each other's way."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder or default_folder()

    def _path(self, setting: Setting) -> Path:
        return self.folder / digest(setting.fingerprint)[:16] / f"{digest(setting)}.json"

    def find(self, setting: Setting) -> Figures | None:
        """What was measured in exactly this setting; a damaged or older file is as none."""
        try:
            entry = Entry.model_validate_json(self._path(setting).read_bytes())
        except (OSError, ValidationError):
            return None
        return entry.figures if entry.schema_version == SCHEMA_VERSION and entry.setting == setting else None

    def keep(self, setting: Setting, figures: Figures) -> None:
        """Replaces what was there for this setting."""
        path = self._path(setting)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, Entry(setting=setting, figures=figures).model_dump_json(indent=1).encode())
