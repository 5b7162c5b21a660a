"""The pair loss against autograd through the materialized formula in float64, that formula against single pairs in plain Python, and
the promises of the operator: memory, repeatability, compile, torch.func, autocast, what it refuses.

The rule: error at most twice that of PyTorch in the same dtype, plus 4 units in the last place of the largest value.
"""

import itertools
import math
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from wherefrom.kernels import pair_loss_torch
from wherefrom.kernels.pair_loss import Activation, Pairs, Regression, _pair_loss_op, pair_loss
from wherefrom.kernels.pair_loss_reference import PairLoss
from wherefrom.kernels.pair_targets_reference import CHANNELS, PairUnits, Scale
from wherefrom.pipeline.laws import Disjoint
from wherefrom.train.encoder import Encoder, Features, ModelSettings
from wherefrom.train.objective import Progress
from wherefrom.train.objectives.pairs import law_records, pair_terms
from wherefrom.train.objectives.spatial import SpatialPrediction, SpatialSettings

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ACTIVATIONS, LOSSES, PAIRS = get_args(Activation), get_args(Regression), (*get_args(Pairs), "list")
LEARNED = ("a", "b", "weight", "output_bias", "hidden_bias")


def problem(samples: int, boxes: int, hidden: int, *, scale: Scale = "log_area", loss: str = "squared", seed: int = 0) -> dict[str, Any]:
    """Return arguments of `pair_loss` with every option given, in float32."""
    random = torch.Generator().manual_seed(seed)
    channels = len(CHANNELS[scale])
    outputs = 2 * channels if loss == "gaussian_nll" else channels

    def normal(*shape: int, spread: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=random) * spread).to(DEVICE)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=random).to(DEVICE)

    corner = uniform(samples, boxes, 2) * 200
    weight, output_bias = normal(outputs, hidden, spread=hidden**-0.5), normal(outputs, spread=0.3)
    weight[channels:] *= 0.25  # log-variances: their exponential makes much of any rounding
    return {
        "a": normal(samples, boxes, hidden),
        "b": normal(samples, boxes, hidden),
        "boxes": torch.cat([corner, corner + 8 + 60 * uniform(samples, boxes, 2)], -1),
        "weight": weight,
        "output_bias": output_bias,
        "hidden_bias": normal(hidden, spread=0.3),
        "valid": uniform(samples, boxes) < 0.9,
        "flipped": uniform(samples, boxes) < 0.5,
        "quarter_turns": torch.randint(0, 4, (samples, boxes), generator=random).to(DEVICE),
        "units": PairUnits(scale=scale, mean=normal(channels), std=uniform(channels) + 0.5),
        "channel_weights": uniform(channels) + 0.5,
        "loss": loss,
        "beta": 0.7,
    }


def chosen_pairs(pairs: str, boxes: int) -> str | Tensor:
    """Return the word, or for "list" a list with a pair twice, a box with itself, and one that no other order would have."""
    if pairs != "list":
        return pairs
    listed = torch.tensor([[0, 0], [1, 0], [1, 0], [0, 2], [2, 1], [5, 3], [4, 60]])
    return (listed % boxes).to(DEVICE)


def results(
    arguments: dict[str, Any], *, learned: tuple[str, ...] = LEARNED, dtype: torch.dtype | None = None, **more: Any
) -> dict[str, Tensor]:
    """Return every part of the result and every gradient, by name; arguments may hold "upstream", what the loss is multiplied by."""
    arguments = arguments | more
    upstream = arguments.pop("upstream", torch.ones(()))
    for name in LEARNED:
        value = arguments[name].detach()
        arguments[name] = (value if dtype is None else value.to(dtype)).requires_grad_(name in learned)
    found = pair_loss(**arguments)
    if learned:
        (found.loss * upstream.to(found.loss)).sum().backward()
    gradients = {f"d_{name}": arguments[name].grad for name in learned}
    return {name: value.detach() for name, value in found._asdict().items()} | gradients


Results = dict[str, Tensor]


def errors(found: Results, truth: Results) -> dict[str, float]:
    """Return the largest error of each result, in units in the last place of its largest value."""
    said = {}
    for name, exact in truth.items():
        assert found[name].shape == exact.shape, name
        largest = float(exact.abs().max()) if exact.numel() else 0.0
        unit = torch.finfo(found[name].dtype).eps if found[name].is_floating_point() else 1.0
        place = 2.0 ** math.floor(math.log2(largest)) if largest else 1.0
        said[name] = float((found[name].double() - exact.double()).abs().max()) / (unit * place) if exact.numel() else 0.0
    return said


