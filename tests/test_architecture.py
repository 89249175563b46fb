"""The floors of the package, read from its source: imports only go down, and none of the local floors touches Ray."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from graphlib import TopologicalSorter
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest

import dinov3_ray

PACKAGE = Path(dinov3_ray.__file__).parent
TESTS = Path(__file__).parent
MOST_LINES = 500  # in a file; cutting a noun in halves is not a way to get under it

MOST_FILES = 12  # in a folder, its __init__.py left out

# The floors of the package and of the folders that have folders in them, from the ground up. A name is a folder, with
# all in it, or a file. Imports only go down: what is named twice, or imports what does not stand below it, stands on
# two floors, and is two folders.
FLOORS = {
    "": [
        ["errors"],
        ["machine", "feature_spec", "images", "interrupts", "pictures", "validation"],
        ["features"],
        ["teacher", "watch"],
        ["config"],
        ["testing", "network"],
        ["checkpoint"],
        ["model"],
        ["training"],
        ["scenes"],
        ["pool"],
        ["integrations", "datasets"],
        ["distillation"],
        ["bench", "demo", "doctor"],
        ["cli"],
        ["__main__"],
    ],
    "pool": [
        ["address", "kv", "metrics", "spec"],
        ["probe"],
        ["cluster", "messages"],
        ["poolfile", "shared_ray", "transport"],
        ["replica"],
        ["control"],
        ["local"],
        ["client"],
        ["teacher_pool"],
        ["rollout"],
    ],
    "datasets": [
        ["cache_db", "formats", "folder", "limits", "meter"],
        ["decode"],
        ["cache", "sources"],
        ["store"],
        ["extraction", "stored"],
        ["exports"],
    ],
    "config": [
        ["architecture", "directory", "filetype", "preprocessing"],
        ["layouts", "license", "variants"],
        ["timm", "weights"],
        ["files", "hub"],
        ["config"],
        ["transformers_model"],
    ],
    "training": [
        ["boxes", "learning"],
        ["losses", "taps"],
        ["distiller", "layer_search", "recipe_term"],
        ["recipes"],
        ["prefetch"],
    ],
    "bench": [
        ["cost", "own_ray", "printout", "rates", "simulated", "teacher_modes"],
        ["proof", "round_trip", "routing", "scaling", "teacher_speed", "throughput", "training_steps"],
        ["dataset"],
        ["gpu"],
    ],
}

# What only one folder imports.
ONLY_IN = {"click": "cli"}

# Modules that stand on a package which is not everywhere.
OPTIONAL = {"integrations.lightning": "lightning", "integrations.ultralytics": "ultralytics"}


def module_name(path: Path) -> str:
    """``pool.wire`` for pool/wire.py; ``pool`` for pool/__init__.py; empty for the package's own __init__.py."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@cache
def statements(path: Path) -> list[ast.Import | ast.ImportFrom]:
    """Every import of ``path``: inside functions and for type checkers too."""
    return [node for node in ast.walk(tree_of(path)) if isinstance(node, (ast.Import, ast.ImportFrom))]


def imports(path: Path) -> Iterator[str]:
    """The modules that ``path`` imports, by full name; ``from a import b`` gives a.b where that is a module of ours."""
    for statement in statements(path):
        if isinstance(statement, ast.Import):
            yield from (alias.name for alias in statement.names)
            continue
        assert statement.level == 0, f"{path}: imports are absolute in this package"
        for alias in statement.names:
            full = f"{statement.module}.{alias.name}"
            ours = full.removeprefix("dinov3_ray.")
            yield full if full != ours and ours in MODULES else str(statement.module)


@cache
def own_imports(name: str) -> set[str]:
    """What module ``name`` imports of this package, by name within it."""
    found = imports(MODULES[name])
    return {full.removeprefix("dinov3_ray.") for full in found if full.startswith("dinov3_ray.")} - {name}


def floor_of(name: str, folder: str = "") -> int:
    """The floor, in ``folder``, of the file or folder there that module ``name`` is, or is in."""
    place = name.removeprefix(f"{folder}." if folder else "").split(".")[0]
    floors = [level for level, names in enumerate(FLOORS[folder]) if place in names]
    assert len(floors) == 1, f"{name} stands on {len(floors)} floors, not on one: see {Path(__file__).name}"
    return floors[0]


