"""README.md and the pages of docs/, held to their word: Python runs and prints as written, commands exist, messages are ones that are said.

A page's blocks fenced as python run in order, in one namespace, in a folder that holds pictures/ and shards/; a comment behind a `print`
that looks like a value is what it prints. A block that begins with `# NAME.py` or `# NAME.toml` is that file of a package, which is on the
path as if it were installed; one that begins with `# NAME.yaml` is a file beside shards/; several blocks of one .toml are one file.
`<!-- no-test: reason -->` on the line before a block leaves it out; such blocks are printed, counted and must give a reason. Blocks fenced
as console hold commands: lines behind `$ `, or else all lines; those after `<!-- run -->` are run too, after `<!-- run: slow -->` with the
slow tests. What Sphinx makes of the pages is seen by .ci/run.
"""

import ast
import contextlib
import functools
import importlib
import importlib.util
import io
import re
import shlex
import subprocess
import sys
import tokenize
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from itertools import dropwhile, takewhile
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

from wherefrom.pipeline.demo.shards import demo_shards
from wherefrom.pipeline.render.choose import check_renderer
from wherefrom.pipeline.view_recipe import LAWS, Snap
from wherefrom.train.objective import OBJECTIVES

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
DOCS = ROOT / "docs"
PAGES = [README, *sorted(page for page in DOCS.rglob("*.md") if "generated" not in page.parts)]
MOST_LINES = 120  # of the README
MOST_EXAMPLE_LINES = 40  # of a file on the page of extending
FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```\s*$", re.MULTILINE | re.DOTALL)
FILE = re.compile(r"# ([\w/.-]+\.(?:py|toml|yaml))\n")
NOTE = re.compile(r"<!--\s*(no-test|run)(?::\s*((?:(?!-->).)*?))?\s*-->\s*\Z", re.DOTALL)
VALUE = re.compile(r"torch\.|[\d(\['\"-]|True\b|False\b|None\b")  # how a comment begins that says what is printed


@dataclass(frozen=True, kw_only=True, slots=True)
class Block:
    """One fenced block: its language, its text, the line it begins at, what the note before it says and why."""

    language: str
    text: str
    line: int
    note: str = ""  # "no-test", "run", or nothing
    reason: str = ""

    @property
    def file(self) -> str:
        """The name of the file that the block is, "" if it is none."""
        match = FILE.match(self.text)
        return match[1] if match else ""


def blocks_of(markdown: str) -> list[Block]:
    blocks = []
    for match in FENCE.finditer(markdown):
        note = NOTE.search(markdown[: match.start()])
        line = markdown[: match.start()].count("\n") + 2
        kind, reason = (note[1], note[2] or "") if note else ("", "")
        blocks.append(Block(language=match[1], text=match[2], line=line, note=kind, reason=reason))
    return blocks


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


def run_blocks(blocks: list[Block], name: str, declare: Callable[[Path, Path], None] = lambda pyproject, site: None) -> str:
    """Run Python blocks in one namespace and commands between them, write blocks that are files; return what is printed.

    A traceback names the page's own lines. Raises: AssertionError if a block prints something else than its comments say.
    """
    namespace: dict[str, object] = {"__name__": "page"}
    printed = ""
    for block in blocks:
        heard = io.StringIO()
        with contextlib.redirect_stdout(heard):
            if block.file:
                write_file(block, declare)
            elif block.language == "python":
                exec(compile("\n" * (block.line - 1) + block.text, name, "exec"), namespace)
            else:
                run_commands(commands_of([block]))
        if block.language == "python" and not block.file:
            assert_printed(block, heard.getvalue(), name)
        printed += heard.getvalue()
    return printed


def write_file(block: Block, declare: Callable[[Path, Path], None]) -> None:
    """Write a block that is a file: YAML into the current folder, else into package/, whose metadata `declare` writes into site/."""
    place = Path("." if block.language == "yaml" else "package", block.file)
    place.parent.mkdir(parents=True, exist_ok=True)
    earlier = place.read_text(encoding="utf-8") if block.language == "toml" and place.exists() else ""
    place.write_text(earlier + block.text, encoding="utf-8")
    if place.name == "pyproject.toml":
        declare(place, Path("site"))
    importlib.invalidate_caches()


def run_commands(commands: list[list[str]]) -> None:
    from wherefrom.tools.cli import main

    for command in commands:
        assert command[0] in ("wherefrom", "python"), f"{command}: only commands of ours, and Python, are run"
        if command[0] == "python":
            subprocess.run([sys.executable, *command[1:]], check=True)
        else:
            assert main(command[1:]) == 0, command


def assert_printed(block: Block, printed: str, name: str) -> None:
    """Hold the comment behind each top-level `print` to what was printed, if it looks like a value; text may follow the value."""
    comments = {
        token.start[0]: token.string.removeprefix("#").strip()
        for token in tokenize.generate_tokens(io.StringIO(block.text).readline)
        if token.type == tokenize.COMMENT
    }
    prints = [node for node in ast.parse(block.text).body if isinstance(node, ast.Expr) and ast.unparse(node).startswith("print(")]
    lines = printed.splitlines()
    assert len(lines) == len(prints), f"{name}: {len(prints)} prints gave {len(lines)} lines: {lines}"
    for node, line in zip(prints, lines, strict=True):
        comment = comments.get(node.end_lineno or 0, "")
        if VALUE.match(comment):
            assert comment.startswith(line), f"{name} line {block.line + node.lineno - 1} says {comment!r}, printed is {line!r}"


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
    at = words.index("--spatial.law") if "--spatial.law" in words else len(words)  # a law has options of its own
    absent = [option for option in options if not known(option, help_of(*named, *words[at : at + 2]))]
    beside = {
        option: option.partition(".")[0] for option in absent if option.partition(".")[0][2:] in OBJECTIVES
    }  # has options once learned
    return [option for option in absent if option not in beside or not known(option, help_of(*named, beside[option]))]


BLOCKS = {page: blocks_of(page.read_text(encoding="utf-8")) for page in PAGES}
COMMANDS = {page: commands_of([block for block in blocks if block.language == "console"]) for page, blocks in BLOCKS.items()}
RUNNING = [page for page, blocks in BLOCKS.items() if any(block.language == "python" or block.note == "run" for block in blocks)]


def named(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder a split and class: pictures/train/class0/000.jpg, ...; 40 in train, 16 in val, of four classes."""
    folder = tmp_path_factory.mktemp("docs") / "pictures"
    rng = np.random.default_rng(0)
    for split, count in (("train", 40), ("val", 16)):
        for number in range(count):
            height, width = rng.integers(120, 161, 2).tolist()
            small = Image.fromarray(rng.integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8))
            place = folder / split / f"class{number % 4}" / f"{number:03d}.jpg"
            place.parent.mkdir(parents=True, exist_ok=True)
            small.resize((width, height), Image.Resampling.BICUBIC).save(place, quality=90)
    return folder


@pytest.fixture
def workplace(pictures: Path, make_shard: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current folder, with pictures/ and the same packed in shards/train and shards/val."""
    (tmp_path / "pictures").symlink_to(pictures)
    for split in ("train", "val"):
        (tmp_path / "shards" / split).mkdir(parents=True)
        samples = [
            (place.stem, {"jpg": place.read_bytes(), "cls": str(int(place.stem) % 4).encode()})
            for place in sorted((pictures / split).rglob("*.jpg"))
        ]
        make_shard(tmp_path / "shards" / split / "000000.tar", samples)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WHEREFROM_CACHE", str(tmp_path / "cache"))
    for folder in ("package", "site"):  # for blocks that are files of a package
        (tmp_path / folder).mkdir()
        monkeypatch.syspath_prepend(str(tmp_path / folder))
    before = set(sys.modules)
    yield tmp_path
    for module in set(sys.modules) - before:
        if str(getattr(sys.modules[module], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[module]


@pytest.mark.parametrize("slow", [False, pytest.param(True, id="slow", marks=pytest.mark.slow)])
@pytest.mark.parametrize("page", RUNNING, ids=named)
def test_blocks_run_as_written(
    page: Path,
    slow: bool,
    workplace: Path,
    declare: Callable[[Path, Path], None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The README with fewer demo pictures than are drawn, unless slow; pages without their slow commands, unless slow."""
    if not slow:
        monkeypatch.setattr(demo_shards, "__kwdefaults__", (demo_shards.__kwdefaults__ or {}) | {"train": 32, "val": 1, "workers": 1})
    if "ShardWriter(" in page.read_text(encoding="utf-8"):  # it packs them itself
        (workplace / "shards").rename(workplace / "packed")
    left_out = [block for block in BLOCKS[page] if block.note == "no-test"]
    with capsys.disabled():
        for block in left_out:
            print(f"\n{named(page)} line {block.line}: a {block.language} block is not tested: {block.reason}")
    assert [block.line for block in left_out if not block.reason] == []
    python = [block for block in BLOCKS[page] if (block.language == "python" or block.file) and block.note != "no-test"]
    commands = [block for block in BLOCKS[page] if block.note == "run" and (slow or block.reason != "slow")]
    run_blocks(sorted([*python, *commands], key=lambda block: block.line), str(page), declare)


@pytest.mark.core
def test_readme_runs_and_is_short() -> None:
    assert README in RUNNING
    assert len(README.read_text(encoding="utf-8").splitlines()) <= MOST_LINES


@pytest.mark.core
@pytest.mark.parametrize("page", [page for page in PAGES if COMMANDS[page]], ids=named)
def test_commands_exist(page: Path, workplace: Path, declare: Callable[[Path, Path], None]) -> None:
    run_blocks([block for block in BLOCKS[page] if block.file], str(page), declare)
    unknown = {" ".join(command): unknown_words(command, help_of) for command in COMMANDS[page]}
    assert {command: words for command, words in unknown.items() if words} == {}


def test_launchers_find_the_command_line_as_a_module() -> None:
    done = subprocess.run([sys.executable, "-m", "wherefrom.tools.cli", "--help"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "train" in done.stdout


@pytest.mark.core
def test_the_two_promised_commands_are_there() -> None:
    lines = {line.removeprefix("$ ").strip() for block in BLOCKS[README] for line in block.text.splitlines()}
    assert {"pip install -e . && wherefrom train", "pip install -e '.[test]' && pytest"} <= lines


@pytest.mark.parametrize("page", [README, DOCS / "methods" / "spatial.md", DOCS / "limits.md"], ids=named)
def test_method_is_named_as_what_it_is(page: Path) -> None:
    assert "SP as re-implemented from secondary descriptions" in re.sub(r"\s+", " ", page.read_text(encoding="utf-8"))


@pytest.mark.core
@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"], ids=named)
def test_links_within_the_repository_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", page.read_text(encoding="utf-8")))
    inside = [target.split("#")[0] for target in targets if not re.match(r"[a-z]+:|#", target)]
    assert [target for target in inside if not (page.parent / target).exists()] == []


def message_templates(source: str) -> Iterator[list[str]]:
    """Yield every text of a source as the pieces between what is filled in."""
    tree = ast.parse(source)
    inner = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield [part.value for part in node.values if isinstance(part, ast.Constant) and isinstance(part.value, str)]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in inner:
            yield [node.value]


def is_said(message: str, template: list[str]) -> bool:
    """Tell whether a message, which may be cut off at its end, holds a template's pieces in order, twenty letters of them at least."""
    at = letters = 0
    for piece in template:
        place = message.find(piece, at)
        if place < 0 and not letters and piece[:20] not in message:
            return False
        if place < 0:  # cut off within this piece?
            cut = next((size for size in range(min(len(piece), len(message) - at), 0, -1) if message.endswith(piece[:size])), 0)
            return letters + cut >= 20 and cut > 0
        at, letters = place + len(piece), letters + len(piece)
    return letters >= 20


@pytest.mark.core
def test_quoted_messages_are_ones_that_are_said() -> None:
    templates = [
        template
        for folder in ("kernels", "pipeline", "train", "tools")
        for path in (ROOT / folder).rglob("*.py")
        for template in message_templates(path.read_text(encoding="utf-8"))
    ]
    page = DOCS / "troubleshooting.md"
    messages = [block.text.strip() for block in BLOCKS[page] if block.language == "text"]
    assert len(messages) > 10
    assert [message for message in messages if not any(is_said(message, template) for template in templates)] == []


@pytest.mark.core
def test_misspelled_names_are_answered_as_quoted() -> None:
    page = re.sub(r"\s+", " ", (DOCS / "troubleshooting.md").read_text(encoding="utf-8"))
    for ask in (lambda: LAWS["pared"], lambda: check_renderer("dalli")):
        with pytest.raises(ValueError, match="did you mean") as refused:
            ask()
        assert f"`{refused.value}`" in page


@pytest.mark.core
def test_reader_of_messages_sees_what_nobody_says() -> None:
    (template,) = message_templates('f"{n} samples would not decode, max_bad={limit}: {listed}; audit them"')
    assert is_said("11 samples would not decode, max_bad=10: 3 (a), 5 (b); audit them", template)
    assert is_said("11 samples would not decode, max_bad=10: 3 (a), 5 (b); aud", template)
    assert not is_said("11 samples will not decode, max_bad=10: 3 (a), 5 (b); audit them", template)
    assert not is_said("11 samples would not decode, max_bad=10, 3 (a), 5 (b)", template)


API_NAME = re.compile(r"^   (\w+)$", re.MULTILINE)


@pytest.mark.core
@pytest.mark.parametrize("package", ["kernels", "pipeline", "train"])
def test_reference_names_all_that_is_public(package: str) -> None:
    page = (DOCS / "api" / f"{package}.md").read_text(encoding="utf-8")
    names = API_NAME.findall(page) + re.findall(r"^`(\w+)`", page, re.MULTILINE)  # by autosummary, or in a sentence of its own
    public = importlib.import_module(f"wherefrom.{package}").__all__
    assert {"missing": set(public) - set(names), "gone": set(names) - set(public)} == {"missing": set(), "gone": set()}
    assert len(names) == len(set(names))


@pytest.mark.core
def test_every_page_is_reached_from_the_first() -> None:
    reached: set[Path] = set()
    waiting = [DOCS / "index.md"]
    while waiting:
        page = waiting.pop()
        reached.add(page)
        for listed in re.findall(r"^```\{toctree\}\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL):
            names = [line for line in listed.splitlines() if line and not line.startswith(":")]
            waiting += [page.parent / f"{name}.md" for name in names]
    assert reached == set(PAGES) - {README}