def assert_exact(found: Sequence[Results], eager: Sequence[Results], truth: Sequence[Results]) -> None:
    """Raise unless every result keeps the rule of this file; over some problems, as eager's error in one may be small by luck."""
    ours, its = ([errors(*both) for both in zip(results, truth, strict=True)] for results in (found, eager))
    for name in truth[0]:
        assert found[0][name].dtype == eager[0][name].dtype, name
        error, allowed = (max(one[name] for one in each) for each in (ours, its))
        assert error <= 2 * allowed + 4, f"{name}: error {error:.3g}, eager {allowed:.3g} units in the last place"


def assert_as_reference(*problems: dict[str, Any], backend: str = "torch") -> None:
    """Raise unless a path's results are those of the formula in float64, to what PyTorch reaches in the dtype given."""
    truth = [results(arguments, dtype=torch.float64, backend="reference") for arguments in problems]
    eager = [results(arguments, backend="reference") for arguments in problems]
    assert_exact([results(arguments, backend=backend) for arguments in problems], eager, truth)


@pytest.mark.core
@pytest.mark.parametrize(("activation", "loss", "pairs"), list(itertools.product(ACTIVATIONS, LOSSES, PAIRS)))
def test_loss_and_gradients_are_those_of_float64(activation: str, loss: str, pairs: str) -> None:
    sizes = (
        (40, 1, "log_area", True),
        (20, 2, "ratio", False),
        (20, 2, "ratio", True),
        (2, 63, "log_sides", True),
        (2, 63, "log_area", False),
        (3, 40, "none", True),
    )
    assert_as_reference(
        *(
            problem(samples, boxes, 37, scale=scale, loss=loss, seed=seed)
            | {"activation": activation, "pairs": chosen_pairs(pairs, boxes), "per_sample": per_sample}
            | {"upstream": torch.linspace(-2, 3, samples) if per_sample else torch.tensor(1.7)}
            for seed, (samples, boxes, scale, per_sample) in enumerate(sizes)
        )
    )


def test_pairs_of_196_tokens_are_those_of_float64() -> None:
    assert_as_reference(*(problem(1, 196, 24, seed=seed) for seed in range(3)))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("activation", "loss"), [("gelu", "squared"), ("gelu_tanh", "huber"), ("relu", "smooth_l1"), ("gelu", "gaussian_nll")]
)
def test_wide_heads_of_196_tokens_are_those_of_float64(activation: str, loss: str) -> None:
    assert_as_reference(*(problem(1, 196, 512, loss=loss, seed=seed) | {"activation": activation} for seed in range(3)))


@pytest.mark.core
@pytest.mark.parametrize("mistake", ["swapped", "diagonal", "unturned", "tanh", "late weights"])
def test_the_nearest_mistakes_break_the_rule(mistake: str) -> None:
    arguments = problem(3, 9, 37)
    if mistake == "late weights":
        arguments |= {"per_sample": True, "upstream": torch.tensor([0.3, -2.0, 1.1])}
    truth, eager = (results(arguments, dtype=dtype, backend="reference") for dtype in (torch.float64, torch.float32))
    wrong, more = dict(arguments), {}
    if mistake == "swapped":
        wrong["a"], wrong["b"] = wrong["b"], wrong["a"]
    elif mistake == "diagonal":
        more["pairs"] = "others"
    elif mistake == "unturned":
        wrong["quarter_turns"] = None
    elif mistake == "tanh":
        more["activation"] = "gelu_tanh"
    found = results(wrong, backend="torch", **more)
    if mistake == "late weights":  # what a sum over samples, scaled afterwards, would give
        wrong["upstream"] = wrong["upstream"].mean().expand(3)
        found["d_weight"] = results(wrong, backend="torch")["d_weight"]
    with pytest.raises(AssertionError, match="error"):
        assert_exact([found], [eager], [truth])


def gelu(x: float) -> float:
    return 0.5 * x * (1 + math.erf(x / math.sqrt(2)))


SINGLE = {
    "squared": lambda e: e * e,
    "l1": abs,
    "smooth_l1": lambda e: e * e / 1.4 if abs(e) < 0.7 else abs(e) - 0.35,
    "huber": lambda e: e * e / 2 if abs(e) < 0.7 else 0.7 * (abs(e) - 0.35),
}


