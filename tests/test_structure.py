"""The repository's own rules: imports go one way, importing starts nothing, the wheel has every file."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import file_map
import pytest

import roastify

ROOT = Path(__file__).parents[1]

PACKAGE, KERNELS = ROOT / "roastify", ROOT / "kernels"

# The levels of the package, the highest first: a file imports only from its own level or from lower ones. A level is
# one folder, or some files beside the folders.
LEVELS = [
    {"cli"},
    {"commands"},
    {"help_text", "plan_table", "report", "source", "text_layout"},
    {"integrations", "ratio_sweep"},
    {"api"},
    {"recovery"},
    {"checks"},
    {"artifact", "builders", "dense_artifact", "deployment", "manifest"},
    {"conversion"},
    {"config"},
    {"layers"},
    {"pool"},
    {
        "calls",
        "companions",
        "files",
        "isolation",
        "model_libraries",
        "names",
        "plain_json",
        "progress",
        "shown",
        "tensor_file",
        "tensor_values",
        "typed_values",
    },
    {"errors", "printable"},
    {"kernels"},
]


def module_name(path: Path) -> str:
    """Return the dotted name by which a file of the package is imported."""
    parts = ["kernels", *path.relative_to(KERNELS).parts] if path.is_relative_to(KERNELS) else []
    parts = parts or list(path.relative_to(PACKAGE).parts)
    parts[-1] = parts[-1].removesuffix(".py")
    return ".".join(["roastify", *(part for part in parts if part != "__init__")])


# `rglob` does not follow the link roastify/kernels, so each file is here once.
FILES = {module_name(path): path for folder in (PACKAGE, KERNELS) for path in sorted(folder.rglob("*.py"))}
MODULES = {name: path for name, path in FILES.items() if path.name != "__init__.py"}


def level_of(module: str) -> int:
    name = module.split(".")[1]
    found = [level for level, names in enumerate(LEVELS) if name in names]
    assert found, f"{module} is in no level of LEVELS"
    return found[0]


def imported_modules(path: Path) -> set[str]:
    """Return the names of roastify's modules that a file imports, at its top or inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "roastify":
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found |= {name if name in FILES else node.module for name in names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.startswith("roastify.")}
    return found - {"roastify"}


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_one_way(module: str) -> None:
    for imported in imported_modules(MODULES[module]):
        assert level_of(imported) >= level_of(module), f"{module} imports {imported}"


def test_every_file_and_folder_of_the_package_has_a_level() -> None:
    assert {name.split(".")[1] for name in MODULES} == set().union(*LEVELS)


def test_no_import_cycles() -> None:
    graph = {name: imported_modules(path) for name, path in MODULES.items()}
    done: set[str] = set()

    def visit(module: str, above: tuple[str, ...]) -> None:
        assert module not in above, " → ".join((*above, module))
        if module not in done:
            for below in graph.get(module, ()):
                visit(below, (*above, module))
            done.add(module)

    for module in graph:
        visit(module, ())


def test_init_files_of_folders_import_nothing_of_the_package() -> None:
    for name, path in FILES.items():
        if path.name == "__init__.py" and name != "roastify":
            assert not imported_modules(path), f"{name} makes its whole folder part of every import from it"


def test_only_the_gpu_folder_imports_triton() -> None:
    for name, path in MODULES.items():
        tree = ast.parse(path.read_text())
        imported = [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
        imported += [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
        if any(each.split(".")[0] == "triton" for each in imported):
            assert name.startswith("roastify.kernels.gpu."), name


# These modules share names on purpose: an operator has one name in its reference, its launcher and the function that
# calls it; a command has the name of its Python function; the mapping on the GPU has the mapping's names.
TWINS = {"api", "ratio_sweep", "kernels.ops", "kernels.plain", "kernels.reference", "pool.mapping"}
TWINS |= {f"commands.{name}" for name in ("bench", "conversion", "training")}


def test_no_two_modules_define_the_same_name() -> None:
    found: dict[str, list[str]] = {}
    for name, path in MODULES.items():
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                found.setdefault(node.name, []).append(name.removeprefix("roastify."))
    for name, places in found.items():
        places = sorted(set(places))
        twins = sum(place in TWINS or place.startswith("kernels.gpu.") for place in places)
        assert len(places) == 1 or twins == len(places), f"{name} is defined in {', '.join(places)}"


def test_no_public_function_shadows_a_module() -> None:
    for name in roastify.__all__:
        assert f"roastify.{name}" not in FILES, f"import roastify.{name} would give a module, roastify.{name} does not"


def test_private_parts_of_torch_have_one_home() -> None:
    private = re.compile(r"torch\.(_C|_dynamo|_functorch|_inductor)\b|torch\.utils\._|import _pytree|_execution_engine")
    for name, path in MODULES.items():
        if name != "roastify.kernels.torch_internals":
            assert not (hit := private.search(path.read_text())), (
                f"{name} uses {hit and hit[0]}: torch_internals names it"
            )


def test_numerics_import_no_user_interface() -> None:
    """Only the command line needs rich: `import roastify` loads neither rich, click nor sympy."""
    for name, path in MODULES.items():
        at_top = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.Import | ast.ImportFrom)]
        modules = [node.module or "" if isinstance(node, ast.ImportFrom) else node.names[0].name for node in at_top]
        if level_of(name) > level_of("roastify.report"):
            assert not any(module.split(".")[0] in ("rich", "click", "sympy") for module in modules), name


