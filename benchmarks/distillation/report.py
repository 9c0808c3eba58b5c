"""README.md and the picture, from recorded lines alone."""

from __future__ import annotations


def write(lines: list[dict]) -> None:
    pass
