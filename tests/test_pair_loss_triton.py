"""The Triton kernels of the pair loss, run by Triton's interpreter where there is no GPU: held to the rule of test_pair_loss.py, and
their own promises: launches over parts of a batch, segments, offsets beyond 2^31, an activation exact to rounding.
"""

import importlib
import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import Any, get_args

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from wherefrom.kernels.pair_loss import Activation, Pairs, Regression, pair_loss
from wherefrom.kernels.pair_targets_reference import CHANNELS, PairUnits, PositionUnit, Scale

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
kernels = pytest.importorskip("wherefrom.kernels.pair_loss_triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ACTIVATIONS, LOSSES, PAIRS = get_args(Activation), get_args(Regression), (*get_args(Pairs), "list")
LEARNED = ("a", "b", "weight", "output_bias", "hidden_bias")


def problem(
    samples: int,
    boxes: int,
    hidden: int,
    *,
    scale: Scale = "log_area",
    position: PositionUnit = "reference",
    loss: str = "squared",
    seed: int = 0,
) -> dict[str, Any]:
    """Return arguments of `pair_loss` with every option given."""
    random = torch.Generator().manual_seed(seed)
    channels = len(CHANNELS[scale])
    outputs = 2 * channels if loss == "gaussian_nll" else channels

    def normal(*shape: int, spread: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=random) * spread).to(DEVICE)

    corner = torch.rand(samples, boxes, 2, generator=random) * 200
    return {
        "a": normal(samples, boxes, hidden),
        "b": normal(samples, boxes, hidden),
        "boxes": torch.cat([corner, corner + 8 + 60 * torch.rand(samples, boxes, 2, generator=random)], -1).to(DEVICE),
        "weight": normal(outputs, hidden, spread=0.5 * hidden**-0.5),
        "output_bias": normal(outputs, spread=0.3),
        "hidden_bias": normal(hidden, spread=0.3),
        "valid": (torch.rand(samples, boxes, generator=random) < 0.9).to(DEVICE),
        "flipped": (torch.rand(samples, boxes, generator=random) < 0.5).to(DEVICE),
        "quarter_turns": torch.randint(-3, 4, (samples, boxes), generator=random).to(DEVICE),
        "picture_hw": torch.tensor([[300, 280]]).expand(samples, 2).to(DEVICE),
        "units": PairUnits(scale=scale, position=position, mean=normal(channels), std=normal(channels).abs() + 0.5),
        "channel_weights": normal(channels).abs() + 0.5,
        "loss": loss,
        "beta": 0.7,
    }


def chosen_pairs(pairs: str, boxes: int) -> str | Tensor:
    """Return the word, or for "list" a list with a pair twice, a box with itself and boxes that are in none."""
    return pairs if pairs != "list" else (torch.tensor([[0, 0], [1, 0], [1, 0], [0, 2], [2, 1], [5, 3]]) % boxes).to(DEVICE)


