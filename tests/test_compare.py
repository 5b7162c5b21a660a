"""`wherefrom compare`: what stands side by side, what may not, and how it looks."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from wherefrom.tools.cli import main

pytestmark = pytest.mark.core

Scores = Mapping[tuple[str, str], float | None]  # by row and features
Write = Callable[..., Path]
LOSS = "loss"  # the row that is better when lower


def protocol(title: str, scores: Scores, **changes: Any) -> dict[str, Any]:
    """Return a protocol's results as a report holds them."""
    plain = [
        {"row": row, "features": features, "value": value, "better": "lower" if row == LOSS else "higher"}
        for (row, features), value in scores.items()
    ]
    return {"protocol": title, "choices": {"k": [20]}, "scores": plain, "seconds": 1.0, "not_measured": "", "of": {}} | changes


def knn(first: float, second: float | None = 0.5) -> dict[str, Any]:
    return protocol("knn@1", {("k 10", "encoder"): first, ("k 20", "encoder"): second, ("k 10", "raw pixels"): 0.25})


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Write a report into a folder of its own, beside the others."""
    monkeypatch.chdir(tmp_path)

    def write(name: str, *protocols: dict[str, Any], **about: Any) -> Path:
        Path(name).mkdir(parents=True, exist_ok=True)
        head = {"name": f"net {name}", "train": "t", "held_out": "h", "limit": None, "network": name, "picture_px": 64, "seed": 0}
        Path(name, "evaluation.json").write_text(json.dumps(head | about | {"protocols": protocols}))
        return Path(name)

    return write


def told(capsys: pytest.CaptureFixture[str], *words: str) -> list[str]:
    assert main(["compare", *words]) == 0
    return capsys.readouterr().out.splitlines()


def test_networks_stand_side_by_side_with_the_best_floor_and_the_best_of_them(write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    lower = {(LOSS, "encoder"): 1.5, (LOSS, "random encoder"): 3.0, (LOSS, "chance"): 2.0}
    write("a", knn(0.3), protocol("far@2", lower))
    write("b", knn(0.5, None), protocol("far@2", lower | {(LOSS, "encoder"): 0.5, (LOSS, "random encoder"): 2.5}), picture_px=48, seed=1)
    write("c", knn(0.4))
    assert told(capsys, "a", "b/evaluation.json", "c") == [
        "#1 a: net a, pictures of 64 px, seed 0",
        "#2 b/evaluation.json: net b, pictures of 48 px, seed 1",
        "#3 c: net c, pictures of 64 px, seed 0",
        "knn@1      #1      #2      #3   floor  best",
        "k 10   0.3000  0.5000  0.4000  0.2500  #2",
        "k 20   0.5000       -  0.5000       -  #1 #3",
        "far@2      #1      #2   floor  best",
        "loss   1.5000  0.5000  2.0000  #2",
        "far@2: left out, #3 not measured",
    ]


def test_of_many_networks_tables_follow_one_another_within_80_columns(write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    names = [f"n{number}" for number in range(12)]
    for number, name in enumerate(names):
        write(name, knn(number / 100))
    lines = told(capsys, *names)[len(names) :]
    assert max(map(len, lines)) <= 80
    headings = [line.split() for line in lines if line.startswith("knn@1")]
    assert [word for heading in headings for word in heading if word.startswith("#")] == [f"#{number + 1}" for number in range(12)]
    assert len(headings) > 1
    assert all(line.endswith("#12") for line in lines if line.startswith("k 10"))


def test_numbers_of_other_versions_choices_and_pictures_do_not_stand_side_by_side(write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    masks = {("mIoU", "encoder"): 0.5}
    write("a", knn(0.3) | {"choices": {"k": [1]}}, protocol("masks@1", masks, of={"masks": ["v"]}))
    write("b", knn(0.5), protocol("masks@1", masks, of={"masks": ["w"]}))
    write("c", knn(0.4), knn(0.6) | {"protocol": "knn@2"}, protocol("masks@1", masks, of={"masks": ["v"]}))
    write("d", knn(0.0) | {"scores": [], "not_measured": "too small"})
    assert told(capsys, "a", "b", "c", "d")[4:] == [
        "knn@1      #2      #3   floor  best",
        "k 10   0.5000  0.4000  0.2500  #2",
        "k 20   0.5000  0.5000       -  #2 #3",
        "knn@1: left out, #4 not measured (too small); #1 by choices or pictures of its own",
        "masks@1      #1      #3  floor  best",
        "mIoU     0.5000  0.5000      -  #1 #3",
        "masks@1: left out, #4 not measured; #2 by choices or pictures of its own",
        "knn@2: left out, #1 #2 #4 not measured; #3 alone",
    ]


def test_each_kind_of_choices_that_several_share_has_a_table(write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    for name, k in (("a", 1), ("b", 2), ("c", 1), ("d", 2)):
        write(name, knn(0.3) | {"choices": {"k": [k]}})
    headings = [line.split()[1:3] for line in told(capsys, "a", "b", "c", "d") if line.startswith("knn@1")]
    assert headings == [["#1", "#3"], ["#2", "#4"]]


def test_where_chance_differs_no_network_is_best(write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    """A right cell of 9 says less than one of 196."""
    for name, right, cells in (("a", 0.2, 9), ("b", 0.1, 196)):
        scores = {("cell", "encoder"): right, ("cell", "chance"): 1 / cells, ("similar", "encoder"): right, ("similar", "raw pixels"): 0.05}
        write(name, protocol("correspondence@1", scores))
    assert told(capsys, "a", "b")[2:] == [
        "correspondence@1      #1      #2   floor  best",
        "cell              0.2000  0.1000       -  -",
        "similar           0.2000  0.1000  0.0500  #1",
        "correspondence@1: chance differs, so that none is best: cell, #1 0.1111, #2 0.0051",
    ]


def test_what_was_left_out_has_no_best(write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    for name, share in (("a", 0.0), ("b", 0.4)):
        plain = protocol("jigsaw@1", {("left out", "encoder"): share, ("left out", "raw pixels"): 0.9})
        for score in plain["scores"]:
            score["better"] = "neither" if name == "b" else "higher"  # as reports once said
        write(name, plain)
    assert told(capsys, "a", "b")[-1] == "left out  0.0000  0.4000      -     -"


def test_networks_that_read_alike_are_alike(write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    names = [f"n{number}" for number in range(5)]
    for name in names:
        write(name, knn(0.30001 if name == "n0" else 0.30002))
    assert next(line for line in told(capsys, *names) if line.startswith("k 10")).endswith("#1 and 4 more")
    assert told(capsys, "n0", "n1", "n2")[4].endswith("#1 #2 #3")


def test_protocols_are_chosen_by_name_with_or_without_version(write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a", "b"):
        failed = protocol("jigsaw@1", {}, not_measured="too small")
        write(name, knn(0.3), protocol("far@2", {(LOSS, "encoder"): 1.0}), failed)
    for word in ("knn", "knn@1"):
        assert [line.split()[0] for line in told(capsys, "a", "b", "--protocols", word)] == ["#1", "#2", "knn@1", "k", "k"]
    for word in ("knn@2", "jigsaw"):
        assert main(["compare", "a", "b", "--protocols", word]) == 2
        assert f"protocol {word}: none of these networks was measured by it, but by knn@1, far@2" in capsys.readouterr().err


def test_runs_are_compared_by_their_evaluations_and_not_by_their_own_short_forms(write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("runs/a", "runs/b"):
        write(f"{name}/evaluations", knn(0.3))
        Path(name, "settings.yaml").write_text("recipe: demo\n")
        Path(name, "evaluation.json").write_text("{}")
    assert "k 10   0.3000  0.3000  0.2500  #1 #2" in told(capsys, "runs/a", "runs/b")
    Path("runs/b/evaluations/evaluation.json").unlink()
    assert main(["compare", "runs/a", "runs/b"]) == 2
    assert "runs/b: holds no evaluation; `wherefrom evaluate` makes one" in capsys.readouterr().err
    assert main(["compare", "runs/a", "runs/b/evaluation.json"]) == 2
    assert "runs/b/evaluation.json: holds the short forms that a run measures itself by; evaluate runs/b" in capsys.readouterr().err


def test_a_folder_that_timm_wrote_is_compared_by_its_evaluations(write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    write("a", knn(0.3))
    write("net/evaluations", knn(0.4))
    assert "k 10   0.3000  0.4000  0.2500  #2" in told(capsys, "a", "net")


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("", "0 named: needs two reports at least"),
        ("a", "1 named: needs two reports at least"),
        ("a a/evaluation.json", "a is named twice"),
        (
            "a others",
            "others: was measured on other pictures than a (held-out pictures); evaluate it with the same --data, --val and --limit",
        ),
        ("a few", "few: was measured on other pictures than a (pictures to learn from, --limit)"),
        ("a torn", "torn/evaluation.json: is no report of `wherefrom evaluate`, or torn; evaluate again"),
        ("a words", "words/evaluation.json: is no report of `wherefrom evaluate`, or torn; evaluate again"),
        ("a huge", "huge/evaluation.json: is no report of `wherefrom evaluate`, or torn; evaluate again"),
        ("a nowhere", "nowhere: no such file or folder"),
        ("void bare", "void, bare: hold no scores; evaluate these networks by some protocol"),
    ],
)
def test_what_does_not_compare_is_one_line(words: str, line: str, write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    write("a", knn(0.3))
    write("others", knn(0.3), held_out="x")
    write("few", knn(0.3), train="x", limit=100)
    write("words", protocol("knn@1", {("k 10", "encoder"): "0.3"}))  # type: ignore[dict-item]
    write("huge", protocol("knn@1", {("k 10", "encoder"): 10**400}))
    write("void")
    write("bare", knn(0.3) | {"scores": []})
    write("torn")
    Path("torn/evaluation.json").write_text('{"name": "x", "protocols": [{"protocol"')
    assert main(["compare", *words.split()]) == 2
    error = capsys.readouterr().err
    assert line in error and error.count("\n") == 1


def test_a_score_that_is_no_number_is_best_of_nothing(write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    write("a", knn(0.3, None))
    write("b", knn(0.3, None))
    assert "k 20        -       -       -  -" in told(capsys, "a", "b")
