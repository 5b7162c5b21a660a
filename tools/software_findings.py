"""What `wherefrom doctor` finds of software: libraries, the GPU's, the kernels' and the renderers'.

Here: versions against what the packages themselves need, torch's build against the driver, what each renderer lacks, trials of a picture.
Not here: any answer that the library has itself: renderers (pipeline/render/choose.py), Triton (kernels/dispatch.py) and others say what
they lack.
No library is imported before it is looked at, so that one that does not load is one finding among others.
"""

import contextlib
import importlib
import importlib.metadata
import os
import platform
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

from wherefrom.tools.findings import FAULTS, Asked, Finding, Mark, first_line, from_reason
from wherefrom.tools.machine import installed_version, query_gpu

SHOWN = ("torch", "torchvision", "timm", "accelerate", "triton", "numpy", "simplejpeg", "pillow")
PROBE_COLOR, PROBE_SIZE, PROBE_ERROR = (200, 60, 90), (96, 128), 16  # RGB, (height, width), levels


def look_at_libraries(_: Asked) -> Iterator[Finding]:
    """Say which versions there are, and which of them are too old or do not belong together, by the packages' own metadata."""
    home = Path(__file__).resolve().parents[1]
    yield Finding("good", "wherefrom", f"{installed_version('wherefrom')} in {home}, Python {platform.python_version()}")
    unmet = list(unmet_requirements())
    dali = [requirement.name for requirement in _requirements("wherefrom", "cuda12") if requirement.name.startswith("nvidia-")]
    fitting = [name for name in (*SHOWN, *dali) if name not in {finding.name for finding in unmet}]
    yield Finding("good", "libraries", ", ".join(f"{name} {version}" for name in fitting if (version := installed_version(name))))
    yield from unmet


def unmet_requirements() -> Iterator[Finding]:
    """Yield the libraries that wherefrom needs, or one of these of another, and that are not there or of another version."""
    ours = {requirement.name: requirement for requirement in _requirements("wherefrom")}
    for name, requirement in ours.items():
        # what is for some systems alone is missed where something needs it
        if installed_version(name) is None and requirement.marker is None:
            yield Finding("mend", name, "is not installed", f"pip install '{name}{requirement.specifier}'")
    for of in ("wherefrom", *(name for name in ours if installed_version(name))):
        for requirement in _requirements(of):
            name, specifier, version = requirement.name, requirement.specifier, installed_version(requirement.name)
            if version is None or name not in {*ours, *SHOWN} or specifier.contains(version, prereleases=True):
                continue
            if of == "wherefrom":
                yield Finding("mend", name, f"is {version}, wherefrom needs {specifier}", f"pip install '{name}{specifier}'")
            else:
                mend = f"pip install --upgrade {of} {name}, both at once, and from one index"
                yield Finding("mend", name, f"is {version}, {of} {installed_version(of)} needs {specifier}", mend)


def load_fault(module: str) -> Finding | None:
    """Return what is wrong with a module that does not load."""
    try:
        importlib.import_module(module)
    except FAULTS as problem:
        mend = "pip install --force-reinstall torch torchvision, both at once, and from one index"
        if module.startswith("wherefrom"):
            mend = "pip install wherefrom again, with the libraries that it needs"
        return Finding("FAILS", module, f"does not load: {first_line(problem)}", mend)
    return None


def _requirements(package: str, extra: str = "") -> Iterator[Requirement]:
    """Yield what a package needs here, with one extra or none; nothing where there is no such package."""
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        for requirement in map(Requirement, importlib.metadata.requires(package) or []):
            if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
                yield requirement


# devices, kernels and renderers


def look_at_gpu(asked: Asked) -> Iterator[Finding]:
    """Say whether torch computes on a GPU here, or why not."""
    import torch

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        there = torch.cuda.is_available()
    driver = query_gpu(("driver_version",)).get("driver_version")
    if not there:
        told = "; ".join(str(each.message).split("\n")[0] for each in caught[:1])
        yield judge_absent_gpu(asked, built_for=torch.version.cuda, driver=driver, told=told)
    elif fault := _gpu_fault():
        mend = "take a torch built for this GPU (https://pytorch.org/get-started/locally), or update the driver"
        mark: Mark = "mend" if asked.device == "cpu" else "FAILS"
        yield Finding(mark, "GPU", f"torch sees it, but computes nothing on it: {fault}", mend)
    else:
        capability = ".".join(map(str, torch.cuda.get_device_capability()))
        name = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}, capability {capability}"
        yield Finding("good", "GPU", f"{name}; driver {driver}, torch is built for CUDA {torch.version.cuda}")


