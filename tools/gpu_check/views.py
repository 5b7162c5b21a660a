"""Stages of `gpu_check`: `render_views` by Triton on a GPU against the float64 reference and the pixel proof, then 512 views timed; a
CUDA graph of it.

Here: random records of every kind, the proof of pictures that are decoded on the CPU and lie on the GPU, times, replays of a graph.
Not here: the reference (kernels/render_views_reference.py), the proof (pipeline/proof/prove.py), the renderer that decodes on the GPU
(pipeline/render/triton_renderer.py).
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from wherefrom.kernels.render_views import ViewBackend, native_missing, render_views
from wherefrom.tools.bench_kernels.cases import CASES
from wherefrom.tools.bench_kernels.measuring import interleaved, timer_of
from wherefrom.tools.bench_kernels.problems import Call
from wherefrom.tools.gpu_check.kernels import measure_case
from wherefrom.tools.gpu_check.stages import Options, Report

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from wherefrom.pipeline.proof.prove import ProofCase
    from wherefrom.pipeline.render.renderer import Rendered
    from wherefrom.pipeline.view_recipe import ViewRecipe
    from wherefrom.pipeline.views import Record

FLOAT_BAR, BYTE_BAR = 2e-3, 0.51  # levels of 255, worst: as the tests ask
PLANTED_PX = 0.01  # a box so far aside must break the bar
VIEWS_S = {False: 3.0, True: 0.1}  # of timing; in a dry run
FULL_PROOF_S = 35.0  # that must be left for another case of the full proof


def render_views_stage(options: Options, report: Report) -> None:
    """Compare with the reference, prove by pixels, then time; what is red is not timed."""
    sides, size_px = ((40, 53), (9, 12)) if options.dry_run else ((375, 500), (96, 80))
    pictures, records = random_records(2 if options.dry_run else 16, 2, sides)
    exact = render_views(pictures, size_px=size_px, backend="reference", **records).double()
    right = compare(pictures, records, exact, size_px, options, report)
    try:
        right &= _prove(options, report)
    except ModuleNotFoundError as error:
        report.leave_out(f"the pixel proof: {error}")
    if not right:
        return
    if options.dry_run and (missing := native_missing()):  # which a CPU's cases take
        report.leave_out(f"the benchmark's cases: {missing}")
    else:
        for case in CASES:
            if case.kernel == "render_views" and (case.quick and not case.cuda if options.dry_run else case.cuda):
                measure_case(case, options, report)
    _time_photometrics(options, report)


def random_records(count: int, views: int, sides: tuple[int, int], *, seed: int = 0) -> tuple[list[Tensor], dict[str, Any]]:
    """Draw pictures of noise of ragged sizes, and views of them in every orientation, mirror, turn and color.

    Shapes: pictures (H, W, 3) uint8, H and W up to `sides`; records as `render_views` takes them, (B,) and (B, V, ...), on the CPU.
    """
    random = torch.Generator().manual_seed(seed)
    orientation = torch.arange(count) % 8 + 1
    pictures = [
        torch.randint(256, (*(side - number % 5 for side in sides), 3), generator=random, dtype=torch.uint8) for number in range(count)
    ]
    upright = torch.stack([torch.tensor(p.shape[1::-1] if o < 5 else p.shape[:2]) for p, o in zip(pictures, orientation, strict=True)])
    size = (upright[:, None] * (0.2 + 0.6 * torch.rand(count, views, 2, generator=random))).clamp(min=1)
    corner = (upright[:, None] - size) * torch.rand(count, views, 2, generator=random)
    number = torch.arange(count * views).view(count, views)
    return pictures, {
        "boxes": torch.cat([corner, corner + size], -1).float(),
        "flipped": number % 2 == 1,
        "quarter_turns": number // 2 % 4,
        "orientation": orientation,
        "matrix": torch.eye(3, 4) + torch.randn(count, views, 3, 4, generator=random) * torch.tensor([0.3, 0.3, 0.3, 30.0]),
        "blur_sigma_px": (0.1 + 1.9 * torch.rand(count, views, generator=random)) * (number % 3 == 1),
        "solarized": number % 5 == 2,
    }


def compare(
    pictures: Sequence[Tensor], records: dict[str, Any], exact: Tensor, size_px: tuple[int, int], options: Options, report: Report
) -> bool:
    """Hold every dtype to the reference, and see that the bar finds boxes a hundredth of a pixel aside; return whether all is right."""
    pictures = [picture.to(options.device) for picture in pictures]
    on_device = {name: value.to(options.device) for name, value in records.items()}
    render = partial(render_views, pictures, size_px=size_px, backend="triton")
    levels = render(**on_device).cpu()
    aside = render(**on_device | {"boxes": on_device["boxes"] + PLANTED_PX}).cpu()
    errors = {
        "float32": _worst(levels, exact),
        "uint8": _worst(render(**on_device, dtype=torch.uint8).cpu(), exact),
        "planted": _worst(aside, exact),
    }
    for dtype in (torch.float16, torch.bfloat16):
        errors[str(dtype).removeprefix("torch.")] = _worst(render(**on_device, dtype=dtype).cpu(), exact)
    report.add("errors_in_levels", errors)
    # rounding adds half a unit in the last place of 255: 1/16 in float16, 1/2 in bfloat16
    bars = {"float32": FLOAT_BAR, "uint8": BYTE_BAR, "float16": FLOAT_BAR + 1 / 16, "bfloat16": BYTE_BAR}
    if options.dry_run:
        bars["bfloat16"] *= 2  # which the interpreter cuts off instead of rounding it
    wrong = [f"{name} {errors[name]:.3g}, at most {bar:.3g}" for name, bar in bars.items() if not errors[name] <= bar]
    for words in wrong:
        report.fail(f"levels from the reference, {words} is right")
    if not errors["planted"] > FLOAT_BAR:
        report.fail(f"boxes {PLANTED_PX} px aside go unseen: {errors['planted']:.3g} levels")
    report.say(f"{len(pictures) * records['boxes'].shape[1]} views: {errors['float32']:.2g} levels worst, planted {errors['planted']:.2g}")
    return not wrong and errors["planted"] > FLOAT_BAR


def _worst(views: Tensor, exact: Tensor) -> float:
    return float((views.double() - exact).abs().max())


def graph_stage(options: Options, report: Report) -> None:
    """Capture a batch's launches as a CUDA graph; replays must equal `render_views` bit for bit, also on another batch's numbers.

    The other batch's numbers, packed, are copied into the block that the graph reads: nothing is captured again. In a dry run there is no
    graph, and what would be captured is called again.
    """
    count, sides, size_px = (2, (24, 30), (9, 12)) if options.dry_run else (64, (375, 500), (96, 80))
    batches = [random_records(count, 2, sides, seed=seed) for seed in (0, 1)]
    pictures = [[picture.to(options.device) for picture in batch] for batch, _ in batches]
    numbers = [_numbers(on_device, records) for on_device, (_, records) in zip(pictures, batches, strict=True)]
    expected = [
        render_views(own, size_px=size_px, backend="triton", **{name: value.to(options.device) for name, value in records.items()})
        for own, (_, records) in zip(pictures, batches, strict=True)
    ]
    block, out, replay = captured(numbers[0], size_px, torch.device(options.device))
    is_right = {}
    for words, batch in (("as captured", 0), ("another batch", 1), ("the first again", 0)):
        out.fill_(float("nan"))
        block.copy_(packed(numbers[batch], options.device), non_blocking=True)
        replay()
        is_right[words] = torch.equal(out, expected[batch])
        if not is_right[words]:
            report.fail(f"a replay, {words}: {float((out - expected[batch]).abs().max()):.3g} levels from the eager call, 0 is right")
        if torch.equal(out, expected[1 - batch]):
            report.fail(f"a replay, {words}: two batches give the same views, nothing is shown")
    report.add("replays_equal_eager", is_right)
    report.say(f"{count * 2} views by a graph, a block of {block.nbytes} bytes: {sum(is_right.values())} of {len(is_right)} replays right")


def _numbers(pictures: Sequence[Tensor], records: dict[str, Any]) -> dict[str, Tensor]:
    """Return what `render_views_triton` reads of a batch, on the CPU, by its name; shapes as there."""
    return {
        "addresses": torch.tensor([picture.data_ptr() for picture in pictures]),
        "sizes": torch.tensor([picture.shape[:2] for picture in pictures], dtype=torch.int32),
        **records,
    }


def packed(numbers: dict[str, Tensor], device: str) -> Tensor:
    """Return a batch's numbers in one block (bytes,), on the CPU."""
    from wherefrom.kernels.render_views_triton import pack

    return pack(list(numbers.values()), pinned=device == "cuda")


