"""Tables that other packages add to, with real packages: metadata in a folder on the path, as pip leaves it."""

import importlib
import os
import sys
from collections.abc import Callable
from importlib.metadata import EntryPoints, entry_points
from pathlib import Path

import pytest

from wherefrom.pipeline.entry_table import EntryTable
from wherefrom.train import RECIPES

pytestmark = pytest.mark.core

Bring = Callable[..., None]
TABLE = EntryTable(kind="law", group="wherefrom.tests", own={"ours": "math:pi", "broken": "math:no_such"})


@pytest.fixture
def bring(install: Callable[..., None], tmp_path: Path) -> Bring:
    """Return what installs a package of one module and one entry point."""

    def put(package: str, entry: str, code: str = "value = 7") -> None:
        folder = tmp_path / package
        folder.mkdir()
        (folder / f"{package}.py").write_text(code)
        name, _, value = entry.partition(" = ")
        install(package, {"wherefrom.tests": {name: value}}, modules=folder)

    return put


def test_an_entry_is_imported_when_it_is_asked_for_and_not_before(bring: Bring) -> None:
    bring("their_laws", "theirs = their_laws:value")
    assert list(TABLE) == ["ours", "broken", "theirs"]
    assert "theirs" in TABLE and TABLE.owner("theirs") == "their_laws 1.5"
    assert "their_laws" not in sys.modules
    assert TABLE["theirs"] == 7
    assert TABLE["ours"] == importlib.import_module("math").pi and TABLE.owner("ours") == "wherefrom"


def test_what_is_listed_is_known_by_its_name_and_nothing_is_imported_to_find_it(bring: Bring) -> None:
    table = EntryTable(kind="law", group="wherefrom.tests", own={"ours": "fractions:Fraction"})
    bring("class_laws", "theirs = class_laws:Law", code="class Law: ...\nclass Other: ...")
    assert table.name_of(importlib.import_module("fractions").Fraction) == "ours"
    assert table.name_of(Path) == f"{Path.__module__}:Path" and "class_laws" not in sys.modules
    assert table.name_of(table["theirs"]) == "theirs"
    assert table.name_of(sys.modules["class_laws"].Other) == "class_laws:Other"


def test_a_name_that_two_packages_declare_is_refused(bring: Bring) -> None:
    bring("first_laws", "theirs = first_laws:value")
    bring("second_laws", "theirs = second_laws:value")
    bring("third_laws", "ours = third_laws:value")
    with pytest.raises(ValueError, match=r"law 'theirs' is declared by (first_laws 1.5 and second|second_laws 1.5 and first)_laws 1.5;"):
        TABLE["theirs"]
    with pytest.raises(ValueError, match=r"law 'ours' is declared by wherefrom and third_laws 1.5; uninstall all but one"):
        TABLE["ours"]
    assert list(TABLE) == ["ours", "broken", "theirs"]


def test_get_gives_the_default_for_what_there_is_not_and_nothing_for_what_cannot_be_had() -> None:
    assert TABLE.get("ours") == importlib.import_module("math").pi
    assert TABLE.get("theirs") is None and TABLE.get("theirs", 3) == 3
    with pytest.raises(AttributeError):
        TABLE.get("broken", 3)


def test_a_misspelled_name_is_refused_and_the_nearest_named() -> None:
    with pytest.raises(ValueError, match=r"no law 'our'; did you mean 'ours'\?"):
        TABLE["our"]
    with pytest.raises(ValueError, match="no law 'x'; there are ours, broken"):
        TABLE["x"]
    with pytest.raises(ValueError, match=r"no recipe 'dino'; did you mean 'imagenette_dino' or 'imagenet_dino_vits16'\?"):
        RECIPES["dino"]


def test_a_foreign_entry_that_cannot_be_imported_is_one_line_and_ours_is_a_bug(bring: Bring) -> None:
    bring("absent_laws", "theirs = absent_laws:value", code="import no_such_module")
    with pytest.raises(ValueError, match=r"law 'theirs' of absent_laws 1.5 cannot be imported: No module named 'no_such_module'; mend"):
        TABLE["theirs"]
    bring("faulty_laws", "faulty = faulty_laws:value", code="1 / 0")
    with pytest.raises(ValueError, match=r"law 'faulty' of faulty_laws 1.5 cannot be imported: ZeroDivisionError: division by zero; mend"):
        TABLE["faulty"]
    with pytest.raises(AttributeError):
        TABLE["broken"]


def test_packages_are_looked_for_once_and_again_when_the_path_or_what_is_on_it_changes(
    bring: Bring, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: list[str] = []

    def look(group: str) -> EntryPoints:
        looks.append(group)
        return entry_points(group=group)

    monkeypatch.setattr("wherefrom.pipeline.entry_table.entry_points", look)
    assert "theirs" not in TABLE and list(TABLE) == ["ours", "broken"] and TABLE.owner("ours") == "wherefrom"
    assert TABLE["ours"] and "theirs" not in TABLE and len(looks) <= 1  # 0 where another test has looked
    site = tmp_path / "site-packages"
    site.mkdir()
    os.utime(site, ns=(0, 0))  # long ago: clocks of file systems are coarse
    monkeypatch.syspath_prepend(str(site))
    assert "later" not in TABLE
    metadata = tmp_path / "later_laws-1.5.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: later-laws\nVersion: 1.5\n")
    (metadata / "entry_points.txt").write_text("[wherefrom.tests]\nlater = math:tau\n")
    metadata.rename(site / metadata.name)  # installed into a folder that was on the path before
    assert "later" in TABLE and TABLE.owner("later") == "later-laws 1.5"
    bring("new_laws", "theirs = new_laws:value")
    assert TABLE["theirs"] == 7


def test_a_class_goes_by_a_name_that_can_be_looked_up(bring: Bring) -> None:
    bring("single_laws", "single = one_laws:Law")
    bring("two_laws", "shared = two_laws:value")
    bring("one_laws", "shared = one_laws:Law", code="class Law: ...")
    law = importlib.import_module("one_laws").Law
    assert TABLE.name_of(law) == "single" and TABLE["single"] is law
