"""The repository's own rules: imports go one way, importing starts nothing, what is installed is what is here."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# From the outermost layer in. A file imports only from its own layer's files listed beside it, or from further in.
LAYERS = [
    {"cli"},
    {"source", "api"},
    {
        "checkpoint",
        "admission",
        "initial",
        "rewrite",
        "report",
        "verify",
        "planner",
        "plan",
        "trace",
        "huggingface",
        "behaviour",
        "inputs",
        "graph",
        "bench",
        "agreement",
        "timing",
        "recover",
        "recovery",
        "align",
        "distill",
        "batches",
        "training_state",
    },
    {
        "kinds",
        "layers",
        "operand",
        "shared",
        "basis",
        "reading",
        "pool",
        "gamma",
        "passes",
        "traced",
        "mapping",
        "config",
    },
    {"weight"},
    {"errors"},
    {"kernels"},
]


def layer_of(module: str) -> int:
    return next(level for level, names in enumerate(LAYERS) if module in names)


def imported_modules(path: Path) -> set[str]:
    """Names of roastify's modules that a file imports, at its top or inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "roastify":
            parts = node.module.split(".")
            found |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("roastify.")}
    return found


@pytest.mark.parametrize("path", sorted((ROOT / "roastify").glob("*.py")), ids=lambda path: path.stem)
def test_imports_go_one_way(path: Path) -> None:
    if path.stem == "__init__":
        return
    for module in imported_modules(path):
        assert layer_of(module) >= layer_of(path.stem), f"{path.stem} imports {module}"


@pytest.mark.parametrize("path", sorted((ROOT / "kernels").glob("*.py")), ids=lambda path: path.stem)
def test_kernels_import_nothing_of_roastify(path: Path) -> None:
    assert imported_modules(path) <= {"kernels"}


def test_no_import_cycles() -> None:
    graph = {path.stem: imported_modules(path) for path in (ROOT / "roastify").glob("*.py") if path.stem != "__init__"}
    done: set[str] = set()

    def visit(module: str, above: tuple[str, ...]) -> None:
        assert module not in above, " → ".join((*above, module))
        if module not in done:
            for below in graph.get(module, ()):
                visit(below, (*above, module))
            done.add(module)

    for module in graph:
        visit(module, ())


def test_importing_starts_nothing() -> None:
    code = (
        "import sys, torch; before = set(sys.modules); import roastify, roastify.kernels.ops; "
        "new = set(sys.modules) - before; assert not torch.cuda.is_initialized(); "
        "print([name for name in new if name.split('.')[0] in ('triton', 'transformers')])"
    )
    output = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert output.strip() == "[]"


def test_no_top_level_package_named_kernels() -> None:
    code = "import roastify.kernels.ops, importlib.util; print(importlib.util.find_spec('kernels') is None)"
    output = subprocess.run([sys.executable, "-c", code], cwd="/", check=True, capture_output=True, text=True).stdout
    assert output.strip() == "True"


def test_installed_wheel_works(tmp_path: Path) -> None:
    """Build the wheel, unpack it as an installation would, and convert with it from another folder."""
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path / "dist"), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True, text=True)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(site)
    assert "roastify/kernels/ops.py" in names and "roastify/py.typed" in names
    assert not any(name.startswith(("kernels/", "tests/", "examples/", "benchmarks/")) for name in names)
    code = (
        "import torch, roastify; from pathlib import Path; "
        f"assert Path(roastify.__file__).is_relative_to({str(site)!r}), roastify.__file__; "
        "m = roastify.convert(torch.nn.Linear(64, 64), 4); print(m(torch.zeros(1, 64)).shape)"
    )
    # -S and an explicit path keep the editable installation out of the way.
    packages = sysconfig.get_paths()["purelib"]
    command = [sys.executable, "-S", "-c", f"import sys; sys.path[:0] = [{str(site)!r}, {packages!r}]; {code}"]
    output = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True).stdout
    assert "torch.Size([1, 64])" in output


def test_readme_names_every_file() -> None:
    readme = (ROOT / "README.md").read_text()
    for folder in ("roastify", "kernels", "examples", "benchmarks", "benchmarks/accuracy"):
        for path in (ROOT / folder).glob("*.py"):
            if path.name not in ("__init__.py", "__main__.py"):
                assert path.name in readme, f"{folder}/{path.name} has no line in the README's file tree"


def test_package_version_is_the_projects() -> None:
    import roastify

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert roastify.__version__ == project["version"]


def test_readme_table_is_the_committed_results() -> None:
    code = (
        "import json; from benchmarks.cpu import README, RESULTS, markdown; "
        "assert markdown(json.loads(RESULTS.read_text())) in README.read_text()"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_performance_page_is_the_committed_results() -> None:
    code = (
        "from benchmarks.page import DOCUMENT, KERNELS, MODELS, load, markdown; "
        "assert markdown(load(KERNELS), load(MODELS)) == DOCUMENT.read_text()"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_performance_page_shows_only_pictures_that_exist() -> None:
    pictures = re.findall(r"!\[[^]]*\]\(([^)]*)\)", (ROOT / "docs" / "performance.md").read_text())
    assert pictures
    for picture in pictures:
        assert (ROOT / "docs" / picture).is_file(), f"docs/{picture} is missing; python -m benchmarks.page draws it"
