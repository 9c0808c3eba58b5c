"""Numbers and names as a reader sees them. Accuracies come as fractions, sizes as bytes, times as milliseconds or seconds."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime

from fofa_deploy.progress import one_line

ABSENT = "—"
NOT_ENOUGH = "not enough runs"
REASON_LENGTH = 500


def clipped(text: str, length: int = REASON_LENGTH) -> str:
    """One line of at most ``length`` characters; report.json keeps the whole."""
    line = one_line(text).strip()
    return line if len(line) <= length else f"{line[: length - 1]}…"


def percent(fraction: float | None) -> str:
    return ABSENT if fraction is None else f"{100 * fraction:.1f} %"


def points(difference: float | None) -> str:
    """A difference of fractions in percentage points, with its sign."""
    if difference is None:
        return ABSENT
    rounded = round(100 * difference, 1)
    sign = "+" if rounded > 0 else "−" if rounded < 0 else "±"  # noqa: RUF001
    return f"{sign}{abs(rounded):.1f} points"


def milliseconds(value: float | None) -> str:
    """Three significant digits, without a unit."""
    if value is None:
        return ABSENT
    decimals = 0 if value >= 100 else 1 if value >= 10 else 2 if value >= 1 else 3
    return f"{value:,.{decimals}f}"


def percentile(value: float | None) -> str:
    """A percentile in milliseconds; ``None`` is a sample too small to claim it, and says so."""
    return NOT_ENOUGH if value is None else milliseconds(value)


def size(value: int | None) -> str:
    """Decimal units, as file managers and vendors' data sheets use them."""
    if value is None:
        return ABSENT
    amount, unit = float(value), "B"
    for larger in ("kB", "MB", "GB"):
        if amount < 1000:
            break
        amount, unit = amount / 1000, larger
    return f"{amount:.0f} B" if unit == "B" else f"{amount:.3g} {unit}" if amount < 100 else f"{amount:.0f} {unit}"


def pixels(size: tuple[int, int] | None) -> str:
    """Height and width."""
    return ABSENT if size is None else f"{size[0]} × {size[1]}"  # noqa: RUF001


def factor(value: float | None) -> str:
    return ABSENT if value is None else f"{value:.2f}×" if value < 10 else f"{value:.1f}×"  # noqa: RUF001


def count(value: int) -> str:
    return f"{value:,}"


def duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def moment(timestamp: str) -> str:
    """An ISO time stamp to the minute; any other text as it is."""
    try:
        return datetime.fromisoformat(timestamp).strftime("%Y-%m-%d %H:%M %Z").strip()
    except ValueError:
        return timestamp


def tally(counts: Mapping[str, int]) -> str:
    """``20 int8, 1 fp32``, most frequent first."""
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{number:,} {one_line(name)}" for name, number in ordered) or ABSENT


def pairs(values: Mapping[str, str]) -> str:
    """``onnx 1.19.0, onnxruntime 1.23.2``."""
    return ", ".join(f"{one_line(name)} {one_line(value)}" for name, value in sorted(values.items()))