@pytest.mark.core
def test_documentation_is_built_with_warnings_as_errors() -> None:
    assert re.search(r"^ +python -m sphinx -W --keep-going .*\bdocs\b", (ROOT / ".ci" / "run").read_text(encoding="utf-8"), re.MULTILINE)
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    assert [name for name in ("sphinx", "furo", "myst-parser") if not any(one.startswith(f"{name}>=") for one in extras["docs"])] == []
    assert "/docs/api/generated/" in (ROOT / ".gitignore").read_text(encoding="utf-8").splitlines()


@pytest.fixture(scope="module")
def plain_docstrings() -> ModuleType:
    """The Sphinx extension of docs/, which needs no Sphinx to be looked at."""
    path = DOCS / "_extensions" / "plain_docstrings.py"
    spec = importlib.util.spec_from_file_location("plain_docstrings", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.core
def test_headings_of_docstrings_become_terms_and_nothing_else_is_markup(plain_docstrings: ModuleType) -> None:
    docstring = """Pool *boxes into |e| bins of `out_hw`.

    mode:   a word,
            or two
    Nothing more is asked.
    Shapes: tokens (B, H) -> (B, *out_hw)
    Raises: ValueError if weight_ is wrong, or
    later: never mind.
    """
    lines = plain_docstrings.as_restructured_text("\n".join(line.removeprefix("    ") for line in docstring.splitlines()))
    assert [line for line in lines if line] == [
        r"Pool \*boxes into \|e\| bins of `out_hw`.",
        "``mode``",
        "   a word, or two",
        "Nothing more is asked.",
        "Shapes",
        r"   tokens (B, H) -> (B, \*out_hw)",
        "Raises",
        r"   ValueError if weight\_ is wrong, or later: never mind.",
    ]


@pytest.mark.core
def test_signatures_call_arrays_as_the_sources_do(plain_docstrings: ModuleType) -> None:
    array = "~numpy.ndarray[tuple[~typing.Any, ...], ~numpy.dtype[~numpy.float64]]"
    assert (
        plain_docstrings.named_arrays(f"(a: {array}, b: dict[str, {array}])")
        == "(a: NDArray[~numpy.float64], b: dict[str, NDArray[~numpy.float64]])"
    )
    assert plain_docstrings.named_arrays("(a: ndarray)") == "(a: ndarray)" and plain_docstrings.named_arrays(None) is None


@dataclass(frozen=True, kw_only=True)
class _Planted:
    """Fields of every kind."""

    views: int  # V of this family
    size_px: tuple[int, int] = (1, 2)
    snap: Snap = "none"  # of boxes
    notes: list[str] = field(default_factory=list)  # in order


@pytest.mark.core
def test_fields_are_documented_by_their_comments(plain_docstrings: ModuleType) -> None:
    assert plain_docstrings.field_comments(_Planted) == [
        ("views: int", "V of this family"),
        ("size_px: tuple[int, int] = (1, 2)", ""),
        ("snap: 'pixel' | 'none' = 'none'", "of boxes"),
        ("notes: list[str] = list()", "in order"),
    ]


@pytest.mark.core
def test_blocks_that_are_files_make_a_package(workplace: Path, declare: Callable[[Path, Path], None]) -> None:
    page = "```toml\n# pyproject.toml\n[project]\nname = 'a-b'\nversion = '1'\n```\n```python\n# a_b/c.py\nprint(D)\n```\n"
    page += "```toml\n# pyproject.toml\n[project.entry-points.group]\nd = 'a_b.c:D'\n```\n```yaml\n# e.yaml\nf: 1\n```\n"
    blocks = blocks_of(page)
    assert [block.file for block in blocks] == ["pyproject.toml", "a_b/c.py", "pyproject.toml", "e.yaml"]
    assert run_blocks(blocks, "page", declare) == ""
    (point,) = entry_points(group="group")
    assert (point.dist.name, point.value) == ("a-b", "a_b.c:D")
    assert (workplace / "e.yaml").read_text() == "# e.yaml\nf: 1\n"
    with pytest.raises(NameError, match="'D'"):
        point.load()


@pytest.mark.core
def test_every_file_of_a_package_is_an_example_of_at_most_forty_lines() -> None:
    blocks = [block for block in BLOCKS[DOCS / "extending.md"] if block.file]
    groups = {group for block in blocks for group in re.findall(r'entry-points\."(.+)"', block.text)}
    assert groups == {f"wherefrom.{kind}" for kind in ("laws", "renderers", "objectives", "recipes", "protocols")}
    sizes = {block.file: block.text.count("\n") for block in blocks if block.language == "python"}
    assert {name: size for name, size in sizes.items() if size > MOST_EXAMPLE_LINES} == {}


@pytest.mark.core
def test_reader_of_blocks_sees_fences_lines_and_reasons() -> None:
    page = "# t\n\n```python\na = 1\n```\n\n<!-- no-test: needs a GPU -->\n```python\na / 0\n```\n\n"
    page += "```console\n$ wherefrom train \\\n    demo && ls | wc\nout\n```\n```console\npytest  # it's all\n```\n"
    blocks = blocks_of(page)
    assert [(block.language, block.line, block.note, block.reason) for block in blocks] == [
        ("python", 4, "", ""),
        ("python", 9, "no-test", "needs a GPU"),
        ("console", 13, "", ""),
        ("console", 18, "", ""),
    ]
    noted = blocks_of("<!-- run: slow -->\n```console\nls\n```\n<!-- run -->\n```console\nls\n```\n```console\nls\n```\n")
    assert [(block.note, block.reason) for block in noted] == [("run", "slow"), ("run", ""), ("", "")]
    assert commands_of(blocks[2:]) == [["wherefrom", "train", "demo"], ["ls"], ["wc"], ["pytest"]]
    assert run_blocks(blocks_of("```python\na = 1\n```\n```python\nprint(a)\n```\n"), "page") == "1\n"
    with pytest.raises(ZeroDivisionError):
        run_blocks(blocks[:2], "page")
    assert run_blocks(blocks_of("```python\nprint(1, 2)  # 1 2: both\nprint('x')  # a letter\n```\n"), "page") == "1 2\nx\n"
    with pytest.raises(AssertionError, match="says '1 3', printed is '1 2'"):
        run_blocks(blocks_of("```python\nprint(1, 2)  # 1 3\n```\n"), "page")


def test_unknown_commands_and_options_are_seen() -> None:
    def help_of(*words: str) -> str:
        return {
            (): "{train,bench} --version",
            ("train", "demo"): "--data PATTERN --optim.lr FLOAT",
            ("train", "--spatial.law", "ring"): "--spatial.law NAME --spatial.law.radius FLOAT",
            ("train", "demo", "--dense"): "--data PATTERN --dense.regions INT",
            ("bench", "loader"): "--batch",
        }[words]

    assert unknown_words(["wherefrom", "trian"], help_of) == ["trian"]
    assert unknown_words(["wherefrom", "train", "demo", "--optim.lr=1", "--data", "x", "--dat"], help_of) == ["--dat"]
    assert unknown_words(["wherefrom", "train", "--spatial.law", "ring", "--spatial.law.radius", "1", "--x"], help_of) == ["--x"]
    assert unknown_words(["wherefrom", "train", "demo", "--dense.regions", "3", "--dense.regoins", "3"], help_of) == ["--dense.regoins"]
    assert unknown_words(["wherefrom", "--verison"], help_of) == ["--verison"]
    assert unknown_words(["A=1", "B=2", "wherefrom", "bench", "loader", "--batch", "8", "--data"], help_of) == ["--data"]
    assert unknown_words(["wherefrom", "--version"], help_of) == unknown_words(["ls", "--anything"], help_of) == []
