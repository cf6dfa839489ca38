"""The constants of the notebook's cell `parameters`, and overrides as papermill injects them."""

import ast
import contextlib
import difflib
from typing import Any

import nbformat

from .console import Exit, Failure
from .page import INJECTED, code_cells, tags


def constants(notebook: Any) -> dict[str, Any]:
    """Name to value of the assignments in the parameters cell, read without running it.

    None: not a constant; such a parameter takes any value, like one that is None.
    """
    found: dict[str, Any] = {}
    sources = [cell.source for cell in code_cells(notebook, "parameters")]
    with contextlib.suppress(SyntaxError):  # the kernel will say so
        for node in ast.parse("\n".join(sources)).body:
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                found[node.targets[0].id] = None
                with contextlib.suppress(ValueError):
                    found[node.targets[0].id] = ast.literal_eval(node.value)
    return found


def convert(text: str, default: Any) -> Any:
    """A typed value in the type of the notebook's own; ValueError where it is of another."""
    try:
        value = ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        value = {"true": True, "false": False, "none": None}.get(text.lower(), text)
    kind = type(default)
    if kind is str and text[:1] not in ("'", '"'):
        return text  # needs no quotes, also where it looks like a number
    if (kind is float and type(value) is int) or {kind, type(value)} == {list, tuple}:
        value = kind(value)
    if default is not None and type(value) is not kind or str(value) in ("inf", "-inf"):
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
            result[name] = convert(text, known[name])
        except (ValueError, OverflowError):
            why = (
                f"{text!r} is no {type(known[name]).__name__}, like the notebook's {known[name]!r}."
            )
            raise Failure(Exit.USAGE, f"-p {name}: {why}") from None
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
