"""Every derivative of pooled tokens that PyTorch can ask for, against the definition in float64: right or refused, on every path."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad, functional
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap

from wherefrom.kernels import roi_align, roi_align_pairs

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
backends = pytest.mark.parametrize("backend", ["torch", "triton"])
H, W = 3, 4
BOXES = torch.tensor([[[0.0, 0, 3, 3], [1, 1, 4, 2]]], device=DEVICE)
OPTIONS: dict[str, Any] = {"frame_hw": (H, W), "out_hw": (2, 3), "quarter_turns": torch.tensor([[1, 2]], device=DEVICE)}

Pool = Callable[[Tensor], Tensor]


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def squares(backend: Any) -> Pool:
    """A function of tokens that is not linear, so that its second derivative is not 0."""
    return lambda tokens: roi_align(tokens, BOXES, **OPTIONS, backend=backend).square()


def total(pool: Pool) -> Pool:
    return lambda tokens: pool(tokens).sum()


def dual(pool: Pool, tokens: Tensor, tangent: Tensor) -> Tensor:
    with forward_ad.dual_level():
        found = forward_ad.unpack_dual(pool(forward_ad.make_dual(tokens, tangent))).tangent
    assert found is not None
    return found


def backward_of_dual(pool: Pool, tokens: Tensor, tangent: Tensor) -> Tensor:
    leaf = tokens.clone().requires_grad_()
    return torch.autograd.grad(dual(pool, leaf, tangent).sum(), leaf)[0]


def backward_of_many(pool: Pool, tokens: Tensor) -> Tensor:
    leaf = tokens.clone().requires_grad_()
    pooled = pool(leaf)
    upstream = numbers(3, *pooled.shape, seed=5).to(tokens)
    return torch.autograd.grad(pooled, leaf, upstream, is_grads_batched=True)[0]


def backward_of_vmap(pool: Pool, tokens: Tensor) -> Tensor:
    leaf = tokens.clone().requires_grad_()
    return torch.autograd.grad(vmap(pool)(leaf).sum(), leaf)[0]


# tokens (2, 1, H, W, 2): two items of a batch of one map, the second of which serves as a tangent too
MODES: dict[str, Callable[[Pool, Tensor], Any]] = {
    "jvp": lambda f, t: jvp(f, (t[0],), (t[1],))[1],
    "dual numbers": lambda f, t: dual(f, t[0], t[1]),
    "jacfwd": lambda f, t: jacfwd(f)(t[0]),
    "jacrev": lambda f, t: jacrev(f)(t[0]),
    "jacobian, forward": lambda f, t: functional.jacobian(f, t[0], vectorize=True, strategy="forward-mode"),
    "jacobian, vectorized": lambda f, t: functional.jacobian(f, t[0], vectorize=True),
    "hessian": lambda f, t: hessian(total(f))(t[0]),
    "forward over forward": lambda f, t: jacfwd(jacfwd(total(f)))(t[0]),
    "reverse over reverse": lambda f, t: jacrev(jacrev(total(f)))(t[0]),
    "reverse over forward": lambda f, t: jacrev(jacfwd(total(f)))(t[0]),
    "backward of dual numbers": lambda f, t: backward_of_dual(f, t[0], t[1]),
    "backward of many": lambda f, t: backward_of_many(f, t[0]),
    "vmap": lambda f, t: vmap(f)(t),
    "vmap of grad": lambda f, t: vmap(grad(total(f)))(t),
    "vmap of grad along the features": lambda f, t: vmap(grad(total(f)), in_dims=-1)(t.movedim(0, -1)),
    "grad of vmap": lambda f, t: grad(total(vmap(f)))(t),
    "jvp of vmap": lambda f, t: jvp(vmap(f), (t,), (t.flip(0),))[1],
    "backward of vmap": backward_of_vmap,
}


@pytest.mark.core
@backends
@pytest.mark.parametrize("mode", MODES)
def test_every_derivative_is_that_of_the_definition(mode: str, backend: str) -> None:
    tokens = numbers(2, 1, H, W, 2)
    exact = MODES[mode](squares("reference"), tokens.double())
    assert exact.abs().max() > 0.1
    torch.testing.assert_close(MODES[mode](squares(backend), tokens).double(), exact, rtol=1e-5, atol=1e-5)


@backends
def test_vmap_over_boxes_pools_each_with_its_own(backend: Any) -> None:
    tokens, boxes = numbers(2, 1, H, W, 2), torch.stack([BOXES, BOXES + 0.5])
    valid = torch.tensor([[[True, True]], [[True, False]]], device=DEVICE)

    def loss(tokens: Tensor, boxes: Tensor, valid: Tensor) -> Tensor:
        return roi_align(tokens, boxes, **OPTIONS, valid=valid, backend=backend).square().sum()

    expected = [grad(loss)(*each) for each in zip(tokens, boxes, valid, strict=True)]
    torch.testing.assert_close(vmap(grad(loss))(tokens, boxes, valid), torch.stack(expected))
    of_one_map = torch.stack([grad(loss)(tokens[0], *each) for each in zip(boxes, valid, strict=True)])
    torch.testing.assert_close(vmap(grad(loss), in_dims=(None, 0, 0))(tokens[0], boxes, valid), of_one_map)


OF_BOXES: dict[str, Callable[[Pool], Any]] = {
    "backward": lambda f: f(BOXES.clone().requires_grad_()),
    "dual numbers": lambda f: dual(f, BOXES, BOXES),
    "grad": lambda f: grad(total(f))(BOXES),
    "jvp": lambda f: jvp(f, (BOXES,), (BOXES,)),
    "grad of vmap": lambda f: grad(total(vmap(f)))(BOXES[None]),
    "jvp of vmap": lambda f: jvp(vmap(f), (BOXES[None],), (BOXES[None],)),
}


@pytest.mark.parametrize("backend", ["torch", "triton", "reference"])
@pytest.mark.parametrize("mode", OF_BOXES)
def test_a_derivative_of_boxes_is_refused(mode: str, backend: Any) -> None:
    tokens = numbers(1, H, W, 2)
    words = "boxes requires a gradient|roi_align gives no derivative of boxes"
    if (mode, backend) == ("grad of vmap", "reference"):
        words = "vmap"  # PyTorch's own: the definition asks for values of boxes
    with pytest.raises((ValueError, RuntimeError), match=rf"^({words})"):
        OF_BOXES[mode](lambda boxes: roi_align(tokens, boxes, frame_hw=(H, W), out_hw=(2, 2), backend=backend))


@pytest.mark.core
def test_forward_mode_past_the_function_is_refused_and_never_0() -> None:
    tables = torch.ops.wherefrom.roi_weights(BOXES, None, None, None, [H, W], [H, W], [2, 2], 0, "torch")
    tokens = numbers(1, H, W, 2)
    arguments: Any = (*tables, None, [H, W], [2, 2], False, "torch")
    with forward_ad.dual_level():
        torch.ops.wherefrom.roi_contract(tokens, *arguments)
        with pytest.raises(RuntimeError, match="an operator of wherefrom was called in forward mode"):
            torch.ops.wherefrom.roi_contract(forward_ad.make_dual(tokens, tokens), *arguments)


@pytest.mark.parametrize("fullgraph", [pytest.param(False, marks=pytest.mark.slow), True])
def test_compiled_transforms_are_right_or_refused(fullgraph: bool) -> None:
    tokens = numbers(2, H, W, 2)
    pool: Pool = lambda tokens: roi_align(tokens, BOXES.expand(2, 2, 4), frame_hw=(H, W), out_hw=(2, 3)).square()  # noqa: E731

    def compiled(function: Any) -> Any:
        torch.compiler.reset()
        return torch.compile(function, fullgraph=fullgraph, backend="aot_eager")

    transforms: dict[str, Callable[..., Tensor]] = {
        "grad": grad(total(pool)),
        "vmap of grad": lambda tokens: vmap(grad(total(pool)))(tokens[None]),
        "jvp": lambda tokens: jvp(pool, (tokens,), (tokens,))[1],
        "jvp of grad": lambda tokens: jvp(grad(total(pool)), (tokens,), (tokens,))[1],
    }
    for transform in transforms.values():
        if fullgraph:
            with pytest.raises(Exception, match=r"torch.compile cannot trace a transform of torch.func here"):
                compiled(transform)(tokens)
        else:
            torch.testing.assert_close(compiled(transform)(tokens), transform(tokens))
    with pytest.raises(Exception, match=r"in forward mode|dual tensor"):
        dual(compiled(pool), tokens, tokens)


@backends
def test_pooling_with_pairs_has_the_same_derivatives(backend: Any) -> None:
    tokens = numbers(2, 1, H, W, 2)

    def pairs(tokens: Tensor) -> Any:
        return roi_align_pairs(tokens, BOXES, **OPTIONS, backend=backend)

    pooled, targets = pairs(tokens[0])
    for found, expected in zip(vmap(pairs)(tokens[:1]), (pooled, targets), strict=True):
        torch.testing.assert_close(found[0], expected)
    (_, unmoved), (of_pooled, of_targets) = jvp(pairs, (tokens[0],), (tokens[1],))
    torch.testing.assert_close(unmoved, targets)
    torch.testing.assert_close(of_pooled, pairs(tokens[1])[0])
    assert not of_targets.any()  # they are of the boxes alone
    loss = lambda tokens: pairs(tokens)[0].square().sum()  # noqa: E731
    torch.testing.assert_close(vmap(grad(loss))(tokens), vmap(grad(total(squares(backend))))(tokens))
    with pytest.raises((ValueError, RuntimeError), match="no derivative"):
        jvp(lambda boxes: roi_align_pairs(tokens[0], boxes, **OPTIONS, backend=backend), (BOXES,), (BOXES,))
