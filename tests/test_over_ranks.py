"""What ranks say together, against one process that has all samples: values, gradients and statistics, on two processes over gloo."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from timm.layers import BatchNormAct2d
from torch import Tensor, nn

from wherefrom.train.encoder import Encoder, ModelSettings
from wherefrom.train.over_ranks import (
    BatchNormOverRanks,
    batch_norm_over_ranks,
    gathered,
    mean_over_ranks,
    own_rank,
    rank_count,
    this_rank_alone,
)


def network() -> nn.Module:
    """Return layers with every kind of BatchNorm, all parameters away from their starts."""
    torch.manual_seed(0)
    layers = nn.Sequential(
        nn.Conv2d(3, 6, 3),
        nn.BatchNorm2d(6, momentum=0.3),
        BatchNormAct2d(6),
        nn.Flatten(),
        nn.Linear(6 * 36, 5),
        nn.BatchNorm1d(5, affine=False),
        nn.Linear(5, 4),
        nn.BatchNorm1d(4, momentum=None),
    )
    with torch.no_grad():
        for parameter in layers.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return layers.double()  # where rounding hides nothing


def pixels() -> Tensor:
    torch.manual_seed(1)
    x = torch.randn(8, 3, 8, 8, dtype=torch.float64)
    return x * torch.arange(1, 9).view(8, 1, 1, 1) + torch.arange(8).view(8, 1, 1, 1)  # a rank's half is unlike the other's


def computed(*, rank: int, ranks: int, over_ranks: bool = True) -> dict[str, Tensor]:
    """Return what a rank computes of its slice: loss, mean gradients over ranks as DDP takes them, what BatchNorm remembers."""
    model = network().train()
    model = batch_norm_over_ranks(model) if over_ranks else model
    x = pixels().chunk(ranks)[rank].clone().requires_grad_()
    for _ in range(2):  # the second time with statistics of the first
        z = model(x)
    everyone = gathered(z)
    similarity = F.normalize(z, dim=-1) @ F.normalize(everyone, dim=-1).mT / 0.2
    place = torch.arange(len(z)) + own_rank() * len(z)
    correlation = mean_over_ranks(z.mT @ z / len(z))
    loss = F.cross_entropy(similarity, place) + correlation.square().sum() + (z[:, 0] * everyone.detach()[0, 0]).mean()
    loss.backward()
    tensors = {name: parameter.grad for name, parameter in model.named_parameters()} | {"loss": loss.detach()}
    if ranks > 1:
        for tensor in tensors.values():
            dist.all_reduce(tensor)
            tensor /= ranks
    assert x.grad is not None
    own = {f"x {rank}": x.grad / ranks, "z": everyone.detach()} | dict(model.named_buffers())
    return {name: tensor.clone().contiguous() for name, tensor in (tensors | own).items()}


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Tensor]]]:
    """What two ranks compute, with BatchNorm over ranks and without."""
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    shared = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, str(folder)]
    processes = [subprocess.Popen(command, env=shared | {"RANK": rank}, stderr=subprocess.PIPE) for rank in "01"]
    for process in processes:
        _, complaint = process.communicate(timeout=120)
        assert process.returncode == 0, complaint.decode()[-2000:]
    return {way: [load_file(folder / f"{way}.{rank}") for rank in range(2)] for way in ("over ranks", "alone")}


def apart(alone: dict[str, Tensor], ranks: list[dict[str, Tensor]]) -> dict[str, float]:
    """Return by name how far both ranks are from one process, of the largest value; a bias before a BatchNorm has a gradient of 0."""
    x = torch.cat([found[f"x {rank}"] for rank, found in enumerate(ranks)])
    joined = [{name: value for name, value in found.items() if not name.startswith("x ")} | {"x 0": x} for found in ranks]
    scale = {name: max(1e-3, float(value.abs().max())) for name, value in alone.items()}
    return {name: max(float((found[name] - value).abs().max()) / scale[name] for found in joined) for name, value in alone.items()}


@pytest.mark.core
def test_two_ranks_give_what_one_process_gives(two_ranks: dict[str, list[dict[str, Tensor]]]) -> None:
    alone = computed(rank=0, ranks=1)
    errors = apart(alone, two_ranks["over ranks"])
    assert max(errors.values()) < 1e-10, errors
    # control: BatchNorm of each rank by itself
    errors = apart(alone, two_ranks["alone"])
    assert min(errors[name] for name in ("loss", "0.weight", "x 0", "1.running_mean", "7.running_var")) > 1e-3, errors


@pytest.mark.core
def test_of_one_rank_it_is_torchs_own_bit_for_bit() -> None:
    assert (rank_count(), own_rank()) == (1, 0)
    ours, theirs = computed(rank=0, ranks=1), computed(rank=0, ranks=1, over_ranks=False)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    x = torch.randn(2, 3)
    assert gathered(x) is x and mean_over_ranks(x) is x


@pytest.mark.core
@pytest.mark.parametrize("name", ["resnet10t", "regnetz_005"])
def test_an_encoder_keeps_its_weights_names_and_forward(name: str) -> None:
    settings = ModelSettings(name=name)
    assert settings.has_batch_norm
    encoder = Encoder(settings).eval()
    x = torch.randn(2, 1, 3, 64, 64)
    before, state = encoder.encode(x), {name: value.clone() for name, value in encoder.state_dict().items()}
    assert batch_norm_over_ranks(encoder) is encoder
    norms = [module for module in encoder.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    assert norms and all(isinstance(module, BatchNormOverRanks) for module in norms)
    assert torch.equal(encoder.encode(x).summary, before.summary)
    after = encoder.state_dict()
    assert after.keys() == state.keys() and all(torch.equal(after[name], state[name]) for name in state)
    timm.create_model(name, num_classes=0).load_state_dict(encoder.model.state_dict())
    assert all(isinstance(module, BatchNormOverRanks) for module in encoder.slow_copy().modules() if hasattr(module, "running_mean"))


@pytest.mark.core
def test_a_tensor_without_channels_is_refused() -> None:
    with pytest.raises(ValueError, match=r"BatchNorm of shape \(3,\): needs \(n, C, \.\.\.\)"):
        BatchNormOverRanks(3)(torch.zeros(3))


if __name__ == "__main__":
    dist.init_process_group("gloo")
    if own_rank() == 0:  # while the other is elsewhere: where it asked for that one, what comes next would be what it gets
        with this_rank_alone():
            assert (rank_count(), float(mean_over_ranks(torch.ones(())))) == (1, 1.0)
    assert rank_count() == 2
    for way, over_ranks in (("over ranks", True), ("alone", False)):
        save_file(computed(rank=own_rank(), ranks=2, over_ranks=over_ranks), Path(sys.argv[1]) / f"{way}.{own_rank()}")
    dist.destroy_process_group()
