"""A renderer that another package brings, with its metadata on the path as pip leaves it: it works by name wherever ours do."""

import logging
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from wherefrom.pipeline import Independent, ViewFamily, ViewRecipe, ViewTransform, make_loader
from wherefrom.pipeline.proof.prove import proof_cases
from wherefrom.pipeline.render.choose import RENDERERS, choose_renderer, make_renderer
from wherefrom.pipeline.render.renderer import Rendered
from wherefrom.pipeline.shards.index import ShardIndex
from wherefrom.pipeline.view_recipe import LAWS
from wherefrom.tools import prove as command
from wherefrom.train.loop import accelerator_for
from wherefrom.train.plain_data import from_plain, to_plain
from wherefrom.train.recipes import RECIPES
from wherefrom.train.settings import RuntimeSettings
from wherefrom.train.trainer import Trainer

pytestmark = pytest.mark.core

PACKAGE = Path(__file__).resolve().parent / "foreign_package"
RECIPE = ViewRecipe(families=(ViewFamily(name="one", views=2, size_px=(16, 16), law=Independent(), snap="none"),))


@pytest.fixture(autouse=True)
def installed(install: Callable[..., None]) -> None:
    install("bilinear-views", {"wherefrom.renderers": {"bilinear": "foreign_renderer:ENTRY"}}, version="1.2", modules=PACKAGE)


def test_it_is_imported_when_it_is_asked_for_and_serves_nobody_unasked() -> None:
    assert list(RENDERERS) == [*RENDERERS.own, "bilinear"] and RENDERERS.owner("bilinear") == "bilinear-views 1.2"
    assert choose_renderer("auto", torch.device("cpu"))[0] in RENDERERS.own
    with pytest.raises(ValueError, match=r"renderer='bilinaer': take one of .*, bilinear; did you mean 'bilinear'\?"):
        make_renderer(RECIPE, "bilinaer")
    assert "foreign_renderer" not in sys.modules


def test_a_loader_and_a_transform_cut_with_it(tiny_shards: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO), make_loader(tiny_shards / "train.tar", RECIPE, global_batch=4, renderer="bilinear") as loader:
        batch = next(iter(loader))
        assert loader.position()["renderer"] == "bilinear" and "renderer bilinear: as asked" in caplog.text
    assert batch.views[0].pixels.shape == (4, 2, 3, 16, 16) and batch.views[0].pixels.isfinite().all()
    picture = torch.randint(256, (3, 50, 60), dtype=torch.uint8)
    ours, theirs = (ViewTransform(RECIPE, renderer=name)(picture, sample=3, epoch=0).batch for name in ("auto", "bilinear"))
    assert torch.equal(ours.views[0].geometry.boxes, theirs.views[0].geometry.boxes)


def test_a_run_trains_with_it_and_writes_it_down(tiny_shards: Path) -> None:
    settings = RECIPES["demo"]()
    runtime = replace(settings.runtime, renderer="bilinear", device="cpu", threads=1, log_with="none")
    settings = replace(settings, runtime=runtime, global_batch=4, updates=1, model=replace(settings.model, depth=1))
    assert from_plain(RECIPES["demo"](), to_plain(settings)) == settings
    trainer = Trainer(settings, ShardIndex.open(str(tiny_shards / "train.tar")), accelerator_for(settings))
    try:
        trainer.update()
        assert trainer.settings.runtime.renderer == trainer.loader.renderer.name == "bilinear"
    finally:
        trainer.close()
    with pytest.raises(ValueError, match=r"renderer='bilinaer': .*did you mean 'bilinear'\?"):
        RuntimeSettings(renderer="bilinaer")