def results(arguments: dict[str, Any], backend: str, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Return every part of the result and every gradient, by name."""
    arguments = dict(arguments)
    for name in LEARNED:
        value = arguments[name].detach()
        arguments[name] = (value if dtype is None else value.to(dtype)).requires_grad_()
    found = pair_loss(**arguments, backend=backend)
    if found.loss.ndim:
        (found.loss * torch.linspace(-2, 3, len(found.loss)).to(found.loss)).sum().backward()
    else:
        found.loss.backward()
    return {name: value.detach() for name, value in found._asdict().items()} | {f"d_{name}": arguments[name].grad for name in LEARNED}


def errors(found: dict[str, Tensor], truth: dict[str, Tensor]) -> dict[str, float]:
    """Return the largest error of each result in units in the last place of its largest value."""
    said = {}
    for name, exact in truth.items():
        largest = float(exact.abs().max())
        unit = torch.finfo(found[name].dtype).eps if found[name].is_floating_point() else 1.0
        place = 2.0 ** math.floor(math.log2(largest)) if largest else 1.0
        said[name] = float((found[name].double() - exact.double()).abs().max()) / (unit * place)
    return said


def assert_exact(*problems: dict[str, Any]) -> None:
    """Raise unless errors against float64 are at most twice those of eager PyTorch, plus 4 units in the last place."""
    truth = [results(arguments, "reference", torch.float64) for arguments in problems]
    ours, its = (
        [errors(results(arguments, backend), exact) for arguments, exact in zip(problems, truth, strict=True)]
        for backend in ("triton", "reference")
    )
    for name in truth[0]:
        error, allowed = (max(one[name] for one in each) for each in (ours, its))
        assert error <= 2 * allowed + 4, f"{name}: error {error:.3g}, eager {allowed:.3g} units in the last place"


CASES = list(itertools.product(ACTIVATIONS, LOSSES, PAIRS))


def is_in_the_cut(case: tuple[str, str, str]) -> bool:
    """A third of the cases, in which every two options meet."""
    activation, loss, pairs = case
    return (LOSSES.index(loss) + PAIRS.index(pairs)) % len(ACTIVATIONS) == ACTIVATIONS.index(activation)


def test_every_two_options_meet_in_the_cut() -> None:
    cut = [case for case in CASES if is_in_the_cut(case)]
    assert 3 * len(cut) == len(CASES)
    for first, second in itertools.combinations(range(3), 2):
        assert {(case[first], case[second]) for case in cut} == {(case[first], case[second]) for case in CASES}


@pytest.mark.parametrize(
    ("activation", "loss", "pairs"), [case if is_in_the_cut(case) else pytest.param(*case, marks=pytest.mark.slow) for case in CASES]
)
def test_loss_and_gradients_are_those_of_float64(activation: str, loss: str, pairs: str) -> None:
    number = CASES.index((activation, loss, pairs))
    scale, position = get_args(Scale)[number % 4], get_args(PositionUnit)[number // 3 % 3]
    assert_exact(
        *(
            problem(samples, boxes, hidden, scale=scale, position=position, loss=loss)
            | {"activation": activation, "pairs": chosen_pairs(pairs, boxes), "per_sample": number % 2 == 0}
            for samples, boxes, hidden in ((2, 1 + number // 4 % 2, 4), (1, 5, 5))
        )
    )


def test_63_boxes_are_those_of_float64() -> None:
    assert_exact(problem(1, 63, 3))


@pytest.mark.slow
def test_196_boxes_are_those_of_float64() -> None:
    assert_exact(problem(1, 196, 6))


@pytest.mark.slow
@pytest.mark.parametrize("pairs", PAIRS)
def test_wide_heads_are_those_of_float64(pairs: str) -> None:
    assert_exact(problem(2, 13, 130) | {"pairs": chosen_pairs(pairs, 13)})


@pytest.mark.core
def test_a_shifted_box_breaks_the_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = problem(1, 9, 7)
    moved = arguments["boxes"] + torch.tensor([0.5, 0, 0.5, 0], device=DEVICE) * (torch.arange(9, device=DEVICE) == 4)[:, None]
    truth = results(arguments, "reference", torch.float64)
    wrong = errors(results(arguments | {"boxes": moved}, "triton"), truth)
    right = errors(results(arguments, "triton"), truth)
    assert wrong["loss"] > 100 * max(1, right["loss"]) and wrong["d_a"] > 100 * max(1, right["d_a"])


@pytest.mark.parametrize("pairs", ["all", "list"])
@pytest.mark.parametrize("per_sample", [False, True])
def test_how_the_work_is_cut_changes_nothing_but_rounding(monkeypatch: pytest.MonkeyPatch, pairs: str, per_sample: bool) -> None:
    arguments = problem(3, 9, 3) | {"pairs": chosen_pairs(pairs, 9), "per_sample": per_sample}
    whole = results(arguments, "triton")
    for samples, warps in ((2, 1), (64, 10**6)):
        monkeypatch.setattr(kernels, "SAMPLES_AT_ONCE", samples)
        monkeypatch.setattr(kernels, "BACKWARD_WARPS", warps)
        cut = results(arguments, "triton")
        for name in whole:
            torch.testing.assert_close(cut[name], whole[name], rtol=1e-5, atol=1e-6)


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Whatever is allocated without being written holds NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory and torch.empty(3, device=DEVICE).isnan().all()
    yield
    torch.use_deterministic_algorithms(before)


@pytest.mark.parametrize("pairs", PAIRS)
def test_every_element_is_written_and_results_repeat_bit_for_bit(poisoned: None, pairs: str) -> None:
    for boxes in (1, 11):
        arguments = problem(2, boxes, 5) | {"pairs": chosen_pairs(pairs, boxes)}
        one, other = (results(arguments, "triton") for _ in range(2))
        assert not any(value.isnan().any() for value in one.values())
        assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.core
def test_low_precision_inputs_are_computed_in_float32() -> None:
    arguments = problem(2, 5, 6)
    arguments |= {"a": arguments["a"].bfloat16(), "weight": arguments["weight"].half()}
    found, exact = results(arguments, "triton"), results(arguments, "triton", torch.float32)
    assert torch.equal(found["loss"], exact["loss"]) and torch.equal(found["d_b"], exact["d_b"])
    assert found["d_a"].dtype == torch.bfloat16 and torch.equal(found["d_a"], exact["d_a"].bfloat16())


class LargeOperations(TorchDispatchMode):
    """Counts operations, by name, that read or write floats as many as a, views and bare allocations left out."""

    def __init__(self, numbers: int) -> None:
        super().__init__()
        self.numbers, self.counts = numbers, Counter[str]()

    def __torch_dispatch__(self, func: Any, types: object, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::")
        touched = tree_leaves(result if name.startswith("new_") else (args, kwargs, result))  # what is new looks at no numbers
        large = any(isinstance(each, Tensor) and each.is_floating_point() and each.numel() >= self.numbers for each in touched)
        if large and not func.is_view and "empty" not in name:
            self.counts[name] += 1
        return result


@pytest.mark.core
@pytest.mark.parametrize(("hidden", "dtype"), [(16, torch.float32), (16, torch.bfloat16), (20, torch.float32)])
def test_what_is_large_is_copied_no_oftener_than_a_kernel_needs(hidden: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """a and b, each once, in fours for the forward kernel; converted or padded if need be; gradients are scaled once, in backward."""
    for kernel in ("pair_loss_forward_kernel", "pair_loss_backward_kernel"):
        monkeypatch.setattr(kernels, kernel, defaultdict(lambda: lambda *_, **__: None))
    module = importlib.import_module("wherefrom.kernels.pair_loss")
    arguments = problem(8, 5, hidden)
    learned = [arguments[name].to(dtype if name in "ab" else torch.float32) for name in LEARNED]
    learned[-1] = None
    words = ("all", "reference", "log_area", "view", "gelu", "squared", 1.0, False, True, "triton")
    with LargeOperations(learned[0].numel()) as forward:
        _, *found = module._pair_loss_op(*learned, arguments["boxes"], *[None] * 8, *words)
    wanted = {"clone": 2} | ({"_to_copy": 2} if dtype == torch.bfloat16 else {}) | ({"constant_pad_nd": 2} if hidden % 16 else {})
    assert dict(forward.counts) == wanted
    with LargeOperations(learned[0].numel()) as backward:
        module._scale_gradients(learned[0], torch.tensor(1.0, device=DEVICE), *found[4:], dtype, dtype, None, None, None)
    assert dict(backward.counts) == {"mul": 2} | ({"_to_copy": 2} if dtype == torch.bfloat16 else {})


def test_without_gradients_only_the_loss_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = problem(2, 5, 6)
    monkeypatch.setattr(kernels, "_backward", None)
    found, expected = (pair_loss(**arguments, backend=backend) for backend in ("triton", "torch"))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("case", ["no boxes", "no samples", "no pairs", "none valid"])
def test_nothing_to_do_is_done(case: str) -> None:
    arguments = problem(0 if case == "no samples" else 2, 0 if case == "no boxes" else 3, 4)
    if case == "no pairs":
        arguments["pairs"] = torch.zeros(0, 2, dtype=torch.int64, device=DEVICE)
    if case == "none valid":
        arguments["valid"] = torch.zeros(2, 3, dtype=torch.bool, device=DEVICE)
    for backend in ("triton", "torch", "reference"):
        found = results(arguments, backend)
        assert all(not value.any() for value in found.values()), backend


def test_a_pair_that_names_no_box_makes_the_loss_nan_and_reads_nothing() -> None:
    """Unchecked, as on a GPU without check_values."""
    arguments = problem(1, 3, 4)
    tensors = [arguments[name] for name in (*LEARNED, "boxes")]
    listed = torch.tensor([[0, 1], [2, 3], [-1, 0]], device=DEVICE)
    words = ["list", "reference", "log_area", "view", "gelu", "squared", 1.0, False, True, "triton"]
    loss, *_, of_a, of_b, _, _ = torch.ops.wherefrom.pair_loss(*tensors, listed, *[None] * 7, *words)
    assert loss.isnan() and of_a.shape == of_b.shape == (1, 3, 4)
    words[-1], sound = "torch", listed[:1]
    assert not torch.ops.wherefrom.pair_loss(*tensors, sound, *[None] * 7, *words)[0].isnan()


@triton.jit
def activate_kernel(active_ptr, steep_ptr, x_ptr, ACTIVATION: tl.constexpr, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    active, steep = kernels.activate(tl.load(x_ptr + at), ACTIVATION)
    tl.store(active_ptr + at, active)
    tl.store(steep_ptr + at, steep)


@pytest.mark.core
@pytest.mark.parametrize(("activation", "active_units", "steep_units"), [("relu", 0, 0), ("gelu", 2, 3), ("gelu_tanh", 2, 3)])
def test_activations_are_exact_to_rounding(activation: str, active_units: float, steep_units: float) -> None:
    """In units in the last place of 1, and of x where that is larger."""
    x = torch.linspace(-12, 12, 2**14).to(DEVICE)
    active, steep = torch.empty_like(x), torch.empty_like(x)
    activate_kernel[(1,)](active, steep, x, ACTIVATION=activation, SIZE=len(x))
    exact = x.double().requires_grad_()
    wanted = (
        torch.relu(exact)
        if activation == "relu"
        else torch.nn.functional.gelu(exact, approximate="tanh" if "tanh" in activation else "none")
    )
    wanted.sum().backward()
    unit = torch.finfo(torch.float32).eps * x.abs().clamp(min=1).double()
    assert ((active.double() - wanted.detach()).abs() / unit).max() <= active_units
    assert exact.grad is not None
    assert ((steep.double() - exact.grad).abs() / unit).max() <= steep_units


@triton.jit
def offset_kernel(out_ptr, N):
    tl.store(out_ptr, kernels.wide(N) * N)
    tl.store(out_ptr + 1, tl.program_id(0).to(tl.int64) + N * N)  # the negative control


@pytest.mark.core
def test_products_of_lengths_pass_2_to_the_31() -> None:
    """Planes of slopes are N^2 apart: `wide` is what keeps that from wrapping."""
    out = torch.zeros(2, dtype=torch.int64, device=DEVICE)
    offset_kernel[(1,)](out, 70_000)
    assert out[0] == 70_000**2 and out[1] == 70_000**2 - 2**32


@pytest.mark.core
def test_launches_are_those_that_are_made() -> None:
    """What is compiled ahead of time names every argument, and nothing else."""
    for launch in kernels.launches():
        names = launch.kernel.arg_names
        assert set(names) == set(launch.types) | set(launch.constants) and not set(launch.types) & set(launch.constants)
    assert len({launch.name for launch in kernels.launches()}) == len(kernels.launches())
