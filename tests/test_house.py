"""The plan of the house, read from the files with ast and tomllib: who imports whom, what is packaged, forbidden, documented.

Every reader of source below is shown a planted offense first, so that a rule that sees nothing cannot pass.
"""

import ast
import importlib.util
import inspect
import re
import subprocess
import sys
import tomllib
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("kernels", "pipeline", "train", "tools")  # each may import those before it
FIRST_USER = {  # of each library from outside: that folder and those after it may import it
    "torch": "kernels",
    "triton": "kernels",
    "threadpoolctl": "kernels",
    "numpy": "pipeline",
    "nvidia": "pipeline",
    "PIL": "pipeline",
    "braceexpand": "pipeline",
    "safetensors": "pipeline",
    "simplejpeg": "pipeline",
    "torchvision": "pipeline",
    "webdataset": "pipeline",
    "accelerate": "train",
    "tensorboard": "train",
    "timm": "train",
    "yaml": "train",
    "matplotlib": "tools",
    "rich": "tools",
    "tyro": "tools",
}
DISTRIBUTION = {"PIL": "pillow", "yaml": "pyyaml", "nvidia": "nvidia-dali-cuda130", "triton": "torch"}  # where the name differs
TESTS = sorted((ROOT / "tests").glob("test_*.py"))
SOURCES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
PACKAGES = sorted(path.parent for path in SOURCES if path.name == "__init__.py")


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(("wherefrom", *(parts[:-1] if parts[-1] == "__init__" else parts)))


MODULES = [module_name(path) for path in SOURCES]
IMPORTABLE = [name for name in MODULES if not name.endswith("_triton") or importlib.util.find_spec("triton")]


