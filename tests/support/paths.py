"""Where the repository's parts are."""

from __future__ import annotations

from pathlib import Path

SUPPORT = Path(__file__).parent
TESTS = SUPPORT.parent
REPOSITORY = TESTS.parent
DEPLOY = REPOSITORY / "deploy"
README = REPOSITORY / "README.md"
