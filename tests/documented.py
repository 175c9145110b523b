"""The code blocks of Markdown pages, and how each kind is held to the truth.

    python   runs, all blocks of a page in one namespace
    output   what the Python block before it has printed
    sh       every command runs, or is checked where running it would install or build (see `run_command`)
    yaml     is read as a file of settings
    text     a picture or a formula, not code

A block with ``title="path"`` is an excerpt: it stands in that file word for word. What cannot be checked is marked by a
line ``<!-- not run: reason -->`` before it.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import Any

from torch.distributed.run import get_args_parser
from typer.main import get_command

from benchmarks import run as benchmark_run
from benchmarks.systems import run as systems_run
from mmer_fast import cli, info
from mmer_fast.training.commands import app
from mmer_fast.training.settings import configure, read_settings

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted(page for page in (ROOT / "docs").rglob("*.md") if page.name != "README.md")]
LANGUAGES = ("python", "output", "sh", "yaml", "text")
_FENCE = re.compile(
    r"(?:^ *<!-- not run: (?P<reason>[^\n]+?) -->\n)?"
    r"^(?P<indent> *)```(?P<language>[^\s`]*)(?P<options>[^\n`]*)\n(?P<code>.*?)^(?P=indent)```$",
    re.MULTILINE | re.DOTALL,
)
_VARIABLE = re.compile(r"[A-Z][A-Z_]+=")


@dataclass(frozen=True)
class Block:
    """A fenced block: where it stands, its language, its text; the file it is taken from, or why it is not run."""

    page: Path
    line: int
    language: str
    code: str
    excerpt_of: str | None
    reason: str | None

    @property
    def place(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(page: Path) -> list[Block]:
    """Every fenced block of a page, in order."""
    text = page.read_text()
    found = []
    for match in _FENCE.finditer(text):
        title = re.search(r'title="([^"]+)"', match["options"])
        lines = match["code"].splitlines(keepends=True)
        code = "".join(line.removeprefix(match["indent"]) for line in lines)
        line = text.count("\n", 0, match.start("indent")) + 1
        found.append(Block(page, line, match["language"], code, title[1] if title else None, match["reason"]))
    assert text.count("```") == 2 * len(found), f"{page}: a fence that is not understood"
    return found


def run_page(page: Path) -> dict[str, Any]:
    """Check every block of a page, in the working directory; returns the names that its Python blocks have made."""
    names: dict[str, Any] = {"__name__": "__main__"}
    printed = ""
    for block in blocks(page):
        if block.reason is not None:
            continue
        try:
            if block.excerpt_of is not None:
                assert block.code in (ROOT / block.excerpt_of).read_text(), f"is not in {block.excerpt_of}"
            elif block.language == "python":
                printed = run_python(block, names)
            elif block.language == "output":
                assert block.code == printed, f"is not what is printed:\n{printed}"
            elif block.language == "sh":
                for words in commands(block.code):
                    run_command(words)
            elif block.language == "yaml":
                check_settings(block.code)
            else:
                assert block.language == "text", f"a language other than {', '.join(LANGUAGES)}: {block.language!r}"
        except BaseException as error:
            raise AssertionError(f"{block.place}: {type(error).__name__}: {error}") from error
    return names


def run_python(block: Block, names: dict[str, Any]) -> str:
    """Run a block; returns what it prints. Errors show its line in the page."""
    with redirect_stdout(StringIO()) as out:
        exec(compile("\n" * block.line + block.code, str(block.page), "exec"), names)
    return out.getvalue()


def commands(script: str) -> Iterator[list[str]]:
    """The words of each command of a shell script, without comments."""
    for line in script.replace("\\\n", " ").splitlines():
        if words := shlex.split(line, comments=True):
            yield words


def run_command(words: list[str]) -> None:
    """Run a command, or check what can be checked of it without installing or building anything."""
    while words and _VARIABLE.match(words[0]):
        check_variable(words.pop(0).partition("=")[0])
    match words:
        case ["export", assignment]:
            check_variable(assignment.partition("=")[0])
        case ["mmer-fast", *arguments]:
            mmer_fast(arguments)
        case ["torchrun", *arguments]:
            check_torchrun(arguments)
        case ["python", "-m", "mmer_fast.info", *arguments]:
            with redirect_stdout(StringIO()):
                info.main(arguments)
        case ["python", "-m", "benchmarks.run", *arguments]:
            benchmark_run.parse(arguments)
        case ["python", "-m", "benchmarks.systems.run", *arguments]:
            systems_run.parse(arguments)
        case ["python", "-m", module]:
            assert find_spec(module), f"there is no module {module}"
        case ["python", script]:
            assert (ROOT / script).is_file(), f"there is no {script}; tests/examples runs those that are there"
        case ["make", *rest]:
            check_make(rest)
        case ["pip", "install", *rest]:
            check_pip(rest)
        case ["bash", script, *_]:
            assert (ROOT / script).is_file(), f"there is no {script}"
        case _:
            raise AssertionError(f"no rule for the command {shlex.join(words)}")


def mmer_fast(arguments: list[str]) -> None:
    """Run `mmer-fast`; a redirection of its output works as in a shell."""
    target = None
    if ">" in arguments:
        arguments, target = arguments[: arguments.index(">")], Path(arguments[-1])
    code: Any = 0
    with redirect_stdout(StringIO()) as out:
        try:
            cli.main(arguments)
        except SystemExit as end:
            code = end.code or 0
    assert code == 0, f"mmer-fast {shlex.join(arguments)} ends with {code}"
    if target is not None:
        target.write_text(out.getvalue())


def check_torchrun(words: list[str]) -> None:
    """Parse as torchrun and `mmer-fast` would; tests/training starts several processes."""
    launch = get_args_parser().parse_args(words)
    assert (launch.module, launch.training_script) == (True, "mmer_fast"), "torchrun is for -m mmer_fast"
    name, *arguments = launch.training_script_args
    get_command(app).commands[name].make_context(name, arguments)


def check_variable(name: str) -> None:
    sources = [ROOT / "setup.py", ROOT / ".ci" / "gpu-check", *(ROOT / "mmer_fast").rglob("*.py")]
    sources += [ROOT / "kernels" / "cpu" / "dispatch.cpp"]
    assert any(name in source.read_text() for source in sources), f"nothing reads the variable {name}"


def check_make(words: list[str]) -> None:
    text = (ROOT / "Makefile").read_text()
    for word in words:
        name, equals, _ = word.partition("=")
        pattern = rf"^{name}\s*\?=" if equals else rf"^{name}:"
        assert re.search(pattern, text, re.MULTILINE), f"the Makefile does not know {word}"


def check_pip(words: list[str]) -> None:
    project = (ROOT / "pyproject.toml").read_text()
    known = re.findall(r"^(\w+) = \[", project.partition("[project.optional-dependencies]")[2], re.MULTILINE)
    for word in words:
        own = re.fullmatch(r"(?:\.|mmer_fast)(?:\[([\w,]+)\])?", word)
        for extra in (own[1] or "").split(",") if own else ():
            assert extra in ("", *known), f"there is no extra {extra}"
        if not own and not word.startswith("-"):
            name = re.split(r"[<>=\[]", word)[0]
            assert re.search(rf'"{name}[<>=]', project), f"{word} is no dependency of the project"


def check_settings(text: str) -> None:
    path = Path("documented_settings.yaml")
    path.write_text(text)
    configure(read_settings(path))