def imported_names(source: str, module: str) -> Iterator[str]:
    """Yield every module that a source imports anywhere, relative ones spelled out."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = module.split(".")[: -node.level] if node.level else []
            target = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{target}.{alias.name}" for alias in node.names)


def import_offenses(source: str, module: str) -> list[str]:
    own = FOLDERS.index(module.split(".")[1])
    allowed = {f"wherefrom.{folder}" for folder in FOLDERS[: own + 1]}
    offenses = []
    for name in imported_names(source, module):
        top = name.split(".")[0]
        if top == "wherefrom":
            right = ".".join(name.split(".")[:2]) in allowed
        else:
            right = top in sys.stdlib_module_names or (top in FIRST_USER and FOLDERS.index(FIRST_USER[top]) <= own)
        if not right:
            offenses.append(f"{module} imports {name}")
    return offenses


def forbidden_words(source: str) -> list[str]:
    """Return what of pickles, shells, unsafe loads and catch-alls a source uses."""
    found = []
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import() | ast.ImportFrom():
                if any(
                    name.split(".")[0] in {"pickle", "cPickle", "dill", "cloudpickle"} for name in imported_names(ast.unparse(node), "x")
                ):
                    found.append("pickle")
            case ast.ExceptHandler(type=caught):
                if caught is None or {"Exception", "BaseException"} & {name.id for name in ast.walk(caught) if isinstance(name, ast.Name)}:
                    found.append("catch-all")
            case ast.Call(func=function, keywords=keywords):
                given = {keyword.arg: ast.unparse(keyword.value) for keyword in keywords}
                called = ast.unparse(function)
                if given.get("shell", "False") != "False" or called in {"os.system", "os.popen"}:
                    found.append("shell")
                if called == "torch.load" and given.get("weights_only") != "True":
                    found.append("unsafe load")
                if given.get("allow_pickle", "False") != "False":
                    found.append("pickle")
    return found


@pytest.mark.core
@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("wherefrom.kernels.x", "import numpy"),
        ("wherefrom.kernels.x", "from wherefrom.pipeline import views"),
        ("wherefrom.kernels.x", "from wherefrom import pipeline"),
        ("wherefrom.kernels.x", "from ..pipeline import views"),
        ("wherefrom.pipeline.x", "def f():\n    import wherefrom.train.loop"),
        ("wherefrom.pipeline.x", "import timm"),
        ("wherefrom.train.objectives.x", "from wherefrom.tools.cli import main"),
        ("wherefrom.tools.x", "import pipeline"),
        ("wherefrom.tools.x", "import requests"),
    ],
)
def test_an_import_against_the_plan_is_seen(module: str, source: str) -> None:
    assert import_offenses(source, module)


@pytest.mark.core
@pytest.mark.parametrize("path", SOURCES, ids=MODULES)
def test_imports_point_one_way(path: Path) -> None:
    assert import_offenses(path.read_text(encoding="utf-8"), module_name(path)) == []


@pytest.mark.core
@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "import numpy as np\nnp.load(path, allow_pickle=True)",
        "subprocess.run(command, shell=True)",
        "os.system(command)",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "try:\n    pass\nexcept Exception:\n    pass",
        "try:\n    pass\nexcept (ValueError, Exception) as error:\n    raise",
        "try:\n    pass\nexcept:\n    pass",
    ],
)
def test_a_forbidden_word_is_seen(source: str) -> None:
    assert forbidden_words(source)


@pytest.mark.core
@pytest.mark.parametrize("path", SOURCES, ids=MODULES)
def test_no_pickle_no_shell_no_unsafe_load_no_catch_all(path: Path) -> None:
    assert forbidden_words(path.read_text(encoding="utf-8")) == []


@pytest.mark.core
def test_pyproject_lists_every_package_on_disk() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    on_disk = {module_name(folder / "__init__.py"): str(folder.relative_to(ROOT)) for folder in PACKAGES}
    assert set(listed["packages"]) == set(on_disk)
    assert listed["package-dir"] == on_disk


@pytest.mark.core
def test_every_library_from_outside_is_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    declared = {re.split(r"[^\w-]", requirement)[0] for requirement in project["dependencies"]}
    assert {DISTRIBUTION.get(name, name) for name in FIRST_USER} <= declared


@pytest.mark.core
def test_every_folder_with_sources_is_a_typed_package() -> None:
    assert {path.parent for path in SOURCES} == set(PACKAGES)
    assert [folder.name for folder in PACKAGES if not (folder / "py.typed").is_file()] == []


@pytest.mark.core
def test_no_module_is_named_after_a_standard_one() -> None:
    names = {name.rsplit(".", 1)[1] for name in MODULES}
    assert names & set(sys.stdlib_module_names) == set()


def fresh_python(code: str) -> str:
    """Run code in a new interpreter, return what it prints."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_the_pipeline_leaves_heavy_libraries_out() -> None:
    heavy = ["timm", "accelerate", "torchvision", "webdataset", "nvidia.dali", "matplotlib"]
    report = f"print([name for name in {heavy} if name in sys.modules])"
    said = fresh_python(f"import sys, wherefrom.pipeline; {report}; import matplotlib; {report}")
    assert said.splitlines() == ["[]", "['matplotlib']"]


@pytest.mark.core
def test_kernels_import_without_triton_and_without_a_gpu() -> None:
    hide = "import os, sys; os.environ['CUDA_VISIBLE_DEVICES'] = ''; sys.modules['triton'] = None"
    modules = [name for name in MODULES if name.startswith("wherefrom.kernels") and not name.endswith("_triton")]
    assert fresh_python(f"{hide}; import {', '.join(modules)}; print('imported')") == "imported"


@pytest.mark.core
def test_there_is_one_copy_of_each_module() -> None:
    for name in IMPORTABLE:
        importlib.import_module(name)
    names = defaultdict(set)
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if isinstance(module, ModuleType) and file and Path(file).resolve() in SOURCES:
            names[Path(file).resolve()].add(name)
    assert names == {path: {module_name(path)} for path in SOURCES if module_name(path) in IMPORTABLE}


def is_undocumented(thing: object) -> bool:
    """Say whether a class or function lacks words of its own; a dataclass without any gets its signature from Python."""
    if not (inspect.isclass(thing) or inspect.isroutine(thing)):
        return False
    words = thing.__doc__ or ""
    return not words or words.startswith(f"{thing.__name__}(")