@pytest.mark.parametrize("loss", LOSSES)
def test_the_formula_is_that_of_single_pairs(loss: str) -> None:
    """Means, counts and R2 too, against plain Python, for upright boxes."""
    boxes = 5
    arguments = problem(2, boxes, 4, loss=loss) | {"flipped": None, "quarter_turns": None}
    found = pair_loss(**arguments, pairs="disjoint", backend="reference")
    units = arguments["units"]
    mean, std = units.mean.double().cpu().numpy(), units.std.double().cpu().numpy()
    numbers = {name: value.double().cpu().numpy() for name, value in arguments.items() if isinstance(value, Tensor)}
    losses, errors, wanted, counted = [], [], [], []
    for b, r, t in itertools.product(range(2), range(boxes), range(boxes)):
        (rx0, ry0, rx1, ry1), (tx0, ty0, tx1, ty1) = numbers["boxes"][b, r], numbers["boxes"][b, t]
        overlap = max(0, min(rx1, tx1) - max(rx0, tx0)) * max(0, min(ry1, ty1) - max(ry0, ty0))
        if overlap > 0 or not (numbers["valid"][b, r] and numbers["valid"][b, t]):
            continue
        hidden = [gelu(x) for x in numbers["a"][b, r] + numbers["b"][b, t] + numbers["hidden_bias"]]
        said = numbers["weight"] @ hidden + numbers["output_bias"]
        w, h = rx1 - rx0, ry1 - ry0
        target = [(tx0 + tx1 - rx0 - rx1) / 2 / w, (ty0 + ty1 - ry0 - ry1) / 2 / h, 0.5 * math.log((tx1 - tx0) * (ty1 - ty0) / (w * h))]
        target = (np.array(target) - mean) / std
        error = said[:3] - target
        single = (
            [(s + e * e * math.exp(-s)) / 2 for e, s in zip(error, said[3:], strict=True)] if len(said) == 6 else map(SINGLE[loss], error)
        )
        losses.append(list(single)), errors.append(error), wanted.append(target), counted.append(b)
    expected = np.mean(losses, 0)
    np.testing.assert_allclose(found.channel_loss.cpu(), expected, rtol=1e-5)
    np.testing.assert_allclose(float(found.loss), expected @ numbers["channel_weights"], rtol=1e-5)
    np.testing.assert_allclose(found.squared_error.cpu(), np.square(errors).mean(0), rtol=1e-5)
    np.testing.assert_allclose(found.target_variance.cpu(), np.var(wanted, 0), rtol=1e-5)
    np.testing.assert_allclose(found.r2.cpu(), 1 - np.square(errors).mean(0) / np.var(wanted, 0), rtol=1e-4)
    assert found.counted.tolist() == [counted.count(0), counted.count(1)] and 0 < len(counted) < 40


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_words_for_pairs_are_lists_of_them(backend: str) -> None:
    arguments = problem(2, 7, 16)
    each = torch.cartesian_prod(torch.arange(7), torch.arange(7)).to(DEVICE)
    for word, listed in (("all", each), ("others", each[each[:, 0] != each[:, 1]])):
        one, other = (results(arguments, pairs=pairs, backend=backend) for pairs in (word, listed.int()))
        for name in one:
            torch.testing.assert_close(one[name], other[name], rtol=1e-5, atol=1e-6)
    boxes = arguments["boxes"].clone()
    boxes[:, 1] = boxes[:, 0] + torch.tensor([1000.0, 0, 1000, 0], device=DEVICE)
    boxes[:, 2:] = boxes[:, :1]
    boxes[:, 2, 2:] = boxes[:, 1, 2:]  # over both 0 and 1, up to where 1 ends
    boxes[:, 3] = boxes[:, 1] + (boxes[:, 1, 2:] - boxes[:, 1, :2]).repeat(1, 2)  # touches 1 at a corner
    counts = pair_loss(**(arguments | {"boxes": boxes, "valid": None}), pairs="disjoint", backend=backend).counted
    apart = [(0, 1), (0, 3), (1, 3), (1, 4), (1, 5), (1, 6), (2, 3), (3, 4), (3, 5), (3, 6)]
    assert counts.tolist() == [2 * len(apart)] * 2


@given(st.tuples(*[st.integers(0, 9)] * 3), st.tuples(*[st.integers(0, 30)] * 3), st.integers(1, 200))
def test_tiles_hold_every_pair_once_and_no_more_than_allowed(lengths: tuple[int, ...], starts: tuple[int, ...], at_once: int) -> None:
    seen = np.zeros([start + length for start, length in zip(starts, lengths, strict=True)], int)
    for tile in pair_loss_torch._tiles(starts, lengths, at_once):
        assert 0 < math.prod(part.stop - part.start for part in tile) <= at_once
        seen[tile] += 1
    assert (seen[tuple(slice(start, None) for start in starts)] == 1).all() and seen.sum() == math.prod(lengths)


