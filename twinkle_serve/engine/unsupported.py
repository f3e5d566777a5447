"""The error for a model directory that this engine cannot serve. Knows nothing else."""

from __future__ import annotations


class UnsupportedModel(ValueError):
    """The model directory is not one that this engine can serve; the message says why."""
