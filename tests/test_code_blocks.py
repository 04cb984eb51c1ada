"""Every code block of README and of the pages in docs/ runs, and every command in them is one."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
import types
from collections.abc import Iterator
from pathlib import Path

import click.testing
import pytest
import torch
import torch.distributed as dist
from page_setups import SETUPS
from pages import PAGES, ROOT, SHELL, Block, blocks_of, commands_of, differences
from torch.distributed.run import get_args_parser

from roastify.cli import main

BLOCKS = {str(path.relative_to(ROOT)): blocks_of(path.read_text(encoding="utf-8"), path.name) for path in PAGES}
# A block of README that is no whole program takes these names for granted; README shows nobody comments of the tests.
for _block in BLOCKS["README.md"]:
    if _block.language == "python" and not _block.marks and "import" not in _block.code.splitlines()[0]:
        _block.marks["given"] = (
            "out/ of transformers, base as fresh, student, teacher, batches, base as model, words as x"
        )
        _block.marks["shortened"] = (
            "batches) to batches, steps=2); example_inputs=x) to example_inputs=x, seconds=0.01)"
        )
ALL = [block for blocks in BLOCKS.values() for block in blocks]
RUN = {
    page: [block for block in blocks if "not run" not in block.marks]
    for page, blocks in BLOCKS.items()
    if any(block.language == "python" or "run" in block.marks for block in blocks)
}
# What `make test` runs, and the pages that it does not run or not to their end.
SHORT = {page: [block for block in blocks if "long" not in block.marks] for page, blocks in RUN.items()}
LONG = [page for page, blocks in RUN.items() if blocks != SHORT[page]]
QUICKSTARTS = [page for page in RUN if page.startswith("docs/quickstart/")]


class Page:
    """A page that is run in the current folder: its blocks share one namespace, as the cells of a notebook do."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        # A module with a file, because a conversion reads the code of a model's classes.
        self.module = types.ModuleType("__main__")
        self.file = Path("page.py").absolute()
        self.module.__file__ = str(self.file)
        monkeypatch.setitem(sys.modules, "__main__", self.module)
        self.printed = ""

    def run(self, block: Block) -> None:
        """Run a block, or compare it with what the block before it printed."""
        if not all(map(shutil.which, block.items("needs"))):
            return
        for name in block.items("given"):
            setup, _, own_name = name.partition(" as ")
            value = SETUPS[setup]()
            if (own_name or setup).isidentifier():
                vars(self.module)[own_name or setup] = value
        if "printed" in block.marks:
            assert not (wrong := differences(block.code, self.printed)), "\n".join([f"{block.place} shows", *wrong])
        elif block.language == "python":
            self._run_python(block)
        elif "run" in block.marks:
            self.printed = "".join(map(_output_of, commands_of(block)))

    def _run_python(self, block: Block) -> None:
        code = block.shortened()
        if named := re.match(r"# (\w+\.py)\n", code):
            Path(named[1]).write_text(code, encoding="utf-8")
        before = self.file.read_text(encoding="utf-8") if self.file.exists() else ""
        self.file.write_text(before + code, encoding="utf-8")
        # Line numbers are those of the file.
        compiled = compile("\n" * before.count("\n") + code, self.file, "exec")
        with contextlib.redirect_stdout(io.StringIO()) as out:
            exec(compiled, vars(self.module))
            for test in re.findall(r"^def (test_\w+)\(\)", code, re.MULTILINE):
                vars(self.module)[test]()
        self.printed = out.getvalue()


def _output_of(command: str) -> str:
    words = shlex.split(command, comments=True)
    assert words[0] == "roastify", f"{words[0]} is not run"
    result = click.testing.CliRunner().invoke(main, words[1:])
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture
def page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Page]:
    monkeypatch.chdir(tmp_path)
    with torch.random.fork_rng():
        yield Page(monkeypatch)
    if dist.is_initialized():
        dist.destroy_process_group()


# PEFT asks transformers this.
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
@pytest.mark.parametrize("name", SHORT)
def test_the_blocks_of_a_page_run_in_order(name: str, page: Page) -> None:
    for block in SHORT[name]:
        page.run(block)


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", LONG)
def test_all_blocks_of_a_page_run_in_order(name: str, page: Page) -> None:
    for block in RUN[name]:
        page.run(block)