@pytest.mark.core
@pytest.mark.parametrize("name", IMPORTABLE)
def test_every_public_name_exists_and_is_documented(name: str) -> None:
    module = importlib.import_module(name)
    assert module.__doc__, "a module opens with what lives here, and what may not"
    public = getattr(module, "__all__", [])
    assert len(set(public)) == len(public)
    assert [word for word in public if is_undocumented(getattr(module, word))] == []


@pytest.mark.core
@pytest.mark.parametrize("folder", ["kernels", "pipeline", "train"])
def test_a_folder_opens_with_its_table_of_contents(folder: str) -> None:
    module = importlib.import_module(f"wherefrom.{folder}")
    assert module.__all__
    assert [name for name in module.__all__ if name.startswith("_")] == []


@pytest.mark.core
def test_type_checkers_see_the_names_that_train_gives() -> None:
    train = importlib.import_module("wherefrom.train")
    shown: dict[str, str] = {}
    for node in ast.walk(ast.parse((ROOT / "train" / "__init__.py").read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("wherefrom."):
            shown |= {alias.name: (node.module or "").removeprefix("wherefrom.train.") for alias in node.names}
    assert shown == train._HOMES
    homes = {name: home if home.startswith("wherefrom.") else f"wherefrom.train.{home}" for name, home in shown.items()}
    assert all(getattr(train, name).__module__ == home for name, home in homes.items() if name != "RECIPES")


def marks(node: ast.AST) -> set[str]:
    """Return the names of the marks of pytest that are spelled out in it: slow for @pytest.mark.slow, for marks=pytest.mark.slow too."""
    return {each.attr for each in ast.walk(node) if isinstance(each, ast.Attribute) and ast.unparse(each.value) == "pytest.mark"}


def core_offenses(source: str) -> list[str]:
    """Return what is wrong with the core tests of a file: there is none, or one is slow, which `pytest -m core` would run."""
    tree = ast.parse(source)
    for_all = set().union(*(marks(node.value) for node in tree.body if isinstance(node, ast.Assign) and "pytestmark" in ast.unparse(node)))
    tests = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")]
    of_each = {test.name: for_all.union(*(marks(decorator) for decorator in test.decorator_list)) for test in tests}
    offenses = [f"{name} is core and slow" for name, found in of_each.items() if {"core", "slow"} <= found]
    return offenses if any("core" in found for found in of_each.values()) else [*offenses, "no core test"]


@pytest.mark.core
@pytest.mark.parametrize(
    ("source", "offenses"),
    [
        ("@pytest.mark.core\ndef test_a(): ...\ndef test_b(): ...", []),
        ("pytestmark = [pytest.mark.core, pytest.mark.skipif(no)]\ndef test_a(): ...", []),
        ("@pytest.mark.slow\ndef test_a(): ...\ndef core(): ...", ["no core test"]),
        ("pytestmark = pytest.mark.core\ndef helper(): ...", ["no core test"]),
        ("@pytest.mark.core\n@pytest.mark.slow\ndef test_a(): ...", ["test_a is core and slow"]),
        ("pytestmark = pytest.mark.core\n@pytest.mark.slow\ndef test_a(): ...", ["test_a is core and slow"]),
        (
            "@pytest.mark.core\n@pytest.mark.parametrize('n', [1, pytest.param(9, marks=pytest.mark.slow)])\ndef test_a(n): ...",
            ["test_a is core and slow"],
        ),
    ],
)
def test_a_file_without_core_tests_or_with_slow_ones_is_seen(source: str, offenses: list[str]) -> None:
    assert core_offenses(source) == offenses


@pytest.mark.core
@pytest.mark.parametrize("path", TESTS, ids=[path.stem for path in TESTS])
def test_every_test_file_has_core_tests_and_none_of_them_is_slow(path: Path) -> None:
    assert core_offenses(path.read_text(encoding="utf-8")) == []
