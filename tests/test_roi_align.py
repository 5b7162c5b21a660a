"""ROI pooling held to torchvision, to its float64 definition, to rot90 and flip, and to areas added up one token at a time.

Every property is asked of both fast paths: "torch", and "triton", which without a GPU runs in Triton's interpreter.
"""

import importlib
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision import ops

from wherefrom.kernels import roi_align_pairs
from wherefrom.kernels.roi_align import ADAPTIVE, roi_align
from wherefrom.kernels.roi_align_torch import CHUNK, READERS, contract_torch, weights_torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = ("torch", pytest.param("triton", marks=pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")))
backends = pytest.mark.parametrize("backend", BACKENDS)
MODULE = importlib.import_module("wherefrom.kernels.roi_align_torch")
H, W = 5, 4
NAN, INF = math.nan, math.inf

ADVERSARIAL = {
    "the whole map": (0, 0, W, H),
    "beyond the map on all sides": (-0.5, -0.5, W + 0.5, H + 0.5),
    "half outside": (-2, 1, 2, 7),
    "wholly outside": (-9, 2, -6, 3),
    "a token outside, where samples begin to count": (-1.5, -1.5, -0.5, -0.5),
    "no width": (2, 1, 2, 3),
    "a point": (1.5, 1.5, 1.5, 1.5),
    "inverted": (3, 4, 1, 1),
    "one token": (1, 2, 2, 3),
    "ten times the map": (-20, -25, 24, 30),
    "tokens' own edges": (1, 1, 3, 4),
}


def random_boxes(batch: int, each: int, seed: int = 0) -> Tensor:
    """Boxes (B, R, 4) about the map H x W, some of them partly outside."""
    corners = torch.rand(batch, each, 2, 2, generator=torch.Generator().manual_seed(seed)) * torch.tensor([W + 2.0, H + 2.0]) - 1
    return torch.cat([corners.amin(2), corners.amax(2)], -1).to(DEVICE)


def random_tokens(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def adversarial_boxes() -> Tensor:
    return torch.tensor([list(ADVERSARIAL.values())], dtype=torch.float32, device=DEVICE)


def torchvision_pool(tokens: Tensor, boxes: Tensor, out_hw: tuple[int, int], sampling: Any) -> Tensor:
    """torchvision's aligned roi_align of boxes in units of tokens."""
    sample = torch.arange(len(boxes), device=boxes.device).repeat_interleave(boxes.shape[1]).to(boxes)
    regions = torch.cat([sample[:, None], boxes.reshape(-1, 4)], 1)
    pooled = ops.roi_align(tokens.permute(0, 3, 1, 2), regions, out_hw, 1.0, -1 if sampling == "adaptive" else sampling, aligned=True)
    return pooled.view(*boxes.shape[:2], *pooled.shape[1:]).permute(0, 1, 3, 4, 2)


def with_gradient(tokens: Tensor, boxes: Tensor, upstream: Tensor | None = None, **options: Any) -> tuple[Tensor, Tensor]:
    """Return what `roi_align` gives in units of tokens, and the gradient of the tokens."""
    tokens = tokens.detach().requires_grad_()
    pooled = roi_align(tokens, boxes, frame_hw=(H, W), **options)
    pooled.backward(torch.ones_like(pooled) if upstream is None else upstream.to(pooled))
    assert tokens.grad is not None
    return pooled.detach(), tokens.grad


def assert_as_exact_as_eager(ours: Tensor, eager: Tensor, exact: Tensor) -> None:
    """Raise unless our error is at most twice eager PyTorch's in the same dtype, plus 4 ulp of the largest output."""
    assert ours.dtype == eager.dtype
    if exact.numel():
        ulp = torch.finfo(ours.dtype).eps * float(exact.abs().max())
        assert (ours - exact).abs().max() <= 2 * (eager - exact).abs().max() + 4 * ulp


# torchvision


@pytest.mark.core
@backends
@pytest.mark.parametrize(
    ("sampling", "out_hw"), [("adaptive", (3, 3)), ("adaptive", (6, 7)), ("adaptive", (1, 2)), (1, (1, 1)), (2, (2, 5)), (3, (3, 3))]
)
def test_equals_torchvision_on_random_and_adversarial_boxes(backend: Any, sampling: Any, out_hw: tuple[int, int]) -> None:
    boxes = torch.cat([random_boxes(1, 8), adversarial_boxes()], 1)
    tokens = random_tokens(1, H, W, 3).requires_grad_()
    expected = torchvision_pool(tokens, boxes, out_hw, sampling)
    upstream = random_tokens(*expected.shape, seed=2)
    expected.backward(upstream)
    pooled, gradient = with_gradient(tokens, boxes, upstream, out_hw=out_hw, sampling=sampling, backend=backend)
    torch.testing.assert_close(pooled, expected, rtol=0, atol=1e-5)
    assert (gradient - tokens.grad).abs().max() <= 1e-5 * tokens.grad.abs().max()


@pytest.mark.parametrize("mistake", ["half a token beside", "x and y swapped", "one sample more"])
def test_the_nearest_mistakes_differ_from_torchvision(mistake: str) -> None:
    boxes, tokens, sampling = random_boxes(1, 8), random_tokens(1, H, W, 3), 2
    expected = torchvision_pool(tokens, boxes, (3, 3), sampling)
    boxes = {"half a token beside": boxes + 0.5, "x and y swapped": boxes[..., [1, 0, 3, 2]]}.get(mistake, boxes)
    pooled = roi_align(tokens, boxes, frame_hw=(H, W), out_hw=(3, 3), sampling=sampling + (mistake == "one sample more"))
    assert (pooled - expected).abs().max() > 1e-2


@given(st.data())
@settings(max_examples=60)
def test_equals_torchvision_whatever_the_map_and_the_boxes(data: st.DataObject) -> None:
    h, w, seed = (data.draw(st.integers(1, 12)) for _ in range(3))
    out_hw = data.draw(st.tuples(st.integers(1, 5), st.integers(1, 5)))
    # on a grid of 1/8 bin: edges, integers and halves are hit; inverted both ways or not at all, torchvision refuses the rest
    ends = [data.draw(st.tuples(*[st.integers(-2 * 8 * size, 3 * 8 * size)] * 2)) for size in (w, h)]
    low, high = (min, max) if data.draw(st.booleans()) else (max, min)
    box = torch.tensor([[[low(ends[0]), low(ends[1]), high(ends[0]), high(ends[1])]]]) / 8.0
    tokens = random_tokens(1, h, w, 2, seed=seed).cpu()
    sampling = data.draw(st.sampled_from(["adaptive", 1, 2, 5]))
    expected = torchvision_pool(tokens, box, out_hw, sampling)
    pooled = roi_align(tokens, box, frame_hw=(h, w), out_hw=out_hw, sampling=sampling)
    torch.testing.assert_close(pooled, expected, rtol=0, atol=1e-5)


@backends
def test_boxes_much_larger_than_the_map_equal_torchvision(backend: Any) -> None:
    boxes = torch.tensor([[[-300.0, -2, 500, 3], [-90, -900, 4, 700], [0, 0, 65, 1000]]], device=DEVICE)
    tokens = random_tokens(1, H, W, 2)
    expected = torchvision_pool(tokens, boxes, (3, 2), "adaptive")
    pooled = roi_align(tokens, boxes, frame_hw=(H, W), out_hw=(3, 2), backend=backend)
    torch.testing.assert_close(pooled, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    assert (pooled != 0).any()


@backends
@pytest.mark.parametrize("sampling", ["adaptive", "area", 2])
@pytest.mark.parametrize("box", [(NAN, 0, 2, 2), (0, 0, 2, NAN), (NAN,) * 4, (0, 0, INF, 2), (-INF, -INF, INF, INF), (0, -INF, 2, 2)])
def test_boxes_without_a_place_pool_to_zero(backend: Any, sampling: Any, box: tuple[float, ...]) -> None:
    """torchvision gives 0 for them too, refuses them or reads outside its memory, by version and device."""
    boxes = torch.tensor([[box, (0, 0, W, H)]], dtype=torch.float32, device=DEVICE)
    pooled, gradient = with_gradient(random_tokens(1, H, W, 2), boxes, out_hw=(2, 3), sampling=sampling, backend=backend)
    alone, its_gradient = with_gradient(random_tokens(1, H, W, 2), boxes[:, 1:], out_hw=(2, 3), sampling=sampling, backend=backend)
    assert (pooled[:, 0] == 0).all()
    torch.testing.assert_close(pooled[:, 1:], alone)
    torch.testing.assert_close(gradient, its_gradient)


class LargestTensor(TorchDispatchMode):
    """Notes the most elements of any tensor made while it is on."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.numel = max(self.numel, *(t.numel() for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, Tensor)), 0)
        return out


def test_a_huge_box_takes_no_more_memory_than_one_as_large_as_the_map() -> None:
    def largest(side: float) -> int:
        with LargestTensor() as mode:
            weights_torch(torch.tensor([[[0, 0, side, side]]]), None, None, None, (32, 32), (32, 32), (3, 3), ADAPTIVE)
        return mode.numel

    assert largest(1e6) == largest(32.0) == 2 * 3 * 32 * READERS


def test_many_boxes_on_a_large_map_hold_a_fraction_of_what_lies_between_the_two_sums() -> None:
    tokens, upstream = random_tokens(1, 40, 40, 128).cpu(), random_tokens(1, 64, 4, 4, 128, seed=2).cpu()
    boxes = random_boxes(1, 64).cpu() * 6
    between = 64 * 4 * 40 * 128  # boxes, bins, columns, features: the first sums of all of them
    assert between > 2 * CHUNK
    tables = weights_torch(boxes, None, None, None, (40, 40), (40, 40), (4, 4), ADAPTIVE)
    for source, transposed in ((tokens, False), (upstream, True)):
        with LargestTensor() as mode:
            contract_torch(source, *tables, None, (40, 40), (4, 4), transposed)
        assert mode.numel < between / 2


@pytest.mark.parametrize("D", [5, 40])
def test_how_features_are_cut_changes_no_bit(D: int, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens, boxes = random_tokens(2, H, W, D), random_boxes(2, 7)
    monkeypatch.setattr(MODULE, "SMALL", 0)
    whole = with_gradient(tokens, boxes, out_hw=(3, 2), backend="torch")
    monkeypatch.setattr(MODULE, "CHUNK", 1)
    assert [length for _, length in MODULE._few_features(D, 1)] == ([5] if D == 5 else [16, 16, 8])
    parts = with_gradient(tokens, boxes, out_hw=(3, 2), backend="torch")
    assert all(torch.equal(one, other) for one, other in zip(whole, parts, strict=True))


@pytest.mark.skipif(DEVICE == "cuda", reason="what is small on a processor is as any on a GPU")
@pytest.mark.parametrize("wild", [0.5, NAN, INF])
@pytest.mark.parametrize("out_hw", [(3, 3), (2, 5)])
def test_small_problems_are_pooled_without_lists_and_the_same(
    out_hw: tuple[int, int], wild: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is not finite spoils what reads it, and no bit of anything else."""
    tokens, boxes, turns = random_tokens(2, H, W, 7), random_boxes(2, 8), torch.arange(16).view(2, 8)
    upstream = random_tokens(2, 8, *out_hw, 7, seed=3)
    options: dict[str, Any] = {"out_hw": out_hw, "quarter_turns": turns, "backend": "torch"}
    spoilt, above = tokens.clone(), upstream.clone()
    spoilt[0, 2, 2, 3] = above[1, 2, 1, 1, 4] = wild
    monkeypatch.setattr(MODULE, "SMALL", 0)
    listed = with_gradient(spoilt, boxes, above, **options)
    monkeypatch.undo()
    monkeypatch.setattr(MODULE, "SMALL", 2**40)
    clean = with_gradient(tokens, boxes, upstream, **options)
    dense = with_gradient(spoilt, boxes, above, **options)
    for ours, theirs, before in zip(dense, listed, clean, strict=True):
        torch.testing.assert_close(ours, theirs, equal_nan=True)
        untouched = theirs.isfinite()
        assert untouched.any()
        if not math.isfinite(wild):
            assert torch.equal(ours[untouched], before[untouched]) and not untouched.all()


@pytest.mark.skipif(DEVICE == "cuda", reason="of the processor's path")
def test_the_number_of_threads_changes_no_bit() -> None:
    """Of small problems, which one thread sums whatever there are, and of large ones."""
    threads = torch.get_num_threads()
    try:
        for D in (7, 700):
            results = []
            for each in (1, 2, 5):
                torch.set_num_threads(each)
                results.append(with_gradient(random_tokens(2, H, W, D), random_boxes(2, 8), out_hw=(3, 3), backend="torch"))
            assert all(torch.equal(one, first) for others in results for one, first in zip(others, results[0], strict=True))
    finally:
        torch.set_num_threads(threads)


# the definition in float64


@backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("R", "D"), [(0, 5), (1, 1), (7, 37), (1, 384)])
@pytest.mark.parametrize("sampling", ["adaptive", "area"])
def test_outputs_and_gradients_are_as_exact_as_eager(backend: Any, sampling: Any, R: int, D: int, dtype: torch.dtype) -> None:
    boxes = random_boxes(2, R)
    tokens = random_tokens(2, H, W, D, dtype=dtype)
    random = torch.Generator().manual_seed(3)
    options: dict[str, Any] = {
        "out_hw": (3, 2),
        "sampling": sampling,
        "quarter_turns": torch.randint(-4, 5, (2, R), generator=random).to(DEVICE),
        "flipped": (torch.rand(2, R, generator=random) < 0.5).to(DEVICE),
        "valid": (torch.rand(2, R, generator=random) < 0.8).to(DEVICE),
    }
    upstream = random_tokens(2, R, 3, 2, D, dtype=dtype, seed=4)
    exact = with_gradient(tokens.double(), boxes, upstream, **options)
    eager = with_gradient(tokens, boxes, upstream, backend="reference", **options)
    for ours, theirs, truth in zip(with_gradient(tokens, boxes, upstream, backend=backend, **options), eager, exact, strict=True):
        assert_as_exact_as_eager(ours, theirs, truth)


@pytest.mark.core
@backends
@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (33, 2), (8, 35)])
def test_maps_of_any_size_are_as_exact_as_eager(backend: Any, shape: tuple[int, int]) -> None:
    boxes, tokens, upstream = random_boxes(1, 2), random_tokens(1, *shape, 2), random_tokens(1, 2, 2, 3, 2, seed=4)
    exact, eager, ours = (
        with_gradient(t, boxes, upstream, out_hw=(2, 3), backend=b)
        for t, b in ((tokens.double(), "auto"), (tokens, "reference"), (tokens, backend))
    )
    for result in zip(ours, eager, exact, strict=True):
        assert_as_exact_as_eager(*result)


def test_weights_rounded_once_would_fail_the_rule_of_bfloat16_on_exact_outputs() -> None:
    """The rule's control: what the kernel would give if it did not carry a second part of each weight."""
    tokens, boxes = torch.ones(1, H, W, 1), torch.tensor([[[0.3, 0.6, 3.1, 4.2]]])
    rows, columns = weights_torch(boxes, None, None, None, (H, W), (H, W), (3, 3), 3)
    exact, eager = (roi_align(t, boxes, frame_hw=(H, W), out_hw=(3, 3), sampling=3, backend="reference") for t in (tokens.double(), tokens))
    once = torch.einsum("brph,brqw,bhwd->brpqd", rows.bfloat16().float(), columns.bfloat16().float(), tokens)
    with pytest.raises(AssertionError):
        assert_as_exact_as_eager(once, eager, exact)


# mirrors, turns, places


@backends
@pytest.mark.parametrize("out_hw", [(2, 4), (4, 4), (8, 1)])
@pytest.mark.parametrize("sampling", ["adaptive", "area", 2])
def test_mirrors_and_turns_equal_flip_and_rot90_exactly(backend: Any, sampling: Any, out_hw: tuple[int, int]) -> None:
    """Tokens and weights whose sums are exact in float32, in any order."""
    tokens = random_tokens(1, 8, 8, 3).mul(8).round()
    boxes = torch.tensor([[[1.0, 2, 5, 6]]], device=DEVICE).expand(1, 8, 4)
    turns = torch.arange(-3, 5, device=DEVICE)[None]
    flipped = torch.tensor([[True, False, False, True, False, True, True, False]], device=DEVICE)
    options: dict[str, Any] = {"frame_hw": (8, 8), "sampling": sampling, "backend": backend}
    turned = roi_align(tokens, boxes, out_hw=out_hw, quarter_turns=turns, flipped=flipped, **options)
    upright = [roi_align(tokens, boxes[:, :1], out_hw=hw, **options)[0, 0] for hw in (out_hw, out_hw[::-1])]
    for r in range(8):
        pooled = upright[int(turns[0, r]) % 2]
        expected = torch.rot90(pooled.flip(1) if flipped[0, r] else pooled, int(turns[0, r]), (0, 1))
        assert torch.equal(turned[0, r], expected)
    assert not torch.equal(turned[0, 2], turned[0, 3])  # a mirror more


@pytest.mark.parametrize("out_hw", [(3, 3), (2, 5)])
def test_mirrors_and_turns_change_no_bit_of_the_torch_path(out_hw: tuple[int, int]) -> None:
    tokens, boxes = random_tokens(2, H, W, 7), random_boxes(2, 8)
    turns, flipped = torch.arange(16, device=DEVICE).view(2, 8), torch.arange(16, device=DEVICE).view(2, 8) % 8 > 3
    options: dict[str, Any] = {"frame_hw": (H, W), "backend": "torch"}
    turned = roi_align(tokens, boxes, out_hw=out_hw, quarter_turns=turns, flipped=flipped, **options)
    upright = [roi_align(tokens, boxes, out_hw=hw, **options) for hw in (out_hw, out_hw[::-1])]
    for b in range(2):
        for r in range(8):
            pooled = upright[r % 2][b, r]
            assert torch.equal(turned[b, r], torch.rot90(pooled.flip(1) if flipped[b, r] else pooled, r, (0, 1)))


@backends
@pytest.mark.parametrize("sampling", ["adaptive", 1, 4, "area"])
def test_constants_pool_to_the_constant_and_ramps_to_the_center_of_the_bin(backend: Any, sampling: Any) -> None:
    y, x = torch.meshgrid(torch.arange(6.0) + 0.5, torch.arange(9.0) + 0.5, indexing="ij")
    tokens = torch.stack([torch.full_like(x, 3), x, y], -1)[None].to(DEVICE)
    inside = random_boxes(1, 6) if sampling != "area" else torch.tensor([[[1.0, 2, 7, 4]]], device=DEVICE)  # a cell's ramp is a stair
    inside = inside.clamp(min=0.5).minimum(torch.tensor([8.5, 5.5, 8.5, 5.5], device=DEVICE))
    inside = torch.cat([inside, torch.tensor([[[0.5, 0.5, 8.5, 5.5]]], device=DEVICE)], 1) if sampling != "area" else inside
    pooled = roi_align(tokens, inside, frame_hw=(6, 9), out_hw=(2, 3), sampling=sampling, backend=backend)
    width, height = inside[..., 2] - inside[..., 0], inside[..., 3] - inside[..., 1]
    center_x = inside[..., 0, None] + (torch.arange(3, device=DEVICE) + 0.5) / 3 * width[..., None]
    center_y = inside[..., 1, None] + (torch.arange(2, device=DEVICE) + 0.5) / 2 * height[..., None]
    torch.testing.assert_close(pooled[..., 0], torch.full_like(pooled[..., 0], 3), rtol=0, atol=1e-5)
    torch.testing.assert_close(pooled[..., 1], center_x[:, :, None].expand(-1, -1, 2, -1), rtol=0, atol=1e-5)
    torch.testing.assert_close(pooled[..., 2], center_y[..., None].expand(-1, -1, -1, 3), rtol=0, atol=1e-5)


def test_a_ramp_in_a_box_nearer_the_edge_than_half_a_token_is_not_its_center() -> None:
    tokens = (torch.arange(W) + 0.5).expand(1, H, W)[..., None]
    pooled = roi_align(tokens, torch.tensor([[[0.0, 1, 2, 3]]]), frame_hw=(H, W), out_hw=(1, 2), sampling=4)
    assert abs(pooled[0, 0, 0, 0, 0] - 0.5) > 1e-2


def test_boxes_are_in_units_of_the_frame_on_each_axis() -> None:
    tokens, boxes = random_tokens(1, H, W, 3), random_boxes(1, 4)
    scaled = boxes * torch.tensor([16.0, 4, 16, 4], device=DEVICE)
    pooled = roi_align(tokens, boxes, frame_hw=(H, W), out_hw=(2, 2))
    assert torch.equal(roi_align(tokens, scaled, frame_hw=(H * 4, W * 16), out_hw=(2, 2)), pooled)
    assert not torch.equal(roi_align(tokens, scaled, frame_hw=(H * 16, W * 4), out_hw=(2, 2)), pooled)


def test_one_number_is_a_square() -> None:
    tokens, boxes = random_tokens(2, H, W, 3), random_boxes(2, 3)
    pooled = roi_align(tokens, boxes, frame_hw=(7.5, 7.5), out_hw=(3, 3))
    assert torch.equal(roi_align(tokens, boxes, frame_hw=7.5, out_hw=3), pooled)
    assert torch.equal(roi_align(tokens, boxes, frame_hw=[7.5, np.float32(7.5)], out_hw=[3, np.int64(3)]), pooled)
    assert torch.equal(roi_align_pairs(tokens, boxes, frame_hw=7.5, out_hw=3)[0], pooled)


# the mean over an area


def area_mean(tokens: Tensor, box: list[float], out_hw: tuple[int, int]) -> Tensor:
    """Add up, token by token, the area that a bin shares with each, and divide by what it shares with the map: float64."""
    x0, y0, x1, y1 = box
    pooled = torch.zeros(*out_hw, tokens.shape[-1], dtype=torch.float64)
    for p in range(out_hw[0]):
        for q in range(out_hw[1]):
            top, bottom = (y0 + (y1 - y0) * (p + end) / out_hw[0] for end in (0, 1))
            left, right = (x0 + (x1 - x0) * (q + end) / out_hw[1] for end in (0, 1))
            total = 0.0
            for y in range(tokens.shape[0]):
                for x in range(tokens.shape[1]):
                    shared = max(0.0, min(bottom, y + 1) - max(top, y)) * max(0.0, min(right, x + 1) - max(left, x))
                    pooled[p, q] += shared * tokens[y, x].double()
                    total += shared
            pooled[p, q] /= total or 1
    return pooled


@backends
def test_area_is_the_mean_over_the_part_of_a_bin_that_lies_on_the_map(backend: Any) -> None:
    tokens, boxes = random_tokens(1, H, W, 2), torch.cat([random_boxes(1, 6), adversarial_boxes()], 1)
    pooled = roi_align(tokens, boxes, frame_hw=(H, W), out_hw=(3, 2), sampling="area", backend=backend)
    for r, box in enumerate(boxes[0].tolist()):
        expected = area_mean(tokens[0].cpu(), box, (3, 2)).float().to(DEVICE)
        torch.testing.assert_close(pooled[0, r], expected, rtol=0, atol=1e-5)


def test_samples_are_no_mean_over_an_area() -> None:
    tokens, box = random_tokens(1, H, W, 2).cpu(), [0.3, 0.2, 3.1, 4.4]
    pooled = roi_align(tokens, torch.tensor([[box]]), frame_hw=(H, W), out_hw=(3, 2), sampling=3)
    assert (pooled[0, 0] - area_mean(tokens[0], box, (3, 2))).abs().max() > 1e-2


# memory: strides, poison, wild values


@backends
def test_strides_of_tokens_and_gradients_do_not_matter(backend: Any) -> None:
    boxes = random_boxes(2, 1)
    options: dict[str, Any] = {"frame_hw": (H, W), "out_hw": (2, 2), "backend": backend}
    with_class = random_tokens(2, 1 + H * W, 6)
    views = {
        "the class token sliced off": with_class[:, 1:].unflatten(1, (H, W)),
        "channels first": random_tokens(2, 6, H, W).permute(0, 2, 3, 1),
        "rows and columns swapped": random_tokens(2, W, H, 6).transpose(1, 2),
        "every second channel": random_tokens(2, H, W, 12)[..., ::2],
        "one picture for all": random_tokens(1, H, W, 6).expand(2, -1, -1, -1),
        "one token for all": random_tokens(1, 1, 1, 6).expand(2, H, W, -1),
    }
    for words, view in views.items():
        pooled = roi_align(view, boxes, **options)
        torch.testing.assert_close(pooled, roi_align(view.contiguous(), boxes, **options), msg=words)
        assert pooled.is_contiguous()

    tokens = random_tokens(2, H, W, 6)
    upstreams = {
        "of a sum": torch.ones(1, device=DEVICE).expand(2, 1, 2, 2, 6),
        "bins swapped": random_tokens(2, 1, 2, 2, 6).transpose(2, 3),
        "every second": random_tokens(2, 1, 2, 2, 12)[..., ::2],
    }
    for words, upstream in upstreams.items():
        _, gradient = with_gradient(tokens, boxes, upstream, out_hw=(2, 2), backend=backend)
        _, expected = with_gradient(tokens, boxes, upstream.contiguous(), out_hw=(2, 2), backend=backend)
        torch.testing.assert_close(gradient, expected, msg=words)
        assert gradient.is_contiguous()


@backends
@pytest.mark.parametrize("R", [0, 1, 3])
def test_every_element_is_written(backend: Any, R: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every buffer is full of NaN first."""
    new_empty = Tensor.new_empty

    def poisoned(like: Tensor, *shape: Any, **options: Any) -> Tensor:
        empty = new_empty(like, *shape, **options)
        return empty.fill_(NAN) if empty.is_floating_point() else empty

    tokens, boxes = random_tokens(2, H, W, 18), random_boxes(2, R)
    turns = torch.arange(2 * R, device=DEVICE).view(2, R)
    options: dict[str, Any] = {"out_hw": (2, 3), "quarter_turns": turns, "backend": backend}
    expected = with_gradient(tokens, boxes, **options)
    monkeypatch.setattr(Tensor, "new_empty", poisoned)
    for ours, theirs in zip(with_gradient(tokens, boxes, **options), expected, strict=True):
        assert torch.equal(ours, theirs)


@backends
@pytest.mark.parametrize("wild", [NAN, INF, -INF])
def test_a_wild_token_spoils_only_the_outputs_that_read_it(backend: Any, wild: float) -> None:
    tokens = random_tokens(1, H, W, 18)
    boxes = torch.tensor([[[0.0, 0, 2, 2], [2, 3, 4, 5], [0, 0, 4, 5], [1, 1, 3, 4]]], device=DEVICE)
    turns = torch.tensor([[0, 1, 2, 3]], device=DEVICE)
    options: dict[str, Any] = {"out_hw": (3, 3), "quarter_turns": turns, "backend": backend}
    one = torch.zeros_like(tokens)
    one[0, 1, 1, 17] = 1
    reads = with_gradient(one, boxes, **options)[0] > 0
    clean = with_gradient(tokens, boxes, **options)[0]
    pooled = with_gradient(tokens.masked_fill(one > 0, wild), boxes, **options)[0]
    assert torch.equal(~pooled.isfinite(), reads)
    assert reads.any() and not reads[:, 1].any() and not reads[:, 2].all()
    torch.testing.assert_close(pooled[~reads], clean[~reads])


@backends
def test_a_wild_gradient_spoils_only_the_tokens_that_its_output_read(backend: Any) -> None:
    tokens, boxes = random_tokens(1, H, W, 3), torch.tensor([[[0.0, 0, 2, 2], [1, 1, 4, 5]]], device=DEVICE)
    upstream = random_tokens(1, 2, 3, 3, 3, seed=5)
    one = torch.zeros_like(upstream)
    one[0, 0, 2, 1, 0] = 1
    options: dict[str, Any] = {"out_hw": (3, 3), "backend": backend}
    read = with_gradient(tokens, boxes, one, **options)[1] > 0
    clean = with_gradient(tokens, boxes, upstream, **options)[1]
    gradient = with_gradient(tokens, boxes, upstream.masked_fill(one > 0, NAN), **options)[1]
    assert torch.equal(gradient.isnan(), read)
    assert read.any() and not read.all()
    torch.testing.assert_close(gradient[~read], clean[~read])


@backends
def test_boxes_that_are_not_valid_pool_to_zero_and_give_no_gradient(backend: Any) -> None:
    tokens, boxes = random_tokens(1, H, W, 3), random_boxes(1, 4)
    valid = torch.tensor([[True, False, False, True]], device=DEVICE)
    pooled, gradient = with_gradient(tokens, boxes, out_hw=(2, 2), valid=valid, backend=backend)
    kept, its_gradient = with_gradient(tokens, boxes[:, [0, 3]], out_hw=(2, 2), backend=backend)
    assert (pooled[~valid] == 0).all()
    torch.testing.assert_close(pooled[valid], kept[0])
    torch.testing.assert_close(gradient, its_gradient)


@backends
def test_results_repeat_to_the_bit(backend: Any) -> None:
    tokens, boxes = random_tokens(2, H, W, 37), random_boxes(2, 7)
    once, again = (with_gradient(tokens, boxes, out_hw=(3, 3), backend=backend) for _ in range(2))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(once, again, strict=True))


# PyTorch around it


@pytest.mark.core
@backends
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_into_one_graph(backend: Any, dynamic: bool) -> None:
    def pool(tokens: Tensor, boxes: Tensor, turns: Tensor) -> Tensor:
        return roi_align(tokens * 2, boxes, frame_hw=(H, W), out_hw=(2, 3), quarter_turns=turns, backend=backend).sin()

    compiled = torch.compile(pool, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for R in (2, 3):
        tokens, boxes = random_tokens(2, H, W, 4), random_boxes(2, R)
        turns = torch.arange(2 * R, device=DEVICE).view(2, R)
        results = []
        for call in (pool, compiled):
            leaf = tokens.clone().requires_grad_()
            out = call(leaf, boxes, turns)
            out.sum().backward()
            results += [(out, leaf.grad)]
        torch.testing.assert_close(results[0], results[1])


@pytest.mark.slow
def test_compiles_with_inductor() -> None:
    pool = torch.compile(lambda tokens, boxes: roi_align(tokens.cos(), boxes, frame_hw=(H, W), out_hw=(2, 3)).sin(), fullgraph=True)
    tokens, boxes = random_tokens(2, H, W, 4).requires_grad_(), random_boxes(2, 3)
    expected = roi_align(tokens.cos(), boxes, frame_hw=(H, W), out_hw=(2, 3)).sin()
    torch.testing.assert_close(pool(tokens, boxes), expected)
    ours, theirs = (torch.autograd.grad(out.sum(), tokens)[0] for out in (pool(tokens, boxes), expected))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.core
@backends
def test_functional_gradients_equal_backward(backend: Any) -> None:
    tokens, boxes = random_tokens(1, H, W, 3), random_boxes(1, 3)
    options: dict[str, Any] = {"out_hw": (2, 2), "backend": backend}
    gradient = torch.func.grad(lambda t: roi_align(t, boxes, frame_hw=(H, W), **options).sum())(tokens)
    torch.testing.assert_close(gradient, with_gradient(tokens, boxes, **options)[1])


@pytest.mark.core
@backends
def test_second_gradients_equal_those_of_the_definition(backend: Any) -> None:
    tokens, boxes = random_tokens(1, H, W, 3), random_boxes(1, 3)
    turns = torch.tensor([[0, 1, 3]], device=DEVICE)

    def twice(tokens: Tensor, backend: Any) -> list[Tensor]:
        tokens = tokens.detach().requires_grad_()
        pooled = roi_align(tokens, boxes, frame_hw=(H, W), out_hw=(2, 3), quarter_turns=turns, backend=backend)
        (first,) = torch.autograd.grad(pooled.pow(3).sum(), tokens, create_graph=True)
        (second,) = torch.autograd.grad(first.pow(2).sum(), tokens)
        return [first.detach(), second]

    for ours, exact in zip(twice(tokens, backend), twice(tokens.double(), "reference"), strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=1e-4, atol=1e-5)
        assert exact.abs().max() > 0.1


@pytest.mark.core
@pytest.mark.parametrize("op", ["roi_weights", "roi_contract"])
@pytest.mark.parametrize("turned", [False, True])
def test_operators_pass_opcheck(op: str, turned: bool) -> None:
    boxes, out_hw = random_boxes(2, 3), [2, 3]
    turns = torch.arange(6, device=DEVICE).view(2, 3) if turned else None
    weights = (boxes, turns, None, None, [H, W], [10.0, 20.0], out_hw, ADAPTIVE, "torch")
    rows, columns = torch.ops.wherefrom.roi_weights(*weights)
    calls = {"roi_weights": [weights], "roi_contract": []}
    for source, transposed in ((random_tokens(2, H, W, 5), False), (random_tokens(2, 3, 2, 3, 5, dtype=torch.bfloat16), True)):
        calls["roi_contract"].append((source, rows, columns, turns, [H, W], out_hw, transposed, "torch"))
    for arguments in calls[op]:
        torch.library.opcheck(getattr(torch.ops.wherefrom, op).default, arguments)


@pytest.mark.core
@backends
def test_autocast_changes_nothing(backend: Any) -> None:
    boxes = random_boxes(1, 3)
    for dtype in (torch.float32, torch.bfloat16):
        tokens = random_tokens(1, H, W, 4, dtype=dtype)
        expected = with_gradient(tokens, boxes, out_hw=(2, 2), backend=backend)
        with torch.autocast(DEVICE, torch.bfloat16):
            results = with_gradient(tokens, boxes, out_hw=(2, 2), backend=backend)
        assert all(ours.dtype == dtype and torch.equal(ours, theirs) for ours, theirs in zip(results, expected, strict=True))


@pytest.mark.core
def test_float64_takes_the_definition() -> None:
    tokens, boxes = random_tokens(1, H, W, 3).double(), random_boxes(1, 3)
    options: dict[str, Any] = {"frame_hw": (H, W), "out_hw": (2, 2)}
    pooled = roi_align(tokens, boxes, **options)
    assert pooled.dtype == torch.float64
    assert torch.equal(pooled, roi_align(tokens, boxes, backend="reference", **options))


# bad input

GOOD: dict[str, Any] = {"tokens": torch.zeros(2, H, W, 3), "boxes": torch.zeros(2, 3, 4), "frame_hw": (H, W), "out_hw": (2, 2)}
BAD: list[tuple[dict[str, Any], str]] = [
    (
        {"tokens": torch.zeros(H, W, 3)},
        "tokens has shape (5, 4, 3), expected (B, H, W, D); tokens are channels-last, e.g. maps.permute(0, 2, 3, 1)",
    ),
    ({"tokens": torch.zeros(2, H, W, 3).long()}, "tokens is int64, expected float32 or bfloat16 or float16 or float64"),
    (
        {"tokens": torch.zeros(2, 0, W, 3)},
        "tokens has shape (2, 0, 4, 3): there is no token to pool; a map has at least one row and column",
    ),
    (
        {"tokens": torch.zeros(2, H, W, 3).double(), "backend": "torch"},
        'tokens is float64, which backend="torch" does not take; use backend="reference"',
    ),
    ({"boxes": torch.zeros(3, 4)}, "boxes has shape (3, 4), expected (2, R, 4); add the batch axis with boxes[None]"),
    ({"boxes": torch.zeros(1, 3, 4)}, "boxes has shape (1, 3, 4), expected (2, R, 4)"),
    ({"boxes": torch.zeros(2, 3, 4).double()}, "boxes is float64, expected float32"),
    ({"boxes": torch.zeros(2, 3, 4, device="meta")}, "boxes is on meta, tokens on cpu; move one of them"),
    ({"boxes": torch.zeros(2, 3, 4).requires_grad_()}, "boxes requires a gradient, and pooling gives none for them; pass boxes.detach()"),
    ({"quarter_turns": torch.zeros(2, 3)}, "quarter_turns is float32, expected int64 or int32 or int16 or int8 or uint8"),
    ({"quarter_turns": torch.zeros(3).long()}, "quarter_turns has shape (3,), expected (2, 3); one a box"),
    ({"flipped": torch.zeros(2, 3).long()}, "flipped is int64, expected bool"),
    ({"flipped": torch.zeros(2, 1).bool()}, "flipped has shape (2, 1), expected (2, 3); one a box"),
    ({"valid": torch.zeros(2, 3, device="meta").bool()}, "valid is on meta, tokens on cpu; move one of them"),
    ({"frame_hw": (224, 0)}, "frame_hw=(224, 0): needs two sides above 0, (height, width) of the frame of the boxes, or one for a square"),
    (
        {"frame_hw": (224, NAN)},
        "frame_hw=(224, nan): needs two sides above 0, (height, width) of the frame of the boxes, or one for a square",
    ),
    (
        {"frame_hw": torch.ones(2, 2)},
        "frame_hw=a tensor of shape (2, 2): needs two sides above 0, (height, width) of the frame of the boxes, or one for a square",
    ),
    ({"frame_hw": ""}, "frame_hw='': needs two sides above 0, (height, width) of the frame of the boxes, or one for a square"),
    (
        {"out_hw": torch.tensor(3)},
        "out_hw=a tensor of shape (): needs two whole numbers of bins, (rows, columns) of the result, or one for a square",
    ),
    ({"out_hw": True}, "out_hw=True: needs two whole numbers of bins, (rows, columns) of the result, or one for a square"),
    ({"out_hw": (2, 2, 2)}, "out_hw=(2, 2, 2): needs two whole numbers of bins, (rows, columns) of the result, or one for a square"),
    ({"out_hw": (2, 0)}, "out_hw=(2, 0): needs two whole numbers of bins, (rows, columns) of the result, or one for a square"),
    ({"out_hw": (2, 2.0)}, "out_hw=(2, 2.0): needs two whole numbers of bins, (rows, columns) of the result, or one for a square"),
    ({"sampling": 0}, "sampling=0: take one of 'adaptive', 'area', or a whole number of samples above 0"),
    ({"sampling": "exact"}, "sampling='exact': take one of 'adaptive', 'area', or a whole number of samples above 0"),
    ({"sampling": True}, "sampling=True: take one of 'adaptive', 'area', or a whole number of samples above 0"),
    ({"backend": "cuda"}, "backend='cuda': take one of auto, triton, torch, reference"),
]


@pytest.mark.core
@pytest.mark.parametrize(("change", "message"), BAD, ids=[message.split(",")[0] for _, message in BAD])
def test_bad_input_is_refused_by_name(change: dict[str, Any], message: str) -> None:
    roi_align(**GOOD)
    with pytest.raises(ValueError) as error:  # noqa: PT011 (the whole message is compared)
        roi_align(**GOOD | change)
    assert str(error.value) == message
