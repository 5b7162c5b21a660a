"""The fused call held to the two calls that define it, `roi_align` and `pair_targets`, by every path; Triton's runs in its interpreter."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from wherefrom.kernels.pair_targets import pair_targets
from wherefrom.kernels.pair_targets_reference import PairUnits
from wherefrom.kernels.roi_align import ADAPTIVE, roi_align
from wherefrom.kernels.roi_align_pairs import roi_align_pairs

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
B, H, W, D = 2, 5, 4, 6
POOLING: dict[str, Any] = {"frame_hw": (50, 40), "out_hw": (2, 3)}
CHOSEN = torch.tensor([[0, 2], [2, 1], [1, 1]], device=DEVICE)
MEAN, STD = torch.tensor([0.1, 0.2, 0.3], device=DEVICE), torch.tensor([2.0, 3, 4], device=DEVICE)
backends = pytest.mark.parametrize("backend", ["torch", "triton", "reference"])


def regions(each: int) -> Tensor:
    random = torch.Generator().manual_seed(0)
    corner = torch.rand(B, each, 2, generator=random) * torch.tensor([20.0, 30.0])
    return torch.cat([corner, corner + 2 + 18 * torch.rand(B, each, 2, generator=random)], -1).to(DEVICE)


def tokens_of(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(B, H, W, D, generator=torch.Generator().manual_seed(1)).to(DEVICE, dtype)


def orientation(each: int) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(2)
    turns = torch.randint(-4, 5, (B, each), generator=random)
    return {"quarter_turns": turns.to(DEVICE), "flipped": (torch.rand(B, each, generator=random) < 0.5).to(DEVICE)}


OPTIONS: list[dict[str, Any]] = [
    {},
    {"pairs": CHOSEN},
    {"sampling": "area", "units": PairUnits(position="mean", scale="log_sides")},
    {
        "sampling": 2,
        "units": PairUnits(position="picture", scale="ratio"),
        "picture_hw": torch.tensor([[50, 40], [60, 30]], device=DEVICE),
    },
    {"pairs": CHOSEN.int(), "units": PairUnits(mean=MEAN, std=STD)},
    {"units": PairUnits(axes="source")},
]


@backends
@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: " ".join(options) or "plain")
@pytest.mark.parametrize("oriented", [False, True])
def test_equals_pooling_and_targets_apart(backend: Any, options: dict[str, Any], oriented: bool) -> None:
    boxes, valid = regions(3), torch.tensor([[True, True, False]] * B, device=DEVICE)
    view = orientation(3) if oriented else {}
    pooled, targets = roi_align_pairs(tokens_of(), boxes, valid=valid, backend=backend, **POOLING, **view, **options)
    apart = {name: value for name, value in options.items() if name not in ("sampling", "pairs")}
    sampling = options.get("sampling", "adaptive")
    torch.testing.assert_close(pooled, roi_align(tokens_of(), boxes, valid=valid, sampling=sampling, backend=backend, **POOLING, **view))
    expected = pair_targets(boxes, options.get("pairs"), backend="reference", **view, **apart)
    assert targets.dtype == (torch.float64 if backend == "reference" else torch.float32)
    torch.testing.assert_close(targets.double(), expected, rtol=1e-5, atol=2e-6)


@pytest.mark.core
def test_orientation_changes_results_and_targets() -> None:
    """The control of the test above."""
    boxes = regions(3)
    plain, turned = (roi_align_pairs(tokens_of(), boxes, **POOLING, **view) for view in ({}, orientation(3)))
    assert all((ours - theirs).abs().max() > 1e-2 for ours, theirs in zip(plain, turned, strict=True))


@backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_is_that_of_pooling_alone_and_targets_have_none(backend: Any, dtype: torch.dtype) -> None:
    boxes, view = regions(3), orientation(3)
    gradients = []
    for fused in (True, False):
        tokens = tokens_of(dtype).requires_grad_()
        if fused:
            pooled, targets = roi_align_pairs(tokens, boxes, backend=backend, **POOLING, **view)
            assert not targets.requires_grad
        else:
            pooled = roi_align(tokens, boxes, backend=backend, **POOLING, **view)
        assert pooled.dtype == dtype
        pooled.square().sum().backward()
        gradients.append(tokens.grad)
    assert torch.equal(*gradients)


@pytest.mark.core
@backends
def test_functional_and_second_gradients_equal_those_of_pooling_alone(backend: Any) -> None:
    boxes = regions(2)

    def cubed(tokens: Tensor, fused: bool) -> Tensor:
        pooled = roi_align_pairs(tokens, boxes, backend=backend, **POOLING)[0] if fused else roi_align(tokens, boxes, **POOLING)
        return pooled.pow(3).sum()

    tokens = tokens_of()
    torch.testing.assert_close(*(torch.func.grad(lambda t, fused=fused: cubed(t, fused))(tokens) for fused in (True, False)))
    second = []
    for fused in (True, False):
        leaf = tokens.clone().requires_grad_()
        (first,) = torch.autograd.grad(cubed(leaf, fused), leaf, create_graph=True)
        second.append(torch.autograd.grad(first.square().sum(), leaf)[0])
    torch.testing.assert_close(*second)


@backends
@pytest.mark.parametrize("R", [0, 1])
def test_no_box_and_one_box(backend: Any, R: int) -> None:
    pooled, targets = roi_align_pairs(tokens_of(), regions(R), backend=backend, **POOLING)
    assert pooled.shape == (B, R, 2, 3, D)
    assert targets.shape == (B, R, R, 3)
    assert (targets == 0).all()
    assert roi_align_pairs(tokens_of(), regions(R), pairs=CHOSEN[:0], backend=backend, **POOLING)[1].shape == (B, 0, 3)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_every_element_is_written_and_repeats_to_the_bit(backend: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    new_empty = Tensor.new_empty

    def poisoned(like: Tensor, *shape: Any, **options: Any) -> Tensor:
        empty = new_empty(like, *shape, **options)
        return empty.fill_(math.nan) if empty.is_floating_point() else empty

    clean = roi_align_pairs(tokens_of(), regions(3), backend=backend, **POOLING)
    monkeypatch.setattr(Tensor, "new_empty", poisoned)
    again = roi_align_pairs(tokens_of(), regions(3), backend=backend, **POOLING)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(again, clean, strict=True))


@pytest.mark.core
@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("pairs", [None, CHOSEN])
def test_passes_opcheck_and_compiles_into_one_graph(backend: Any, pairs: Tensor | None) -> None:
    boxes, view = regions(3), orientation(3)
    turns, flipped = view["quarter_turns"], view["flipped"]
    rows, columns = torch.ops.wherefrom.roi_weights(boxes, turns, flipped, None, [H, W], [50.0, 40.0], [2, 3], ADAPTIVE, backend)
    words = ("reference", "log_area", "view", backend)
    arguments = (tokens_of(), rows, columns, boxes, pairs, turns, flipped, None, None, None, [H, W], [2, 3], *words)
    torch.library.opcheck(torch.ops.wherefrom.roi_align_pairs.default, arguments)

    def call(tokens: Tensor) -> tuple[Tensor, Tensor]:
        return roi_align_pairs(tokens * 2, boxes, pairs=pairs, backend=backend, **POOLING, **view)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    results = []
    for each in (call, compiled):
        tokens = tokens_of().requires_grad_()
        pooled, targets = each(tokens)
        pooled.sum().backward()
        results.append((pooled, targets, tokens.grad))
    torch.testing.assert_close(*results)


@pytest.mark.core
@backends
def test_autocast_changes_nothing(backend: Any) -> None:
    expected = roi_align_pairs(tokens_of(), regions(3), backend=backend, **POOLING)
    with torch.autocast(DEVICE, torch.bfloat16):
        results = roi_align_pairs(tokens_of(), regions(3), backend=backend, **POOLING)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(results, expected, strict=True))


BAD: list[tuple[dict[str, Any], str]] = [
    ({"boxes": torch.zeros(3, 4)}, "boxes has shape (3, 4), expected (2, R, 4); add the batch axis with boxes[None]"),
    ({"sampling": "all"}, "sampling='all': take one of 'adaptive', 'area', or a whole number of samples above 0"),
    ({"pairs": torch.zeros(2, 3).long()}, "pairs has shape (2, 3), expected (P, 2)"),
    ({"pairs": torch.tensor([[0, 1], [2, 3]])}, "pairs[1] is (2, 3), boxes are numbered 0 to 2"),
    ({"units": PairUnits(position="picture")}, 'picture_hw is None, position="picture" divides by it; pass picture_hw=source_size'),
    ({"units": PairUnits(std=torch.ones(3).requires_grad_())}, "std requires a gradient, and these targets give none; pass std.detach()"),
]


@pytest.mark.core
@pytest.mark.parametrize(("change", "message"), BAD, ids=[message.split(",")[0] for _, message in BAD])
def test_bad_input_is_refused_by_name(change: dict[str, Any], message: str) -> None:
    good = {"tokens": torch.zeros(B, H, W, D), "boxes": torch.zeros(B, 3, 4), **POOLING}
    roi_align_pairs(**good)
    with pytest.raises(ValueError) as error:  # noqa: PT011 (the whole message is compared)
        roi_align_pairs(**good | change)
    assert str(error.value) == message
