"""What a check found: a verdict, a sentence, and a remedy where one is needed."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

__all__ = ["Finding", "Verdict", "fine", "problem", "skipped", "warning"]


class Verdict(StrEnum):
    FINE = "fine"
    WARNING = "warning"  # works, but not as well as it could
    PROBLEM = "problem"  # a pool would not work
    SKIPPED = "skipped"


@dataclass(frozen=True, slots=True)
class Finding:
    subject: str
    verdict: Verdict
    message: str
    remedy: str = ""


def fine(subject: str, message: str) -> Finding:
    return Finding(subject, Verdict.FINE, message)


def warning(subject: str, message: str, remedy: str) -> Finding:
    return Finding(subject, Verdict.WARNING, message, remedy)


def problem(subject: str, message: str, remedy: str) -> Finding:
    return Finding(subject, Verdict.PROBLEM, message, remedy)


def skipped(subject: str, message: str) -> Finding:
    return Finding(subject, Verdict.SKIPPED, message)