def test_it_is_proven_like_ours(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    asked: list[Any] = []

    def cases(snaps: Any, quick: bool) -> Any:
        asked.append(snaps)
        return (replace(proof_cases(quick=True)[0], laws=("grid", "independent"), snap="none"),)

    monkeypatch.setattr(command, "proof_cases", cases)
    assert command.prove_command("bilinear") == 0
    printed = capsys.readouterr().out
    assert asked == [("pixel", "none")] and re.search(r"bilinear on cpu: errors in source pixels", printed) and "proven" in printed


def test_one_that_cannot_be_imported_leaves_the_others_to_be_proven(
    monkeypatch: pytest.MonkeyPatch, install: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    install("bilinear-views", {"wherefrom.renderers": {"bilinear": "no_such:ENTRY"}}, version="1.2")  # found before the other of its name
    reason = "renderer 'bilinear' of bilinear-views 1.2 cannot be imported: No module named 'no_such'; mend or uninstall it"
    with pytest.raises(ValueError, match=f"^{reason}$"):
        command.prove_command("bilinear")
    monkeypatch.setattr(command, "prove", lambda make, cases, progress: command.ProofReport(renderer="", rows=(), controls=()))
    command.prove_command()
    printed = capsys.readouterr().out
    assert f"left out: {reason}" in printed and "torch on cpu: errors" in printed


class Careless:
    """A renderer that returns what is not asked for."""

    name = "careless"
    strict = True

    def __init__(self, returned: Any) -> None:
        self.returned = returned

    def render(self, encoded: Any, records: Any) -> Any:
        """Return what it was told to."""
        return self.returned

    def close(self) -> None:
        """Hold nothing."""


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (None, "NoneType, expected Rendered"),
        (Rendered(pixels=(), failed={}), "pixels of 0 families, the recipe has 1"),
        (
            Rendered(pixels=(torch.zeros(4, 2, 3, 16, 17),), failed={}),
            "pixels of shape (4, 2, 3, 16, 17) and torch.float32 for family 'one', expected (4, 2, 3, 16, 16) of torch.float32",
        ),
        (
            Rendered(pixels=(torch.zeros(4, 2, 3, 16, 16).double(),), failed={}),
            "pixels of shape (4, 2, 3, 16, 16) and torch.float64 for family 'one', expected (4, 2, 3, 16, 16) of torch.float32",
        ),
        (Rendered(pixels=(torch.zeros(4, 2, 3, 16, 16),), failed={4: "lost"}), "as failed the position 4, in a batch of 4"),
    ],
)
def test_one_that_returns_what_was_not_asked_for_is_named(tiny_shards: Path, returned: Any, message: str) -> None:
    with make_loader(tiny_shards / "train.tar", RECIPE, global_batch=4) as loader:
        loader.renderer.close()
        loader.renderer = Careless(returned)
        with pytest.raises(ValueError, match=f"^renderer 'careless' returns {re.escape(message)}$"):
            next(iter(loader))


def test_a_law_without_an_example_leaves_the_others_to_be_proven(
    install: Callable[..., None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "needy_law.py").write_text(
        "from dataclasses import dataclass\nfrom wherefrom.pipeline import CropLaw\n\n"
        "@dataclass(frozen=True)\nclass Needy(CropLaw):\n    side: float\n    def draw(self, *_): ...\n"
    )
    install("needy-views", {"wherefrom.laws": {"needy": "needy_law:Needy", "lost": "no_such:X"}}, version="1.2", modules=tmp_path)
    seen: list[tuple[str, ...]] = []

    def proven(make: Any, cases: Any, progress: Any) -> Any:
        seen.extend(case.laws for case in cases)
        return command.ProofReport(renderer="", rows=(), controls=())

    monkeypatch.setattr(command, "prove", proven)
    command.prove_command("torch", quick=True)
    printed = capsys.readouterr().out
    assert "left out: law 'needy' of needy-views 1.2 makes no example to prove: " in printed and "mend its `examples`" in printed
    assert "left out: law 'lost' of needy-views 1.2 cannot be imported: " in printed
    assert seen and all(laws == tuple(LAWS.own) for laws in seen)
