"""Procedural word problems, each explained from eight perspectives, with exact answers and checked arithmetic."""

from __future__ import annotations

from mind.problems.arithmetic import check_rationale
from mind.problems.generator import generate_records
from mind.problems.problem import PERSPECTIVES

__all__ = ["PERSPECTIVES", "check_rationale", "generate_records"]