@pytest.mark.long
@pytest.mark.parametrize("name", QUICKSTARTS)
def test_a_quickstarts_program_runs_alone_in_an_empty_folder(name: str, tmp_path: Path) -> None:
    program = next(block for block in RUN[name] if block.language == "python")
    assert not program.marks.keys() - {"long"}, f"{program.place} is whole, and needs nothing"
    (tmp_path / "program.py").write_text(program.code, encoding="utf-8")
    run = subprocess.run([sys.executable, "program.py"], cwd=tmp_path, capture_output=True, text=True)
    # Bars and the lines of a recovery are on standard error too.
    assert run.returncode == 0 and "Warning" not in run.stderr, run.stderr
    printed = next(block for block in RUN[name] if "printed" in block.marks)
    assert not (wrong := differences(printed.code, run.stdout)), "\n".join(wrong)


def test_figures_of_quickstarts_are_on_the_pages_of_results() -> None:
    results = "".join(path.read_text(encoding="utf-8") for path in PAGES if path.parent.name != "quickstart")
    for name in QUICKSTARTS:
        text = re.sub(r"^```.*?^```$", "", (ROOT / name).read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
        figures = re.findall(r"\d+\.\d+(?= %)|\d+,\d{3}(?= param| for)|(?<=of )\d+,\d{3}\b", text)
        assert not [figure for figure in figures if figure not in results], name


def test_every_block_is_of_a_known_kind_and_the_few_that_do_not_run_say_why() -> None:
    assert {block.language for block in ALL} <= {*SHELL, "python", "text", "toml", "yaml", "json"}
    # Python would run such a line, and it would do nothing.
    sketches = [block.place for block in ALL if re.search(r"^ *\.\.\.", block.code, re.MULTILINE)]
    assert not sketches, f"blocks with ... in the place of lines: {sketches}"
    left = [block for block in ALL if {"not run", "long"} & block.marks.keys()]
    for block in left:
        assert len(block.marks.get("not run") or block.marks["long"]) > 10, f"{block.place} does not say why"
        if block.language == "python":
            compile(block.code, block.place, "exec")
    assert sum("not run" in block.marks for block in left) <= 4
    assert sum(block.language == "python" for block in ALL) >= 24


COMMANDS = [
    pytest.param(command, id=f"{block.place} {command[:40].strip()}")
    for block in ALL
    if block.language in SHELL
    for command in commands_of(block)
]


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_of_pages_are_commands(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _check_command(shlex.split(command, comments=True), monkeypatch)


def _check_command(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Check that the program would take these words: its subcommands, options, targets and files exist."""
    program, *rest = words
    if program == "roastify":
        for command in main.commands.values():
            monkeypatch.setattr(command, "callback", lambda **_: None)
        result = click.testing.CliRunner().invoke(main, rest)
        assert result.exit_code == 0, result.output
    elif program == "torchrun":
        found = get_args_parser().parse_args(rest)
        script = found.training_script
        if found.no_python:
            _check_command([script, *found.training_script_args], monkeypatch)
        elif found.module:
            assert importlib.util.find_spec(script), script
        else:
            # A name without a folder is a file of the reader's.
            assert "/" not in script or (ROOT / script).is_file(), script
    elif program == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
        assert {word for word in rest if "=" not in word} <= {*targets}
    elif program == "python" and rest[0] == "-m":
        assert importlib.util.find_spec(rest[1]), rest[1]
    elif program == "python":
        assert "/" not in rest[0] or (ROOT / rest[0]).is_file(), rest[0]
    elif program == "pip":
        project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        extras = {extra for word in rest for found in re.findall(r"\[(.*?)\]", word) for extra in found.split(",")}
        assert rest[0] == "install" and extras <= project["optional-dependencies"].keys()


INLINE = re.compile(r"`((?:roastify|make|python -m) [a-z-][^`]*)`")


def test_commands_in_sentences_have_these_options_and_targets() -> None:
    found = {command for path in PAGES for command in INLINE.findall(path.read_text(encoding="utf-8"))}
    assert len(found) > 10
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    for command in sorted(found):
        program, name, *rest = command.split()
        if program == "make":
            assert name in targets, command
        elif program == "roastify" and name in main.commands:
            known = {option for parameter in main.commands[name].params for option in parameter.opts}
            assert {word.partition("=")[0] for word in rest if re.match("--?[a-z]", word)} <= known, command
