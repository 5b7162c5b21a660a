"""The plan of the house, read from the files with ast and tomllib: who imports whom, what is packaged, forbidden, named, documented.

Every reader of source below is shown a planted offense first, so that a rule that sees nothing cannot pass.
"""

import ast
import functools
import graphlib
import importlib.util
import inspect
import io
import re
import subprocess
import sys
import tokenize
import tomllib
from collections import defaultdict
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from types import ModuleType

import pytest

from wherefrom.pipeline.view_recipe import LAWS

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
    "pyarrow": "pipeline",
    "safetensors": "pipeline",
    "simplejpeg": "pipeline",
    "scipy": "pipeline",
    "torchvision": "pipeline",
    "webdataset": "pipeline",
    "accelerate": "train",
    "huggingface_hub": "train",
    "tensorboard": "train",
    "timm": "train",
    "yaml": "train",
    "matplotlib": "tools",
    "packaging": "tools",
    "rich": "tools",
    "tyro": "tools",
}
OPTIONAL = {"pyarrow": "parquet", "scipy": "imagenet"}  # libraries that an extra brings
DISTRIBUTION = {
    "PIL": "pillow",
    "yaml": "pyyaml",
    "nvidia": "nvidia-dali-cuda130",
    "triton": "torch",
    "huggingface_hub": "timm",
    "packaging": "accelerate",
}  # where the name differs
TESTS = sorted((ROOT / "tests").glob("test_*.py"))
SOURCES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
PACKAGES = sorted(path.parent for path in SOURCES if path.name == "__init__.py")


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(("wherefrom", *(parts[:-1] if parts[-1] == "__init__" else parts)))


MODULES = [module_name(path) for path in SOURCES]
TEXTS = {path: path.read_text(encoding="utf-8") for path in SOURCES}
IMPORTABLE = [name for name in MODULES if not name.endswith("_triton") or importlib.util.find_spec("triton")]


parse = functools.cache(ast.parse)


def imported_names(source: str, module: str) -> Iterator[str]:
    """Yield every module that a source imports anywhere, relative ones spelled out."""
    for node in ast.walk(parse(source)):
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
    words = []
    for node in ast.walk(parse(source)):
        match node:
            case ast.Import() | ast.ImportFrom():
                if any(
                    name.split(".")[0] in {"pickle", "cPickle", "dill", "cloudpickle"} for name in imported_names(ast.unparse(node), "x")
                ):
                    words.append("pickle")
            case ast.ExceptHandler(type=kind):
                if kind is None or {"Exception", "BaseException"} & {name.id for name in ast.walk(kind) if isinstance(name, ast.Name)}:
                    words.append("catch-all")
            case ast.Call(func=function, keywords=keywords):
                settings = {keyword.arg: ast.unparse(keyword.value) for keyword in keywords}
                name = ast.unparse(function)
                if settings.get("shell", "False") != "False" or name in {"os.system", "os.popen"}:
                    words.append("shell")
                if name == "torch.load" and settings.get("weights_only") != "True":
                    words.append("unsafe load")
                if settings.get("allow_pickle", "False") != "False":
                    words.append("pickle")
    return words


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
    assert import_offenses(TEXTS[path], module_name(path)) == []


ARROWS = {  # group of files in kernels/ and pipeline/ -> (the files, the first pattern that fits; the other groups that it may import)
    "dispatch": ("kernels.dispatch", ""),
    "definitions": ("kernels.*_reference", "dispatch"),
    "torch paths": ("kernels.*_torch", "dispatch, definitions"),
    "triton paths": ("kernels.*_triton", "dispatch, definitions, torch paths"),
    "kernels": ("kernels, kernels.*", "dispatch, definitions, torch paths, triton paths"),
    # what describes a view: complete before a pixel moves
    "basics": ("pipeline.entry_table, pipeline.files, pipeline.literals, pipeline.plain_tensors, pipeline.ranges, pipeline.system", ""),
    "generator": ("pipeline.draws", "basics"),
    "boxes": ("pipeline.crops", "basics, generator"),  # what laws share
    "description": ("pipeline.geometry, pipeline.views, pipeline.view_recipe, pipeline.color", "basics, generator, boxes"),
    "order": ("pipeline.order", "basics, generator"),
    "laws": ("pipeline.laws", "basics, generator, boxes, description"),
    "records": ("pipeline.records", "basics, generator, boxes, description, laws"),
    # what makes it: draws nothing
    "pictures": ("pipeline.decode, pipeline.shards.picture_headers", "basics"),
    "shards": ("pipeline.shards, pipeline.shards.*", "kernels, basics, pictures"),  # kernels: the compiled module reads files
    "packing": ("pipeline.packing, pipeline.packing.*", "basics, order, pictures, shards"),
    "renderers": ("pipeline.render, pipeline.render.*", "dispatch, definitions, triton paths, kernels, basics, description, pictures"),
    "delivery": (
        "pipeline.annotations, pipeline.worker_memory, pipeline.loader, pipeline.transform",
        "basics, description, order, records, pictures, shards, renderers",
    ),
    # imported by nobody but the table of contents
    "proof": ("pipeline.proof, pipeline.proof.*", "definitions, basics, description, records, renderers"),
    "demo": ("pipeline.demo, pipeline.demo.*", "basics"),
    "contents": (
        "pipeline",
        "basics, generator, boxes, description, order, laws, records, pictures, shards, packing, renderers, delivery, proof, demo",
    ),
}
AGAINST_ARROWS: set[tuple[str, str]] = set()  # imports of today that the table does not allow


