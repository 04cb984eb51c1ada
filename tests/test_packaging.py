"""The package as others get it: its page on the index, links, dependencies, citation and workflows."""

from __future__ import annotations

import re
import runpy
import sys
import tomllib
from pathlib import Path
from typing import Any

import click.testing
import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

import roastify
from roastify.cli import main
from roastify.config import RoastConfig

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
LINK = re.compile(r"\]\(([^)\s]+)\)")


def _yaml(path: Path) -> Any:
    # A dependency of huggingface_hub, and so of transformers.
    return pytest.importorskip("yaml").safe_load(path.read_text())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_of_pages_lead_to_files(page: Path) -> None:
    for link in LINK.findall(page.read_text()):
        if not link.startswith(("http://", "https://", "#")):
            assert (page.parent / link.partition("#")[0]).exists(), f"{page.name} links to {link}"


def test_addresses_of_the_project_are_one_repository() -> None:
    repository = PROJECT["urls"]["Repository"]
    assert {"Repository", "Documentation", "Issues", "Changelog"} <= PROJECT["urls"].keys()
    assert all(address.startswith(repository) for address in PROJECT["urls"].values())
    assert _yaml(ROOT / "CITATION.cff")["repository-code"] == repository


def test_the_citation_and_the_newest_changes_are_of_this_version() -> None:
    citation = _yaml(ROOT / "CITATION.cff")
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    assert citation["version"] == roastify.__version__ and citation["license"] == PROJECT["license"]
    newest, date = re.findall(r"^## (.*) \((.*)\)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[0]
    assert newest == roastify.__version__ and date == str(citation["date-released"])
    assert [each["year"] for each in citation["references"]] == [2023, 2024]


def test_every_dependency_is_used() -> None:
    texts = [path.read_text() for folder in ("roastify", "kernels") for path in (ROOT / folder).rglob("*.py")]
    extras = PROJECT["optional-dependencies"]
    for line in [*PROJECT["dependencies"], *extras["integrations"], *extras["vision"]]:
        name = Requirement(line).name
        used = re.compile(rf'^\s*(import|from) {name}\b|"{name}"', re.MULTILINE)
        assert any(used.search(text) for text in texts), f"{name} is required, and no file uses it"


def _pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return dict(line.lower().split("==") for line in lines if line and not line.startswith("#"))


def _ranges() -> dict[str, Requirement]:
    extras = PROJECT["optional-dependencies"].values()
    found = map(Requirement, [*PROJECT["dependencies"], *(line for extra in extras for line in extra)])
    return {requirement.name: requirement for requirement in found if requirement.name != "roastify"}


def test_pinned_versions_are_supported_ones() -> None:
    pins = _pins()
    for name, requirement in _ranges().items():
        assert requirement.specifier.contains(pins[name]), requirement


def test_the_page_of_compatibility_names_the_versions_that_are_tested() -> None:
    page = (ROOT / "docs" / "compatibility.md").read_text()
    tried = re.findall(r"^\| (3\.[\d., ]+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|", page, re.MULTILINE)
    pinned, oldest, newest = (dict(zip(("torch", "triton", "transformers"), row[1:], strict=True)) for row in tried)
    pythons = _yaml(ROOT / ".github" / "workflows" / "tests.yml")["jobs"]["tests"]["strategy"]["matrix"]["python"]
    assert tried[0][0].split(", ") == pythons
    for name, version in pinned.items():
        assert version == _pins()[name]
        assert _ranges()[name].specifier == SpecifierSet(f">={oldest[name].removesuffix('.0')}")
        assert Version(newest[name]) >= Version(version)


def test_settings_prints_the_defaults_as_a_config_file(tmp_path: Path) -> None:
    result = click.testing.CliRunner().invoke(main, ["settings"])
    assert result.exit_code == 0
    assert result.output == (ROOT / "configs" / "default.toml").read_text()
    (tmp_path / "settings.toml").write_text(result.output)
    assert RoastConfig.from_toml(tmp_path / "settings.toml") == RoastConfig()


@pytest.mark.long
def test_the_trial_of_the_wheel_trains_saves_loads_and_generates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("transformers")
    monkeypatch.setattr(sys, "argv", ["wheel_trial.py", str(tmp_path)])
    runpy.run_path(str(ROOT / "tests" / "wheel_trial.py"))
    assert "counts to 21" in capsys.readouterr().out
    # From the settings to what is generated.
    text = (ROOT / "tests" / "wheel_trial.py").read_text()
    lines = text.partition("# The lines of the user.")[2].partition("# What is promised")[0].split("\n")
    assert sum(bool(line.strip()) for line in lines) <= 20


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_workflows_run_commands_of_the_makefile(path: Path) -> None:
    workflow = _yaml(path)
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    # YAML reads the key `on` as true.
    assert {"name", True, "permissions", "jobs"} <= workflow.keys()
    for name, job in workflow["jobs"].items():
        assert job["runs-on"] and job["timeout-minutes"] <= 60, name
        for step in job["steps"]:
            assert ("uses" in step) != ("run" in step), step
            if "run" in step:
                program, *words = step["run"].split()
                assert program == "make" and {word for word in words if "=" not in word} <= targets, step["run"]
            else:
                assert re.fullmatch(r"actions/[a-z-]+@v\d+", step["uses"]), step["uses"]


def test_the_workflows_run_every_python_that_is_promised() -> None:
    versions = _yaml(ROOT / ".github" / "workflows" / "tests.yml")["jobs"]["tests"]["strategy"]["matrix"]["python"]
    promised = [line.rpartition(" ")[2] for line in PROJECT["classifiers"] if re.search(r"Python :: 3\.\d+$", line)]
    assert versions == promised and f">={versions[0]}" == PROJECT["requires-python"]
