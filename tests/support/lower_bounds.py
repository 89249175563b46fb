"""A script that tries the lower bounds of pyproject.toml: it installs exactly those versions and runs tests on them.

    python tests/support/lower_bounds.py                                   # the quick loop, in a temporary environment
    python tests/support/lower_bounds.py --with torch==2.13.0              # another version of one package
    python tests/support/lower_bounds.py --venv /tmp/bounds tests/pool     # keep the environment; run these tests

Packages that pyproject.toml does not name are installed in the newest version that the others admit. Where pip finds
no such combination, it names the packages in conflict. To change a bound is to run this script again.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import tomllib
import venv
from importlib.metadata import distributions
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

REPOSITORY = Path(__file__).resolve().parents[2]
QUICK_LOOP = ("-m", "not ray and not slow")


def lower_bounds(pyproject: Path, extras: tuple[str, ...]) -> dict[str, str]:
    """The version after ``>=`` of each package that the project needs, by name. Packages without one are left out."""
    project = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]
    named = [*project["dependencies"]]
    for extra in extras:
        named += project["optional-dependencies"][extra]
    bounds = {}
    for requirement in map(Requirement, named):
        for specifier in requirement.specifier:
            if specifier.operator == ">=":
                bounds[canonicalize_name(requirement.name)] = specifier.version
    return bounds


def main() -> int:
    parser = argparse.ArgumentParser(description="Run tests with the lowest versions that pyproject.toml admits.")
    parser.add_argument("--venv", type=Path, help="keep the environment in this folder; used again if it exists")
    parser.add_argument(
        "--with", dest="instead", action="append", default=[], metavar="NAME==VERSION", help="in place of its bound"
    )
    parser.add_argument("--extra", action="append", default=["test"], help="another extra of pyproject.toml")
    options, arguments = parser.parse_known_args()  # what is left is for pytest
    bounds = lower_bounds(REPOSITORY / "pyproject.toml", tuple(options.extra))
    for given in options.instead:
        name, _, version = given.partition("==")
        known = canonicalize_name(name)
        if known not in bounds or not version:
            parser.error(f"--with must be NAME==VERSION of a package in pyproject.toml; got {given!r}")
        print(f"not its lower bound: {known} {version} (bound: {bounds[known]})", flush=True)
        bounds[known] = version
    with tempfile.TemporaryDirectory(prefix="bounds-") as temporary:
        folder = options.venv or Path(temporary) / "venv"
        venv.create(folder, with_pip=True)
        constraints = folder / "bounds.txt"
        constraints.write_text("".join(f"{name}=={version}\n" for name, version in sorted(bounds.items())))
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        environment["PATH"] = f"{folder.resolve() / 'bin'}{os.pathsep}{environment['PATH']}"
        project = f"{REPOSITORY}[{','.join(options.extra)}]"
        install = ["pip", "install", "--progress-bar", "off", "--constraint", constraints, "--editable", project]
        status = subprocess.run([folder / "bin" / "python", "-m", *install], env=environment, check=False).returncode
        if status:
            return status
        (packages,) = (folder / "lib").glob("python*/site-packages")
        found = {canonicalize_name(each.name): each.version for each in distributions(path=[str(packages)])}
        print("with", ", ".join(f"{name} {found[name]}" for name in sorted(bounds)), flush=True)
        tests = [folder / "bin" / "python", "-m", "pytest", *(arguments or QUICK_LOOP)]
        return subprocess.run(tests, cwd=REPOSITORY, env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
