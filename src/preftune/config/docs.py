"""Docstrings of fields, which Python itself throws away."""

import ast
import inspect
from functools import cache
from itertools import pairwise
from textwrap import dedent

from preftune.losses.knobs import KNOBS, LossKnobs
from preftune.losses.spec import knob_readers


@cache
def field_docs(config: type) -> dict[str, str]:
    """The string under each field of a dataclass and of its parents, on one line.

    Args:
        config: the dataclass. Without its source (a frozen application) nothing is found.

    Returns:
        Field name to text, of the nearest class that has one. That of a loss's knob ends with the
        losses that read it and their defaults.
    """
    docs: dict[str, str] = {}
    for parent in reversed(config.__mro__):
        if parent is LossKnobs:
            readers = {name: f"Read by (default): {knob_readers(name)}." for name in KNOBS}
            docs |= {name: f"{doc} {readers[name]}" for name, doc in _own_docs(parent).items()}
        elif parent is not object:
            docs |= _own_docs(parent)
    return docs


def _own_docs(config: type) -> dict[str, str]:
    try:
        source = inspect.getsource(config)
    except (OSError, TypeError):
        return {}
    definition = ast.parse(dedent(source)).body[0]
    body = definition.body if isinstance(definition, ast.ClassDef) else []
    docs = {}
    for field, below in pairwise(body):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
            text = below.value if isinstance(below, ast.Expr) else None
            if isinstance(text, ast.Constant) and isinstance(text.value, str):
                docs[field.target.id] = " ".join(text.value.split())
    return docs
