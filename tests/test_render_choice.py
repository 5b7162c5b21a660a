"""Which renderer serves who asks for none: a fixed list, read from what the machine has, never from a clock."""

import inspect
import logging
from typing import Any

import pytest
import torch

from wherefrom.pipeline import Independent, Order, ViewFamily, ViewRecipe, ViewTransform, make_loader
from wherefrom.pipeline.render import choose
from wherefrom.pipeline.render.choose import choose_renderer, make_cutter, make_renderer
from wherefrom.pipeline.render.renderer import RendererName

pytestmark = pytest.mark.core

CPU, GPU = torch.device("cpu"), torch.device("cuda")
RECIPE = ViewRecipe(families=(ViewFamily(name="one", views=2, size_px=(16, 16), law=Independent()),), pixels="uint8")


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`machine(dali=True, triton=True, native=True)` says what is there."""

    def has(*, dali: bool = True, triton: bool = True, native: bool = True) -> None:
        monkeypatch.setattr("wherefrom.pipeline.render.dali_decode.installed", lambda: dali)
        monkeypatch.setattr(choose, "triton_missing", lambda: None if triton else "Triton is not installed")
        for module in ("choose", "native_cutter"):
            monkeypatch.setattr(f"wherefrom.pipeline.render.{module}.native_missing", lambda: None if native else "it was not built")

    return has


@pytest.mark.parametrize(
    ("there", "on_gpu", "on_cpu"),
    [
        ({}, "dali", "native"),
        ({"triton": False}, "dali", "native"),
        ({"native": False}, "dali", "torch"),
        ({"dali": False}, "native", "native"),  # triton too has its pictures decoded by DALI
        ({"dali": False, "native": False}, "torch", "torch"),
    ],
)
def test_auto_takes_the_first_of_a_fixed_list_that_can_run(
    machine: Any, there: dict[str, bool], on_gpu: RendererName, on_cpu: RendererName
) -> None:
    machine(**there)
    assert choose_renderer("auto", GPU)[0] == on_gpu
    assert choose_renderer("auto", CPU)[0] == on_cpu
    assert choose_renderer("triton", GPU) == ("triton", "as asked")


def test_triton_serves_before_the_cpu_once_it_can_run_and_dali_is_passed_over(machine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    machine()
    monkeypatch.setattr(choose, "GPU_PREFERENCE", ("triton", *(name for name in choose.GPU_PREFERENCE if name != "triton")))
    assert choose_renderer("auto", GPU)[0] == "triton"
    machine(triton=False)
    assert choose_renderer("auto", GPU) == ("dali", "decodes and resizes on the GPU; triton cannot run: Triton is not installed")


def test_the_choice_says_what_was_passed_over_and_how_to_get_it(machine: Any, caplog: pytest.LogCaptureFixture) -> None:
    machine(dali=False)
    assert choose_renderer("auto", CPU) == ("native", "the fastest on CPUs")
    why = choose_renderer("auto", GPU)[1]
    assert why.startswith("the fastest on CPUs; dali cannot run: NVIDIA DALI is not installed; pip install nvidia-dali-cuda130")
    machine(native=False)
    with caplog.at_level(logging.INFO, "wherefrom.pipeline.render.choose"):
        assert make_renderer(RECIPE, threads=0).name == "torch" and make_cutter(RECIPE).name == "torch"
    assert "renderer torch: runs everywhere; native cannot run: it was not built" in caplog.text
    assert "views are cut by torch: runs everywhere; native cannot run: it was not built" in caplog.text
    with pytest.raises(ValueError, match='renderer "native" cannot run: it was not built; or use renderer="torch"'):
        make_renderer(RECIPE, "native")


def test_no_clock_has_a_say() -> None:
    assert "time" not in vars(choose) and "perf_counter" not in inspect.getsource(choose)


@pytest.mark.parametrize("name", ["natvie", "pil", True, None])
def test_a_misspelled_renderer_is_refused_wherever_one_is_named(name: Any, tmp_path: Any) -> None:
    for build in (
        lambda: make_renderer(RECIPE, name),
        lambda: make_cutter(RECIPE, name),
        lambda: ViewTransform(RECIPE, renderer=name),
        lambda: make_loader(tmp_path / "is-not-even-opened.tar", RECIPE, renderer=name),
        lambda: choose_renderer(name, CPU),
    ):
        with pytest.raises(ValueError, match=f"^renderer={name!r}: take one of auto, native, torch"):
            build()
    with pytest.raises(ValueError, match="renderer='dali': take one of auto, native, torch"):
        ViewTransform(RECIPE, renderer="dali")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"threads": -1}, r"^threads=-1: needs at least 0 \(all in the caller's thread\); None takes one a core$"),
        ({"threads": 1.0}, "^threads=1.0: needs a whole number or None$"),
        ({"prefetch": 0}, "^prefetch=0: needs at least 1 batch$"),
        ({"prefetch": 2.0}, "^prefetch=2.0: needs a whole number$"),
    ],
)
def test_threads_and_prefetch_are_checked_before_anything_starts(setting: dict[str, Any], message: str, tmp_path: Any) -> None:
    with pytest.raises(ValueError, match=message):
        make_renderer(RECIPE, **setting)
    with pytest.raises(ValueError, match=message):
        make_loader(tmp_path / "is-not-even-opened.tar", RECIPE, **setting)


@pytest.mark.parametrize("setting", [{"order": "shufled"}, {"recipe": "demo"}])
def test_a_loaders_settings_are_checked_before_an_index_is_opened(setting: dict[str, Any], tmp_path: Any) -> None:
    with pytest.raises(ValueError, match=r"order='shufled': take one of shuffled|recipe='demo': needs ViewRecipe"):
        make_loader(tmp_path / "is-not-even-opened.tar", **{"recipe": RECIPE, **setting})


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"seed": 1.0}, r"^seed=1\.0: needs a whole number$"),
        ({"seed": -1}, r"^seed=-1: needs 0 <= seed < 2\*\*64$"),
        ({"seed": 2**64}, r"^seed=18446744073709551616: needs 0 <= seed < 2\*\*64$"),
    ],
)
def test_a_seed_that_is_none_is_refused_before_a_draw(setting: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ViewTransform(RECIPE, **setting)
    with pytest.raises(ValueError, match=message):
        Order(samples=8, global_batch=2, **setting)
    with pytest.raises(ValueError, match="recipe='demo': needs ViewRecipe"):
        ViewTransform("demo")  # type: ignore[arg-type]