@settings(max_examples=20)
@given(st.integers(1, 12), st.integers(1, 40), st.integers(1, 300))
def test_how_pairs_are_cut_changes_nothing_but_rounding(boxes: int, hidden: int, tile: int) -> None:
    arguments = problem(3, boxes, hidden)
    whole = results(arguments, backend="torch", pairs="disjoint")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pair_loss_torch, "TILE", tile * hidden)
        patch.setattr(pair_loss_torch, "TARGETS_AT_ONCE", 2 * tile)
        cut = results(arguments, backend="torch", pairs="disjoint")
    for name in whole:
        torch.testing.assert_close(cut[name], whole[name], rtol=1e-4, atol=1e-6)


@pytest.mark.skipif(DEVICE == "cuda", reason="a GPU has the kernels for every size")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_few_pairs_are_materialized_in_float32_and_many_are_not(dtype: torch.dtype) -> None:
    arguments = problem(2, 8, 37)
    arguments |= {name: arguments[name].to(dtype) for name in ("a", "weight")}
    expected = results(arguments, backend="torch")
    learned = {name: arguments[name].clone().requires_grad_() for name in LEARNED}
    with Calls() as calls, torch.autocast(DEVICE, torch.bfloat16):
        found = pair_loss(**(arguments | learned))
        assert not calls.grads
        pair_loss(**problem(2, 120, 37))
        assert calls.grads == [False]
    found.loss.backward()
    for name, value in expected.items():
        same = learned[name.removeprefix("d_")].grad if name.startswith("d_") else getattr(found, name)
        torch.testing.assert_close(same.detach(), value)


def test_gradients_of_samples_are_weighted_before_they_are_summed() -> None:
    arguments, upstream = problem(3, 6, 16), torch.tensor([0.0, -2.0, 5.0])
    found = results(arguments, upstream=upstream, per_sample=True, backend="torch")
    batched = {"a", "b", "boxes", "valid", "flipped", "quarter_turns"}
    total = {f"d_{name}": 0 for name in ("weight", "output_bias", "hidden_bias")}
    for b in range(3):
        alone = results({name: value[b : b + 1] if name in batched else value for name, value in arguments.items()}, backend="torch")
        torch.testing.assert_close(found["loss"][b], alone["loss"])
        torch.testing.assert_close(found["d_a"][b], alone["d_a"][0] * upstream[b])
        total = {name: value + alone[name] * upstream[b] for name, value in total.items()}
    for name, value in total.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6)


def test_only_what_requires_a_gradient_gets_one() -> None:
    arguments = problem(2, 5, 8)
    every = results(arguments, backend="torch")
    for learned in itertools.chain.from_iterable(itertools.combinations(LEARNED, count) for count in (1, 2)):
        found = results(arguments, learned=learned, backend="torch")
        for name in learned:
            assert torch.equal(found[f"d_{name}"], every[f"d_{name}"])


class Calls(TorchDispatchMode):
    """Remember the arguments of the operator."""

    def __init__(self) -> None:
        super().__init__()
        self.grads: list[bool] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.wherefrom.pair_loss.default:
            self.grads.append(args[-2])
        return func(*args, **(kwargs or {}))


