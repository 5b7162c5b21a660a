"""Which kernels the benchmark measures at which sizes, and how much faster and smaller they have to be.

Here: the list of cases. Small ones lose first, so they are in it.
Not here: what is computed and by whom (problems.py), measuring (measuring.py), telling (command.py).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch

from wherefrom.tools.bench_kernels.problems import (
    KernelProblem,
    pair_loss_problem,
    pair_targets_problem,
    render_views_problem,
    roi_align_problem,
)

Kernel = Literal["pair_targets", "pair_loss", "roi_align", "roi_align_pairs", "render_views"]


@dataclass(frozen=True, kw_only=True, slots=True)
class KernelCase:
    """A kernel at one size."""

    kernel: Kernel
    sizes: str  # in words
    batch: int
    build: Callable[..., KernelProblem]  # (batch, dtype, device, planted) -> KernelProblem
    dtype: torch.dtype = torch.float32
    cuda: bool = False
    quick: bool = False  # among those that --quick takes
    launch_bound: bool = False  # so small that CUDA graphs are measured as well
    speed_floors: Mapping[str, float] = field(default_factory=dict)  # how many times as fast as whom our first path must be
    memory_floors: Mapping[str, float] = field(default_factory=dict)  # how many times smaller
    copy_floor: float | None = None  # the share of copy bandwidth that our first path must reach

    @property
    def name(self) -> str:
        """Unique among the cases."""
        where = "cuda" if self.cuda else "cpu"
        return f"{self.kernel} B{self.batch} {self.sizes} {str(self.dtype).removeprefix('torch.')} {where}"


def _targets(batch: int, N: int, **settings: Any) -> KernelCase:
    return KernelCase(kernel="pair_targets", sizes=f"N{N}", batch=batch, build=partial(pair_targets_problem, N=N), **settings)


def _loss(batch: int, N: int, activation: str = "gelu", loss: str = "squared", backward: bool = True, **settings: Any) -> KernelCase:
    build = partial(pair_loss_problem, N=N, H=512, activation=activation, loss=loss, backward=backward)
    sizes = f"N{N} H512 {activation} {loss}{'' if backward else ' forward'}"
    return KernelCase(kernel="pair_loss", sizes=sizes, batch=batch, build=build, **settings)


def _roi(batch: int, R: int, side: int, D: int, bins: int, *, backward: bool = True, pairs: bool = False, **settings: Any) -> KernelCase:
    build = partial(roi_align_problem, R=R, map_hw=(side, side), D=D, out_hw=(bins, bins), backward=backward, pairs=pairs)
    sizes = f"R{R} {side}x{side}x{D} to {bins}x{bins}{'' if backward else ' forward'}"
    return KernelCase(kernel="roi_align_pairs" if pairs else "roi_align", sizes=sizes, batch=batch, build=build, **settings)


def _views(batch: int, V: int, side_px: int, **settings: Any) -> KernelCase:
    build = partial(render_views_problem, V=V, picture_hw=(375, 500), side_px=side_px)
    return KernelCase(kernel="render_views", sizes=f"V{V} 375x500 to {side_px}x{side_px}", batch=batch, build=build, **settings)


BF16 = torch.bfloat16
LARGE, SMALL = {"eager": 1.5, "compile": 1.2}, {"eager": 0.95}  # how fast the pair loss must be on a CPU
CPU_CASES = (
    _targets(16, 64, quick=True),
    _targets(16, 196),
    _loss(64, 8, speed_floors=SMALL, quick=True),
    _loss(16, 16, speed_floors=SMALL),
    _loss(2, 49, speed_floors=SMALL),
    _loss(16, 49, speed_floors=SMALL),
    _loss(1, 196, speed_floors=LARGE, memory_floors={"eager": 40}),
    _loss(1, 196, "relu", "smooth_l1", speed_floors=LARGE, memory_floors={"eager": 40}),
    _loss(1, 196, backward=False),
    _roi(2, 64, 7, 64, 3, speed_floors={"torchvision": 3}, quick=True),
    _roi(16, 8, 14, 384, 6, speed_floors={"torchvision": 10}),
    _roi(16, 8, 14, 384, 6, dtype=BF16, speed_floors={"torchvision": 10}),
    _roi(16, 8, 14, 384, 6, backward=False),
    _roi(2, 4, 7, 64, 3, pairs=True, quick=True),
    _roi(16, 8, 14, 384, 6, pairs=True),
    _views(2, 2, 96, quick=True),
    _views(8, 2, 224),
    _views(8, 8, 96),
)
CUDA_CASES = (
    _targets(64, 8, quick=True, launch_bound=True, cuda=True),
    _targets(256, 196, copy_floor=0.6, cuda=True),
    _loss(64, 8, quick=True, launch_bound=True, cuda=True),
    _loss(256, 196, speed_floors={"compile": 1}, memory_floors={"compile": 50}, dtype=BF16, cuda=True),
    _loss(256, 196, "relu", speed_floors={"compile": 1.5}, memory_floors={"compile": 50}, dtype=BF16, cuda=True),
    _loss(256, 196, memory_floors={"compile": 50}, cuda=True),
    _roi(16, 8, 14, 384, 6, quick=True, launch_bound=True, dtype=BF16, cuda=True),
    _roi(256, 8, 14, 768, 7, speed_floors={"torchvision": 3}, dtype=BF16, cuda=True),
    _roi(256, 8, 14, 768, 7, cuda=True),
    _roi(256, 8, 14, 768, 7, pairs=True, dtype=BF16, cuda=True),
    _views(4, 2, 96, quick=True, cuda=True),
    _views(256, 2, 224, cuda=True),
    _views(64, 8, 96, cuda=True),
)
CASES = CPU_CASES + CUDA_CASES
