"""The kernels' folder as a whole: every function of tensors says their shapes, and importing it imports little."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

KERNELS = Path(__file__).parents[1] / "kernels"
# (B, N, 4), (C,), (..., N, *), "any shape", "shapes as there"
SHAPE = re.compile(r"\((\.\.\.|\*?\w+)( [*/+-] \w+)*,( ?(\.\.\.|\*?\w+|\*)( [*/+-] [\w(), +*/-]+)*,?)*\)|any shape|[Ss]hapes:? .*as ")

Def = ast.FunctionDef | ast.ClassDef


def functions(node: ast.AST, outer: tuple[Def, ...] = ()) -> Iterator[tuple[Def, ...]]:
    """Yield every function, after the classes and functions that it stands in."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, Def):
            if isinstance(child, ast.FunctionDef):
                yield (*outer, child)
            yield from functions(child, (*outer, child))
        else:
            yield from functions(child, outer)


def takes_tensors(function: ast.FunctionDef) -> bool:
    """Say whether a tensor is among its arguments or results; a Triton function's are all tensors."""
    arguments = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs, function.args.vararg]
    annotations = [argument.annotation for argument in arguments if argument] + [function.returns]
    in_triton = any(ast.unparse(each) == "triton.jit" for each in function.decorator_list)
    return in_triton or any(re.search(r"\bTensor\b", ast.unparse(each)) for each in annotations if each)


def without_shapes(source: str) -> list[str]:
    """Return the functions of tensors that state no shape: not in their docstring, nor their class's, nor a comment of theirs."""
    lines, silent = source.splitlines(), []
    for *outer, function in functions(ast.parse(source)):
        assert isinstance(function, ast.FunctionDef)
        own = lines[function.lineno - 1 : function.end_lineno]
        words = [ast.get_docstring(function) or "", *(line.partition("#")[2] for line in own)]
        words += [ast.get_docstring(each) or "" for each in outer if isinstance(each, ast.ClassDef)]
        if takes_tensors(function) and not any(map(SHAPE.search, words)):
            silent.append(f"{function.name}, line {function.lineno}")
    return silent


@pytest.mark.core
@pytest.mark.parametrize("file", sorted(KERNELS.glob("*.py")), ids=lambda file: file.name)
def test_every_function_of_tensors_states_their_shapes(file: Path) -> None:
    assert without_shapes(file.read_text(encoding="utf-8")) == []


@pytest.mark.core
def test_a_function_that_states_none_is_found() -> None:
    """The control of the test above; prose in parentheses is no shape."""
    source = '''
def silent(tokens: Tensor) -> int:
    """Count tokens (those on the map), say."""

def says(tokens: Tensor) -> int:
    """Count tokens (B, H, W, D)."""

@triton.jit
def kernel(out_ptr):
    pass

def no_tensor(count: int) -> int:
    return count
'''
    assert without_shapes(source) == ["silent, line 2", "kernel, line 9"]


@pytest.mark.core
def test_importing_the_kernels_imports_threadpoolctl_beside_torch_and_nothing_more() -> None:
    """And the control: a Triton file does import more."""
    code = """
import importlib, sys, torch
for module in ("wherefrom.kernels", "wherefrom.kernels.pair_targets_triton"):
    before = set(sys.modules)
    try:
        importlib.import_module(module)
    except ModuleNotFoundError:
        sys.modules["triton"] = None
    libraries = {name.partition(".")[0] for name in set(sys.modules) - before} - sys.stdlib_module_names
    print(*sorted(libraries), "torch._dynamo" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    ours, triton = done.stdout.splitlines()
    assert ours == "threadpoolctl wherefrom False"
    assert "triton" in triton