def _gpu_fault() -> str:
    """Compute something on the first GPU; return what is wrong, or nothing."""
    import torch

    try:
        return "" if torch.ones(2, device="cuda").sum().item() == 2 else "1 + 1 is not 2 there"
    except (RuntimeError, AssertionError) as problem:
        return first_line(problem)


def judge_absent_gpu(asked: Asked, *, built_for: str | None, driver: str | None, told: str = "") -> Finding:
    """Say why torch, built for a version of CUDA or none, sees no GPU; `told` is what it said itself, `driver` the driver's version."""
    needed = asked.device == "cuda"
    if driver is None:
        text = f"none: no NVIDIA driver answers (nvidia-smi){'' if built_for else ', and torch is built without CUDA'}"
        mend = "go where there is one (docker run --gpus all), or take --device cpu" if needed else ""
        return Finding("FAILS" if needed else "absent", "GPU", text, mend)
    if built_for is None:
        text, mend = f"torch is built without CUDA, driver {driver}", "https://pytorch.org/get-started/locally has torch built for CUDA"
    elif os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0].strip() in ("", "-1"):
        text, mend = f"CUDA_VISIBLE_DEVICES={os.environ['CUDA_VISIBLE_DEVICES']!r} hides it", "unset CUDA_VISIBLE_DEVICES"
    else:
        text = f"torch, built for CUDA {built_for}, sees none under driver {driver}" + (f": {told}" if told else "")
        mend = "update the driver, or take a torch built for its CUDA, which the head of nvidia-smi names"
    return Finding("FAILS" if needed else "mend", "GPU", f"is not used: {text}", mend)


def look_at_kernels(asked: Asked) -> Iterator[Finding]:
    """Say what serves of the compiled kernel, of decoding in part, and of Triton with its compiler."""
    import torch

    from wherefrom.kernels.dispatch import interpreted, triton_missing
    from wherefrom.kernels.render_views import native_missing
    from wherefrom.pipeline.render.jpeg_parts import part_decoder_missing

    native, parts, triton = native_missing(), part_decoder_missing(), triton_missing()
    yield from_reason("mend", "view kernel", f"views are cut more slowly: {native}") if native else _native_kernel()
    if parts is None:
        yield Finding("good", "region decoding", "of JPEGs known to decode, no more is decoded than views show")
    elif native:
        yield Finding("absent", "region decoding", "comes with the view kernel")
    else:
        mend = "pip install --force-reinstall pillow: its wheels bring a libjpeg-turbo that serves"
        yield from_reason("mend", "region decoding", f"pictures are decoded whole: {parts}", mend)
    gpu = torch.cuda.is_available()
    yield _compiler(gpu)
    if triton is None and interpreted() and (gpu or asked.device == "cuda"):
        yield Finding("mend", "Triton", "TRITON_INTERPRET=1: its kernels are interpreted, and crawl", "unset TRITON_INTERPRET")
    elif triton is None:
        yield _triton(torch.device("cuda") if gpu else None)
    elif gpu or asked.device == "cuda":
        yield from_reason("mend", "Triton", f"kernels take slower paths on the GPU: {triton}", "pip install the triton that torch needs")
    else:
        yield Finding("absent", "Triton", f"{triton.partition(';')[0]}; only a GPU needs it")


def _native_kernel() -> Finding:
    """Say which compiled kernel was loaded, and whether it is of this source."""
    from wherefrom.kernels.render_views import instruction_sets, native_stale

    file = Path(str(importlib.import_module("wherefrom.kernels._native").__file__))
    checkout = file.parents[1]
    again = f"pip install --no-deps -e {checkout}" if (checkout / "setup.py").is_file() else "pip install wherefrom again"
    if stale := native_stale():
        return Finding("mend", "view kernel", f"{file}: {stale.rpartition('; ')[0]}", again)
    newer = [source.name for source in sorted(file.parent.glob("*.[ch]")) if source.stat().st_mtime > file.stat().st_mtime]
    if newer:
        return Finding("mend", "view kernel", f"{file} is older than its source, {', '.join(newer)}", again)
    return Finding("good", "view kernel", f"{file}, with {instruction_sets()[-1]}")


