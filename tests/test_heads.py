"""What hosts share: heads, by what they are made of."""

import pytest
import torch
from torch import nn

from wherefrom.train.objectives.heads import Closing, mlp
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
