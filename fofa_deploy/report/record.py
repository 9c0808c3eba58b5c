"""report.json: the record that every other report is rendered from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NoReturn

from pydantic import ValidationError

from fofa_deploy.errors import UserError
from fofa_deploy.results import RunReport
from fofa_deploy.types import Frozen

SCHEMA_VERSION = 1
REPAIR = "give a report.json that fofa-deploy wrote, or make the run again"


def to_json(report: Frozen) -> str:
    """Strict JSON: a NaN that slipped past the types raises ValueError and is never written."""
    # model_dump_json would write NaN as null, which reads as "not measured".
    return json.dumps(report.model_dump(mode="json"), allow_nan=False, indent=1) + "\n"


def read_report(path: Path) -> RunReport:
    """Read ``report.json``; a run directory stands for the one inside it.

    Raises:
        UserError: no such file, not JSON, another ``schema_version``, or fields that do not fit.
    """
    file = path / "report.json" if path.is_dir() else path
    data = _read_object(file)
    version = data.get("schema_version")
    if version != SCHEMA_VERSION:
        raise UserError(
            f"{file} has schema_version {version!r}; this fofa-deploy reads {SCHEMA_VERSION}",
            "read it with the fofa-deploy that wrote it",
        )
    try:
        return RunReport.model_validate_json(json.dumps(data))
    except ValidationError as error:
        raise UserError(f"{file} is not a report: {_first(error)}", REPAIR) from error


def _read_object(file: Path) -> dict[str, object]:
    try:
        data = json.loads(file.read_bytes(), parse_constant=_refuse)
    except FileNotFoundError as error:
        raise UserError(f"{file} is not there", "write it: fofa-deploy report RUN, once the student is trained") from error
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror or error}", REPAIR) from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is not valid JSON: {error}", REPAIR) from error
    if not isinstance(data, dict):
        raise UserError(f"{file} is not a report: its top level is not an object", REPAIR)
    return data


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not a JSON number")


def _first(error: ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    return f"{'.'.join(map(str, first['loc']))}: {first['msg']}{more}"