def house_imports(source: str, module: str, modules: Collection[str] = MODULES) -> set[str]:
    """Return the files of the house that a source imports, as modules: in functions, for type checkers and through a package too."""
    names = set(imported_names(source, module))
    return {name if name in modules else name.rpartition(".")[0] for name in names} & set(modules)


def circle(imports: dict[str, set[str]]) -> list[str]:
    """Return one circle of files that import each other, its first file once more at its end; nothing if there is none."""
    try:
        graphlib.TopologicalSorter(imports).prepare()
    except graphlib.CycleError as error:
        return list(error.args[1])
    return []


def group_of(file: str) -> str:
    """Return the group of a file of kernels/ or pipeline/, "" for one that has none."""
    return next((group for group, (files, _) in ARROWS.items() if any(fnmatch(file, each) for each in files.split(", "))), "")


def arrow_offenses(source: str, module: str) -> set[tuple[str, str]]:
    """Return the imports within kernels/ and pipeline/ that the table of arrows does not allow: (file, what it imports)."""
    file = module.removeprefix("wherefrom.")
    if file.split(".")[0] not in ("kernels", "pipeline"):
        return set()
    group = group_of(file)
    allowed = {group, *ARROWS[group][1].split(", ")}
    targets = {name.removeprefix("wherefrom.") for name in house_imports(source, module)}
    return {(file, target) for target in targets if group_of(target) not in allowed}


@pytest.mark.core
@pytest.mark.parametrize(
    ("sources", "length"),
    [
        ({"p.a": "from p import b", "p.b": "import p.c"}, 0),
        ({"p.a": "from p import b", "p.b": "import p.a"}, 2),
        ({"p.a": "import p.b", "p.b": "def f():\n    from p.c import x", "p.c": "if TYPE_CHECKING:\n    from p.a import X"}, 3),
        ({"p": "from p.a import x", "p.a": "from p import x"}, 2),
        ({"p.a": "from p.a import x"}, 1),
    ],
)
def test_a_circle_of_imports_is_seen(sources: dict[str, str], length: int) -> None:
    cycle = circle({module: house_imports(source, module, sources) for module, source in sources.items()})
    assert len(cycle[1:]) == length


@pytest.mark.core
def test_no_files_import_each_other_in_a_circle() -> None:
    assert circle({module_name(path): house_imports(text, module_name(path)) for path, text in TEXTS.items()}) == []


@pytest.mark.core
@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("kernels.roi_align_reference", "from wherefrom.kernels.roi_align_torch import table_bins"),
        ("kernels.roi_align_torch", "from wherefrom.kernels import roi_align_triton"),
        ("kernels.dispatch", "import wherefrom.kernels.roi_align"),
        ("pipeline.view_recipe", "from wherefrom.pipeline.laws import Paired"),
        ("pipeline.views", "def f():\n    from wherefrom.pipeline.render.renderer import Renderer"),
        ("pipeline.order", "from wherefrom.pipeline import loader"),
        ("pipeline.literals", "from wherefrom.pipeline import views"),
        ("pipeline.records", "from wherefrom.pipeline.decode import decode"),
        ("pipeline.crops", "from wherefrom.kernels.render_views import render_views"),
        ("pipeline.render.threads", "from wherefrom.pipeline.laws import Paired"),
        ("pipeline.render.choose", "if TYPE_CHECKING:\n    from wherefrom.pipeline.transform import ViewTransform"),
        ("pipeline.loader", "from wherefrom.pipeline.proof.prove import prove"),
        ("pipeline.loader", "from wherefrom.pipeline.draws import Keys"),
        ("pipeline.shards.index", "from wherefrom.pipeline.demo.shards import demo_shards"),
        ("pipeline.demo.shards", "from wherefrom.pipeline import ViewRecipe"),
    ],
)
def test_an_import_against_the_arrows_is_seen(module: str, source: str) -> None:
    assert len(arrow_offenses(source, f"wherefrom.{module}")) == 1


