"""`mind generate`: a teacher's rationales of several perspectives for a set of questions, judged and selected."""

from __future__ import annotations


class GenerateError(ValueError):
    """Rationales cannot be made: a setting, a prompt, a server or a model. One line."""
