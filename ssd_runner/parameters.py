"""The constants of the notebook's cell `parameters`, and overrides as papermill injects them."""

import ast
import contextlib
import difflib
import math
from typing import Any

import nbformat

from .console import Exit, Failure
from .page import INJECTED, code_cells, tags


def constants(notebook: Any) -> dict[str, Any]:
    """Name to value of the assignments in the parameters cell, read without running it.

    None: not a constant; such a parameter takes any value, like one that is None.
    """
    found: dict[str, Any] = {}
    for cell in code_cells(notebook, "parameters"):
        with contextlib.suppress(SyntaxError):
            for node in ast.parse(cell.source).body:
                if isinstance(node, (ast.Assign, ast.AnnAssign)) and node.value is not None:
                    value = None
                    with contextlib.suppress(ValueError):
                        value = ast.literal_eval(node.value)
                    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                    found |= {name.id: value for name in targets if isinstance(name, ast.Name)}
    return found


def fit(value: Any, default: Any) -> Any:
    """The value in the default's type; ValueError where it is of another."""
    kind, good = type(default), isinstance(value, type(default))
    if default is None:
        return value
    if kind is float and isinstance(value, int):
        value, good = float(value), not isinstance(value, bool)
    elif kind in (list, tuple) and isinstance(value, (list, tuple)):
        alike = len({type(item) for item in default}) == 1
        value, good = kind(fit(item, default[0]) if alike else item for item in value), True
    if not good or (kind is int and isinstance(value, bool)) or value in (math.inf, -math.inf):
        raise ValueError
    return value


def overrides(pairs: list[str], known: dict[str, Any]) -> dict[str, Any]:
    """``NAME=VALUE`` pairs by name, in the types of `constants`; Failure USAGE."""
    result: dict[str, Any] = {}
    for pair in pairs:
        name, sign, text = pair.partition("=")
        if not sign or not name:
            raise Failure(Exit.USAGE, f"-p {pair!r}: write it as NAME=VALUE.")
        if name not in known:
            near = difflib.get_close_matches(name.upper(), known, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}."
            raise Failure(Exit.USAGE, f"-p {name}: the notebook has no such parameter; {hint}")
        try:
            value = ast.literal_eval(text.strip())
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            value = {"true": True, "false": False, "none": None}.get(text.lower(), text)
        if isinstance(known[name], str) and text[:1] not in ("'", '"'):
            value = text  # a text needs no quotes, also where it looks like a number
        try:
            result[name] = fit(value, known[name])
        except (ValueError, OverflowError):
            kind = type(known[name]).__name__
            why = f"-p {name}: {text!r} is no {kind}, like the notebook's {known[name]!r}."
            raise Failure(Exit.USAGE, why) from None
    return result


def inject(notebook: Any, values: dict[str, Any]) -> None:
    """Puts a cell with the values after the parameters cell, in place of an earlier one."""
    notebook.cells[:] = [cell for cell in notebook.cells if INJECTED not in tags(cell)]
    if values:
        lines = [f"{name} = {value!r}" for name, value in values.items()]
        lines.append(f"print('Overrides of this run: {', '.join(values)}')")
        made = nbformat.v4.new_code_cell("\n".join(lines), metadata={"tags": [INJECTED]})
        made["id"] = INJECTED
        after = [n for n, cell in enumerate(notebook.cells, 1) if "parameters" in tags(cell)]
        notebook.cells.insert(after[-1], made)