def test_gradients_are_not_computed_where_none_is_wanted() -> None:
    arguments = problem(2, 5, 8)
    with Calls() as calls:
        plain = pair_loss(**arguments, backend="torch")
        learned = arguments | {"a": arguments["a"].clone().requires_grad_()}
        with torch.no_grad():
            unseen = pair_loss(**learned, backend="torch")
        wanted = pair_loss(**learned, backend="torch")
    assert calls.grads == [False, False, True]
    assert not plain.loss.requires_grad and not unseen.loss.requires_grad and wanted.loss.requires_grad
    assert not any(part.requires_grad for part in wanted[1:])
    for one, other in zip(unseen, wanted, strict=True):
        assert torch.equal(one, other.detach())


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_what_is_not_valid_reaches_nothing(backend: str) -> None:
    arguments = problem(2, 6, 16)
    arguments["valid"] = torch.ones(2, 6, dtype=torch.bool, device=DEVICE)
    arguments["valid"][0, 3] = False
    sound = results(arguments, backend=backend)
    spoilt = dict(arguments)
    for name, value in (("a", math.nan), ("b", math.inf), ("boxes", 0.0)):
        spoilt[name] = arguments[name].clone()
        spoilt[name][0, 3] = value
    found = results(spoilt, backend=backend)
    for name in sound:
        assert torch.equal(found[name], sound[name]), name
    assert not found["d_a"][0, 3].any()
    assert results(spoilt | {"valid": None, "boxes": arguments["boxes"]}, backend=backend)["loss"].isnan()
    if DEVICE == "cpu":
        with pytest.raises(ValueError, match="no finite size above 0; mark it as not valid"):
            results(spoilt | {"valid": None}, backend=backend)


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_the_loss_of_no_pairs_is_0(backend: str, per_sample: bool) -> None:
    arguments = problem(2, 4, 8)
    arguments["valid"] = torch.zeros(2, 4, dtype=torch.bool, device=DEVICE)
    empty = torch.zeros(0, 2, dtype=torch.int64, device=DEVICE)
    for more in ({}, {"pairs": empty}):
        found = results(arguments, backend=backend, per_sample=per_sample, **more)
        assert all(not value.any() for value in found.values())


def test_views_of_larger_tensors_and_expanded_ones_are_read_right() -> None:
    arguments = problem(3, 6, 16)
    expected = results(arguments, per_sample=True, backend="torch")
    strided = dict(arguments)
    strided["a"] = torch.cat([torch.full((3, 1, 16), math.nan, device=DEVICE), arguments["a"]], 1)[:, 1:]
    strided["b"] = arguments["b"].mT.contiguous().mT
    strided["weight"] = arguments["weight"].repeat_interleave(2, 1)[:, ::2]
    strided["boxes"] = arguments["boxes"].flip(-1).contiguous().flip(-1)
    found = results(strided, upstream=torch.tensor(1.0).expand(3), per_sample=True, backend="torch")
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-6)

    one = problem(1, 6, 16) | {"valid": None}
    wide = {
        name: value.expand(3, *value.shape[1:]) if name in ("a", "b", "boxes", "flipped", "quarter_turns") else value
        for name, value in one.items()
    }
    assert not wide["a"].is_contiguous()
    torch.testing.assert_close(results(wide, backend="torch")["d_a"].sum(0), results(one, backend="torch")["d_a"][0])


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Whatever is allocated without being written holds NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory and torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(before)


@pytest.mark.parametrize("pairs", PAIRS)
def test_every_element_is_written(poisoned: None, pairs: str) -> None:
    for boxes in (1, 13):
        found = results(problem(3, boxes, 37), pairs=chosen_pairs(pairs, boxes), backend="torch")
        assert not any(value.isnan().any() for value in found.values())


@pytest.mark.parametrize("pairs", PAIRS)
def test_results_repeat_bit_for_bit(pairs: str) -> None:
    arguments = problem(3, 40, 64)
    one, other = (results(arguments, pairs=chosen_pairs(pairs, 40), backend="torch") for _ in range(2))
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    arguments = problem(2, 20, 37)
    arguments |= {name: arguments[name].to(dtype) for name in LEARNED}
    assert_as_reference(arguments)
    found = results(arguments, backend="torch")
    assert found["loss"].dtype == torch.float32 and all(found[f"d_{name}"].dtype == dtype for name in LEARNED)
    exact = results(arguments, dtype=torch.float32, backend="torch")
    assert torch.equal(found["loss"], exact["loss"])
    assert torch.equal(found["d_a"], exact["d_a"].to(dtype))


def test_float16_gradients_are_scaled_before_they_are_rounded() -> None:
    arguments = problem(2, 60, 16)
    arguments["a"] = arguments["a"].half()
    scale = torch.tensor(2.0**16)
    found = results(arguments, upstream=scale, backend="torch")["d_a"].double() / scale
    exact = results(arguments, backend="torch", dtype=torch.float32)["d_a"].double()
    torch.testing.assert_close(found, exact, rtol=1e-3, atol=2e-11)
    assert (exact.half().double() - exact).abs().max() > 1e-8  # what rounding first would lose


@pytest.mark.core
def test_autocast_leaves_the_mathematics_alone() -> None:
    """Halves in bfloat16, as a linear layer gives them there, parameters in float32."""
    arguments = problem(2, 12, 32)
    arguments |= {name: arguments[name].bfloat16() for name in ("a", "b")}
    plain = results(arguments, backend="torch")
    with torch.autocast(DEVICE, torch.bfloat16):
        found = results(arguments, backend="torch")
    assert all(torch.equal(found[name], plain[name]) for name in plain)
    assert found["d_a"].dtype == torch.bfloat16 and found["d_weight"].dtype == torch.float32


