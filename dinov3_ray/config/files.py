"""Typed values out of one JSON file, with every complaint gathered before the first is raised."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from dinov3_ray.errors import ConfigError

__all__ = ["JsonFields", "is_finite_number", "is_positive_int"]


class JsonFields:
    """The fields of one JSON object.

    Each getter returns the value, or ``default`` where the key is missing or null (transformers writes null for "not
    set"), or ``default`` again where the value is wrong, after noting the complaint in :attr:`problems`. The caller
    raises them together with :meth:`raise_problems`, so that a user mends a file once.
    """

    def __init__(self, path: Path, values: dict[str, Any]) -> None:
        self.path = path
        self.values = values
        self.problems: list[str] = []

    @classmethod
    def read(cls, path: Path, *, remedy: str) -> JsonFields:
        """Read ``path``.

        Raises:
            ConfigError: it is missing (the message ends with ``remedy``), unreadable, or no JSON object.
        """
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ConfigError(f"{path} is missing: {remedy}") from None
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path} cannot be read: {error}") from error
        except (json.JSONDecodeError, RecursionError) as error:
            raise ConfigError(f"{path} is not valid JSON: {error}") from error
        if not isinstance(values, dict):
            raise ConfigError(f"{path} must hold a JSON object; got a {type(values).__name__}")
        return cls(path, values)

    def has(self, key: str) -> bool:
        return self.values.get(key) is not None

    def complain(self, key: str, rule: str, value: object) -> None:
        self.problems.append(f"{key} {rule}; got {value!r}")

    def raise_problems(self) -> None:
        """Raise what was noted so far.

        Raises:
            ConfigError: one line a complaint.
        """
        if len(self.problems) == 1:
            raise ConfigError(f"{self.path}: {self.problems[0]}")
        if self.problems:
            lines = "".join(f"\n  - {problem}" for problem in self.problems)
            raise ConfigError(f"{self.path} has {len(self.problems)} problems:{lines}")

    def integer(self, key: str, default: int, *, minimum: int = 1) -> int:
        value = self.values.get(key)
        if value is None:
            return default
        # JSON's true is an int to Python, and 16.0 is how some writers spell 16.
        if isinstance(value, bool) or not isinstance(value, (int, float)) or value != value // 1 or value < minimum:
            self.complain(key, f"must be an integer >= {minimum}", value)
            return default
        return int(value)

    def number(self, key: str, default: float, *, positive: bool = True) -> float:
        value = self.values.get(key)
        if value is None:
            return default
        if not is_finite_number(value) or (positive and value <= 0):
            self.complain(key, f"must be a {'positive ' if positive else ''}finite number", value)
            return default
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        value = self.values.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            self.complain(key, "must be true or false", value)
            return default
        return value

    def text(self, key: str, default: str) -> str:
        value = self.values.get(key)
        if value is None:
            return default
        if not isinstance(value, str) or not value:
            self.complain(key, "must be a non-empty string", value)
            return default
        return value

    def integers(self, key: str, default: tuple[int, ...]) -> tuple[int, ...]:
        value = self.values.get(key)
        if value is None:
            return default
        if not isinstance(value, list) or not value or not all(is_positive_int(item) for item in value):
            self.complain(key, "must be a list of integers >= 1", value)
            return default
        return tuple(value)


def is_positive_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def is_finite_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
