"""The whole programs of examples/, run for a few steps on small shards or signals; their formulas against loops written out here."""

import importlib.util
import math
import re
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import timm
import torch
from torch import nn

from wherefrom.pipeline.demo.shards import demo_shards

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
SIMCLR = EXAMPLES / "simclr.py"
PART_1D = EXAMPLES / "part_1d.py"
MOST_LINES = 150  # of an example

needs_signals = pytest.mark.skipif(
    importlib.util.find_spec("aeon") is None, reason="its recordings lie in aeon: pip install --no-deps aeon"
)


def loaded(path: Path) -> ModuleType:
    """Return an example as a module."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def simclr() -> ModuleType:
    return loaded(SIMCLR)


@pytest.fixture(scope="module")
def part_1d() -> ModuleType:
    return loaded(PART_1D)


def test_examples_are_short() -> None:
    assert {path.name for path in EXAMPLES.glob("*.py") if len(path.read_text(encoding="utf-8").splitlines()) > MOST_LINES} == set()


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


def glides(number: int, generator: torch.Generator, *, steps: tuple[int, int] = (20, 40)) -> list[torch.Tensor]:
    """Return signals (4, T) that glide from one state to another under noise: what a window shows tells where in its signal it lies."""
    lengths = torch.randint(*steps, (number,), generator=generator).tolist()
    paths = [torch.stack([(t := torch.linspace(-1, 1, length)), -t, t.square() * t, t.sin()]) for length in lengths]
    return [path + 0.2 * torch.randn(path.shape, generator=generator) for path in paths]


@pytest.mark.core
def test_part_1d_targets_are_those_of_pars(part_1d: ModuleType) -> None:
    """Whatever head stands before: with nothing predicted, squared errors of pairs are their targets squared."""
    generator = torch.Generator().manual_seed(0)
    signals = glides(3, generator)
    _, boxes, picture_hw = part_1d.draw_windows(signals, 5, 4, generator)
    head = part_1d.PairHead(6, 8, "both")
    for weight in head.parameters():
        torch.nn.init.zeros_(weight)
    result = head.loss(torch.zeros(3, 4, 6), boxes, picture_hw)

    def by_loops(last: int) -> list[float]:
        start = boxes[..., 0].double().tolist()
        lengths = [signal.shape[1] for signal in signals]
        return [(start[b][j] - start[b][i]) / (lengths[b] - last) for b in range(3) for i in range(4) for j in range(4) if i != j]

    moved = by_loops(1)
    assert result.loss.item() == pytest.approx(sum(move**2 for move in moved) / len(moved), rel=1e-5)
    assert float(result.target_variance[0]) == pytest.approx(sum(move**2 for move in moved) / len(moved), rel=1e-5)  # their mean is 0
    assert result.loss.item() != pytest.approx(sum(move**2 for move in by_loops(0)) / len(moved), rel=1e-2)


@pytest.mark.core
def test_part_1d_windows_are_what_their_boxes_say_and_lie_everywhere(part_1d: ModuleType) -> None:
    signals = [torch.arange(2.0 * steps).reshape(2, steps) for steps in (6, 9)]
    windows, boxes, picture_hw = part_1d.draw_windows(signals, 4, 200, torch.Generator().manual_seed(0))
    assert windows.shape == (2, 200, 2, 4) and picture_hw.tolist() == [[1, 5], [1, 8]]
    for signal, cut, placed, places in zip(signals, windows, boxes.long().tolist(), (3, 6), strict=True):
        assert {box[0] for box in placed} == set(range(places))
        for window, (x0, y0, x1, y1) in zip(cut, placed, strict=True):
            assert (y0, y1) == (0, 1) and torch.equal(window, signal[:, x0:x1])


@pytest.mark.core
@pytest.mark.parametrize("sees", ["both", "apart", "first", "second"])
def test_part_1d_heads_see_what_they_say(part_1d: ModuleType, monkeypatch: pytest.MonkeyPatch, sees: str) -> None:
    torch.manual_seed(0)
    head, z = part_1d.PairHead(3, 5, sees), torch.randn(1, 4, 3)
    given: dict[str, torch.Tensor] = {}
    monkeypatch.setattr(part_1d, "pair_loss", lambda a, b, boxes, **options: given.update(options, a=a, b=b))
    head.loss(z, torch.zeros(1, 4, 4), torch.ones(1, 2))
    hidden = torch.nn.functional.gelu(given["a"][0].unsqueeze(1) + given["b"][0])  # (N, N, H), as pair_loss has it
    said = (hidden @ given["weight"].mT + given["output_bias"])[..., 0]

    by_second, by_first = said - said[:, :1], said - said[:1]  # how what is said changes with a window
    together = by_second - by_second[:1]  # how the change with one changes with the other: nothing in f(first) + g(second)
    sight = {"second": by_second, "first": by_first, "together": together}
    seen = {name for name, change in sight.items() if change.abs().max() > 1e-5}
    assert seen == {"both": {"second", "first", "together"}, "apart": {"second", "first"}}.get(sees, {sees})


@pytest.mark.core
@pytest.mark.parametrize(
    ("spoil", "window", "words"),
    [
        (lambda signal: signal[:, :5], 5, "window=5: signal 1 has 5 steps; take 1 to 4"),
        (lambda signal: signal, 0, "window=0: signal 0 has 20 steps; take 1 to 19"),
        (lambda signal: signal[:3], 5, "signal 1 has 3 channels, signal 0 has 4; leave one of them out"),
        (
            lambda signal: signal.index_fill(1, torch.tensor(7), math.nan),
            5,
            "signal 1 is nan at step 7 of channel 0; fill it, or leave it out",
        ),
        (
            lambda signal: signal.index_fill(1, torch.tensor(2), -math.inf),
            5,
            "signal 1 is -inf at step 2 of channel 0; fill it, or leave it out",
        ),
    ],
)
def test_part_1d_refuses_signals_in_one_line(
    part_1d: ModuleType, spoil: Callable[[torch.Tensor], torch.Tensor], window: int, words: str
) -> None:
    good, bad = glides(2, torch.Generator().manual_seed(0), steps=(20, 21))
    part_1d.check_signals([good, bad], 19)
    with pytest.raises(ValueError, match=rf"^{re.escape(words)}$"):
        part_1d.check_signals([good, spoil(bad)], window)


@pytest.mark.core
def test_part_1d_reads_signals_and_what_is_missing_as_nan(part_1d: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "some.ts").write_text("# said: of it\n@data\n1,2,-3e-1:4,?,6:walking\n\n7,8:9,0:at rest\n", encoding="utf-8")
    (first, second), names = part_1d.read_signals(tmp_path / "some.ts")
    assert names == ["walking", "at rest"] and second.tolist() == [[7, 8], [9, 0]]
    assert first[0].tolist() == pytest.approx([1, 2, -0.3]) and first[1].isnan().tolist() == [False, True, False]
    with pytest.raises(ValueError, match=r"^signal 0 is nan at step 1 of channel 1; fill it, or leave it out$"):
        part_1d.check_signals([first], 2)


@pytest.mark.core
def test_part_1d_learns_of_signals_that_tell_and_of_no_others(part_1d: ModuleType) -> None:
    """R2 by both windows 0.95 and by one 0.49, when written; -0.03 by both where steps are mixed, so that no window tells its place."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    train, test = glides(60, generator), glides(40, generator)
    classes = torch.arange(100) % 2
    both, apart, first, second, *_ = part_1d.compare((train, classes[:60]), (test, classes[60:]), 5, 25)
    assert min(both, apart) > 0.3 + max(first, second) and max(first, second) <= 0.55  # with places known to the step: 0.5
    mixed = [[signal[:, torch.randperm(signal.shape[1], generator=generator)] for signal in part] for part in (train, test)]
    assert part_1d.compare((mixed[0], classes[:60]), (mixed[1], classes[60:]), 5, 25)[0] < 0.1