def captured(numbers: dict[str, Tensor], size_px: tuple[int, int], device: torch.device) -> tuple[Tensor, Tensor, Callable[[], None]]:
    """Return the block (bytes,) that holds a batch's numbers, the views (B, V, 3, h, w) and what renders them from it again."""
    from wherefrom.kernels.render_views_triton import render_views_triton, unpack

    block = packed(numbers, device.type).to(device)
    named = dict(zip(numbers, unpack(block, list(numbers.values())), strict=True))
    out = torch.empty(*numbers["boxes"].shape[:2], 3, *size_px, device=device)

    def launch() -> None:
        render_views_triton(
            named["addresses"],
            named["sizes"],
            **{name: value for name, value in named.items() if name not in ("addresses", "sizes")},
            mean=None,
            std=None,
            size_px=size_px,
            filter="plain",
            out=out,
        )

    if device.type == "cpu":
        return block, out, launch
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        launch()  # compiles
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launch()
    return block, out, graph.replay


class ProofRenderer:
    """Renders encoded pictures for the proof: decoded on the CPU, cut by `render_views` wherever `device` is."""

    name = "render_views"
    strict = True

    def __init__(self, recipe: "ViewRecipe", device: str, backend: ViewBackend) -> None:
        self.recipe, self.device, self.backend = recipe, device, backend

    def render(self, encoded: "Sequence[NDArray[np.uint8]]", records: "Sequence[Record]") -> "Rendered":
        """Render every family of a batch without color: a proof has none."""
        from wherefrom.pipeline.decode import decode_picture
        from wherefrom.pipeline.render.renderer import Rendered

        pictures = [torch.tensor(decode_picture(file)).to(self.device) for file in encoded]
        normalized = self.recipe.pixels != "uint8"
        mean, std = (torch.tensor(numbers, device=self.device) for numbers in (self.recipe.mean, self.recipe.std))
        pixels = tuple(
            render_views(
                pictures,
                record.geometry.boxes.to(self.device),
                flipped=record.geometry.flipped.to(self.device),
                quarter_turns=record.geometry.quarter_turns.to(self.device),
                size_px=family.size_px,
                orientation=record.geometry.stored_orientation.to(self.device),
                mean=mean if normalized else None,
                std=std if normalized else None,
                dtype=getattr(torch, self.recipe.pixels),
                backend=self.backend,
            )
            for family, record in zip(self.recipe.families, records, strict=True)
        )
        return Rendered(pixels=pixels, failed={})

    def close(self) -> None:
        """Nothing is held."""


