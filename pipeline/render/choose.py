"""The table of renderers, and which of them serves.

Here: the one place where a renderer is known by name; the choice behind renderer="auto"; making renderers and cutters.
Not here: what a renderer is (renderer.py), each one's entry and pixels (a file each; the definition is
wherefrom.kernels.render_views_reference). Nothing is imported before it is asked for.
"""

import logging
from typing import Literal

import torch

from wherefrom.pipeline.entry_table import EntryTable
from wherefrom.pipeline.literals import check_literal
from wherefrom.pipeline.render.renderer import Cutter, PartCutter, RenderDevice, Renderer, RendererEntry
from wherefrom.pipeline.view_recipe import ViewRecipe

log = logging.getLogger(__name__)

RENDERERS = EntryTable(
    kind="renderer",
    group="wherefrom.renderers",
    own={
        "native": "wherefrom.pipeline.render.native_cutter:ENTRY",
        "torch": "wherefrom.pipeline.render.torch_cutter:ENTRY",
        "triton": "wherefrom.pipeline.render.triton_renderer:ENTRY",
        "dali": "wherefrom.pipeline.render.dali_renderer:ENTRY",
    },
)


def check_renderer(name: object) -> None:
    """Refuse what is neither "auto" nor a name of the table; nothing is imported for it.

    Raises: ValueError in one line, with the nearest name.
    """
    check_literal("renderer", name, Literal[("auto", *RENDERERS)])


def renderer_entry(name: str) -> RendererEntry:
    """Return what the table knows of a renderer.

    Raises: ValueError in one line if there is none of that name, or the package that declares it is at fault.
    """
    entry = RENDERERS[name]
    if not isinstance(entry, RendererEntry):
        raise ValueError(f"renderer {name!r} of {RENDERERS.owner(name)} is {entry!r}: needs a RendererEntry")
    return entry


def choose_renderer(name: str, device: torch.device) -> tuple[str, str]:
    """Return which renderer serves on a device, and why: the one named, or the first of a fixed list that can run here.

    Nothing is timed and no other package has a say, so that ranks and resumed runs on machines of one kind choose alike.
    Raises: ValueError if there is no renderer of that name.
    """
    check_renderer(name)
    if name != "auto":
        return name, "as asked"
    passed_over: list[str] = []
    for candidate in auto_preference("cuda" if device.type == "cuda" else "cpu"):
        entry = renderer_entry(candidate)
        missing = entry.missing()
        if missing is None:
            return candidate, "; ".join([entry.why, *passed_over])
        passed_over.append(f"{candidate} cannot run: {missing}")
    raise AssertionError("the last of the list runs everywhere")


def auto_preference(device: RenderDevice) -> list[str]:
    """Return the renderers of which renderer="auto" takes the first that can run, for loaders on a device."""
    ranks = {name: renderer_entry(name).auto.get(device) for name in RENDERERS.own}
    return [name for _, name in sorted((rank, name) for name, rank in ranks.items() if rank is not None)]


def decodes_parts(name: str, recipe: ViewRecipe) -> bool:
    """Return whether a renderer decodes no more of a picture that is known to decode than the recipe's views read.

    Raises: ValueError if it cannot serve the recipe.
    """
    entry = renderer_entry(name)
    if entry.cutter is None or entry.missing() is not None:
        return False
    cutter = entry.cutter(recipe)
    return isinstance(cutter, PartCutter) and cutter.in_parts


def check_runtime(*, threads: int | None, prefetch: int) -> None:
    """Raise ValueError unless threads and prefetch are numbers that a loader can work with."""
    check_literal("threads", threads, int | None)
    check_literal("prefetch", prefetch, int)
    if threads is not None and threads < 0:
        raise ValueError(f"threads={threads}: needs at least 0 (all in the caller's thread); None takes one a core of this rank's share")
    if prefetch < 1:
        raise ValueError(f"prefetch={prefetch}: needs at least 1 batch")


def check_device(device: str | torch.device) -> None:
    """Raise ValueError unless views can be handed over on a device of this machine."""
    try:
        kind = torch.device(device).type
    except (RuntimeError, TypeError):
        kind = ""
    if kind not in ("cpu", "cuda"):
        raise ValueError(f"device={str(device)!r}: views are handed over on a processor or a CUDA GPU; use 'cpu', 'cuda' or 'cuda:0'")
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device={str(device)!r}: torch sees no CUDA GPU here; use device='cpu'")


def make_cutter(recipe: ViewRecipe, name: str = "auto") -> Cutter:
    """Build what cuts views of decoded pictures, and say which one and why.

    Raises: ValueError if there is none of that name, it cannot run here, or it cannot serve the recipe.
    """
    eligible = [each for each in RENDERERS if each in RENDERERS.own or each == name]  # no other package is imported unasked
    check_literal("renderer", name, Literal[("auto", *(each for each in eligible if renderer_entry(each).cutter))])
    chosen, why = choose_renderer(name, torch.device("cpu"))
    cutter = renderer_entry(chosen).cutter
    assert cutter is not None, "who serves a CPU unasked cuts"
    _check_runs(chosen)
    log.info("views are cut by %s: %s", chosen, why)
    return cutter(recipe)


def make_renderer(
    recipe: ViewRecipe, name: str = "auto", *, device: str | torch.device = "cpu", threads: int | None = None, prefetch: int = 2
) -> Renderer:
    """Build the renderer called `name` and say which one serves and why.

    Raises: ValueError if there is none of that name, it cannot run here or serve the recipe, or threads or prefetch are out of range.
    """
    check_runtime(threads=threads, prefetch=prefetch)
    chosen, why = choose_renderer(name, torch.device(device))
    _check_runs(chosen)
    log.info("renderer %s: %s", chosen, why)
    return renderer_entry(chosen).make(recipe, device=device, threads=threads, prefetch=prefetch)


def _check_runs(name: str) -> None:
    """Raise ValueError if a renderer cannot run on this machine."""
    if missing := renderer_entry(name).missing():
        raise ValueError(f'renderer "{name}" cannot run: {missing}; or use renderer="auto"')
