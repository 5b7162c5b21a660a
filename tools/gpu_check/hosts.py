"""Stage of `gpu_check` for the hosts: BatchNorm over two ranks beside torch's own, what SP costs beside each ImageNet recipe.

Here: both.
Not here: whether a host is its method, and whether ranks agree (tests/, on a CPU); loading (loading.py).
"""

import statistics
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from wherefrom.pipeline.shards.index import ShardIndex
from wherefrom.tools.gpu_check.loading import WARM_UPDATES, training_speed
from wherefrom.tools.gpu_check.stages import Options, Report
from wherefrom.train.over_ranks import BatchNormOverRanks

if TYPE_CHECKING:
    from wherefrom.train.settings import TrainSettings

RANKS = 2
CHANNELS = 64
BOUND = {torch.float32: 2e-5, torch.bfloat16: 2e-2}  # of the largest number in what is compared
ROUNDS, ROUND_S = 3, 1.5  # of timing a host alone and with SP
LEAST_S = 12.0  # that must be left for another host


def hosts(options: Options, report: Report) -> None:
    """Compare BatchNorm over ranks, then time every host with and without SP on one batch again and again."""
    compare_batch_norms(options.device, report)
    if not options.shards:
        report.leave_out("hosts beside SP: no SHARDS were given")
        return
    from wherefrom.train.loop import accelerator_for

    index = ShardIndex.open(options.shards)
    for host, settings in _recipes(options):
        if not options.dry_run and report.seconds_left < LEAST_S:
            report.leave_out(f"{host}: no time is left")
            continue
        accelerator = accelerator_for(settings[0])
        rates: tuple[list[float], list[float]] = ([], [])  # alone, with SP
        memory = [0.0, 0.0]
        seconds, rounds = (0.05, 1) if options.dry_run else (ROUND_S, ROUNDS)
        for _ in range(rounds):
            for which, one in enumerate(settings):
                reached = training_speed(
                    index, one, accelerator, seconds, compiled=False, synthetic=True, warm=WARM_UPDATES[options.dry_run]
                )
                rates[which].append(reached["pictures_per_s"] / one.global_batch)
                memory[which] = reached["memory_bytes"] / 2**30
        alone, beside = (statistics.median(each) for each in rates)
        report.add(host, {"updates_per_s": rates[0], "with_sp": rates[1], "memory_gib": memory, "batch": settings[0].global_batch})
        report.say(
            f"{alone:.2f} updates/s, with SP {beside:.2f} ({beside / alone:.3f})  {host}, B{settings[0].global_batch}, "
            f"{memory[0]:.1f} and {memory[1]:.1f} GiB"
        )


def _recipes(options: Options) -> Iterator[tuple[str, tuple["TrainSettings", "TrainSettings"]]]:
    """Return every host's ImageNet recipe, alone and with SP; in a dry run two small ones."""
    from wherefrom.train.objectives import SpatialSettings
    from wherefrom.train.recipes import RECIPES

    small = ("imagenette_mocov3", "imagenette_vicreg")
    large = [name for name in RECIPES if name.startswith("imagenet_") and not name.startswith("imagenet_sp")]
    for name in small if options.dry_run else large:
        base = RECIPES[name]()
        batch = 4 if options.dry_run else min(options.batch, 64)
        runtime = replace(base.runtime, log_with="none") if not options.dry_run else replace(base.runtime, log_with="none", device="cpu")
        base = replace(base, global_batch=batch, runtime=runtime)
        spatial = SpatialSettings(size_px=32) if options.dry_run else SpatialSettings()
        beside = replace(base, objectives={**base.objectives, "spatial": replace(spatial, weight=0.1)})
        yield name, (base, beside)


def compare_batch_norms(device: str, report: Report, norm: type[nn.Module] = BatchNormOverRanks) -> None:
    """Compare a BatchNorm over two ranks with one of the whole batch, and on a GPU with SyncBatchNorm: output, gradient, statistics.

    A difference is a share of the largest number in what is compared, the worse of both ranks.
    """
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_one_rank, args=(folder, device, norm), nprocs=RANKS)
        said = [torch.load(Path(folder) / f"{rank}.pt", weights_only=True) for rank in range(RANKS)]
    for dtype, bound in BOUND.items():
        name = str(dtype).removeprefix("torch.")
        differences = {kind: max(each[name][kind] for each in said) for kind in said[0][name]}
        report.add(f"BatchNorm over ranks, {name}", differences)
        for kind, difference in differences.items():
            if not difference <= bound:
                report.fail(f"BatchNorm over ranks, {name}, {kind}: {difference:.1e} of the largest, more than {bound:.0e}")


def _one_rank(rank: int, folder: str, device: str, norm: type[nn.Module]) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=RANKS)
    differences: dict[str, dict[str, float]] = {}
    for dtype in BOUND:
        generator = torch.Generator().manual_seed(0)
        whole = 3 * torch.randn(RANKS * 8, CHANNELS, 7, 7, generator=generator) + torch.arange(RANKS * 8.0)[:, None, None, None]
        upstream = torch.randn(whole.shape, generator=generator)
        whole, upstream = whole.to(device, dtype), upstream.to(device, dtype)
        own = slice(8 * rank, 8 * rank + 8)
        ours = _pass(norm(CHANNELS).to(device), whole[own], upstream[own])
        yardsticks = {"the whole batch": _pass(nn.BatchNorm2d(CHANNELS).to(device), whole, upstream, own)}
        if device == "cuda":
            yardsticks["SyncBatchNorm"] = _pass(nn.SyncBatchNorm(CHANNELS).to(device), whole[own], upstream[own])
        said = differences[str(dtype).removeprefix("torch.")] = {}
        for name, yardstick in yardsticks.items():
            # the gradient of weights is the ranks' own there and here, and of all in one batch
            kinds = ("output", "gradient", "mean", "variance") + (("weight's gradient",) if name == "SyncBatchNorm" else ())
            for kind in kinds:
                difference = (ours[kind] - yardstick[kind]).abs().max() / yardstick[kind].abs().max()
                said[f"{kind} against {name}"] = float(difference)
    torch.save(differences, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


def _pass(norm: nn.Module, pixels: Tensor, upstream: Tensor, rows: slice = slice(None)) -> dict[str, Tensor]:
    pixels = pixels.detach().requires_grad_()
    output = norm(pixels)
    output.backward(upstream)
    assert pixels.grad is not None
    statistics_ = {"mean": norm.running_mean, "variance": norm.running_var, "weight's gradient": norm.weight.grad}
    return {"output": output.detach()[rows].float(), "gradient": pixels.grad[rows].float(), **statistics_}
