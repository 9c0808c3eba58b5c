"""Distillation: feature taps, the FOFA and baseline objectives, and one resumable loop."""
