"""Builds the CPU view kernel where a C compiler is at hand; all else about the package is in pyproject.toml.

With a compiler the wheel serves every Python from 3.11 on (cp311-abi3-PLATFORM); without one it is pure (py3-none-any), and this says why.
"""

import sys
import sysconfig
import tempfile
from distutils.ccompiler import new_compiler  # setuptools brings its own, also where Python no longer has one
from distutils.sysconfig import customize_compiler
from pathlib import Path

from setuptools import Extension, setup
from setuptools.errors import BaseError, CCompilerError

FLAGS = ["-std=gnu11", "-O3", "-ffp-contract=fast", "-fvisibility=hidden", "-Wno-psabi", "-g0", "-pthread"]
LOADER = ["-ldl"] if sys.platform == "linux" else []  # for dlopen, which an older C library keeps apart
PARTS = ("render_views_core", "decode_region", "thread_pool", "read_parts")  # each a .c and a .h, without Python
LIMITED = not sysconfig.get_config_var("Py_GIL_DISABLED")  # Python without its lock has no limited API yet

PROBE = """
#include <Python.h>
#include <pthread.h>
#include <stdatomic.h>
typedef float floats __attribute__((vector_size(16)));
floats swapped(floats a, floats b) { return __builtin_shufflevector(a, b, 0, 4, 1, 5); }
"""


def compiler_missing() -> str | None:
    """Return why no compiler here can build the kernel, or None: a few lines that need what it needs are compiled and linked."""
    compiler = new_compiler()
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.c")
        source.write_text(PROBE)
        try:
            customize_compiler(compiler)
            objects = compiler.compile([str(source)], output_dir=folder, include_dirs=[sysconfig.get_path("include")], extra_postargs=FLAGS)
            compiler.link_shared_object(objects, str(Path(folder, "probe.so")), extra_postargs=["-pthread"])
        except (BaseError, CCompilerError, OSError) as error:
            return f"{type(error).__name__}: {error}"
    return None


missing = compiler_missing()
if missing is not None:
    print(f"wherefrom: built without its CPU view kernel; it needs gcc 12 or clang, and Python's headers ({missing})", file=sys.stderr)

setup(
    ext_modules=[
        Extension(
            "wherefrom.kernels._native",
            sources=[f"kernels/{name}.c" for name in ("render_views_native", *PARTS)],
            depends=["kernels/render_views_lanes.h", *(f"kernels/{name}.h" for name in PARTS)],
            extra_compile_args=FLAGS,
            extra_link_args=["-pthread", *LOADER],
            py_limited_api=LIMITED,
        )
    ]
    if missing is None
    else [],
    options={"bdist_wheel": {"py_limited_api": "cp311"}} if missing is None and LIMITED else {},
)
