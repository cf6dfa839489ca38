"""The notebook as a file: reading, cleaning, and the checklist of step 5."""

import copy
import hashlib
import json
import os
import re
import sys
import tempfile
from pathlib import Path

sys.modules.setdefault("rfc3987_syntax", None)  # a grammar that takes jsonschema two seconds
import nbformat  # noqa: E402

from .console import Console, Exit, Failure, one_line  # noqa: E402

NOTEBOOK = "ssd_bccd_detection.ipynb"
COVERAGE = 90.0  # percent of the code cells that must have outputs
SIZE_WARNING, SIZE_LIMIT = 2_000_000, 5_000_000  # bytes of the notebook file
STAMP = "ssd_runner"  # key of the digest in the notebook's metadata
INJECTED = "injected-parameters"  # papermill's tag
KERNELSPEC = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}
MACHINE_PATH = (
    r"(?<![\w.:/])(?:/home/[^\s/:]+|/root(?=/)|/Users/[^\s/:]+|/tmp/|/private/|/var/folders/"
    r"|/mnt/[^\s/:]+/)|\b[A-Za-z]:\\{1,2}Users\\|ipykernel_\d+"
)
UNSHOWN = {  # what GitHub does not show, by the kinds of an output's data and its HTML
    "a widget": "^application/.*widget-view",
    "an interactive chart": "^application/.*(plotly|vega|bokeh)",
    "a script": r"^application/javascript|<(script|iframe)\b",
    "an SVG picture without PNG": r"^image/svg|<svg\b",
    "a PDF": "^application/pdf",
}
OK = {True: "ok", False: "failure"}


def read(name: str | None):
    """Path, content and bytes of the notebook that is named, else the project's; NOTEBOOK."""
    beside = Path(__file__).parent.parent / NOTEBOOK
    path = Path(os.path.realpath(name or (NOTEBOOK if Path(NOTEBOOK).is_file() else beside)))
    try:
        data = path.read_bytes()
        notebook = nbformat.reads(data.decode("utf-8-sig"), as_version=4)
        nbformat.validate(notebook)
        if not any(cell.source.strip() for cell in code_cells(notebook)):
            raise ValueError("it has no code")
    except OSError as error:
        why = f"There is no notebook {path} ({error.strerror}): name one."
        raise Failure(Exit.NOTEBOOK, why) from None
    except Exception as error:  # nbformat raises many kinds
        why = f"{path.name} is not a valid notebook ({one_line(error, 120)}): restore it."
        raise Failure(Exit.NOTEBOOK, why) from None
    return path, notebook, data


def tags(cell) -> set[str]:
    """A cell's tags."""
    return set(cell.metadata.get("tags", []))


def code_cells(notebook, tag: str = ""):
    """The code cells, or those with a tag, in order."""
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    return [cell for cell in cells if tag in tags(cell)] if tag else cells


def titles(notebook) -> list[str]:
    """For every cell the nearest heading ``## ...`` at or above it."""
    result, title = [], ""
    for cell in notebook.cells:
        text = cell.source if cell.cell_type == "markdown" else ""
        title = re.sub(r"[*_`]", "", [title, *re.findall(r"^##\s+(.+?)\s*$", text, re.M)][-1])
        result.append(title)
    return result


def source_digest(notebook) -> str:
    """SHA-256 over the sources of all code cells, in order."""
    sources = [cell.source.replace("\r\n", "\n") for cell in code_cells(notebook)]
    return hashlib.sha256(json.dumps(sources, ensure_ascii=True).encode()).hexdigest()


def joined(old: str, new: str) -> str:
    """Two pieces of a stream, without what carriage returns hide: a progress bar stays short."""
    text = old + new
    start, hidden = text.rfind("\n") + 1, text.rstrip("\r").rfind("\r") + 1
    return text[:start] + text[max(start, hidden) :]


def terminal_text(text: str) -> str:
    """What is left on a terminal after carriage returns."""
    lines = text.replace("\r\n", "\n").split("\n") if "\r" in text else [text]
    return "\n".join(n.strip("\r").split("\r")[-1].rstrip() if "\r" in n else n for n in lines)


def write(notebook, path: Path):
    """Writes a stamped copy without what changes for nothing, whole or not at all (OSError).

    Returns the copy, and its size in bytes.
    """
    result = copy.deepcopy(notebook)
    result.metadata.pop("widgets", None)
    result.metadata.get("language_info", {}).pop("version", None)
    result.metadata["kernelspec"] = dict(KERNELSPEC)
    for cell in code_cells(result):
        cell.metadata.pop("execution", None)
        cell["outputs"] = join_streams(cell.outputs)
    result.metadata[STAMP] = {"source_sha256": source_digest(result)}
    text = nbformat.v4.writes_json(result)  # nbformat.writes would validate every copy
    data = (text.rstrip("\n") + "\n").encode("utf-8")
    temporary = path.with_name(f".{path.name}.new")  # a fixed name: the next run replaces it
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return result, len(data)


def join_streams(outputs):
    """Outputs with neighbouring streams joined by name, standard output first: order is chance."""
    result = []
    stretch = {}  # streams since the last output of another kind
    for output in outputs:
        if output.output_type != "stream":
            stretch = {}
        elif output.name in stretch:
            stretch[output.name]["text"] += output["text"]
            continue
        else:
            stretch[output.name] = output
        first = output.get("name") == "stdout" and len(stretch) == 2
        result.insert(len(result) - first, output)
    for output in result:
        if output.output_type == "stream":
            output["text"] = terminal_text(output["text"])
    return [output for output in result if output.get("text") != ""]


