"""Which renderer serves who asks for none: a fixed list, read from what the machine has, never from a clock."""

import inspect
import logging
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from wherefrom.pipeline import Independent, Loader, Order, ViewFamily, ViewRecipe, ViewTransform, make_loader, system
from wherefrom.pipeline.render import choose
from wherefrom.pipeline.render.choose import RENDERERS, auto_preference, choose_renderer, make_cutter, make_renderer, renderer_entry
from wherefrom.pipeline.render.gpu_decode import TensorDecoder
from wherefrom.train.settings import RuntimeSettings

pytestmark = pytest.mark.core

CPU, GPU = torch.device("cpu"), torch.device("cuda")
RECIPE = ViewRecipe(families=(ViewFamily(name="one", views=2, size_px=(16, 16), law=Independent()),), pixels="uint8")


Missing = Callable[..., None]


@pytest.fixture
def missing(monkeypatch: pytest.MonkeyPatch) -> Missing:
    """`missing("dali", native="it was not built")` says what is not there; everything else is."""

    def say(*names: str, **reasons: str) -> None:
        absent = dict.fromkeys(names, "it is not installed; pip install it") | reasons
        monkeypatch.setattr(choose, "renderer_entry", lambda name: replace(renderer_entry(name), missing=lambda: absent.get(name)))

    return say


@pytest.mark.parametrize(
    ("absent", "on_gpu", "on_cpu"),
    [
        ([], "dali", "native"),
        (["triton"], "dali", "native"),
        (["native"], "dali", "torch"),
        (["dali"], "triton", "native"),
        (["dali", "triton"], "native", "native"),
        (["dali", "triton", "native"], "torch", "torch"),
    ],
)
def test_auto_takes_the_first_of_a_fixed_list_that_can_run(missing: Missing, absent: list[str], on_gpu: str, on_cpu: str) -> None:
    missing(*absent)
    assert choose_renderer("auto", GPU)[0] == on_gpu
    assert choose_renderer("auto", CPU)[0] == on_cpu
    assert choose_renderer("triton", GPU) == ("triton", "as asked")


def test_the_preference_is_fixed_and_no_other_package_has_a_say(install: Callable[..., None]) -> None:
    install("their-views", {choose.RENDERERS.group: {"theirs": "wherefrom.pipeline.render.torch_cutter:ENTRY"}})
    assert "theirs" in RENDERERS and renderer_entry("theirs").auto
    assert auto_preference("cuda") == ["dali", "triton", "native", "torch"]
    assert auto_preference("cpu") == ["native", "torch"]


def test_the_choice_says_what_was_passed_over_and_how_to_get_it(missing: Missing, caplog: pytest.LogCaptureFixture) -> None:
    missing(dali="NVIDIA DALI is not installed; pip install nvidia-dali-cuda130", triton="Triton is not installed")
    assert choose_renderer("auto", CPU) == ("native", "the fastest on CPUs")
    why = choose_renderer("auto", GPU)[1]
    assert why == (
        "the fastest on CPUs; dali cannot run: NVIDIA DALI is not installed; pip install nvidia-dali-cuda130; "
        "triton cannot run: Triton is not installed"
    )
    missing(native="it was not built")
    with caplog.at_level(logging.INFO, "wherefrom.pipeline.render.choose"):
        assert make_renderer(RECIPE, threads=0).name == "torch" and make_cutter(RECIPE).name == "torch"
    assert "renderer torch: runs everywhere; native cannot run: it was not built" in caplog.text
    assert "views are cut by torch: runs everywhere; native cannot run: it was not built" in caplog.text
    for make in (make_renderer, make_cutter):
        with pytest.raises(ValueError, match=r'^renderer "native" cannot run: it was not built; or use renderer="auto"$'):
            make(RECIPE, "native")


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("cuda", "device='cuda': torch sees no CUDA GPU here; use device='cpu'"),
        ("cuda:1", "device='cuda:1': torch sees no CUDA GPU here; use device='cpu'"),
        ("gpu", "device='gpu': views are handed over on a processor or a CUDA GPU; use 'cpu', 'cuda' or 'cuda:0'"),
        ("meta", "device='meta': views are handed over on a processor or a CUDA GPU; use 'cpu', 'cuda' or 'cuda:0'"),
    ],
)
def test_a_device_that_is_not_here_is_refused_before_an_index_is_built(device: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    recipe = ViewRecipe(families=(ViewFamily(name="a", views=1, size_px=(8, 8)),))
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        make_loader("no-such-shard.tar", recipe, device=device)


def test_no_clock_has_a_say() -> None:
    assert "time" not in vars(choose) and "perf_counter" not in inspect.getsource(choose)


def test_the_table_imports_no_library_that_need_not_be_there() -> None:
    code = (
        "import sys; from wherefrom.pipeline.render.choose import auto_preference\n"
        "assert auto_preference('cuda')\n"  # reads every entry
        "sys.exit(', '.join({'nvidia.dali', 'triton', 'torchcodec', 'torchvision'} & set(sys.modules)) or 0)"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], check=False, cwd="/", env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_what_is_no_entry_is_refused_with_its_owner(install: Callable[..., None]) -> None:
    install("their-views", {choose.RENDERERS.group: {"theirs": "math:pi"}})
    with pytest.raises(ValueError, match=r"^renderer 'theirs' of their-views 1.5 is 3\.14\d*: needs a RendererEntry$"):
        make_renderer(RECIPE, "theirs")
    assert make_renderer(RECIPE, "torch", threads=0).name == "torch"  # and ours are none the worse


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
        ViewTransform(RECIPE, renderer="dali")
    with pytest.raises(ValueError, match=r"^renderer='natvie': take one of auto, native, torch, triton, dali; did you mean 'native'\?$"):
        RuntimeSettings(renderer="natvie")


def test_a_position_names_who_served_and_another_who_goes_on_is_said(tiny_shards: Path, caplog: pytest.LogCaptureFixture) -> None:
    def loader(renderer: str) -> Loader:
        return make_loader(tiny_shards / "train.tar", RECIPE, global_batch=4, renderer=renderer, threads=0)

    with loader("auto") as began, loader("torch") as other:
        position = began.position(3)
        assert position["renderer"] == began.renderer.name != "auto"
        with caplog.at_level(logging.INFO, "wherefrom.pipeline.loader"):
            began.resume(position)
            assert "goes on with renderer" not in caplog.text
            other.resume(position | {"renderer": "theirs"})
        assert other.updates == 3 and "goes on with renderer torch, began with theirs: pixels differ by rounding" in caplog.text


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"threads": -1}, r"^threads=-1: needs at least 0 \(all in the caller's thread\); None takes one a core of this rank's share$"),
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


@pytest.mark.parametrize(("threads", "taken"), [(None, 2), (5, 5), (0, 0)])
def test_a_renderer_takes_its_ranks_share_of_the_cores(threads: int | None, taken: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(system, "available_cores", lambda: 8)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    renderer: Any = make_renderer(RECIPE, "torch", threads=threads)
    renderer.close()
    decoder = TensorDecoder(device=torch.device("cpu"), threads=threads)
    decoder.close()
    assert (renderer.threads, decoder._pool._max_workers) == (taken, max(1, taken))


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
