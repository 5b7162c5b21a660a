"""README.md, held to its word: its Python blocks run as written, its commands exist, its links lead somewhere.

Blocks fenced as python run in order, in one namespace, in an empty folder. `<!-- no-test: reason -->` on the line before a block leaves it
out; such blocks are printed, counted and must give a reason. Blocks fenced as console hold commands: lines behind `$ `, or else all lines.
"""

import contextlib
import functools
import io
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from itertools import dropwhile, takewhile
from pathlib import Path

import pytest

from wherefrom.pipeline.demo.shards import demo_shards

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```\s*$", re.MULTILINE | re.DOTALL)
LEFT_OUT = re.compile(r"<!--\s*no-test:(.*?)-->\s*\Z", re.DOTALL)


@dataclass(frozen=True, kw_only=True, slots=True)
class Block:
    """One fenced block: its language, its text, the line it begins at, and why it is left out (None: it is not)."""

    language: str
    text: str
    line: int
    left_out: str | None


def blocks_of(markdown: str) -> list[Block]:
    found = []
    for match in FENCE.finditer(markdown):
        note = LEFT_OUT.search(markdown[: match.start()])
        line = markdown[: match.start()].count("\n") + 2
        found.append(Block(language=match[1], text=match[2], line=line, left_out=note[1].strip() if note else None))
    return found


def commands_of(blocks: list[Block]) -> list[list[str]]:
    """Return the words of every command, continued lines joined, split where && or | joins commands."""
    commands = []
    for block in blocks:
        lines = block.text.replace("\\\n", " ").splitlines()
        prompted = [line[2:] for line in lines if line.startswith("$ ")]
        for line in prompted or lines:
            lexer = shlex.shlex(line, posix=True, punctuation_chars="&|")
            lexer.whitespace_split = True
            commands.append([])
            for word in lexer:
                if set(word) <= set("&|"):
                    commands.append([])
                else:
                    commands[-1].append(word)
    return [command for command in commands if command]


def run_blocks(blocks: list[Block], name: str) -> str:
    """Run blocks in one namespace, return what they print; a traceback names the README's own lines."""
    namespace: dict[str, object] = {"__name__": "readme"}
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        for block in blocks:
            exec(compile("\n" * (block.line - 1) + block.text, name, "exec"), namespace)
    return printed.getvalue()


@functools.cache
def help_of(*words: str) -> str:
    """Return what `wherefrom WORDS --help` prints."""
    from wherefrom.tools.cli import main

    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        patch.setattr(sys, "argv", ["wherefrom", *words, "--help"])
        patch.setenv("COLUMNS", "200")
        try:
            code = main()
        except SystemExit as ended:
            code = ended.code
    assert not code, f"wherefrom {' '.join(words)} --help: {printed.getvalue()}"
    return printed.getvalue()


def unknown_words(command: list[str], help_of: Callable[..., str]) -> list[str]:
    """Return the sub-command or the long options of a `wherefrom` command that its help does not name."""

    def known(word: str, text: str) -> bool:
        return re.search(rf"(?<![\w-]){re.escape(word)}(?![\w-])", text) is not None

    words = list(dropwhile(lambda word: re.match(r"\w+=", word), command))  # VARIABLE=value before a command
    if len(words) < 2 or words[0] != "wherefrom":
        return []
    if not known(words[1], help_of()):
        return [words[1]]
    named = list(takewhile(lambda word: not word.startswith("-"), words[1:]))
    options = [word.split("=")[0] for word in words[1 + len(named) :] if word.startswith("--")]
    return [option for option in options if not known(option, help_of(*named))]


BLOCKS = blocks_of(README.read_text(encoding="utf-8"))
COMMANDS = commands_of([block for block in BLOCKS if block.language == "console"])


@pytest.mark.parametrize("pictures", [{"train": 64, "val": 10}, pytest.param({}, id="all demo pictures", marks=pytest.mark.slow)])
def test_python_blocks_run_as_written(
    pictures: dict[str, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With fewer demo pictures than they draw, unless slow."""
    monkeypatch.setattr(demo_shards, "__kwdefaults__", (demo_shards.__kwdefaults__ or {}) | pictures)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WHEREFROM_CACHE", str(tmp_path / "cache"))
    python = [block for block in BLOCKS if block.language == "python"]
    left_out = [block for block in python if block.left_out is not None]
    with capsys.disabled():
        for block in left_out:
            print(f"\nREADME.md line {block.line}: a python block is not tested: {block.left_out}")
    assert [block.line for block in left_out if not block.left_out] == []
    ran = [block for block in python if block.left_out is None]
    assert ran, "README.md has no python block that runs"
    run_blocks(ran, str(README))


@pytest.mark.core
def test_commands_exist() -> None:
    assert ["wherefrom", "train"] in COMMANDS
    assert [(command, unknown_words(command, help_of)) for command in COMMANDS if unknown_words(command, help_of)] == []


def test_launchers_find_the_command_line_as_a_module() -> None:
    done = subprocess.run([sys.executable, "-m", "wherefrom.tools.cli", "--help"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "train" in done.stdout


@pytest.mark.core
def test_the_two_promised_commands_are_there() -> None:
    lines = {line.removeprefix("$ ").strip() for block in BLOCKS for line in block.text.splitlines()}
    assert {"pip install -e . && wherefrom train", "pip install -e '.[test]' && pytest"} <= lines


def test_method_is_named_as_what_it_is() -> None:
    assert "SP as re-implemented from secondary descriptions" in re.sub(r"\s+", " ", README.read_text(encoding="utf-8"))


@pytest.mark.core
@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_links_within_the_repository_lead_somewhere(page: str) -> None:
    targets = re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", (ROOT / page).read_text(encoding="utf-8")))
    inside = [target.split("#")[0] for target in targets if not re.match(r"[a-z]+:|#", target)]
    assert [target for target in inside if not (ROOT / target).exists()] == []


@pytest.mark.core
def test_reader_of_blocks_sees_fences_lines_and_reasons() -> None:
    page = "# t\n\n```python\na = 1\n```\n\n<!-- no-test: needs a GPU -->\n```python\na / 0\n```\n\n"
    page += "```console\n$ wherefrom train \\\n    demo && ls | wc\nout\n```\n```console\npytest  # it's all\n```\n"
    blocks = blocks_of(page)
    assert [(block.language, block.line, block.left_out) for block in blocks] == [
        ("python", 4, None),
        ("python", 9, "needs a GPU"),
        ("console", 13, None),
        ("console", 18, None),
    ]
    assert commands_of(blocks[2:]) == [["wherefrom", "train", "demo"], ["ls"], ["wc"], ["pytest"]]
    assert run_blocks(blocks_of("```python\na = 1\n```\n```python\nprint(a)\n```\n"), "page") == "1\n"
    with pytest.raises(ZeroDivisionError):
        run_blocks(blocks[:2], "page")


def test_unknown_commands_and_options_are_seen() -> None:
    def help_of(*words: str) -> str:
        return {(): "{train,bench} --version", ("train", "demo"): "--data PATTERN --optim.lr FLOAT", ("bench", "loader"): "--batch"}[words]

    assert unknown_words(["wherefrom", "trian"], help_of) == ["trian"]
    assert unknown_words(["wherefrom", "train", "demo", "--optim.lr=1", "--data", "x", "--dat"], help_of) == ["--dat"]
    assert unknown_words(["wherefrom", "--verison"], help_of) == ["--verison"]
    assert unknown_words(["A=1", "B=2", "wherefrom", "bench", "loader", "--batch", "8", "--data"], help_of) == ["--data"]
    assert unknown_words(["wherefrom", "--version"], help_of) == unknown_words(["ls", "--anything"], help_of) == []
