"""SimCLR, BYOL, Barlow Twins and VICReg on two processes over gloo: loss and gradients of one process, and of the authors' code.

The figures are of losses alone (tests/data/hosts): of Barlow Twins' authors on one rank, for on two their gradient is half of it.
"""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from host_formulas import figures, pair, tensor, wave
from host_steps import TinyEncoder, batch_of, fill, pictures_of
from safetensors.torch import load_file, save_file
from torch import Tensor

from wherefrom.pipeline import Batch
from wherefrom.train import (
    BYOL,
    BarlowTwins,
    BarlowTwinsSettings,
    BYOLSettings,
    Objective,
    Progress,
    SimCLR,
    SimCLRSettings,
    Step,
    VICReg,
    VICRegSettings,
)
from wherefrom.train.objectives.barlow import barlow_terms
from wherefrom.train.objectives.vicreg import vicreg_terms
from wherefrom.train.over_ranks import mean_over_ranks, own_rank, rank_count

pytestmark = pytest.mark.core

METHODS = ("simclr", "byol", "barlow", "vicreg")
SAMPLES = 8


def objective_of(method: str) -> Objective:
    """Return a method with a narrow head, for views of 4 px."""
    match method:
        case "simclr":
            return SimCLR(SimCLRSettings(size_px=4, out=8))
        case "byol":
            return BYOL(BYOLSettings(size_px=4, hidden=12, out=8, target_start="copied"))
        case "barlow":
            return BarlowTwins(BarlowTwinsSettings(size_px=4, hidden=12, out=10))
        case _:
            return VICReg(VICRegSettings(size_px=4, hidden=12, out=10))


def own_part(batch: Batch) -> Batch:
    """Return this rank's samples."""
    part = slice(own_rank() * SAMPLES // rank_count(), (own_rank() + 1) * SAMPLES // rank_count())
    return batch_of(*((views.geometry.family, views.pixels[part]) for views in batch.views))


def whole_step(method: str) -> dict[str, Tensor]:
    """Return what a step says and the gradient that it leaves, means over ranks as DDP takes them."""
    objective = objective_of(method)
    step = Step(TinyEncoder(16, norm=True), [objective], seed=0).double().train()
    fill(step, lambda name: name)
    out = step(own_part(pictures_of(objective, SAMPLES, 0)), Progress(update=0, updates=2, updates_per_epoch=1))
    out.loss.backward()
    found = {"loss": out.loss} | {name: values.grad for name, values in step.named_parameters() if values.grad is not None}
    return {f"{method}/{name}": mean_over_ranks(value.detach()).contiguous() for name, value in found.items()}


def weighted_loss(method: str, x: Tensor, y: Tensor) -> Tensor:
    if method == "vicreg":
        terms = vicreg_terms(x, y)
        return 25 * terms["invariance"] + 25 * terms["variance"] + terms["covariance"]
    terms = barlow_terms(x, y)
    return terms["invariance"] + 0.0051 * terms["redundancy"]


def as_in_the_figures(method: str) -> dict[str, Tensor]:
    """Return loss and gradient of a weight that two views go through."""
    weight = (torch.eye(10, dtype=torch.float64) + 0.1 * tensor(wave((10, 10), 5))).requires_grad_()
    x, y = (tensor(view).chunk(rank_count())[own_rank()] @ weight for view in pair((8, 10), 140))
    loss = weighted_loss(method, x, y)
    loss.backward()
    assert weight.grad is not None
    return {f"{method} of the figures/{name}": mean_over_ranks(value.detach()) for name, value in (("loss", loss), ("grad", weight.grad))}


def everything() -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for method in METHODS:
        found |= whole_step(method)
    return found | as_in_the_figures("barlow") | as_in_the_figures("vicreg")


@pytest.fixture(scope="module")
def one_rank() -> dict[str, Tensor]:
    return everything()


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    shared = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, str(folder / "found")]
    processes = [subprocess.Popen(command, env=shared | {"RANK": rank}, stderr=subprocess.PIPE) for rank in "01"]
    for process in processes:
        _, complaint = process.communicate(timeout=120)
        assert process.returncode == 0, complaint.decode()[-2000:]
    return load_file(folder / "found")


@pytest.mark.parametrize("method", METHODS)
def test_two_ranks_make_the_step_of_one(method: str, one_rank: dict[str, Tensor], two_ranks: dict[str, Tensor]) -> None:
    names = [name for name in one_rank if name.startswith(f"{method}/")]
    assert len(names) > 5 and one_rank.keys() == two_ranks.keys()
    for name in names:
        torch.testing.assert_close(two_ranks[name], one_rank[name], rtol=1e-9, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}")
    largest = max(float(one_rank[name].abs().max()) for name in names if not name.endswith("/loss"))
    assert largest > 1e-3  # there is a gradient to compare


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("method", ["barlow", "vicreg"])
def test_loss_and_gradient_over_ranks_are_the_authors(
    method: str, ranks: int, one_rank: dict[str, Tensor], two_ranks: dict[str, Tensor]
) -> None:
    rows = {row["world"]: row for row in figures(method)["two_ranks"]["rows"]}
    found = one_rank if ranks == 1 else two_ranks
    theirs = rows[1] if method == "barlow" else rows[ranks]  # on two ranks the gradient of Barlow Twins' authors is half of their loss's
    assert rows[2]["ddp_grad"] == pytest.approx(rows[1]["ddp_grad"] / (2 if method == "barlow" else 1))
    assert found[f"{method} of the figures/loss"].item() == pytest.approx(theirs["loss_mean"], rel=1e-9)
    assert found[f"{method} of the figures/grad"].norm().item() == pytest.approx(theirs["ddp_grad"], rel=1e-9)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    found = everything()
    if own_rank() == 0:
        save_file(found, Path(sys.argv[1]))
    dist.destroy_process_group()
