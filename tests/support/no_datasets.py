"""Keeps transformers from taking the folder tests/datasets, which pytest makes importable, for the package datasets."""

from __future__ import annotations

import importlib.util
import sys

_found = importlib.util.find_spec("datasets")
if _found is not None and _found.origin is None:  # a folder without code
    sys.modules["datasets"] = None  # type: ignore[assignment] # as if it were not there
