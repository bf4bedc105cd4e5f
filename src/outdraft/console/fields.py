"""Help texts from where they are written: the docstring under a settings class's field.

Reads source, imports nothing, so that `--help` needs no torch.
"""

from __future__ import annotations

import ast
from functools import cache
from itertools import pairwise
from pathlib import Path

PACKAGE = Path(__file__).parents[1]


@cache
def field_help(file: str, class_name: str) -> dict[str, str]:
    """Field -> docstring of a class in `file`, a path within the package."""
    module = ast.parse((PACKAGE / file).read_text(encoding="utf-8"))
    body = next(node.body for node in module.body if isinstance(node, ast.ClassDef) and node.name == class_name)
    return {
        field.target.id: " ".join(text.value.value.split())
        for field, text in pairwise(body)
        if isinstance(field, ast.AnnAssign)
        and isinstance(field.target, ast.Name)
        and isinstance(text, ast.Expr)
        and isinstance(text.value, ast.Constant)
        and isinstance(text.value.value, str)
    }
