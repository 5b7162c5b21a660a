"""Every derivative of the pair loss that PyTorch can ask for, against the definition in float64: right or refused, on every path and size.

"small" and "large" are backend="auto" on either side of the size from which nothing is stored, on the same small problem.
"""

import importlib
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad, functional
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap
from torch.utils._pytree import tree_leaves, tree_map

from wherefrom.kernels import pair_loss

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INTERPRETED = ("jvp", "vmap of grad of a", "hessian", "backward of dual numbers")  # the others differ in what stands around the kernel
PATHS = ("torch", "triton", "small", "large")
MODULE = importlib.import_module("wherefrom.kernels.pair_loss")
B, N, H, C = 2, 3, 4, 3
LEARNED = tuple(range(5))  # a, b, weight, output_bias, hidden_bias

Loss = Callable[..., Tensor]
Five = tuple[Tensor, ...]


def numbers(seed: int) -> Five:
    random = torch.Generator().manual_seed(seed)
    shapes = ((B, N, H), (B, N, H), (C, H), (C,), (H,))
    return tuple(torch.randn(shape, generator=random).to(DEVICE) for shape in shapes)


CORNERS = torch.rand(B, N, 2, 2, generator=torch.Generator().manual_seed(2)).to(DEVICE)
BOXES = torch.cat([CORNERS[:, :, 0], CORNERS.sum(2) + 0.2], -1)


def loss_by(path: str, per_sample: bool, monkeypatch: pytest.MonkeyPatch) -> Loss:
    if path == "large":
        monkeypatch.setattr(MODULE, "STORE_BELOW", 0)
    backend: Any = "auto" if path in ("small", "large") else path

    def loss(a: Tensor, b: Tensor, weight: Tensor, output_bias: Tensor, hidden_bias: Tensor) -> Tensor:
        where = BOXES.to(a.dtype) if path == "reference" else BOXES
        options: dict[str, Any] = {
            "weight": weight,
            "output_bias": output_bias,
            "hidden_bias": hidden_bias,
            "per_sample": per_sample,
            "backend": backend,
        }
        return pair_loss(a, b, where, **options).loss

    return loss


def total(loss: Loss) -> Loss:
    return lambda *inputs: loss(*inputs).sum()


def dual(loss: Loss, inputs: Five, tangents: Five) -> Tensor:
    with forward_ad.dual_level():
        found = forward_ad.unpack_dual(loss(*map(forward_ad.make_dual, inputs, tangents))).tangent
    assert found is not None
    return found


def leaves(inputs: Five) -> Five:
    return tuple(value.clone().requires_grad_() for value in inputs)


def backward_of_vmap(loss: Loss, inputs: Five) -> Five:
    each = leaves(inputs)
    return torch.autograd.grad(vmap(loss)(*each).sum(), each)


def backward_of_dual(loss: Loss, inputs: Five, tangents: Five) -> Five:
    each = leaves(inputs)
    return torch.autograd.grad(dual(loss, each, tangents).sum(), each)


def stacked(inputs: Five, others: Five) -> Five:
    return tuple(torch.stack(both) for both in zip(inputs, others, strict=True))


def first_only(loss: Loss, inputs: Five) -> Loss:
    """As a function of a alone."""
    return lambda a: loss(a, *inputs[1:]).sum()


FIRST: dict[str, Callable[[Loss, Five, Five], Any]] = {
    "jvp": lambda f, x, t: jvp(f, x, t)[1],
    "jvp of the weight": lambda f, x, t: jvp(lambda weight: f(*x[:2], weight, *x[3:]), x[2:3], t[2:3])[1],
    "dual numbers": dual,
    "jacfwd": lambda f, x, t: jacfwd(f, LEARNED)(*x),
    "jacrev": lambda f, x, t: jacrev(f, LEARNED)(*x),
    "jacobian": lambda f, x, t: functional.jacobian(f, x),
    "jacobian, forward": lambda f, x, t: functional.jacobian(f, x, vectorize=True, strategy="forward-mode"),
    "jacobian, vectorized": lambda f, x, t: functional.jacobian(f, x, vectorize=True),
    "vmap": lambda f, x, t: vmap(f)(*stacked(x, t)),
    "vmap of grad": lambda f, x, t: vmap(grad(total(f), LEARNED))(*stacked(x, t)),
    "vmap of grad of a": lambda f, x, t: vmap(grad(total(f), LEARNED), (0, *[None] * 4))(torch.stack([x[0], t[0]]), *x[1:]),
    "vmap of jvp": lambda f, x, t: vmap(lambda *along: jvp(f, x, along)[1])(*stacked(x, t)),
    "grad of vmap": lambda f, x, t: grad(total(vmap(f)), LEARNED)(*stacked(x, t)),
    "jvp of vmap": lambda f, x, t: jvp(vmap(f), stacked(x, t), stacked(t, x))[1],
    "backward of vmap": lambda f, x, t: backward_of_vmap(f, stacked(x, t)),
}
SECOND: dict[str, Callable[[Loss, Five, Five], Any]] = {
    "hessian": lambda f, x, t: hessian(first_only(f, x))(x[0]),
    "forward over forward": lambda f, x, t: jacfwd(jacfwd(first_only(f, x)))(x[0]),
    "reverse over reverse": lambda f, x, t: jacrev(jacrev(first_only(f, x)))(x[0]),
    "reverse over forward": lambda f, x, t: jacrev(jacfwd(first_only(f, x)))(x[0]),
    "of a, then of the weight": lambda f, x, t: jacfwd(jacrev(total(f), 0), 2)(*x),
    "of a, then of the weight, reversed": lambda f, x, t: jacrev(jacfwd(total(f), 0), 2)(*x),
    "backward of dual numbers": backward_of_dual,
    "functional.hessian": lambda f, x, t: functional.hessian(first_only(f, x), x[0]),
    "functional.hvp": lambda f, x, t: functional.hvp(first_only(f, x), x[0], t[0])[1],
}