def _prove(options: Options, report: Report) -> bool:
    """Prove the short cut through the cases, then as many of all cases as there is time for; return whether all passed."""
    from wherefrom.pipeline.proof.prove import proof_cases, prove

    cases: Sequence[ProofCase] = (*proof_cases(quick=True), *proof_cases())
    backend: ViewBackend = "triton"
    if options.dry_run:  # hundreds of views take the interpreter too long
        cases, backend = [replace(cases[0], size_px=(20, 24), source_size=(61, 73), laws=("grid",))], "reference"
    right, proved, worst = True, 0, 0.0
    for place, case in enumerate(cases):
        if place > 1 and report.seconds_left < FULL_PROOF_S:
            break
        outcome = prove(partial(ProofRenderer, device=options.device, backend=backend), cases=[case])
        proved, worst = proved + 1, max(worst, *(row.worst_px for row in outcome.rows))
        for row in outcome.rows:
            if not row.passed:
                report.fail(
                    f"proof, {row.law}, {case}: mean {row.mean_px:.3f}, worst {row.worst_px:.3f} source px, read {row.read_frac:.0%}"
                )
        for control in outcome.controls:
            if not control.caught:
                report.fail(f"proof, {case}: the mistake {control.mistake!r} passes")
        right &= outcome.passed
        report.add("proof", {"passed": right, "cases": proved, "of": len(cases), "worst_px": worst})
    report.say(f"proof: {proved} of {len(cases)} cases, {worst:.3f} source px worst")
    return right


def _time_photometrics(options: Options, report: Report) -> None:
    """Time two views each of 256 pictures of 0.2 MP with every photometric, a third of them blurred, and what the host takes for a call."""
    count, views, sides, side_px = (1, 1, (24, 30), 8) if options.dry_run else (256, 2, (375, 500), 224)
    pictures, records = random_records(count, views, sides)
    pictures = [picture.to(options.device) for picture in pictures]
    on_device = {name: value.to(options.device) for name, value in records.items()}
    geometry = {name: on_device[name] for name in ("boxes", "flipped", "quarter_turns", "orientation")}
    render = partial(render_views, pictures, size_px=(side_px, side_px), dtype=torch.float16, backend="triton")
    calls: dict[str, Call] = {
        "geometry": lambda: {"views": render(**geometry)},
        "all photometrics": lambda: {"views": render(**on_device)},
    }
    seconds = interleaved(calls, timer_of(torch.device(options.device)), VIEWS_S[options.dry_run])
    host = interleaved(calls, _host_seconds, VIEWS_S[options.dry_run])
    for name, rounds in seconds.items():
        low, median, high = (torch.tensor(rounds).quantile(q).item() * 1e3 for q in (0.25, 0.5, 0.75))
        called = torch.tensor(host[name]).median().item() * 1e3
        report.add(f"{count * views} views to float16, {name}", {"seconds": rounds, "host_seconds": host[name]})
        report.say(f"{count * views} views to float16, {name}: {median:.3g} ms ({low:.3g} to {high:.3g}), {called:.3g} ms of the host")


def _host_seconds(call: Call, times: int) -> float:
    """Return what a call takes until the host may go on, the GPU having nothing else to do."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    started = time.perf_counter()
    call()
    return time.perf_counter() - started