def rooms_of(folder: str) -> dict[str, set[str]]:
    """The files and folders of ``folder`` (empty: the package), each with those beside it that it imports."""
    inside = f"{folder}." if folder else ""
    rooms: dict[str, set[str]] = {}
    for name in MODULES:
        if name.startswith(inside) and name not in ("", folder):
            room = name.removeprefix(inside).split(".")[0]
            beside = {
                other.removeprefix(inside).split(".")[0] for other in own_imports(name) if other.startswith(inside)
            }
            rooms.setdefault(room, set()).update(beside - {room})
    return rooms


def dunder_all(tree: ast.Module) -> list[str] | None:
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            names = ast.literal_eval(node.value)
            assert isinstance(names, list)
            return names
    return None


FOLDERS = ["", *(name for name, path in MODULES.items() if name and path.name == "__init__.py")]


@pytest.mark.parametrize("folder", FLOORS)
def test_imports_only_go_down(folder: str) -> None:
    rooms = rooms_of(folder)
    for room, beside in rooms.items():
        for other in beside:
            assert other in rooms, f"{folder}.{room} imports {other}, which is not a module"
            above, below = (floor_of(f"{folder}.{place}".lstrip("."), folder) for place in (room, other))
            assert below < above, f"{folder}.{room} imports {other}, which does not stand below it"


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_folder_is_one_machine(folder: str) -> None:
    files = [name for name in MODULES if name.rpartition(".")[0] == folder and name not in FOLDERS]
    assert len(files) <= MOST_FILES, f"{folder} has {len(files)} files: look for a second machine in it"


@pytest.mark.parametrize("folder", FOLDERS)
def test_each_room_of_a_folder_stands_on_one_floor(folder: str) -> None:
    # A file or folder that another one imports, and that imports it in turn, would stand below and above it.
    rooms = rooms_of(folder)
    assert len(list(TopologicalSorter(rooms).static_order())) >= len(rooms)  # raises CycleError, which names the circle


def test_no_file_imports_the_folder_that_it_is_in() -> None:
    # An __init__.py hands out what its files have; a file that imports it imports itself. The version is the root's.
    for name in MODULES:
        around = {name[:index] for index, letter in enumerate(name) if letter == "."}
        assert not around & own_imports(name), name
        of_the_root = [node for node in statements(MODULES[name]) if getattr(node, "module", None) == "dinov3_ray"]
        assert {alias.name for node in of_the_root for alias in node.names} <= {*MODULES, "__version__"}, name


def test_folders_with_folders_in_them_state_their_floors() -> None:
    assert {name.rpartition(".")[0] for name in FOLDERS if name} == set(FLOORS)


def test_the_tests_stand_in_the_folders_of_what_they_test() -> None:
    tested = {path.parent for path in TESTS.rglob("test_*.py")}
    tested = {folder.parent if folder.name == "with_ray" else folder for folder in tested}
    tested = {folder.relative_to(TESTS) for folder in tested} - {Path("deploy"), Path("support")}
    folders = {MODULES[name].parent.relative_to(PACKAGE) for name in FOLDERS}
    assert tested <= folders
    assert {path.parts[:1] for path in folders} == {path.parts[:1] for path in tested}


@pytest.mark.parametrize("package", ONLY_IN)
def test_some_packages_are_imported_in_one_folder_only(package: str) -> None:
    users = {name for name, path in MODULES.items() if package in {full.split(".")[0] for full in imports(path)}}
    assert users
    assert {name.split(".")[0] for name in users} == {ONLY_IN[package]}


def test_the_lower_floors_know_no_ray() -> None:
    users = {name for name, path in MODULES.items() if "ray" in {full.split(".")[0] for full in imports(path)}}
    assert "pool.cluster" in users
    assert not {name for name in users if floor_of(name) <= floor_of("training")}