def _compiler(gpu: bool) -> Finding:
    """Look for the C compiler that Triton would take."""
    named = os.environ.get("CC")
    found = shutil.which(named) if named else shutil.which("gcc") or shutil.which("clang")
    if found:
        return Finding("good", "C compiler", found)
    text = f"CC={named} names no program" if named else "none: neither gcc nor clang is on the PATH"
    text += "; Triton needs one on a GPU, and so does an install from source"
    return Finding("mend" if gpu or named else "absent", "C compiler", text, "install gcc, such as by apt install gcc, or set CC")


def _triton(device: Any) -> Finding:
    """Let Triton compile a tiny kernel for a device (torch.device), if there is one for it."""
    import torch

    from wherefrom.kernels import pair_targets

    version = installed_version("triton") or "of no known version"
    if device is None:
        return Finding("good", "Triton", f"{version}; there is no GPU to try it on")
    boxes = torch.tensor([[[1.0, 2, 5, 8], [3, 1, 4, 9]]], device=device)
    try:
        off = float((pair_targets(boxes, backend="triton").cpu() - pair_targets(boxes.cpu(), backend="torch")).abs().max())
        fault = "" if off < 1e-4 else f"a tiny kernel is off by {off:.1g}"
    except FAULTS as problem:
        fault = first_line(problem)
    if fault:
        return Finding("mend", "Triton", f"{version} does not serve: {fault}", "pip install the triton that torch needs, mend the compiler")
    return Finding("good", "Triton", f"{version}, a tiny kernel runs on {device.type}")


def look_at_renderers(asked: Asked) -> Iterator[Finding]:
    """Say of every renderer whether it can run; the one that is asked for, or that a run takes, renders a picture."""
    import torch

    from wherefrom.pipeline.render.choose import RENDERERS, auto_preference, choose_renderer

    gpu = torch.cuda.is_available()
    device = torch.device("cuda" if gpu and asked.device != "cpu" else "cpu")
    serving, why = choose_renderer(asked.renderer, device)
    passed_over = auto_preference("cuda" if device.type == "cuda" else "cpu")
    passed_over = passed_over[: passed_over.index(serving)] if asked.renderer == "auto" else []
    for name in RENDERERS:
        title, missing = f"renderer {name}", _renderer_missing(name, gpu)
        if name == serving:
            fault = missing or _render_fault(name, device)
            if fault:
                yield from_reason("FAILS", title, fault, "take another --renderer")
            else:
                yield Finding("good", title, f"serves on {device.type} ({why.partition(';')[0]}), rendered a picture")
        elif missing:
            yield from_reason("mend" if name in passed_over or name not in RENDERERS.own else "absent", title, missing)
        else:
            yield Finding("good", title, "can run")


def _renderer_missing(name: str, gpu: bool) -> str | None:
    """Return what a renderer lacks here, or None."""
    from wherefrom.pipeline.render.choose import renderer_entry

    try:
        entry = renderer_entry(name)
        missing = entry.missing()
    except FAULTS as problem:
        return first_line(problem)
    return missing or (None if gpu or "cpu" in entry.devices else "renders on a GPU alone, and there is none")


def _render_fault(name: str, device: Any) -> str:
    """Render views of a picture of one color for a device (torch.device); return what is wrong, or nothing."""
    import numpy as np
    import simplejpeg
    import torch

    from wherefrom.pipeline import ViewFamily, ViewRecipe, draw_records
    from wherefrom.pipeline.render.choose import make_renderer
    from wherefrom.pipeline.render.renderer import render_checked

    recipe = ViewRecipe(families=(ViewFamily(name="tried", views=2, size_px=(32, 32)),), pixels="uint8")
    encoded = np.frombuffer(simplejpeg.encode_jpeg(np.full((*PROBE_SIZE, 3), PROBE_COLOR, np.uint8)), np.uint8)
    records = draw_records(recipe, seed=0, epoch=0, drawn_for=np.arange(1), source_size=np.array([PROBE_SIZE], np.int32))
    try:
        with contextlib.closing(make_renderer(recipe, name, device=device, threads=1)) as renderer:
            rendered = render_checked(renderer, recipe, [encoded], records)
            off = rendered.pixels[0].cpu().int() - torch.tensor(PROBE_COLOR)[:, None, None]
    except FAULTS as problem:
        return first_line(problem)
    return rendered.failed.get(0, "") or ("" if off.abs().max() <= PROBE_ERROR else "it shows another picture than it was given")
