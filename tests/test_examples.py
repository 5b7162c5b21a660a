"""The whole programs of examples/, run for a few steps on small shards; their formulas against float64 loops written out here."""

import importlib.util
import math
import runpy
import sys
from pathlib import Path
from types import ModuleType

import pytest
import timm
import torch
from torch import nn

from wherefrom.pipeline.demo.shards import demo_shards

SIMCLR = Path(__file__).resolve().parents[1] / "examples" / "simclr.py"


@pytest.fixture(scope="module")
def simclr() -> ModuleType:
    """The example as a module."""
    spec = importlib.util.spec_from_file_location("simclr", SIMCLR)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def nt_xent_by_loops(z: torch.Tensor, temperature: float) -> float:
    """Return the loss as SimCLR's equation 1 has it, in float64: z (B, 2, D)."""
    each = [row / row.norm() for row in z.double().flatten(0, 1)]
    terms = []
    for i, anchor in enumerate(each):
        partner = i + 1 if i % 2 == 0 else i - 1
        others = sum(math.exp(float(anchor @ other) / temperature) for k, other in enumerate(each) if k != i)
        terms.append(-math.log(math.exp(float(anchor @ each[partner]) / temperature) / others))
    return sum(terms) / len(terms)


@pytest.mark.core
def test_simclr_loss_is_the_papers(simclr: ModuleType) -> None:
    z = torch.randn(5, 2, 7, generator=torch.Generator().manual_seed(0))
    assert float(simclr.nt_xent(z, 0.2)) == pytest.approx(nt_xent_by_loops(z, 0.2), rel=1e-5)
    wrong_partners = torch.cat([z[:, :1], z[:, 1:].roll(1, 0)], 1)
    assert float(simclr.nt_xent(wrong_partners, 0.2)) != pytest.approx(nt_xent_by_loops(z, 0.2), rel=1e-2)


@pytest.mark.core
def test_simclr_runs_and_its_gradient_reaches_the_first_layer(
    simclr: ModuleType, tiny_shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[tuple[nn.Module, torch.Tensor]] = []
    create = timm.create_model

    def remembered(*words: str, **options: int) -> nn.Module:
        model = create(*words, **options)
        made.append((model, model.conv1.weight.detach().clone()))
        return model

    monkeypatch.setattr(timm, "create_model", remembered)
    losses = simclr.train(str(tiny_shards / "train.tar"), updates=2, batch=8, side_px=32)
    ((model, before),) = made
    assert len(losses) == 2 and all(map(math.isfinite, losses))
    assert not torch.equal(model.conv1.weight, before)


def test_simclr_is_a_program(tiny_shards: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--data", str(tiny_shards / "train.tar"), "--updates", "1", "--batch", "8", "--side-px", "32", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["simclr.py", *words])
    runpy.run_path(str(SIMCLR), run_name="__main__")
    assert capsys.readouterr().out.startswith("update 0: loss ")


@pytest.mark.slow
def test_simclr_learns_to_find_partners(simclr: ModuleType, tmp_path: Path) -> None:
    """On drawn scenes: clearly below ln(2 B - 1), the loss where every other view is as likely; 3.20 where that is 3.43, when written."""
    torch.manual_seed(0)
    shards = demo_shards(tmp_path, train=128, val=1, workers=1)
    losses = simclr.train(shards.train, updates=60, batch=16, side_px=64)
    assert sum(losses[-10:]) / 10 < math.log(31) - 0.1