@pytest.mark.core
def test_imports_within_kernels_and_pipeline_follow_the_arrows() -> None:
    files = [name.removeprefix("wherefrom.") for name in MODULES if name.split(".")[1] in ("kernels", "pipeline")]
    assert [file for file in files if not group_of(file)] == [], "give it a group in ARROWS"
    assert set().union(*(arrow_offenses(text, module_name(path)) for path, text in TEXTS.items())) == AGAINST_ARROWS


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
    assert forbidden_words(TEXTS[path]) == []


@pytest.mark.core
def test_pyproject_lists_every_package_on_disk() -> None:
    tool = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    on_disk = {module_name(folder / "__init__.py"): str(folder.relative_to(ROOT)) for folder in PACKAGES}
    assert set(tool["packages"]) == set(on_disk)
    assert tool["package-dir"] == on_disk


@pytest.mark.core
def test_every_library_from_outside_is_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = [requirement for extra in set(OPTIONAL.values()) for requirement in project["optional-dependencies"][extra]]
    declared = {re.split(r"[^\w-]", requirement)[0] for requirement in (*project["dependencies"], *extras)}
    assert {DISTRIBUTION.get(name, name) for name in FIRST_USER} <= declared


@pytest.mark.core
@pytest.mark.parametrize("name", OPTIONAL)
def test_an_extra_is_imported_where_it_is_needed_alone(name: str) -> None:
    """At the head of a file it would be needed by all."""
    heads = [line for text in TEXTS.values() for line in text.splitlines() if re.match(rf"(import|from) {name}\b", line)]
    assert heads == []


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
    printed = fresh_python(f"import sys, wherefrom.pipeline; {report}; import matplotlib; {report}")
    assert printed.splitlines() == ["[]", "['matplotlib']"]


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


@dataclass(frozen=True, kw_only=True, slots=True)
class Named:
    """What one table of the house names, and no other file."""

    table: str  # the file of the table
    names: set[str]
    elsewhere: set[
        str
    ]  # of them, words with another meaning too (a kernel's backend, a place): they count where compared and among their like
    classes: set[str]  # that no file tells apart by isinstance or match, the table's file neither
    exceptions: set[str]  # files of today that name one; this set only shrinks


NAMED = {
    "renderer": Named(
        table="pipeline/render/choose.py",
        names={"native", "torch", "triton", "dali"},
        elsewhere={"torch", "triton"},
        classes=set(),
        exceptions=set(),
    ),
    "law": Named(
        table="pipeline/view_recipe.py",
        names=set(LAWS.own),
        elsewhere={"disjoint", "inside", "center", "grid"},
        classes={"Independent", "Paired", "Disjoint", "Overlapping", "Inside", "Center", "Grid"},
        exceptions={"train/renames.py"},  # what they were called
    ),
}
CHOOSERS = [path for path in SOURCES if path.relative_to(ROOT).parts[0] != "kernels" and "bench_kernels" not in path.parts]


def strings(*nodes: ast.AST | None) -> list[str]:
    return [node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]


def names_chosen_by(source: str, named: Named) -> list[str]:
    """Return the names that a source chooses by: compares with, matches, or lists (Literal, tuple, list, set, the keys of a dict)."""
    names = []
    for node in ast.walk(parse(source)):
        match node:
            case ast.Compare(left=left, comparators=others):
                names += [text for text in strings(left, *others) if text in named.names]
            case ast.MatchValue(value=value):
                names += [text for text in strings(value) if text in named.names]
            case ast.Tuple(elts=parts) | ast.List(elts=parts) | ast.Set(elts=parts) | ast.Dict(keys=parts):
                row = strings(*parts)
                if set(row) & (named.names - named.elsewhere) or (len(row) > 1 and set(row) <= named.names | {"auto", "all"}):
                    names += [text for text in row if text in named.names]
            case ast.Subscript(slice=index):
                names += [text for text in strings(index) if text in named.names - named.elsewhere]
    return names


