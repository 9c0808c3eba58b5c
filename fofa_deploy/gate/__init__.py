"""Candidate x baseline -> verdicts: a real regression fails, nothing else does. The rules are told in docs/gate.md."""