@pytest.mark.core
def test_part_1d_probe_finds_classes_that_are_there(part_1d: ModuleType) -> None:
    generator = torch.Generator().manual_seed(0)
    classes = torch.arange(40) % 2
    signals = [torch.randn(3, 20, generator=generator) + label for label in classes.tolist()]
    noise = [torch.randn(3, 20, generator=generator) for _ in range(40)]
    found, guessed = (part_1d.probe(nn.Flatten(-2), (x[:20], classes[:20]), (x[20:], classes[20:]), 4, 5) for x in (signals, noise))
    assert found > 0.9 and guessed < 0.75


@needs_signals
def test_part_1d_finds_where_windows_of_speech_lie(part_1d: ModuleType) -> None:
    """On recordings held out, cut down: 0.88 by both windows and 0.37 by one, when written."""
    torch.manual_seed(0)
    both, _, first, second, *_ = part_1d.compare(*part_1d.bundled_signals("JapaneseVowels", 3), 3, 25)
    assert both > 0.3 + max(first, second)


@needs_signals
def test_part_1d_is_a_program(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--set", "BasicMotions", "--window", "20", "--updates", "2", "--seeds", "2"]
    monkeypatch.setattr(sys, "argv", ["part_1d.py", *words])
    runpy.run_path(str(PART_1D), run_name="__main__")
    names, *lines = capsys.readouterr().out.splitlines()
    assert names.split()[:4] == ["both", "apart", "first", "second"] and len(lines) == 2
    assert all(len(line.split()) == 10 and math.isfinite(sum(map(float, line.split()))) for line in lines)


@needs_signals
def test_part_1d_says_in_one_line_what_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["part_1d.py", "--window", "12"])
    with pytest.raises(SystemExit, match=r"^part_1d.py: window=12: signal \d+ has \d+ steps; take 1 to \d+$"):
        runpy.run_path(str(PART_1D), run_name="__main__")


@pytest.mark.core
def test_part_1d_names_the_package_that_is_missing(part_1d: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"^JapaneseVowels lies in the package aeon, .*: pip install --no-deps 'aeon>=1.6'$"):
        part_1d.bundled_signals("JapaneseVowels", 3)