def classes_told_apart(source: str, classes: Collection[str]) -> list[str]:
    """Return the classes that a source asks for by isinstance, or matches."""
    tests = []
    for node in ast.walk(parse(source)):
        match node:
            case ast.Call(func=ast.Name(id="isinstance" | "issubclass"), args=[_, kinds]):
                tests.append(kinds)
            case ast.MatchClass(cls=kind):
                tests.append(kind)
    words = [getattr(each, "id", getattr(each, "attr", "")) for test in tests for each in ast.walk(test)]
    return [word for word in words if word in classes]


@pytest.mark.core
@pytest.mark.parametrize(
    ("kind", "source", "names"),
    [
        ("renderer", "if name == 'dali': ...", ["dali"]),
        ("renderer", "x = 1 if 'triton' != name else 2", ["triton"]),
        ("renderer", "match name:\n    case 'torch': ...", ["torch"]),
        ("renderer", "Name = Literal['auto', 'torch', 'triton']", ["torch", "triton"]),
        ("renderer", "Name = Literal['native']", ["native"]),
        ("renderer", "WHY = {'native': 1, 'kornia': 2}", ["native"]),
        ("renderer", "for name in ('native',): ...", ["native"]),
        ("renderer", "PACKAGES = ('torch', 'triton', 'numpy')", []),
        ("renderer", "pair_targets(boxes, backend='triton'); paths = ('triton',); loader(renderer='dali')", []),
        ("law", "LawName = Literal['paired', 'disjoint']", ["paired", "disjoint"]),
        ("law", "if law == 'grid': ...", ["grid"]),
        ("law", "text(ha='center'); places = ('left', 'center')", []),
    ],
)
def test_a_name_outside_its_table_is_seen(kind: str, source: str, names: list[str]) -> None:
    assert names_chosen_by(source, NAMED[kind]) == names


@pytest.mark.core
@pytest.mark.parametrize(
    "source", ["isinstance(law, Paired)", "isinstance(law, crops.Grid | int)", "match law:\n    case Inside(of=name): ..."]
)
def test_a_law_told_apart_by_its_class_is_seen(source: str) -> None:
    assert len(classes_told_apart(source, NAMED["law"].classes)) == 1


@pytest.mark.core
@pytest.mark.parametrize("kind", NAMED)
def test_names_stand_in_their_table_alone(kind: str) -> None:
    named, files = NAMED[kind], set()
    for path in CHOOSERS:
        file = str(path.relative_to(ROOT))
        if (file != named.table and names_chosen_by(TEXTS[path], named)) or classes_told_apart(TEXTS[path], named.classes):
            files.add(file)
    assert files == named.exceptions


SAME_NAME: set[str] = set()  # public types that share a name today; this set stays empty


def public_types(source: str) -> set[str]:
    """Return the public classes, and other names of types (`Progress = Callable[...]`), that a source defines."""
    types = set()
    for node in parse(source).body:
        match node:
            case ast.ClassDef(name=name) | ast.Assign(targets=[ast.Name(id=name)]) | ast.AnnAssign(target=ast.Name(id=name)):
                types.add(name)
    return {name for name in types if re.match("[A-Z][A-Za-z0-9]*[a-z]", name)}


def several(sources: list[str]) -> set[str]:
    """Return the names of public types that more than one of the sources defines."""
    types = [name for source in sources for name in public_types(source)]
    return {name for name in types if types.count(name) > 1}


@pytest.mark.core
def test_two_public_types_of_one_name_are_seen() -> None:
    sources = ["class Plan: ...\nclass _Own: ...", "Plan = Callable[[int], None]\nclass _Own: ...", "PLAN = 1\nPlans = int"]
    assert several(sources) == {"Plan"}


@pytest.mark.core
def test_no_two_public_types_of_the_house_share_a_name() -> None:
    assert several(list(TEXTS.values())) == SAME_NAME


