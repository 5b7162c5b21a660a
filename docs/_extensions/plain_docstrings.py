"""Sphinx reads the docstrings of this project: plain text under headings such as "Shapes:", and comments behind fields.

Here: docstrings as reStructuredText, a class's fields with their comments, signatures without what a list of fields says better.
Not here: which names are documented (docs/api/), how the site looks (conf.py, _static/).
"""

import ast
import contextlib
import dataclasses
import inspect
import io
import re
import textwrap
import tokenize
from collections.abc import Iterator
from typing import Any, Literal, get_args, get_origin, get_type_hints

HEADING = re.compile(r"(?P<title>Not here|[A-Z][A-Za-z]*|[a-z_]+(?:, [a-z_]+)*):\s+(?P<text>\S.*)")
ARRAY = re.compile(r"[~\w.]*\bndarray\[[~\w.]*\btuple\[[~\w.]*\bAny, \.\.\.\], [~\w.]*\bdtype\[([~\w.]+)\]\]")  # what NDArray[X] stands for
SPECIAL = re.compile(r"([*|\\]|(?<=\w)_(?!\w))")  # what reStructuredText would read as markup


with contextlib.suppress(ImportError):  # the tests read docstrings where there is no Sphinx
    from sphinx.util.inspect import signature as signature_of
    from sphinx.util.inspect import stringify_signature


def setup(app: Any) -> dict[str, Any]:
    """Register with Sphinx."""
    app.connect("autodoc-process-docstring", _process_docstring)
    app.connect("autodoc-process-signature", _process_signature)
    app.connect("autodoc-skip-member", _skip_member)
    return {"version": "1", "parallel_read_safe": True}


def as_restructured_text(docstring: str) -> list[str]:
    """Return the lines of a docstring in which headings are terms of a definition list, and nothing but backticks is markup."""
    lines: list[str] = []
    for paragraph in re.split(r"\n\s*\n", docstring.strip("\n")):
        for title, text in _parts(paragraph):
            if title is None:
                lines += ["", escaped(text), ""]
            else:
                term = f"``{title}``" if title[0].islower() else title
                lines += [term, f"   {escaped(text)}"]
        lines.append("")
    return lines


def escaped(text: str) -> str:
    """Return text in which reStructuredText finds no markup but what stands in backticks."""
    parts = re.split(r"(`[^`]+`)", text)
    return "".join(part if part.startswith("`") else SPECIAL.sub(r"\\\1", part) for part in parts)


def field_comments(kind: type) -> list[tuple[str, str]]:
    """Return what the source says of a class's own fields, in order: `name: type = default`, and the comment behind it, or "".

    Returns nothing where there is no source.
    """
    try:
        source = textwrap.dedent(inspect.getsource(kind))
    except OSError:
        return []
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = {token.start[0]: token.string.removeprefix("#").strip() for token in tokens if token.type == tokenize.COMMENT}
    body = ast.parse(source).body[0]
    assert isinstance(body, ast.ClassDef)
    fields = [node for node in body.body if isinstance(node, ast.AnnAssign)]
    hints = get_type_hints(kind)
    return [(_declared(node, hints), comments.get(node.end_lineno or node.lineno, "")) for node in fields]


def _declared(node: ast.AnnAssign, hints: dict[str, Any]) -> str:
    """Return a field as its class declares it; `field(default_factory=X)` is X(), and a name for some words is these words."""
    name, annotation, value = ast.unparse(node.target), ast.unparse(node.annotation), node.value
    if isinstance(node.annotation, ast.Name) and get_origin(hints.get(name)) is Literal:
        annotation = " | ".join(map(repr, get_args(hints[name])))
    text = f"{name}: {annotation}"
    if isinstance(value, ast.Call) and ast.unparse(value.func) == "field":
        factories = [keyword.value for keyword in value.keywords if keyword.arg == "default_factory"]
        return f"{text} = {ast.unparse(factories[0])}()" if factories else text
    return text if value is None else f"{text} = {ast.unparse(value)}"


def _parts(paragraph: str) -> Iterator[tuple[str | None, str]]:
    """Yield the sentences before any heading, with None, then every heading with its text; broken lines are joined."""
    title, words, hangs = None, [], False
    for line in paragraph.splitlines():
        heading = HEADING.match(line)
        if heading is not None and heading["title"][0].islower() and words and not words[-1].endswith("."):
            heading = None  # a word of a sentence that goes on
        indented = line.startswith("  ")
        if heading is not None or (hangs and not indented):  # after lines that hang under a heading, one that does not is no part of it
            if words:
                yield title, " ".join(words)
            title, words, hangs = (heading["title"], [heading["text"].strip()], False) if heading else (None, [line.strip()], False)
        elif line.strip():
            words.append(line.strip())
            hangs = title is not None and indented
    if words:
        yield title, " ".join(words)


def _process_docstring(app: object, what: str, name: str, documented: Any, options: object, lines: list[str]) -> None:
    """Rewrite a docstring in place, for Sphinx, and list a class's own fields after it."""
    lines[:] = as_restructured_text("\n".join(lines))
    if what == "class" and isinstance(documented, type):
        fields = [
            (declared, comment) for declared, comment in field_comments(documented) if comment or dataclasses.is_dataclass(documented)
        ]
        lines += ["", ".. rst-class:: fields", ""] if fields else []
        lines += [f"- ``{declared}``" + (f" {escaped(comment)}" if comment else "") for declared, comment in fields]
        lines.append("")


def _process_signature(
    app: object, what: str, name: str, documented: Any, options: object, signature: str | None, returned: str | None
) -> Any:
    """Leave out what a class's list of fields says better, or says nothing; give a protocol that is called the signature of its call."""
    if what != "class":
        return named_arrays(signature), named_arrays(returned)
    if getattr(documented, "_is_protocol", False):
        call = vars(documented).get("__call__")
        return (stringify_signature(signature_of(call, bound_method=True), unqualified_typehints=True) if call else ""), None
    anything = signature is not None and signature.startswith("(*args")
    return ("", None) if anything or dataclasses.is_dataclass(documented) or _is_named_tuple(documented) else (signature, returned)


def named_arrays(text: str | None) -> str | None:
    """Return part of a signature in which NumPy's arrays are called as our sources call them, NDArray[float64]."""
    return None if text is None else ARRAY.sub("NDArray[\\1]", text)


def _skip_member(app: object, what: str, name: str, documented: Any, skip: bool, options: object) -> bool | None:
    """Leave out a named tuple's own accessors, which are listed as fields, and calls that say nothing of their own."""
    silent = name == "__call__" and not documented.__doc__
    return True if silent or type(documented).__name__ == "_tuplegetter" else None


def _is_named_tuple(documented: Any) -> bool:
    return isinstance(documented, type) and issubclass(documented, tuple) and hasattr(documented, "_fields")