def check(notebook, size: int, folder: Path, draft: bool, paths: str):
    """The checklist, lines of (name, "ok" or "warning" or "failure", measured).

    size: bytes of the file. folder: the notebook's. draft: a page that stays here: silence and
    paths only warn. paths: verdict for an output that names a folder of this machine.
    """
    stamp, digest = notebook.metadata.get(STAMP, {}).get("source_sha256"), source_digest(notebook)
    stamped = f"digest {digest[:12]}" if stamp else "no digest: not stamped by this script"
    if stamp and stamp != digest:
        stamped += f", stamped {stamp[:12]}: the code was edited after the run, run it again"
    of_stamp = OK[stamp == digest] if stamp else "warning"
    of_size = "ok" if size <= SIZE_WARNING else "warning" if size <= SIZE_LIMIT else "failure"
    return [
        *check_cells(code_cells(notebook), "warning" if draft else "failure"),
        ("outputs belong to this code", of_stamp, stamped),
        (f"file saved, under {SIZE_LIMIT // 10**6} MB", of_size, f"{size / 1e6:.2f} MB"),
        *check_outputs(notebook, folder, "warning" if draft else paths),
    ]


def check_cells(cells, silence: str):
    """Executed, with outputs, without errors, in order; silence: verdict for too many without."""

    def which(test) -> tuple[int, str]:
        found = [str(number) for number, cell in enumerate(cells, 1) if test(cell)]
        more = ", ..." if len(found) > 8 else ""
        return len(found), f" (code cell {', '.join(found[:8])}{more})" if found else ""

    counts = [cell.execution_count for cell in cells if cell.source.strip()]
    idle, where = which(lambda cell: cell.source.strip() and cell.execution_count is None)
    measured = f"{len(counts) - idle} of {len(counts)}{where}"
    yield "all code cells executed", OK[bool(counts) and not idle], measured
    silent, where = which(lambda cell: not cell.outputs)
    share = 100.0 * (len(cells) - silent) / max(1, len(cells))
    measured = f"{len(cells) - silent} of {len(cells)}, coverage {share:.1f}%{where}"
    covered = "ok" if share >= COVERAGE else silence
    yield f"outputs present in {COVERAGE:.0f}% of the code cells", covered, measured
    failed, where = which(lambda cell: any(o.output_type == "error" for o in cell.outputs))
    yield "no errors", OK[not failed], f"{failed} errors{where}"
    ordered = counts == list(range(1, len(counts) + 1))
    measured = f"1 to {len(counts)}" if ordered else one_line(f"counts {counts}", 80)
    yield "executed in order", OK[ordered], measured


def check_outputs(notebook, folder: Path, verdict: str):
    """Nothing that GitHub cannot show, and no folder of this machine; folder, verdict: `check`."""
    own = {str(folder), os.path.expanduser("~"), sys.prefix, tempfile.gettempdir()}
    own = {re.escape(name) for name in own - {"/usr/local"} if len(name) > 4}
    pattern = re.compile(rf"{MACHINE_PATH}|(?<![\w.:/])(?:{'|'.join(own)})(?![\w.-])")
    found, warned = [], []
    widgets = notebook.metadata.get("widgets", {}).values()
    unshown = ["widget metadata without state"] * any("state" not in value for value in widgets)
    cells = enumerate(code_cells(notebook), 1)
    for number, output in ((n, output) for n, cell in cells for output in cell.outputs):
        data = output.get("data", {})
        text = "\n".join([*data, str(data.get("text/html", ""))])
        if not re.search(r"^image/(png|jpeg|gif)$", text, re.M):
            what = [name for name, sign in UNSHOWN.items() if re.search(sign, text, re.I | re.M)]
            unshown += [f"{name} in code cell {number}" for name in what]
        texts = [str(value) for kind, value in data.items() if not kind.startswith("image/")]
        texts += [output.get("text", ""), output.get("evalue", ""), *output.get("traceback", [])]
        if hit := pattern.search("\n".join(texts)):  # in a library's warning it only warns
            kind = warned if output.get("name") == "stderr" else found
            kind.append(f"{hit[0]!r} in code cell {number}")
    yield "GitHub can show it", OK[not unshown], one_line("; ".join(unshown)) or "all of it"
    verdict = verdict if found else "warning" if warned else "ok"
    yield "no paths of one machine", verdict, one_line("; ".join(found + warned)) or "none"


def show(console: Console, lines, name: str) -> None:
    """Prints the checklist with ticks; Failure VALIDATION where a line of it failed."""
    signs = {"ok": "✓", "warning": "!", "failure": "✗"}
    if "utf" not in (sys.stdout.encoding or "").lower():
        signs = {"ok": "[x]", "warning": "[!]", "failure": "[ ]"}
    for title, verdict, measured in lines:
        console.note(f"{signs[verdict]} {title:<42}  {measured}")
    if failed := [f"{title}: {said}" for title, verdict, said in lines if verdict == "failure"]:
        raise Failure(Exit.VALIDATION, f"{name} does not pass: {'; '.join(failed)}.")