@pytest.mark.core
@pytest.mark.parametrize("per_sample", [False, True])
def test_compiles_without_a_break(per_sample: bool) -> None:
    arguments, upstream = problem(2, 5, 8), torch.tensor([0.5, 2.0]) if per_sample else None
    torch.compiler.reset()

    def step(a: Tensor, b: Tensor, weight: Tensor, output_bias: Tensor, hidden_bias: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
        said = pair_loss(
            2 * a,
            b,
            boxes,
            weight=weight,
            output_bias=output_bias,
            hidden_bias=hidden_bias,
            pairs="others",
            per_sample=per_sample,
            backend="torch",
        )
        loss = said.loss if upstream is None else said.loss * upstream.to(a)
        return loss.sum(), said.r2

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    both = []
    for call in (step, compiled):
        inputs = [arguments[name].clone().requires_grad_() for name in LEARNED]
        loss, said = call(*inputs, arguments["boxes"])
        loss.backward()
        both.append([loss.detach(), said, *(value.grad for value in inputs)])
    for one, other in zip(*both, strict=True):
        torch.testing.assert_close(one, other)
    loss, _ = compiled(*inputs, arguments["boxes"])
    with pytest.raises(RuntimeError, match=r"create_graph=False|double backward"):
        sum(torch.autograd.grad(loss, inputs, create_graph=True)[0].sum(), inputs[0].sum()).backward()


@pytest.mark.core
def test_torch_func_differentiates_it() -> None:
    arguments = problem(2, 5, 8)
    expected = results(arguments, backend="torch")

    def loss(a: Tensor, weight: Tensor) -> tuple[Tensor, PairLoss]:
        said = pair_loss(**(arguments | {"a": a, "weight": weight}), backend="torch")
        return said.loss, said

    (of_a, of_weight), said = torch.func.grad(loss, argnums=(0, 1), has_aux=True)(arguments["a"], arguments["weight"])
    assert torch.equal(of_a, expected["d_a"]) and torch.equal(of_weight, expected["d_weight"])
    assert torch.equal(said.squared_error, expected["squared_error"])


@pytest.mark.core
@pytest.mark.parametrize("outer", ["penalty", "of the loss's weight", "func"])
def test_a_second_derivative_is_refused_never_0(outer: str) -> None:
    arguments = problem(2, 5, 8)
    a, factor = arguments["a"].clone().requires_grad_(), torch.ones((), device=DEVICE, requires_grad=True)

    def penalty(backend: str) -> None:
        loss = pair_loss(**(arguments | {"a": a}), backend=backend).loss * factor
        (gradient,) = torch.autograd.grad(loss, a, create_graph=True)
        target = a if outer == "penalty" else factor
        assert torch.autograd.grad(gradient.square().sum() + target.sum(), target)[0].abs().sum() > 0

    def curvature(backend: str) -> None:
        def slope(x: Tensor) -> Tensor:
            return torch.func.grad(lambda y: pair_loss(**(arguments | {"a": y}), backend=backend).loss)(x).square().sum()

        assert torch.func.grad(slope)(arguments["a"]).any()

    differentiate = curvature if outer == "func" else penalty
    with pytest.raises(RuntimeError, match='pair_loss has no second derivative; use backend="reference"'):
        differentiate("torch")
    differentiate("reference")


@pytest.mark.core
@pytest.mark.parametrize(("pairs", "grads", "per_sample"), [("all", True, False), ("list", True, True), ("disjoint", False, False)])
def test_the_operator_is_what_it_says(pairs: str, grads: bool, per_sample: bool) -> None:
    arguments = problem(2, 5, 8)
    listed = chosen_pairs(pairs, 5)
    tensors = [arguments[name] for name in (*LEARNED, "boxes")]
    plain = [listed if isinstance(listed, Tensor) else None, *(arguments[name] for name in ("valid", "flipped", "quarter_turns"))]
    plain += [None, arguments["units"].mean, arguments["units"].std, arguments["channel_weights"]]
    words = [pairs, "reference", "log_area", "view", "gelu", "huber", 0.5, per_sample, grads, "torch"]
    torch.library.opcheck(torch.ops.wherefrom.pair_loss.default, (*tensors, *plain, *words))


class Allocated(TorchDispatchMode):
    """Count the bytes of live tensors that were not there before, those inside the operator too, and remember the peak."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in tree_leaves(args):
            self.knows(tensor)
        if func is torch.ops.wherefrom.pair_loss.default:
            with self:
                out = _pair_loss_op(*args)
        else:
            out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            size = 0 if self.knows(tensor) else tensor.untyped_storage().nbytes()
            self.now += size
            self.peak = max(self.peak, self.now)
            if size:
                weakref.finalize(tensor.untyped_storage(), self.freed, size)
        return out

    def knows(self, tensor: Any) -> bool:
        """Say whether a tensor's memory was seen before; that of a freed one may be another's."""
        if not isinstance(tensor, Tensor):
            return True
        storage = tensor.untyped_storage()
        if storage._cdata in self.known:
            return True
        self.known.add(storage._cdata)
        weakref.finalize(storage, self.known.discard, storage._cdata)
        return False

    def freed(self, size: int) -> None:
        self.now -= size


def test_memory_is_a_fortieth_of_the_materialized_forms() -> None:
    peaks = {}
    arguments = problem(1, 196, 512)
    for backend in ("reference", "torch"):
        with Allocated() as allocated:
            results(arguments, backend=backend)
        peaks[backend] = allocated.peak
    hidden = 196 * 196 * 512 * 4
    assert peaks["reference"] > 2 * hidden  # the hidden activations, and what they came from
    assert peaks["torch"] > 2 * 784 * 512 * 4 * 0.9  # the two buffers are seen
    assert peaks["reference"] > 40 * peaks["torch"]


def changed_box(right: float) -> Callable[[dict[str, Any]], Any]:
    """Give one box, of those that are valid, another right edge."""

    def change(arguments: dict[str, Any]) -> Tensor:
        arguments["valid"][1, 3] = True
        boxes = arguments["boxes"].clone()
        boxes[1, 3] = torch.tensor([0, 0, right, 4])
        return boxes

    return change


def with_gradient(name: str) -> Callable[[dict[str, Any]], Any]:
    return lambda arguments: arguments[name].clone().requires_grad_()


@pytest.mark.core
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"a": torch.zeros(5, 8)}, r"a has shape \(5, 8\), expected \(B, N, H\)"),
        ({"b": torch.zeros(2, 4, 8)}, r"b has shape \(2, 4, 8\), expected \(2, 5, 8\)"),
        ({"boxes": torch.zeros(5, 4)}, r"boxes has shape \(5, 4\), expected \(2, 5, 4\)"),
        ({"weight": torch.zeros(8, 3)}, r"weight has shape \(8, 3\), expected \(3, 8\)"),
        ({"loss": "gaussian_nll"}, r"weight has shape \(3, 8\), expected \(6, 8\)"),
        ({"output_bias": torch.zeros(4)}, r"output_bias has shape \(4,\), expected \(3,\)"),
        ({"hidden_bias": torch.zeros(3)}, r"hidden_bias has shape \(3,\), expected \(8,\)"),
        ({"valid": torch.ones(2, 5)}, "valid is float32, expected bool"),
        ({"valid": torch.ones(5, dtype=torch.bool)}, r"valid has shape \(5,\), expected \(2, 5\)"),
        ({"flipped": torch.zeros(2, 4)}, r"flipped has shape \(2, 4\), expected \(2, 5\)"),
        ({"flipped": torch.zeros(2, 5)}, "flipped is float32, expected bool"),
        ({"quarter_turns": torch.full((2, 5), 0.9)}, "quarter_turns is float32, expected int64 or int32 or int16 or int8 or uint8"),
        ({"boxes": changed_box(math.nan)}, r"boxes\[1, 3\] is \(0, 0, nan, 4\), which has no finite size above 0; mark it as not valid"),
        ({"boxes": changed_box(math.inf)}, r"boxes\[1, 3\] is \(0, 0, inf, 4\), which has no finite size above 0; mark it as not valid"),
        ({"boxes": changed_box(0)}, r"boxes\[1, 3\] is \(0, 0, 0, 4\), which has no finite size above 0; mark it as not valid"),
        ({"picture_hw": torch.zeros(2)}, r"picture_hw has shape \(2,\), expected \(2, 2\)"),
        ({"channel_weights": torch.zeros(2)}, r"channel_weights has shape \(2,\), expected \(3,\)"),
        ({"units": PairUnits(scale="ratio")}, r"weight has shape \(3, 8\), expected \(4, 8\)"),
        ({"pairs": torch.zeros(3, dtype=torch.long)}, r"pairs has shape \(3,\), expected \(P, 2\)"),
        ({"pairs": torch.zeros(3, 2)}, "pairs is float32, expected int64 or int32"),
        ({"pairs": torch.tensor([[0, 4], [5, 0]])}, r"pairs\[1\] is \(5, 0\), boxes are numbered 0 to 4"),
        ({"pairs": "some"}, r"pairs='some': take one of all, others, disjoint, or a tensor \(P, 2\)"),
        ({"a": torch.zeros(2, 5, 8, dtype=torch.float64)}, "a is float64, expected float32 or float16 or bfloat16"),
        ({"boxes": torch.zeros(2, 5, 4, dtype=torch.bfloat16)}, "boxes is bfloat16, expected float32 or float64"),
        ({"b": torch.zeros(2, 5, 8, device="meta")}, "b is on meta, a on cpu; move one of them"),
        ({"boxes": with_gradient("boxes")}, r"boxes requires a gradient, which pair_loss does not give; pass boxes.detach\(\)"),
        (
            {"units": PairUnits(std=torch.ones(3, requires_grad=True))},
            r"std requires a gradient, which pair_loss does not give; pass std.detach\(\)",
        ),
        ({"activation": "silu"}, "activation='silu': take one of gelu, gelu_tanh, relu"),
        ({"loss": "mse"}, "loss='mse': take one of squared, l1, smooth_l1, huber, gaussian_nll"),
        ({"units": PairUnits(position="picture")}, 'picture_hw is None, position="picture" divides by it; pass picture_hw=source_size'),
        ({"loss": "huber", "beta": 0.0}, r'beta=0.0: needs to be above 0; for \|e\| alone take loss="l1"'),
        ({"backend": "cuda"}, "backend='cuda': take one of auto, triton, torch, reference"),
    ],
)
def test_what_does_not_fit_is_named(changes: dict[str, Any], message: str) -> None:
    arguments = {name: value.cpu() if isinstance(value, Tensor) else value for name, value in problem(2, 5, 8).items()}
    arguments["units"] = PairUnits()
    changes = {name: value(arguments) if callable(value) else value for name, value in changes.items()}
    with pytest.raises(ValueError, match=f"^{message}$") as caught:
        pair_loss(**(arguments | changes))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "spatial",
    [
        SpatialSettings(law=Disjoint(), views=4, weight_position=0.3, weight_scale=0.7),
        SpatialSettings(weight_scale=0.0, stop="reference"),
        SpatialSettings(scale="log_sides", both_orders=True, loss="smooth_l1", stop="encoder"),
    ],
    ids=["disjoint", "one way", "both orders"],
)
def test_sp_learns_the_same_from_an_additive_head_as_from_its_predictions(spatial: SpatialSettings) -> None:
    objective = SpatialPrediction(replace(spatial, head="additive", hidden=24))
    torch.manual_seed(0)
    objective.setup(Encoder(ModelSettings(view_size_px=48, patch_size_px=12, width=16, depth=1, heads=1)))
    record = law_records(objective.families[0], pictures=5)
    views = objective.families[0].views
    valid = torch.ones(5, views, dtype=torch.bool)
    valid[2, 1] = False
    summary = torch.randn(5, views, 16, requires_grad=True)
    features = Features(summary=summary, tokens=torch.zeros(5, views, 1, 1, 16))
    objective.features = lambda *_: features  # type: ignore[method-assign]
    batch = SimpleNamespace(family=lambda _: SimpleNamespace(geometry=record, valid=valid))

    fused = objective(batch, None, Progress(update=0, updates=1, updates_per_epoch=1))
    said, wanted, counted = objective.predict(features)[0], objective.targets(record), objective.pair_mask(record, valid)
    plain = pair_terms(said, wanted, counted, objective.channels, loss=spatial.loss, beta=spatial.smooth_l1_beta)
    left_out = 1 - counted.float().mean()
    torch.testing.assert_close(dict(fused.losses), dict(plain.losses))
    torch.testing.assert_close(dict(fused.meters), {**plain.meters, "pairs_left_out": left_out}, rtol=1e-5, atol=1e-5)
    learned = [summary, *objective.head.parameters()]
    one, other = (
        torch.autograd.grad(sum(objective.weights[term] * terms.losses[term] for term in terms.losses), learned, materialize_grads=True)
        for terms in (fused, plain)
    )
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)
    assert one[1].any() and one[0].any() == (spatial.stop != "encoder")