@pytest.mark.slow
def test_the_local_teacher_works_without_importing_ray_or_transformers(tiny_checkpoint: Path) -> None:
    program = """
import sys
import dinov3_ray
assert "torch" not in sys.modules, "import dinov3_ray loads torch"
from dinov3_ray import DinoV3Config, DinoV3Teacher, FeatureSpec
assert "ray" not in sys.modules, "importing the local teacher loads ray"
import numpy
teacher = DinoV3Teacher(DinoV3Config(sys.argv[1]))
teacher.extract(numpy.zeros((3, 32, 32), numpy.uint8), FeatureSpec(cls=True))
assert not {"ray", "transformers"} & set(sys.modules), "using the local teacher loads ray or transformers"
"""
    subprocess.run([sys.executable, "-c", program, str(tiny_checkpoint)], check=True, timeout=120)


def test_the_package_itself_and_help_do_without_pydantic() -> None:
    # It takes as long to load as the rest of the command line.
    program = """
import sys
import dinov3_ray, dinov3_ray.cli
try:
    dinov3_ray.cli.main(["--help"])
except SystemExit:
    pass
assert "pydantic" not in sys.modules
import dinov3_ray.config
assert "pydantic" in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


@pytest.mark.slow
def test_a_controller_a_look_at_a_pool_and_the_plan_of_an_extraction_do_without_torch() -> None:
    # It takes seconds to load, and replicas settle how its threads wait before they load it.
    program = """
import sys
import dinov3_ray.pool.control.controller, dinov3_ray.cli.session, dinov3_ray.datasets.extraction.extract
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


def test_files_stay_short() -> None:
    lengths = {
        path: len(path.read_text(encoding="utf-8").splitlines()) for path in [*MODULES.values(), *TESTS.rglob("*.py")]
    }
    long = {str(path): lines for path, lines in lengths.items() if lines > MOST_LINES}
    assert not long, f"look for a second noun in {long}"


def test_no_name_is_given_twice() -> None:
    # Two things of one name make a reader ask which is meant. Commands are named as people type them, and a folder's
    # main file as the folder.
    named: dict[str, set[str]] = {}
    for name, path in MODULES.items():
        folder, _, last = name.rpartition(".")
        if folder != "cli" and last != folder.rpartition(".")[2]:
            named.setdefault(f"module {last}", set()).add(name)
        classes = [node for node in ast.walk(tree_of(path)) if isinstance(node, ast.ClassDef)]
        functions = [node for node in tree_of(path).body if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
        public = [each for each in functions if not each.name.startswith("_") and name.split(".")[0] != "cli"]
        for node in [*classes, *public]:
            named.setdefault(node.name.lstrip("_"), set()).add(name)
    assert not {name: sorted(places) for name, places in named.items() if len(places) > 1}


def test_each_module_begins_with_one_sentence() -> None:
    for name, path in MODULES.items():
        first = (ast.get_docstring(tree_of(path)) or "").split("\n\n")[0]
        assert first.endswith((".", "::")), f"{name}: its docstring begins with {first!r}"


def test_dunder_all_names_what_is_there_and_public() -> None:
    for name, path in MODULES.items():
        declared = dunder_all(tree_of(path))
        if declared is None:
            assert path.name in ("__init__.py", "__main__.py"), f"{name} has no __all__"
            continue
        assert declared == sorted(declared, key=lambda n: (not n.isupper(), not n[0].isupper(), n)), f"{name}: unsorted"
        assert len(set(declared)) == len(declared), name
        if name in OPTIONAL and find_spec(OPTIONAL[name]) is None:
            continue
        module = import_module(f"dinov3_ray.{name}".rstrip("."))
        for public in declared:
            assert not public.startswith("_"), name
            assert hasattr(module, public), f"{name}.__all__ names {public}, which is not there"


def test_what_another_module_uses_is_public() -> None:
    for name, path in MODULES.items():
        for statement in statements(path):
            if isinstance(statement, ast.ImportFrom) and str(statement.module).startswith("dinov3_ray"):
                names = [alias.name for alias in statement.names]
                private = [name for name in names if name.startswith("_") and not name.endswith("__")]
                assert not private, f"{name} imports {private} from {statement.module}"
