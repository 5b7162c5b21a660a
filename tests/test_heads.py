"""What hosts share: heads by what they are made of, and meters of spread against eigenvalues."""

import math

import pytest
import torch
from torch import nn

from wherefrom.train.objectives.heads import Closing, mlp, spread
from wherefrom.train.over_ranks import BatchNormOverRanks

pytestmark = pytest.mark.core


@pytest.mark.parametrize(("closing", "learned"), [("none", None), ("plain", []), ("scale", ["weight"]), ("norm", ["weight", "bias"])])
def test_a_head_closes_as_asked(closing: Closing, learned: list[str] | None) -> None:
    head = mlp([5, 7, 3], closing=closing)
    assert [type(layer) for layer in head[:4]] == [nn.Linear, BatchNormOverRanks, nn.ReLU, nn.Linear]
    assert len(head) == (4 if learned is None else 5)
    if learned is not None:
        assert [name for name, _ in head[4].named_parameters()] == learned
    x = torch.randn(6, 5)
    assert head(x).shape == (6, 3)
    head.load_state_dict(mlp([5, 7, 3], closing=closing).state_dict())


def test_biases_norms_and_activations_are_as_asked() -> None:
    head = mlp([5, 7, 7, 3], norm=False, hidden_bias=True, out_bias=True, activation=nn.GELU)
    assert [type(layer) for layer in head] == [nn.Linear, nn.GELU, nn.Linear, nn.GELU, nn.Linear]
    assert all(layer.bias is not None for layer in head[::2])
    biases = [layer.bias is not None for layer in mlp([5, 7, 3], hidden_bias=True) if isinstance(layer, nn.Linear)]
    assert biases == [True, False]


@pytest.mark.parametrize("shape", [(40, 6), (6, 40)])
def test_rank_and_std_are_those_of_the_eigenvalues(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    features = torch.randn(shape, dtype=torch.float64) + 1
    unit = nn.functional.normalize(features, dim=-1)
    eigenvalues = torch.linalg.eigvalsh(torch.cov(unit.T, correction=0))
    meters = spread(features, "x")
    assert meters["x_rank"].item() == pytest.approx((eigenvalues.sum() ** 2 / eigenvalues.square().sum()).item())
    assert meters["x_std"].item() == pytest.approx(math.sqrt(eigenvalues.sum()))


def test_collapse_to_a_point_and_to_a_line_are_seen() -> None:
    torch.manual_seed(0)
    everywhere = torch.randn(512, 32)
    assert spread(everywhere, "x")["x_std"] > 0.9 and spread(everywhere, "x")["x_rank"] > 25
    point = torch.randn(32) + 1e-3 * everywhere
    assert spread(point, "x")["x_std"] < 2e-3
    line = torch.randn(32) * torch.randn(512, 1) + 1e-3 * everywhere
    assert spread(line, "x")["x_rank"] < 1.1
    exactly = spread(torch.ones(4, 3), "x")
    assert exactly["x_std"] < 1e-6 and torch.isfinite(exactly["x_rank"])
