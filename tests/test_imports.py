"""The house rules that syntax trees can show: who imports whom, and how long a thing may be."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "diffusion_jax"
FILES = sorted(PACKAGE.rglob("*.py"))

# Room -> rooms it may import; all may import errors. Files directly in the package see everything,
# but for these, which the rooms or the doors need before anything else is there.
MAY_IMPORT = {
    "diffusion": set(),
    "networks": set(),
    "data": set(),
    "parallel": set(),
    "visual": set(),
    "checkpoints": {"parallel"},
    "objectives": {"diffusion", "networks"},
    "training": {"objectives", "diffusion", "networks", "data", "parallel", "checkpoints"},
    "evaluation": {"diffusion", "networks", "data", "parallel", "visual"},
    "interop": {"diffusion"},
    "pipelines": {"diffusion", "interop", "networks", "data", "parallel", "visual"},
    "builders": {
        "config",
        "data",
        "diffusion",
        "evaluation",
        "networks",
        "objectives",
        "parallel",
        "pipelines",
        "training",
    },
    "errors": set(),
    "config": {"defaults"},
    "defaults": {"defaults_network"},
    "defaults_network": set(),
    "config_rules": {"config"},
    "config_flag": {"config"},
    "flag_errors": {"config", "config_flag"},
    "doors": {"flag_errors", "config", "parallel", "sigterm"},
    "sigterm": set(),
    "lock": set(),
    "workdir": {"config", "data"},
    "start": {"checkpoints", "config", "data", "lock", "parallel", "workdir"},
    "saves": {"checkpoints", "training", "workdir"},
}
CONFIG_READERS = {
    "builders",
    "config",
    "config_flag",
    "defaults",
    "defaults_network",
    "workdir",
    "api",
    "doors",
    "flag_errors",
}


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in FILES}


def imported(path: Path, *, top_only: bool = False) -> set[str]:
    """Full names of what a file imports; names of `from a import b` resolved to modules."""
    found = set()
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_only else ast.walk(tree)
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                found.add(full if full in MODULES else node.module)
    return found


def room_of(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def ours(path: Path, **kw) -> set[str]:
    return {name for name in imported(path, **kw) if name.split(".")[0] == "diffusion_jax"}


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_rooms_import_downwards_only(room):
    allowed = {room, "errors", *MAY_IMPORT[room]}
    paths = [path for name, path in MODULES.items() if room_of(name) == room]
    assert paths
    for path in paths:
        used = {room_of(name) for name in ours(path)}
        assert used <= allowed, f"{path}: {used - allowed}"


def test_every_room_has_a_rule():
    rooms = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert rooms <= set(MAY_IMPORT)


def test_pipelines_know_the_data_by_their_spec_alone():
    for name, path in MODULES.items():
        if room_of(name) == "pipelines":
            used = {n for n in ours(path) if room_of(n) == "data"}
            assert used <= {"diffusion_jax.data.spec", "diffusion_jax.data.text"}, path


def test_no_import_cycles():
    edges = {name: ours(path, top_only=True) & set(MODULES) for name, path in MODULES.items()}
    done: set[str] = set()

    def visit(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, " -> ".join([*above, name])
        if name not in done:
            # A package's __init__ gathers its own files; those import each other by full name.
            for other in sorted(edges[name] - {name}):
                visit(other, (*above, name))
            done.add(name)

    for name in edges:
        visit(name, ())


def test_torch_is_never_imported_and_tensorflow_only_when_needed():
    for path in FILES:
        assert not {n.split(".")[0] for n in imported(path)} & {"torch", "torchvision"}, path
        heavy = {"tensorflow", "clu"}
        assert not {n.split(".")[0] for n in imported(path, top_only=True)} & heavy, path


# Import names that differ from the name of the package that brings them.
DISTRIBUTIONS = {
    "PIL": "pillow",
    "absl": "absl-py",
    "google": "protobuf",
    "ml_collections": "ml-collections",
    "orbax": "orbax-checkpoint",
    "sklearn": "scikit-learn",
    "tensorflow_datasets": "tensorflow-datasets",
}


def test_every_package_that_is_imported_is_declared():
    names = {name.split(".")[0] for path in FILES for name in imported(path)}
    names -= {"diffusion_jax", *sys.stdlib_module_names}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    lines = [*project["dependencies"], *extras["parquet"], *extras["evaluation"]]
    declared = {re.match(r"[\w-]+", line)[0] for line in lines}
    missing = {DISTRIBUTIONS.get(name, name) for name in names} - declared
    assert not missing


def test_importing_the_package_brings_no_tensorflow():
    code = (
        "import sys, diffusion_jax.api, diffusion_jax.main\n"
        "print([m for m in ('tensorflow', 'torch', 'clu.metric_writers') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=os.environ
    )
    assert done.stdout == "[]\n", done.stderr


def test_the_mathematics_knows_neither_flax_nor_files():
    outside = {"flax", "optax", "orbax", "ml_collections", "os", "pathlib", "json"}
    for name, path in MODULES.items():
        if room_of(name) == "diffusion":
            assert not {n.split(".")[0] for n in imported(path)} & outside, path


def test_only_the_top_of_the_house_reads_configs():
    for name, path in MODULES.items():
        if "ml_collections" in {n.split(".")[0] for n in imported(path)}:
            assert room_of(name) in CONFIG_READERS, path


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_lengths(path):
    text = path.read_text()
    assert text.count("\n") < 400
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            limit = 100 if path.name == "loop.py" else 60
            lines = node.end_lineno - node.lineno + 1
            assert lines < limit, f"{node.name}: {lines} lines"


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.py")), ids=lambda p: p.name)
def test_configs_are_short_and_say_how_they_are_run(path):
    text = path.read_text()
    assert text.count("\n") <= 120
    assert f"--config=configs/{path.name}" in ast.get_docstring(ast.parse(text))
