"""Tensors as plain lists and back, bit for bit: what JSON can hold.

Here: nested lists of numbers <-> tensors of a known shape and type; text <-> the object of one line of JSON, from whoever wrote it.
Not here: which tensors there are (views.py).
A number goes as the shortest text that names it as a float64, which holds every float32; nan and infinity have no word in JSON.
"""

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def to_json_line(plain: Mapping[str, Any]) -> str:
    """Return an object as one line of JSON; tensors in it as nested lists.

    Raises: ValueError that names the tensor, if a number in it is not finite.
    """
    lists = {}
    for name, value in plain.items():
        if isinstance(value, Tensor):
            if value.is_floating_point() and not bool(value.isfinite().all()):
                raise ValueError(f"{name} holds a number that is not finite, and JSON has no word for it; leave out what holds it")
            value = value.tolist()
        lists[name] = value
    return json.dumps(lists, allow_nan=False)


def from_json_line(text: str) -> dict[str, Any]:
    """Return the object that a line of JSON holds, its values not yet looked at.

    Raises: ValueError in one line if it is no JSON, or no object.
    """

    def refuse(word: str) -> None:
        raise ValueError(f"{word} is no number of JSON")

    try:
        plain = json.loads(text, parse_constant=refuse)
    except RecursionError:
        raise ValueError("no JSON of ours: lists within lists without end") from None
    except (ValueError, TypeError) as problem:
        raise ValueError(f"no JSON: {' '.join(str(problem).split())}") from None
    if not isinstance(plain, dict):
        raise ValueError(f"holds {type(plain).__name__}, expected an object with named fields")
    return plain


def to_tensor(name: str, plain: Any, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return nested lists of numbers as a tensor: float32, a kind of integer, or bool. A number becomes the nearest float32.

    No more memory is taken than the lists hold, whatever a shape says.
    Raises: ValueError in one line that names the tensor, if they have another shape, or hold what is no number of that type.
    """
    numbers: list[Any] = [plain]
    for axis, size in enumerate(shape):
        for held in numbers:
            if not isinstance(held, list) or len(held) != size:
                fault = f"{len(held)} where {size} are" if isinstance(held, list) else f"{type(held).__name__} where a list is"
                raise ValueError(f"{name}: {fault} expected on axis {axis}; its shape is {shape}")
        numbers = [number for held in numbers for number in held]
    for number in numbers:
        if not _fits(number, dtype):
            text = f"{number!r:.40}" if isinstance(number, int | float | str) else type(number).__name__
            raise ValueError(f"{name}: {text} is no {str(dtype).removeprefix('torch.')}")
    exact = torch.float64 if dtype.is_floating_point else dtype
    return torch.tensor(numbers, dtype=exact).to(dtype).view(shape)  # float64 first: rounded once, to the nearest


def _fits(number: Any, dtype: torch.dtype) -> bool:
    if dtype == torch.bool:
        return isinstance(number, bool)
    if isinstance(number, bool) or not isinstance(number, int | float):
        return False
    if dtype.is_floating_point:
        limit = torch.finfo(dtype).max
        return -limit <= number <= limit
    return isinstance(number, int) and torch.iinfo(dtype).min <= number <= torch.iinfo(dtype).max
