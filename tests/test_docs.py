"""The pages under docs/ name only what exists, and docs/mathematics.md leaves nothing out."""

from __future__ import annotations

import ast
import functools
import importlib
import re
from pathlib import Path

import pytest

from diffusion_jax.diffusion import (
    guidance,
    likelihood,
    predictions,
    processes,
    schedules,
    solvers,
    time_grids,
    time_sampling,
    weightings,
)
from diffusion_jax.pipelines.guidance_kinds import KINDS

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted((ROOT / "docs").rglob("*.md"))
MATHEMATICS = ROOT / "docs/mathematics.md"
# Where a page may leave the beginning of a name away.
PACKAGES = ("", "diffusion_jax.", "diffusion_jax.diffusion.")
TESTS = ("", "tests/", "tests/diffusion/")

every_page = pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)


def codes(text):
    """What stands between backticks, outside blocks of code."""
    return re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))


def exists(name):
    """Whether a dotted name is a module of the package, or something in one."""
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        module = ".".join(parts[:count])
        if not any((ROOT / f"{module.replace('.', '/')}{end}").exists() for end in (".py", "/")):
            continue
        try:
            found = importlib.import_module(module)
        except ModuleNotFoundError:
            continue
        for part in parts[count:]:
            if not hasattr(found, part) and part not in getattr(found, "__annotations__", {}):
                return False
            found = getattr(found, part, None)
        return True
    return False


@functools.cache
def functions_of(path):
    tree = ast.parse(path.read_text())
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


def missing_functions(text):
    names = [code for code in codes(text) if re.fullmatch(r"[a-z_]\w*(\.\w+)+", code)]
    files = (".py", ".md", ".json", ".png", ".npz")
    names = [name for name in names if not name.endswith(files)]
    return [name for name in names if not any(exists(start + name) for start in PACKAGES)]


def missing_tests(text):
    missing = []
    for code in codes(text):
        if not (named := re.fullmatch(r"([\w/]+\.py)::(\w+)", code)):
            continue
        paths = [path for start in TESTS if (path := ROOT / (start + named[1])).is_file()]
        if not any(path.is_relative_to(ROOT / "tests") for path in paths) or not any(
            named[2] in functions_of(path) for path in paths
        ):
            missing.append(code)
    return missing


def missing_targets(page, text):
    """Relative links and pictures without a file, and links to headings that are not there."""
    headings = {
        re.sub(r"[^\w\- ]", "", line.lstrip("# ").lower()).replace(" ", "-")
        for line in text.splitlines()
        if line.startswith("#")
    }
    missing = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = target.partition("#")
        if "://" in target or (path and (page.parent / path).exists()):
            continue
        if path or anchor not in headings:
            missing.append(target)
    return missing


def first_cells(text, heading):
    """The code in the first column of the tables under a heading of the second level."""
    start = re.search(rf"^## .*{re.escape(heading)}.*$", text, re.MULTILINE)
    assert start, heading
    section = re.split(r"^## ", text[start.end() :], maxsplit=1, flags=re.MULTILINE)[0]
    rows = [line.split("|")[1] for line in section.splitlines() if line.startswith("|")]
    return {code.split()[0] for row in rows for code in codes(row)}


REGISTERED = {
    "Schedules": schedules.SCHEDULES,
    "Predictions": predictions.PREDICTIONS,
    "Weightings": {*weightings.WEIGHTINGS, *time_sampling.TIME_SAMPLINGS},
    "Solvers": solvers.SOLVERS,
    "Time grids": time_grids.TIME_GRIDS,
    "Guidance": {*KINDS, *guidance.__all__},
    "Likelihood": likelihood.PROPOSALS,
    # What was measured is of all solvers too.
    "Error against evaluations": solvers.SOLVERS,
}
MENTIONED = {
    "processes": [f"processes.{n}" for n in ("Gaussian", "Binomial", "Masked", "Uniform")],
    "keeps": [f"processes.{type(keep).__name__}" for keep in processes.KEEPS.values()],
}


@every_page
def test_every_function_named_exists(page):
    assert not missing_functions(page.read_text())


@every_page
def test_every_test_named_exists(page):
    assert not missing_tests(page.read_text())


@pytest.mark.parametrize("page", [*PAGES, ROOT / "README.md"], ids=lambda p: p.name)
def test_links_and_pictures_lead_somewhere(page):
    assert not missing_targets(page, page.read_text())


@pytest.mark.parametrize("heading", REGISTERED)
def test_mathematics_has_a_row_for_everything_registered(heading):
    rows = first_cells(MATHEMATICS.read_text(), heading)
    assert not set(REGISTERED[heading]) - rows


def test_mathematics_names_every_process():
    named = set(codes(MATHEMATICS.read_text()))
    assert not {name for names in MENTIONED.values() for name in names} - named


def test_formulas_are_closed_and_break_no_table():
    """An odd dollar turns the rest of a paragraph to text, a bar inside a formula ends its cell."""
    for page in PAGES:
        text = re.sub(r"`[^`\n]*`", "", page.read_text())
        for paragraph in re.split(r"\n\n|\n(?=\|)|\n(?=- )", text):
            assert paragraph.count("$") % 2 == 0, paragraph
        # Markdown takes the backslash before a sign away, as in a thin space.
        assert not re.findall(r"\\[^A-Za-z].*", text)
        tables = re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)
        for table in tables:
            assert len({row.count("|") for row in table.splitlines()}) == 1, table


def test_what_is_wrong_is_found():
    text = (
        "`schedules.cosin`, `solvers.ddim.ddmi`, `nowhere.thing`, `schedules.cosine`,"
        " `diffusion_jax.diffusion.schedules.Schedule.logsnr`, `denoiser.Denoised.x0`,"
        " `predictions.Preconditioning.c_skip`\n"
        "`test_schedules.py::test_nothing`, `test_nothing.py::test_ends_are_exact`,"
        " `tests/diffusion/test_schedules.py::test_ends_are_exact`,"
        " `diffusion_jax/diffusion/schedules.py::cosine`\n"
        "[a](images/none.png) ![b](images/mnist.png) [c](#here) [d](#there) [e](https://x.y)\n"
        "## Here\n| name | `a` |\n|---|---|\n| `one`, `two` | `three` |\n"
        "## There it is\n| `four` |\n"
    )
    assert missing_functions(text) == ["schedules.cosin", "solvers.ddim.ddmi", "nowhere.thing"]
    assert missing_tests(text) == [
        "test_schedules.py::test_nothing",
        "test_nothing.py::test_ends_are_exact",
        "diffusion_jax/diffusion/schedules.py::cosine",
    ]
    assert missing_targets(MATHEMATICS, text) == ["images/none.png", "#there"]
    assert first_cells(text, "Here") == {"one", "two"}