def assert_right(mode: Callable[[Loss, Five, Five], Any], path: str, per_sample: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Raise unless a derivative is that of the definition in float64."""
    inputs, tangents = numbers(0), numbers(1)
    exact = mode(loss_by("reference", per_sample, monkeypatch), *tree_map(Tensor.double, (inputs, tangents)))
    assert max(value.abs().max() for value in tree_leaves(exact)) > 0.1
    found = mode(loss_by(path, per_sample, monkeypatch), inputs, tangents)
    for ours, truth in zip(tree_leaves(found), tree_leaves(exact), strict=True):
        torch.testing.assert_close(ours.double(), truth, rtol=1e-4, atol=1e-5)


@pytest.mark.core
@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize(("mode", "path"), [each for each in product(FIRST, PATHS) if each[1] != "triton" or each[0] in INTERPRETED])
def test_first_derivatives_are_right_on_every_path_and_size(
    mode: str, path: str, per_sample: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert_right(FIRST[mode], path, per_sample, monkeypatch)


@pytest.mark.core
@pytest.mark.parametrize(("mode", "path"), [each for each in product(SECOND, PATHS) if each[1] != "triton" or each[0] in INTERPRETED])
def test_second_derivatives_are_right_or_refused_and_never_0(mode: str, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if path == "small":
        assert_right(SECOND[mode], path, False, monkeypatch)
        return
    with pytest.raises(RuntimeError, match=r'^pair_loss has no second derivative; use backend="reference"$'):
        SECOND[mode](loss_by(path, False, monkeypatch), numbers(0), numbers(1))


@pytest.mark.parametrize("path", [*PATHS, "reference"])
@pytest.mark.parametrize("mode", ["dual numbers", "jvp", "grad", "grad of vmap", "jvp of vmap"])
def test_a_derivative_of_boxes_is_refused(mode: str, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b, weight, output_bias, _ = numbers(0)
    if path == "large":
        monkeypatch.setattr(MODULE, "STORE_BELOW", 0)
    backend: Any = "auto" if path in ("small", "large") else path

    def loss(boxes: Tensor) -> Tensor:
        return pair_loss(a, b, boxes, weight=weight, output_bias=output_bias, backend=backend).loss

    modes: dict[str, Callable[[], Any]] = {
        "dual numbers": lambda: dual(loss, (BOXES,), (BOXES,)),
        "jvp": lambda: jvp(loss, (BOXES,), (BOXES,)),
        "grad": lambda: grad(loss)(BOXES),
        "grad of vmap": lambda: grad(lambda boxes: vmap(loss)(boxes).sum())(BOXES[None]),
        "jvp of vmap": lambda: jvp(vmap(loss), (BOXES[None],), (BOXES[None],)),
    }
    words = r"^(boxes requires a gradient|pair_loss has derivatives of a, b, weight, output_bias and hidden_bias only)"
    with pytest.raises((ValueError, RuntimeError), match=words):
        modes[mode]()


def test_numbers_to_log_have_no_derivative(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b, weight, output_bias, _ = numbers(0)
    for backend in ("torch", "auto", "reference"):
        call = lambda a: pair_loss(a, b, BOXES, weight=weight, output_bias=output_bias, backend=backend)  # noqa: B023, E731
        _, along = jvp(call, (a,), (b,))
        assert along.loss != 0
        assert not any(value.any() for value in along[1:4])


@pytest.mark.parametrize("path", ["torch", "small"])
def test_forward_mode_does_not_go_through_torch_compile_unseen(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, tangents = numbers(0), numbers(1)
    loss = loss_by(path, False, monkeypatch)
    torch.compiler.reset()

    def forward(inputs: Five, tangents: Five) -> Tensor:
        return jvp(loss, inputs, tangents)[1]

    compiled = torch.compile(forward, fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match=r"torch.compile cannot trace a transform of torch.func here"):
        compiled(inputs, tangents)


@pytest.mark.core
def test_forward_mode_past_the_function_is_refused_and_never_0() -> None:
    a, b, weight, output_bias, hidden_bias = numbers(0)
    words: Any = ("all", "reference", "log_area", "view", "gelu", "squared", 1.0, False, True, "torch")
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="an operator of wherefrom was called in forward mode"):
        torch.ops.wherefrom.pair_loss(forward_ad.make_dual(a, a), b, weight, output_bias, hidden_bias, BOXES, *[None] * 8, *words)
