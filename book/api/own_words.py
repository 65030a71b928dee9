"""Sphinx extension: what a class says of itself in its source, and nothing that others say for it.

Fields of dataclasses and named tuples are explained by the comments beside them. Sphinx does not
see those, so that they are put among the arguments here. What Python or PyTorch writes for a class
(a named tuple's constructor, torch.nn.Module's) is left out.
"""

import ast
import inspect
import io
import re
import textwrap
import tokenize
from typing import Any

from numpy.typing import ArrayLike
from sphinx.application import Sphinx
from sphinx.util.typing import stringify_annotation

FIELDS = {"Returns:": ":returns:", "Yields:": ":Yields:"}


def field_comments(cls: type) -> dict[str, str]:
    """The comment beside each annotated field of a class, in order."""
    source = textwrap.dedent(inspect.getsource(cls))
    comments = {
        token.start[0]: token.string.lstrip("# ")
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    fields = [node for node in ast.parse(source).body[0].body if isinstance(node, ast.AnnAssign)]
    beside = {ast.unparse(node.target): comments.get(node.end_lineno) for node in fields}
    return {name: comment for name, comment in beside.items() if comment}


def explain_class(cls: type, lines: list[str]) -> None:
    """Changes one of a class's docstrings, its own or its constructor's, in place."""
    is_tuple = issubclass(cls, tuple)
    is_own = "\n".join(lines).strip() == inspect.cleandoc(vars(cls)["__doc__"])
    if not is_own and (is_tuple or "__init__" not in vars(cls)):
        lines.clear()
    if is_own and (is_tuple or hasattr(cls, "__dataclass_fields__")):
        explained = [f"    {field}: {text}" for field, text in field_comments(cls).items()]
        lines += ["", "Args:", *explained, ""] if explained else []


def keep_colons(lines: list[str]) -> None:
    """Makes a field of what is returned: napoleon would take words before a colon for a type.

    Where a dict is returned, with a line a key, the lines become a list.
    """
    for start in reversed([i for i, line in enumerate(lines) if line in FIELDS]):
        rest = range(start + 1, len(lines))
        end = next((i for i in rest if re.match(r"\S", lines[i])), len(lines))
        body = textwrap.dedent("\n".join(lines[start + 1 : end])).strip().splitlines()
        if re.match(r"\w+: ", body[0]):
            body = ["  " + line.strip() if line[:1] == " " else f"- {line}" for line in body]
        lines[start:end] = [FIELDS[lines[start]], *(f"    {line}" for line in body), ""]


def change_docstring(
    app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]
) -> None:
    """Changes a docstring in place, before napoleon reads it."""
    if what == "class":
        explain_class(obj, lines)
    elif what in ("attribute", "property"):
        lines[:0] = ["..", ""]  # a comment, as napoleon takes the first line's colon for a type's
    keep_colons(lines)


def change_signature(
    app: Sphinx, what: str, name: str, obj: Any, options: Any, signature: str, returned: str
) -> tuple[str, str] | None:
    """Makes a signature readable; a protocol, which isn't called, has none."""
    if signature is None:
        return None
    if what == "class" and getattr(obj, "_is_protocol", False):
        return "", ""
    array = stringify_annotation(ArrayLike, "smart")
    signature = re.sub(r"<function [\w.]*<lambda>>", "...", signature).replace(array, "ArrayLike")
    return re.sub(r"~(?=torch\.(device|dtype)\b)", "", signature), returned


def leave_out(app: Sphinx, what: str, name: str, obj: Any, skip: bool, options: Any) -> bool | None:
    """A named tuple's fields stand among its arguments already."""
    return True if type(obj).__name__ == "_tuplegetter" else None


def setup(app: Sphinx) -> dict[str, bool]:
    """Connects the above, with a priority before napoleon's 500."""
    app.connect("autodoc-process-docstring", change_docstring, priority=400)
    app.connect("autodoc-process-signature", change_signature)
    app.connect("autodoc-skip-member", leave_out)
    return {"parallel_read_safe": True}