TYPES = """
import torch
from torch import nn
import roastify
from roastify.kernels.view import TileView

class Net(nn.Module): ...

def lines(view: TileView, net: Net) -> None:
    view.slot_size
    view.slot_sise
    reveal_type(roastify.convert(net, 10))
    reveal_type(roastify.convert(net, 10, emit="graph"))
    reveal_type(roastify.load("out", net))
    roastify.convert(net, 10, init="projekt")
    roastify.recover(net, net, [], 10, lr=1e-3)
    roastify.recover(net, net, [], 10, rl=1e-3)
"""


@pytest.mark.long
def test_types_reach_across_the_boundary_to_the_kernels(tmp_path: Path) -> None:
    """A misspelt attribute, choice or setting fails `make check`, and `convert` gives back the class that it took."""
    (tmp_path / "types_seen.py").write_text(TYPES)
    command = [sys.executable, "-m", "mypy", "--config-file", "pyproject.toml", str(tmp_path / "types_seen.py")]
    output = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout
    found = [line.partition(".py:")[2] for line in output.splitlines() if "types_seen.py" in line]
    expected = [
        '11: error: "TileView" has no attribute "slot_sise"',
        '12: note: Revealed type is "types_seen.Net"',
        '13: note: Revealed type is "torch.fx.graph_module.GraphModule"',
        '14: note: Revealed type is "types_seen.Net"',
        "15: error: ",
        '17: error: Unexpected keyword argument "rl" for "recover"',
    ]
    starts = [next((line for line in found if line.startswith(start)), f"missing: {start}") for start in expected]
    assert all(line.startswith(start) for line, start in zip(starts, expected, strict=True)), output
    assert {line.split(":")[0] for line in found} == {start.split(":")[0] for start in expected}, output


def test_importing_starts_nothing() -> None:
    code = (
        "import sys, torch; before = set(sys.modules); import roastify, roastify.kernels.ops; "
        "new = set(sys.modules) - before; assert not torch.cuda.is_initialized(); "
        "print([name for name in new if name.split('.')[0] in ('triton', 'transformers', 'rich', 'click', 'sympy')])"
    )
    output = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert output.strip() == "[]"


def test_no_top_level_package_named_kernels() -> None:
    code = "import roastify.kernels.ops, importlib.util; print(importlib.util.find_spec('kernels') is None)"
    output = subprocess.run([sys.executable, "-c", code], cwd="/", check=True, capture_output=True, text=True).stdout
    assert output.strip() == "True"


@pytest.mark.long
def test_installed_wheel_works(tmp_path: Path) -> None:
    """Build the wheel, unpack it as an installation would, and convert with it from another folder."""
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path / "dist"), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True, text=True)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(site)
    expected = {f"{name.replace('.', '/')}.py" for name in MODULES} | {
        "roastify/py.typed",
        "roastify/configs/default.toml",
    }
    expected |= {f"{name.replace('.', '/')}/__init__.py" for name in FILES.keys() - MODULES.keys()}
    assert {name for name in names if ".dist-info/" not in name} == expected
    code = (
        "import torch, roastify; from pathlib import Path; "
        f"assert Path(roastify.__file__).is_relative_to({str(site)!r}), roastify.__file__; "
        "m = roastify.convert(torch.nn.Linear(64, 64), 4); print(m(torch.zeros(1, 64)).shape)"
    )
    # With -S and an explicit path Python does not find the editable installation.
    packages = sysconfig.get_paths()["purelib"]
    command = [sys.executable, "-S", "-c", f"import sys; sys.path[:0] = [{str(site)!r}, {packages!r}]; {code}"]
    output = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True).stdout
    assert "torch.Size([1, 64])" in output


def test_contributing_maps_every_file() -> None:
    text = file_map.DOCUMENT.read_text(encoding="utf-8")
    assert file_map.with_map(text) == text, "run `make map`"
    assert not [line for line in text.splitlines() if line.endswith("`: ")], "a file without a docstring"


def test_page_of_the_cpu_is_the_committed_results() -> None:
    from benchmarks.cpu import DOCUMENT, RESULTS, markdown
    from benchmarks.rows import load

    assert markdown(load(RESULTS)) in DOCUMENT.read_text()


def test_page_of_scale_is_the_committed_results() -> None:
    from benchmarks.rows import load
    from benchmarks.scale import PAGE, RESULTS, markdown

    assert markdown(load(RESULTS)) in PAGE.read_text()


def test_performance_pages_are_the_committed_results() -> None:
    from benchmarks import cpu, page, performance_tables_page
    from benchmarks.rows import load

    results = load(page.KERNELS), load(page.MODELS), load(cpu.RESULTS)
    assert page.markdown(*results) == page.DOCUMENT.read_text()
    assert performance_tables_page.markdown(*results) == (page.DOCUMENT.parent / page.TABLES).read_text()