BRITISH = re.compile(  # within a word
    "colour|grey|centr(e|ed|es|ing)$|neighbour|favour|behaviour|honour|labour|flavour|harbour|humour|rigour|vapour|endeavour|(^|[^e])metres?$|"
    "litre|fibre|theatre|calibre|(label|cancel|model|travel|signal|level|channel|tunnel|fuel|initial|total|dial|equal|fulfil)l(ed|ing|er)|"
    "(learn|burn|spel|dream)t$|licence|defence|offence|pretence|practise|artefact|judgement|ageing|mould|plough|sceptic|catalogue|programme|"
    "(ana|cata|para)lys(e|ed|er|ing)$"
)
ISE = re.compile("(..+is)(e|es|ed|er|ers|ing|able|ation|ations)")
WITH_S = (  # verbs and nouns that end in -ise in American too
    "noise|raise|praise|rise|arise|wise|promise|compromise|precise|concise|exercise|supervise|revise|advise|devise|disguise|surprise|"
    "comprise|enterprise|premise|expertise|advertise|improvise|otherwise|poise|cruise|bruise|franchise|likewise|merchandise|despise|demise"
)


def british_words(identifier: str) -> list[str]:
    """Return the words of an identifier (snake_case or CamelCase) that are not in American spelling."""
    words = [word.lower() for word in re.findall("[A-Z]+(?![a-z])|[A-Z]?[a-z]+", identifier)]
    return [word for word in words if BRITISH.search(word) or ((of := ISE.fullmatch(word)) and not re.search(f"({WITH_S})$", f"{of[1]}e"))]


def identifiers(source: str) -> set[str]:
    return {token.string for token in tokenize.generate_tokens(io.StringIO(source).readline) if token.type == tokenize.NAME}


@pytest.mark.core
@pytest.mark.parametrize(
    "names",
    [
        ("grey", "colour_matrix", "ColourLaw", "neighbours", "behaviour_of"),
        ("to_centre", "recentred", "MAX_METRES", "is_labelled", "cancelling", "learnt", "LICENCE"),
        ("normalise", "Optimiser", "quantised", "initialisation", "realises", "serialisable", "analysed"),
    ],
)
def test_british_identifiers_are_seen(names: tuple[str, ...]) -> None:
    ways = ("{} = 1", "self.{} = 1", "def f(*, {}): ...", "def {}(): ...", "import a as {}", "f({}=1)")
    for source in (way.format(name) for name in names for way in ways):
        assert [len(british_words(each)) for each in identifiers(source) if british_words(each)] == [1], source


@pytest.mark.core
def test_american_identifiers_pass() -> None:
    right = "noise raise_ raised rises rising otherwise bitwise_xor pairwise elementwise promised precise_ supervised denoiser"
    right += " centered central perimeter labeled cancellation called quantized neighbors analyses analysis basis exists filled parameter"
    assert [word for name in right.split() for word in british_words(name)] == []


@pytest.mark.core
def test_identifiers_are_spelled_as_in_american_english() -> None:
    texts = TEXTS | {path: path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("*.py")}
    names = {name: path.name for path, text in texts.items() for name in {path.stem, *identifiers(text)}}
    assert {name: file for name, file in names.items() if british_words(name)} == {}


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
@pytest.mark.parametrize("folder", ["kernels", "pipeline", "train"])
def test_the_names_that_a_folder_gives_are_plain_imports(folder: str) -> None:
    body = ast.parse((ROOT / folder / "__init__.py").read_text(encoding="utf-8")).body
    docstring, *imports, names = body
    assert isinstance(docstring, ast.Expr) and isinstance(names, ast.Assign) and all(isinstance(node, ast.ImportFrom) for node in imports)
    given = [alias.name for node in imports if isinstance(node, ast.ImportFrom) for alias in node.names]
    assert sorted(given) == sorted(importlib.import_module(f"wherefrom.{folder}").__all__)


def marks(node: ast.AST) -> set[str]:
    """Return the names of the marks of pytest that are spelled out in it: slow for @pytest.mark.slow, for marks=pytest.mark.slow too."""
    return {each.attr for each in ast.walk(node) if isinstance(each, ast.Attribute) and ast.unparse(each.value) == "pytest.mark"}


def core_offenses(source: str) -> list[str]:
    """Return what is wrong with the core tests of a file: there is none, or one is slow, which `pytest -m core` would run."""
    tree = ast.parse(source)
    for_all = set().union(*(marks(node.value) for node in tree.body if isinstance(node, ast.Assign) and "pytestmark" in ast.unparse(node)))
    tests = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")]
    of_each = {test.name: for_all.union(*(marks(decorator) for decorator in test.decorator_list)) for test in tests}
    offenses = [f"{name} is core and slow" for name, every in of_each.items() if {"core", "slow"} <= every]
    return offenses if any("core" in every for every in of_each.values()) else [*offenses, "no core test"]


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
