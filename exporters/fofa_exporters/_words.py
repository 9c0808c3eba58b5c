"""What a runtime's error says, without where in the runtime's source it was thrown."""

from __future__ import annotations

_PLACES = ("Exception from ", "Check 'false' failed", "FrontEnd API failed", "Model wasn't fully converted", "Summary:")
_ADVICE = "To facilitate the conversion"


def telling(error: Exception) -> str:
    """The message from the first line on that says more than a place in OpenVINO's source, without advice for its authors."""
    lines = [line.removeprefix("-- ") for line in str(error).splitlines() if line.strip() and not line.startswith(_ADVICE)]
    start = next((number for number, line in enumerate(lines) if not line.startswith(_PLACES)), 0)
    return "\n".join(lines[start:])
