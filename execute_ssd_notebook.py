#!/usr/bin/env python3
# /// script
# requires-python = ">=3.10"
# dependencies = [
#   "torch>=2.5",
#   "torchvision>=0.20",
#   "numpy>=1.26",
#   "pillow>=10.3",
#   "matplotlib>=3.7",
#   "opencv-python>=4.8",
#   "tqdm>=4.65",
#   "lxml>=5.0",
#   "ipykernel>=6.25",
#   "nbformat>=5.9",
#   "nbclient>=0.8",
#   "nbconvert>=7.8",
#   "filelock>=3.12",
#   "packaging>=23.0",
#   # optional: the notebook says so where it lacks one of these
#   "torchmetrics>=1.3",
#   "faster-coco-eval>=1.6.3",
#   "onnx>=1.16",
#   "onnxruntime>=1.17",
#   "onnxscript>=0.1",
#   "tifffile>=2023.7.10",
# ]
# ///
"""Run the notebook from beginning to end and publish the result, or say why not.

Six steps: dependencies, dataset, weights, execute, validate, publish. The run works
on a copy; the notebook and what it stages (metrics, checkpoints) change together, by
renames, and only after the result was validated. A failed run leaves them byte for
byte as they were, and its own outputs beside them.

This file needs nothing but the notebook. It imports the standard library alone until
step 1 has found the packages, so the others are imported where they are used.
"""

import argparse
import ast
import asyncio
import contextlib
import copy
import difflib
import errno
import hashlib
import importlib.util
import json
import logging
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import uuid
import warnings
import zipfile
from concurrent.futures import ThreadPoolExecutor
from enum import IntEnum
from pathlib import Path

NOTEBOOK = "ssd_bccd_detection.ipynb"
OLDEST_PYTHON = (3, 10)
COVERAGE = 90.0  # percent of the code cells that must have outputs
SIZE_WARNING = 2_000_000  # bytes of the notebook file
SIZE_LIMIT = 5_000_000
OUTPUT_LIMIT = 8_000_000  # characters of text in one cell: more than a whole page may have
SAVE_SECONDS = 30.0  # a long cell is saved this often
INTERRUPT_SECONDS = 6.0  # a cell may take this long to end after an interrupt
SILENT_SECONDS = 60.0  # without a terminal: a sign of life after so much silence

EXIT_CODES = """\
Exit codes: 0 done, or --check found nothing wrong; 1 an error in this script; 2 wrong use;
3 packages, Python; 4 dataset; 5 weights; 6 a cell failed; 7 the kernel died, also after retries;
8 --timeout; 9 the result did not pass, or the notebook was edited meanwhile; 10 no notebook;
11 disk space or a place that cannot be written; 12 another run works here;
129, 130, 143 ended by SIGHUP, SIGINT (Ctrl-C), SIGTERM."""


# ---------------------------------------------------------------------------------------
# What the steps share: how a run ends, what it says, how it hears signals


class Exit(IntEnum):
    """Exit codes, as EXIT_CODES explains them; a signal ends with 128 + its number."""

    INTERNAL = 1
    USAGE = 2
    PACKAGES = 3
    DATASET = 4
    WEIGHTS = 5
    CELL = 6
    KERNEL = 7
    TIMEOUT = 8
    VALIDATION = 9
    NOTEBOOK = 10
    STORAGE = 11
    LOCKED = 12


# exceptions that the notebook defines, and the exit codes that they end a run with
EXIT_OF_EXCEPTION = {
    "DatasetError": Exit.DATASET,
    "AnnotationError": Exit.DATASET,
    "WeightsError": Exit.WEIGHTS,
}


class Failure(Exception):
    """An end of the run: an exit code, and one sentence that says what to do."""

    def __init__(self, code, sentence: str):
        super().__init__(sentence)
        self.code = int(code)
        self.sentence = sentence


def one_line(text, limit: int = 160) -> str:
    """The text on one line without colours, at most `limit` characters."""
    without_colours = re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", str(text))
    line = " ".join(without_colours.split())
    if len(line) > limit:
        line = line[: limit - 3] + "..."
    return line


def storage_failure(what: str, error: OSError) -> Failure:
    """A Failure for a file that cannot be written: why, and what helps against it."""
    no_room = [errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC)]
    protected = [errno.EACCES, errno.EPERM, errno.EROFS]
    reason = error.strerror or str(error)
    if error.errno in no_room:
        advice = "make room for it and run again"
    elif error.errno in protected:
        advice = "make it writable for this user, or write elsewhere by --output"
    else:
        advice = "free that place, or write elsewhere by --output"
    return Failure(Exit.STORAGE, f"{what} ({reason}): {advice}.")


def prepare_streams() -> None:
    """Standard streams that are closed or missing (a service, pythonw) lead nowhere.

    A closed one is opened again: its number would go to the next file that is opened.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            nowhere = os.open(os.devnull, os.O_RDWR)  # takes the lowest free number
            os.set_inheritable(nowhere, True)
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")
    if sys.stderr is None:
        sys.stderr = sys.stdout
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)  # Jupyter's have none
        if reconfigure is not None:
            with contextlib.suppress(OSError, ValueError):  # it is closed
                reconfigure(errors="replace")


def is_terminal(stream) -> bool:
    """Whether lines can be replaced in place there."""
    try:
        return stream.isatty() and os.environ.get("TERM") != "dumb"
    except (AttributeError, ValueError):
        return False


class Console:
    """Lines on standard output; a reader that goes away does not end the run."""

    CLEAR_LINE = "\r\x1b[K"

    def __init__(self):
        self.unheard = False
        self.terminal = is_terminal(sys.stdout)
        self.status_shown = False  # on a terminal: the last line is to be replaced

    def note(self, text: str) -> None:
        """One line below the heading of a step."""
        self.write(f"  {text}")

    def write(self, text: str, end: str = "\n") -> None:
        """Write a line in place of the status that may stand below."""
        if self.unheard:
            return
        if self.status_shown:
            text = self.CLEAR_LINE + text
            self.status_shown = False
        try:
            print(text, end=end, flush=True)
        except (OSError, ValueError):  # nobody reads any more
            self.unheard = True
            sys.stdout = open(os.devnull, "w", encoding="utf-8")

    def end_status(self) -> None:
        """Take away the status that may stand there, before somebody else writes."""
        if self.status_shown:
            self.write("", end="")

    def show_status(self, text: str) -> None:
        """A line on the terminal that the next one replaces."""
        width = shutil.get_terminal_size().columns
        self.write(text[: width - 1], end="")
        self.status_shown = True


class Signals:
    """Ctrl-C, SIGTERM, SIGHUP: the first ends the run in order, the second kills the kernel.

    In the first three steps the first one raises KeyboardInterrupt. Later, in the kernel's
    event loop, it is only noted: the watcher there and `check` look at `failure`.
    """

    def __init__(self):
        self.failure = None  # what the first signal asked for
        self.how_to_go_on = "run it again to go on"
        self.may_raise = True
        self.kill_kernel = None  # set from the first kernel on
        self.earlier_handlers = {}

    def listen(self) -> None:
        """From now on; a signal that our parent had ignored (nohup, `&`) stays ignored."""
        if threading.current_thread() is not threading.main_thread():
            return  # only there handlers can be set
        for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK"):
            number = getattr(signal, name, None)
            if number is None:
                continue
            handler = signal.getsignal(number)
            if handler is None or handler == signal.SIG_IGN:
                continue
            self.earlier_handlers[number] = handler
            signal.signal(number, self.handle)

    def stop_listening(self) -> None:
        """Put back what was there before `listen`."""
        for number, handler in self.earlier_handlers.items():
            signal.signal(number, handler)

    def handle(self, number: int, frame) -> None:
        """What the system calls."""
        if self.failure is not None:
            if self.kill_kernel is not None:
                self.kill_kernel()
            return
        name = signal.Signals(number).name
        sentence = f"Ended by {name}; {self.how_to_go_on}, finished epochs are kept."
        self.failure = Failure(128 + number, sentence)
        if self.may_raise:
            raise KeyboardInterrupt

    def check(self) -> None:
        """Raise the Failure, where a signal has asked for the end."""
        if self.failure is not None:
            raise self.failure


def read_options(arguments):
    """The options of this call."""
    parser = argparse.ArgumentParser(
        usage="%(prog)s [NOTEBOOK] [options]",
        description="Run the notebook from beginning to end, check the result and publish it.",
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("notebook", nargs="?", metavar="NOTEBOOK", help=f"default: {NOTEBOOK}")
    add("--check", action="store_true", help="check the notebook as it stands, run nothing")
    add(
        "-p",
        dest="overrides",
        metavar="NAME=VALUE",
        action="append",
        default=[],
        help="another value of a constant; the result goes under runs/",
    )
    add("--dataset", metavar="DIR", help="an existing copy (also BCCD_DATASET)")
    add(
        "--dataset-url",
        metavar="URL",
        help='another git mirror (also BCCD_URL), or "": the shipped copy',
    )
    add("--weights", metavar="FILE", help="VGG-16's features (also VGG16_WEIGHTS)")
    add("--output", metavar="NB", help="write the executed notebook there, not in place")
    add("--fresh", action="store_true", help="train from the start")
    add("--install", action="store_true", help="install missing packages")
    add(
        "--retries", type=int, default=3, metavar="N", help="restarts of a dead kernel (default: 3)"
    )
    add("--timeout", type=float, metavar="S", help="seconds that a cell may take")
    return parser.parse_args(arguments)


# ---------------------------------------------------------------------------------------
# The notebook as a file: reading, cleaning, writing

STAMP = "execute_ssd_notebook"  # key of the two digests in the notebook's metadata
INJECTED = "injected-parameters"  # papermill's tag
SKIPPED = "skip-execution"  # nbclient's tag: such a cell is not executed
MAY_FAIL = "raises-exception"  # nbclient's tag: such a cell may end in an error
KERNELSPEC = {
    "display_name": "Python 3 (ipykernel)",
    "language": "python",
    "name": "python3",
}
# where Jupyter, Colab, an extension and papermill note when a cell was executed
TIMES_OF_A_CELL = ["execution", "executionInfo", "ExecuteTime", "papermill"]


def import_nbformat():
    """The package, without a grammar that takes jsonschema two seconds and is not used."""
    sys.modules.setdefault("rfc3987_syntax", None)
    import nbformat

    return nbformat


def find_notebook(name) -> Path:
    """The notebook that is named, else the project's: in this folder, or beside this file."""
    if name:
        return Path(os.path.realpath(name))
    path = Path(NOTEBOOK)
    if not path.is_file():
        script = globals().get("__file__", NOTEBOOK)  # none, where Python reads it from a pipe
        path = Path(script).with_name(NOTEBOOK)
        if not path.is_file():
            path = Path(os.path.realpath(script)).with_name(NOTEBOOK)
    return Path(os.path.realpath(path))


def read_notebook(path: Path):
    """Content and bytes of a notebook. Failure NOTEBOOK."""
    nbformat = import_nbformat()
    try:
        data = path.read_bytes()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about ids that it then adds
            notebook = nbformat.reads(data.decode("utf-8-sig"), as_version=4)
        if not knows_ids(notebook):  # some programs write them all the same
            for cell in notebook.cells:
                cell.pop("id", None)
        nbformat.validate(notebook)
        if not cells_to_run(notebook):
            raise ValueError("it has no code")
    except OSError as error:
        why = f"There is no notebook {path} ({error.strerror}): name one."
        raise Failure(Exit.NOTEBOOK, why) from None
    except Exception as error:  # nbformat raises many kinds
        said = one_line(error, 120)
        why = f"{path.name} is not a valid notebook ({said}): restore it."
        raise Failure(Exit.NOTEBOOK, why) from None
    return notebook, data


def knows_ids(notebook) -> bool:
    """Whether cells have ids: from format 4.5 on."""
    return (notebook.nbformat, notebook.nbformat_minor) >= (4, 5)


def tags(cell) -> set:
    """A cell's tags."""
    return set(cell.metadata.get("tags", []))


def is_run(cell) -> bool:
    """Whether a run executes it, as nbclient does: code, not empty, not tagged to be skipped."""
    return cell.cell_type == "code" and cell.source.strip() != "" and SKIPPED not in tags(cell)


def cells_to_run(notebook, tag: str = ""):
    """The code cells that a run executes, or those of them with a tag, in order."""
    cells = []
    for cell in notebook.cells:
        if is_run(cell) and (tag == "" or tag in tags(cell)):
            cells.append(cell)
    return cells


def section_titles(notebook):
    """For every cell the nearest heading ``## ...`` at or above it."""
    titles = []
    title = ""
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            headings = re.findall(r"^##\s+(.+?)\s*$", cell.source, re.MULTILINE)
            if headings:
                title = re.sub(r"[*_`]", "", headings[-1])
        titles.append(title)
    return titles


def digest(value) -> str:
    """SHA-256 of plain data."""
    text = json.dumps(value, ensure_ascii=True, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def source_digest(notebook) -> str:
    """Of the sources of all cells that are executed, in order."""
    sources = []
    for cell in cells_to_run(notebook):
        sources.append(cell.source.replace("\r\n", "\n").rstrip())
    return digest(sources)


def outputs_digest(notebook) -> str:
    """Of what those cells show, as a clean page has it.

    Blank characters at the ends and the outputs' metadata are left out: Jupyter changes
    them when it saves a page.
    """
    shown = []
    for cell in cells_to_run(notebook):
        for output in join_streams(cell.outputs):
            parts = {}
            for key in ("output_type", "name", "text", "ename", "evalue"):
                parts[key] = output.get(key, "").strip()
            for kind, content in output.get("data", {}).items():
                if isinstance(content, str):
                    content = content.strip()
                parts[kind] = content
            shown.append(parts)
    return digest(shown)


def joined(old: str, new: str) -> str:
    """Two pieces of a stream, without what carriage returns hide: a progress bar stays short."""
    text = old + new
    last_line = text.rfind("\n") + 1
    visible = text.rstrip("\r").rfind("\r") + 1
    return text[:last_line] + text[max(last_line, visible) :]


def terminal_text(text: str) -> str:
    """What is left on a terminal after carriage returns."""
    if "\r" not in text:
        return text
    lines = []
    for line in text.replace("\r\n", "\n").split("\n"):
        if "\r" in line:
            line = line.strip("\r").split("\r")[-1].rstrip()
        lines.append(line)
    return "\n".join(lines)


def join_streams(outputs):
    """A copy with neighbouring streams joined by name, standard output first: order is chance."""
    result = []
    neighbours = {}  # streams since the last output of another kind
    for output in copy.deepcopy(outputs):
        if output.output_type != "stream":
            neighbours = {}
            result.append(output)
        elif output.name in neighbours:
            neighbours[output.name]["text"] += output["text"]
        elif output.name == "stdout" and "stderr" in neighbours:
            neighbours["stdout"] = output
            result.insert(len(result) - 1, output)
        else:
            neighbours[output.name] = output
            result.append(output)
    kept = []
    for output in result:
        if output.output_type == "stream":
            output["text"] = terminal_text(output["text"])
            if output["text"] == "":
                continue
        kept.append(output)
    return kept


def cleaned(notebook):
    """A stamped copy without what changes for nothing from run to run."""
    page = copy.deepcopy(notebook)
    page.metadata.pop("widgets", None)
    page.metadata.get("language_info", {}).pop("version", None)
    page.metadata["kernelspec"] = dict(KERNELSPEC)
    for cell in page.cells:
        if cell.cell_type == "code":
            for key in TIMES_OF_A_CELL:
                cell.metadata.pop(key, None)
            cell["outputs"] = join_streams(cell.outputs)
    page.metadata[STAMP] = {
        "source_sha256": source_digest(page),
        "outputs_sha256": outputs_digest(page),
    }
    return page


def write_page(notebook, path: Path):
    """Write a clean copy, whole or not at all (OSError): the copy, and its size in bytes."""
    nbformat = import_nbformat()
    page = cleaned(notebook)
    text = nbformat.v4.writes_json(page)  # nbformat.writes would validate every copy
    text = text.rstrip("\n") + "\n"
    data = text.encode("utf-8", errors="backslashreplace")  # half characters, as JSON has them
    temporary = path.with_name(f".{path.name}.new")  # a fixed name: the next run replaces it
    try:
        temporary.write_bytes(data)
        rename(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
    return page, len(data)


# ---------------------------------------------------------------------------------------
# The checklist, of step 5 and of --check: lines of (name, verdict, what was measured)

OK = "ok"
WARNING = "warning"
FAILURE = "failure"

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


def check_page(notebook, size: int, folder: Path, draft: bool, paths: str):
    """All lines of the checklist.

    size: bytes of the file. folder: the notebook's. draft: a page that stays on this
    machine, where silent cells and paths only warn. paths: the verdict for an output that
    names a folder of this machine.
    """
    silence = FAILURE
    if draft:
        silence = WARNING
        paths = WARNING
    lines = check_cells(notebook, silence)
    lines.append(check_stamp(notebook))
    lines.append(check_size(size))
    lines.append(check_display(notebook))
    lines.append(check_paths(notebook, folder, paths))
    return lines


def verdict_if(right: bool) -> str:
    """OK or FAILURE."""
    if right:
        return OK
    return FAILURE


def listed(numbers) -> str:
    """Numbers of code cells in brackets, the first eight of them."""
    if not numbers:
        return ""
    text = ", ".join(map(str, numbers[:8]))
    if len(numbers) > 8:
        text += ", ..."
    return f" (code cell {text})"


def check_cells(notebook, silence: str):
    """Executed, with outputs, without errors, in order; silence: verdict for too few outputs."""
    cells = cells_to_run(notebook)
    counts = []
    idle = []
    silent = []
    failed = []
    expected = 0
    for number, cell in enumerate(cells, start=1):
        counts.append(cell.execution_count)
        if cell.execution_count is None:
            idle.append(number)
        if not cell.outputs:
            silent.append(number)
        if not has_error(cell):
            continue
        if MAY_FAIL in tags(cell):
            expected += 1
        else:
            failed.append(number)

    total = len(cells)
    executed = verdict_if(total > 0 and not idle)
    of_executed = f"{total - len(idle)} of {total}{listed(idle)}"
    share = 100.0 * (total - len(silent)) / max(1, total)
    covered = OK
    if share < COVERAGE:
        covered = silence
    of_covered = f"{total - len(silent)} of {total}, coverage {share:.1f}%{listed(silent)}"
    of_errors = f"{len(failed)} errors{listed(failed)}"
    if expected:
        of_errors += f", {expected} expected"
    ordered = counts == list(range(1, total + 1))
    of_order = f"1 to {total}"
    if not ordered:
        of_order = one_line(f"counts {counts}", 80)
    return [
        ("all code cells executed", executed, of_executed),
        (f"outputs present in {COVERAGE:.0f}% of the code cells", covered, of_covered),
        ("no errors", verdict_if(not failed), of_errors),
        ("executed in order", verdict_if(ordered), of_order),
    ]


def has_error(cell) -> bool:
    """Whether a cell ended in an error."""
    return any(output.output_type == "error" for output in cell.outputs)


def has_times(notebook) -> bool:
    """Whether another program noted when it executed a cell: our pages carry no times."""
    for cell in cells_to_run(notebook):
        if any(cell.metadata.get(key) for key in TIMES_OF_A_CELL):
            return True
    return False


def check_stamp(notebook):
    """Whether the outputs are those of this code, by the digests that a run stamped.

    Other programs keep the stamp and cannot renew it. So other code with other outputs, or
    with times of another run, only warns; other code with the stamped outputs was edited
    after the run.
    """
    name = "outputs belong to this code"
    stamp = notebook.metadata.get(STAMP, {})
    sources = source_digest(notebook)
    said = f"digest {sources[:12]}"
    if "source_sha256" not in stamp:
        return name, WARNING, "no digest: not stamped by this script"
    if stamp["source_sha256"] == sources:
        return name, OK, said
    said += f", stamped {stamp['source_sha256'][:12]}"
    same_outputs = stamp.get("outputs_sha256") == outputs_digest(notebook)
    if same_outputs and not has_times(notebook):
        said += ": the code was edited after the run, run it again by this script"
        return name, FAILURE, said
    said += ": edited and run by another program; a run of this script renews the stamp"
    return name, WARNING, said


def check_size(size: int):
    """Small enough for GitHub's page."""
    name = f"file saved, under {SIZE_LIMIT // 10**6} MB"
    verdict = OK
    if size > SIZE_WARNING:
        verdict = WARNING
    if size > SIZE_LIMIT:
        verdict = FAILURE
    return name, verdict, f"{size / 1e6:.2f} MB"


def shown_outputs(notebook):
    """All outputs on the page, each with the words for its code cell."""
    number = 0
    found = []
    for cell in notebook.cells:
        if cell.cell_type != "code":
            continue
        where = "in a cell that is not executed"
        if is_run(cell):
            number += 1
            where = f"in code cell {number}"
        for output in cell.outputs:
            found.append((where, output))
    return found


def check_display(notebook):
    """Nothing that GitHub cannot show."""
    unshown = []
    for state in notebook.metadata.get("widgets", {}).values():
        if "state" not in state:
            unshown.append("widget metadata without state")
    for where, output in shown_outputs(notebook):
        data = output.get("data", {})
        if "image/png" in data or "image/jpeg" in data or "image/gif" in data:
            continue  # GitHub shows this one
        text = "\n".join(data) + "\n" + str(data.get("text/html", ""))
        for what, sign in UNSHOWN.items():
            if re.search(sign, text, re.IGNORECASE | re.MULTILINE):
                unshown.append(f"{what} {where}")
    said = one_line("; ".join(unshown)) or "all of it"
    return "GitHub can show it", verdict_if(not unshown), said


def check_paths(notebook, folder: Path, verdict: str):
    """No folder of this machine; in a library's warning on standard error it only warns."""
    names = []
    for name in (str(folder), os.path.expanduser("~"), sys.prefix, tempfile.gettempdir()):
        if len(name) > 4 and name != "/usr/local":
            names.append(re.escape(name))
    pattern = MACHINE_PATH
    if names:
        pattern += rf"|(?<![\w.:/])(?:{'|'.join(names)})(?![\w.-])"
    found = []
    in_warnings = []
    for where, output in shown_outputs(notebook):
        texts = [output.get("text", ""), output.get("evalue", "")]
        texts.extend(output.get("traceback", []))
        for kind, content in output.get("data", {}).items():
            if not kind.startswith("image/"):
                texts.append(str(content))
        hit = re.search(pattern, "\n".join(texts))
        if hit is None:
            continue
        if output.get("name") == "stderr":
            in_warnings.append(f"{hit[0]!r} {where}")
        else:
            found.append(f"{hit[0]!r} {where}")
    if not found:
        verdict = OK
        if in_warnings:
            verdict = WARNING
    said = one_line("; ".join(found + in_warnings)) or "none"
    return "no paths of one machine", verdict, said


def show_checklist(console: Console, lines, name: str) -> None:
    """Print the lines with ticks; Failure VALIDATION where one of them failed."""
    signs = {OK: "✓", WARNING: "!", FAILURE: "✗"}
    encoding = getattr(sys.stdout, "encoding", None) or ""
    if "utf" not in encoding.lower():
        signs = {OK: "[x]", WARNING: "[!]", FAILURE: "[ ]"}
    failed = []
    for title, verdict, measured in lines:
        console.note(f"{signs[verdict]} {title:<42}  {measured}")
        if verdict == FAILURE:
            failed.append(f"{title}: {measured}")
    if failed:
        raise Failure(Exit.VALIDATION, f"{name} does not pass: {'; '.join(failed)}.")


# ---------------------------------------------------------------------------------------
# What one run does: all questions are answered before anything is touched

INPUTS = {  # constants of the notebook: the variable and the option that override them
    "DATA_DIR": ("BCCD_DATASET", "dataset"),
    "DATASET_URL": ("BCCD_URL", "dataset_url"),
    "VGG16_WEIGHTS": ("VGG16_WEIGHTS", "weights"),
    "TRAINING": ("SSD_TRAINING", "fresh"),
}


class Job:
    """One run: the notebook as it will be executed, its environment, and all its places."""

    def __init__(self, options, console: Console, signals: Signals):
        self.options = options
        self.console = console
        self.signals = signals
        self.env = dict(os.environ)  # of the kernel
        self.source = find_notebook(options.notebook)
        self.notebook, self.data = read_notebook(self.source)
        self.folder = self.source.parent  # in which the kernel works
        inject(self.notebook, {})  # takes out what an earlier run injected
        self.known = read_constants(self.notebook)
        self.values = read_overrides(options.overrides, self.known)
        for name, value in self.values.items():
            if isinstance(value, str):  # not every shell replaces ~ behind an equals sign
                self.values[name] = os.path.expanduser(value)
        self.check_clashes()
        self.choose_target()
        self.choose_folders()
        for name, (variable, option) in INPUTS.items():
            typed = getattr(options, option)
            if name in self.values:
                self.env.pop(variable, None)
            elif typed is True:
                self.env[variable] = "fresh"
            elif isinstance(typed, str):  # also "": no mirror, the shipped copy
                self.env[variable] = typed
        inject(self.notebook, self.values)

    def check_clashes(self) -> None:
        """Failure USAGE for options that contradict each other or the notebook."""
        for name, (_, option) in INPUTS.items():
            if name in self.values and getattr(self.options, option):
                words = f"--{option.replace('_', '-')} and -p {name} do not go together"
                raise Failure(Exit.USAGE, f"{words}: choose one.")
        own = self.known.get("CHECKPOINT_DIR")
        given = self.values.get("CHECKPOINT_DIR")
        if own and given is not None:
            if os.path.realpath(self.folder / own) == os.path.realpath(self.folder / given):
                why = "the notebook's own folder, which a run with -p never writes to"
                raise Failure(Exit.USAGE, f"-p CHECKPOINT_DIR: that is {why}.")

    def choose_target(self) -> None:
        """Where the result goes: in place, below runs/ with overrides, or where --output says."""
        self.draft = bool(self.values)  # a page that is not the project's own
        self.target = self.source
        runs = self.folder / "runs"
        if self.draft:
            self.target = runs / "custom" / self.source.name
        output = self.options.output
        if output:
            self.target = Path(os.path.realpath(os.path.expanduser(output)))
            in_place = self.draft and self.target == self.source
            if self.target.suffix != ".ipynb" or in_place:
                why = "name a file that ends in .ipynb; overrides are never published in place"
                raise Failure(Exit.USAGE, f"--output {output}: {why}.")
            if is_protected(self.folder):  # a checkout that is only read
                runs = self.target.parent / "runs"
        stem = self.target.stem
        self.place = runs / stem  # what else a run may write
        if runs in self.target.parent.parents:
            self.place = self.target.parent
        self.partial = free_name(self.target, "partial")  # the working copy
        self.work = self.target.with_name(f".{stem}.run")  # the kernel's own files

    def choose_folders(self) -> None:
        """Where checkpoints go: an own folder for a run with overrides.

        Also for one that writes elsewhere because the checkout is only read; that one works
        on a copy of the checkpoints.
        """
        self.checkpoints_to_copy = None
        if self.options.output and not self.draft:
            theirs = self.folder / (self.known.get("CHECKPOINT_DIR") or "")
            if is_protected(theirs):
                self.checkpoints_to_copy = theirs
        if self.draft or self.checkpoints_to_copy is not None:
            name = self.known.get("CHECKPOINT_DIR")
            if name and "CHECKPOINT_DIR" not in self.values:
                own = self.place / Path(name).name
                self.values["CHECKPOINT_DIR"] = self.relative(own)
        self.checkpoints = None
        self.staging = None  # what the notebook writes there changes together with the page
        folder = self.value("CHECKPOINT_DIR")
        if folder:
            self.checkpoints = Path(os.path.realpath(self.folder / folder))
            self.staging = self.checkpoints / ".staging"

    def trains_anew(self) -> bool:
        """Whether a training from the start was asked for."""
        return (self.env.get("SSD_TRAINING") or self.value("TRAINING")) == "fresh"

    def value(self, name: str):
        """A constant as this run has it."""
        return self.values.get(name, self.known.get(name))

    def settle_input(self, name: str):
        """An input's path, or None. To be called once: what was typed counts from the working
        folder, and the kernel gets it as counted from the notebook's.
        """
        variable, _ = INPUTS[name]
        typed = self.env.get(variable)
        if typed:
            path = Path(os.path.abspath(os.path.expanduser(typed)))
            self.env[variable] = self.relative(path)
            return path
        if self.value(name):
            return self.folder / self.value(name)
        return None

    def relative(self, path: Path) -> str:
        """A path as the notebook may print it: relative to its folder where it lies inside."""
        if self.folder in path.parents:
            return path.relative_to(self.folder).as_posix()
        return str(path)


def read_constants(notebook):
    """Name to value of the parameters cell's assignments, not run; None takes any value."""
    sources = []
    for cell in cells_to_run(notebook, "parameters"):
        sources.append(cell.source)
    # without Jupyter's own lines: %matplotlib inline, !pip list
    code = re.sub(r"^[ \t]*[%!].*$", "", "\n".join(sources), flags=re.MULTILINE)
    try:
        statements = ast.parse(code).body
    except (SyntaxError, ValueError):
        return {}  # the kernel will say so
    found = {}
    for statement in statements:
        if not isinstance(statement, ast.Assign):
            continue
        target = statement.targets[0]
        if isinstance(target, ast.Name):
            try:
                found[target.id] = ast.literal_eval(statement.value)
            except (ValueError, TypeError):
                found[target.id] = None
    return found


def read_overrides(pairs, known):
    """``NAME=VALUE`` pairs by name, in the types of the known constants. Failure USAGE."""
    values = {}
    for pair in pairs:
        name, sign, text = pair.partition("=")
        if sign == "" or name == "":
            raise Failure(Exit.USAGE, f"-p {pair!r}: write it as NAME=VALUE.")
        if name not in known:
            near = difflib.get_close_matches(name.upper(), known, n=1, cutoff=0.5)
            hint = f"known are {', '.join(known)}."
            if near:
                hint = f"did you mean {near[0]}?"
            why = f"the notebook has no such parameter; {hint}"
            raise Failure(Exit.USAGE, f"-p {name}: {why}")
        values[name] = read_value(name, text, known[name])
    return values


def read_value(name: str, text: str, default):
    """A value of the same type as the notebook's; a text needs no quotes. Failure USAGE."""
    kind = type(default)
    value = text
    if kind is not str or text.startswith(("'", '"')):
        literal = text.strip()
        if kind is bool:
            literal = literal.title()
        with contextlib.suppress(ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
            value = ast.literal_eval(literal)
    if kind is float and type(value) is int:
        value = float(value)
    if kind in (list, tuple) and type(value) in (list, tuple):
        value = kind(value)
    wrong_type = default is not None and type(value) is not kind
    if wrong_type or str(value) in ("inf", "-inf"):
        why = f"{text!r} is no {kind.__name__}, like the notebook's {default!r}"
        raise Failure(Exit.USAGE, f"-p {name}: {why}.")
    return value


def inject(notebook, values) -> None:
    """Put a cell with the values after the parameters cell, in place of an earlier one."""
    nbformat = import_nbformat()
    cells = []
    place = 0
    for cell in notebook.cells:
        if INJECTED in tags(cell):
            continue
        cells.append(cell)
        if "parameters" in tags(cell):
            place = len(cells)
    if values:
        lines = []
        for name, value in values.items():
            lines.append(f"{name} = {value!r}")
        lines.append(f"print('Overrides of this run: {', '.join(values)}')")
        metadata = {"tags": [INJECTED]}
        injected = nbformat.v4.new_code_cell("\n".join(lines), metadata=metadata)
        injected["id"] = INJECTED
        if not knows_ids(notebook):
            injected.pop("id")
        cells.insert(place, injected)
    notebook.cells = cells


# ---------------------------------------------------------------------------------------
# Places: what may be written, by whom, and to whom it belongs afterwards


def is_protected(path: Path) -> bool:
    """Whether a file or folder that exists may not be written; root, too, is told."""
    if not path.exists():
        return path.parent != path and is_protected(path.parent)
    read_only = path.stat().st_mode & 0o222 == 0
    if read_only and not (os.name == "nt" and path.is_dir()):  # there it protects no folder
        return True
    if path.is_dir() or is_mount_point(path):
        return not os.access(path, os.W_OK)
    # another user's file can be replaced by a rename, but not where nothing can be written
    return hasattr(os, "statvfs") and bool(os.statvfs(path).f_flag & os.ST_RDONLY)


def is_mount_point(path: Path) -> bool:
    """Whether a file was mounted by itself (docker run -v FILE:FILE): no rename replaces it."""
    escaped = str(path).replace("\\", r"\134").replace(" ", r"\040")
    try:
        lines = Path("/proc/self/mountinfo").read_text("utf-8", errors="replace").splitlines()
    except OSError:
        return os.path.ismount(path)
    for line in lines:
        fields = line.split(" ")
        if len(fields) > 4 and fields[4] == escaped:
            return True
    return False


def free_name(target: Path, what: str) -> Path:
    """A name beside the target that no earlier run's outputs have: page.partial.ipynb."""
    number = 1
    path = target.with_name(f"{target.stem}.{what}.ipynb")
    while path.exists():
        number += 1
        path = target.with_name(f"{target.stem}.{what}-{number}.ipynb")
    return path


def earlier_outputs(target: Path):
    """The files that failed runs have left beside the target, as `free_name` names them."""
    pattern = re.escape(target.stem) + r"\.(partial|failed)(-\d+)?\.ipynb"
    found = []
    for path in target.parent.iterdir():
        if re.fullmatch(pattern, path.name):
            found.append(path)
    return found


def lock_of(target: Path) -> Path:
    """The file by which runs that write the target know of each other."""
    return target.with_name(f".{target.name}.lock")


def claim(target: Path, folder: Path, room: float):
    """A held lock by which no other run writes the target. Failure STORAGE, LOCKED.

    Tells before the first cell where the folder cannot be written or has no room.
    """
    from filelock import FileLock, Timeout

    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path in (folder, target):
            if path.exists() and is_protected(path):
                raise OSError(errno.EACCES, f"{path.name} is write-protected")
        tempfile.TemporaryFile(dir=folder).close()
        free = shutil.disk_usage(folder).free
        if free < room:
            reason = f"{free / 1e6:.0f} MB are free, {room / 1e6:.0f} MB needed"
            raise OSError(errno.ENOSPC, reason)
    except OSError as error:
        raise storage_failure(f"Cannot write {target.name} in {folder}", error) from None

    # The lock file stays: removed, two runs could hold locks of one name. Others may open it.
    path = lock_of(target)
    try:
        held = FileLock(path, mode=0o666).acquire(timeout=0)
    except Timeout:
        why = f"Another run works on {target.name} (it holds {path}): wait or end it."
        raise Failure(Exit.LOCKED, why) from None
    except OSError as error:
        why = f"The lock {path} cannot be opened"
        if not isinstance(error, PermissionError) or not path.exists():
            raise storage_failure(why, error) from None
        advice = "another user's run made it: remove it when no run works here"
        raise Failure(Exit.STORAGE, f"{why} ({error.strerror}); {advice}.") from None
    with contextlib.suppress(OSError):  # it is another user's
        path.chmod(0o666)
    return held


def copy_checkpoints(job: Job) -> None:
    """Of a checkout that is only read, those that the run's own folder does not have yet."""
    source = job.checkpoints_to_copy
    if source is None or job.checkpoints is None or not source.is_dir():
        return
    for path in source.iterdir():
        copied = job.checkpoints / path.name
        if path.is_file() and not copied.exists():
            half = copied.with_name(f".{copied.name}.new")
            shutil.copyfile(path, half)
            rename(half, copied)
    job.console.note(f"{source} is write-protected: this run works on a copy of it")


class Owners:
    """After a run as root all files belong to whom they belonged before.

    What the run made belongs to the notebook's owner. For any other user nothing is done.
    """

    def __init__(self, job: Job):
        self.job = job
        self.owner = owner_of(job.source)
        self.before = {}
        self.needed = hasattr(os, "geteuid") and os.geteuid() == 0
        if self.needed:
            for path in self.paths():
                self.before[path] = owner_of(path)

    def paths(self):
        """What a run may write: beside the notebook, its own folders, the result's own names."""
        job = self.job
        found = [job.target, job.partial, job.work, lock_of(job.target)]
        if job.target.parent.is_dir():
            found.extend(earlier_outputs(job.target))
        whole = [job.folder / "runs", job.place]
        if job.checkpoints is not None:
            found.append(lock_of(job.checkpoints))
            whole.append(job.checkpoints)
        if job.value("DATA_DIR"):
            whole.append(job.folder / job.value("DATA_DIR"))
        found.extend(whole)
        found.extend(paths_in(job.folder, deep=False))
        for folder in whole:
            found.extend(paths_in(folder, deep=True))
        return found

    def restore(self) -> None:
        """Give back what changed hands, and give away what is new."""
        if not self.needed:
            return
        for path in self.paths():
            self.give(path)
            if self.before.get(path) is None and not path.is_symlink():
                for inside in paths_in(path, deep=True):
                    self.give(inside)

    def give(self, path: Path) -> None:
        """Give one file or folder that is root's to its owner."""
        now = owner_of(path)
        wanted = self.before.get(path) or self.owner
        if now is None or now[0] != 0 or now == wanted:
            return
        with contextlib.suppress(OSError):
            os.chown(path, wanted[0], wanted[1], follow_symlinks=False)


def owner_of(path: Path):
    """User and group; None where nothing is (any more)."""
    try:
        status = path.lstat()
    except OSError:
        return None
    return status.st_uid, status.st_gid


def paths_in(folder: Path, deep: bool):
    """Files and folders in a folder, or all below it; other runs may take some away meanwhile."""
    found = []
    for parent, folders, files in os.walk(folder):  # passes over what vanishes
        for name in folders + files:
            found.append(Path(parent, name))
        if not deep:
            break
    return found


# ---------------------------------------------------------------------------------------
# Step 1: are the packages of this file's own header here and recent enough?

MODULES = {"pillow": "PIL", "opencv-python": "cv2"}  # imported by another name


def read_requirements(script: Path):
    """A script's PEP 723 header: what is needed, and what stands below its word `optional`."""
    text = script.read_text("utf-8")
    header = re.search(r"^# dependencies = \[\n(.*?)^# \]", text, re.DOTALL | re.MULTILINE)
    needed, _, optional = header[1].partition("# optional")
    return re.findall(r'"([^"]+)"', needed), re.findall(r'"([^"]+)"', optional)


def find_problems(requirements):
    """Of requirements ``name>=version`` those that are not met, and why in words."""
    import importlib.metadata  # Python 3.7, which this file tells to be too old, has none

    importlib.invalidate_caches()
    problems = {}
    for requirement in requirements:
        name, _, oldest = requirement.partition(">=")
        module = MODULES.get(name, name.replace("-", "_"))
        if importlib.util.find_spec(module) is None:
            problems[requirement] = f"{name} is missing"
            continue
        try:
            from packaging.version import Version  # a bare Python has none

            version = importlib.metadata.version(name)
            if Version(version) < Version(oldest):
                problems[requirement] = f"{name} {version} is older than {oldest}"
        except (ImportError, ValueError, TypeError):
            continue  # no metadata: let it pass
    return problems


def install(requirements) -> None:
    """Install packages by pip, or by uv where there is no pip; it shows its own progress."""
    command = [sys.executable, "-m", "pip", "install", "--disable-pip-version-check"]
    if importlib.util.find_spec("pip") is None and shutil.which("uv"):
        command = ["uv", "pip", "install", "--python", sys.executable]
    command.extend(requirements)
    subprocess.run(command, stdin=subprocess.DEVNULL)


def ensure_packages(console: Console, may_install: bool, only: str = "") -> None:
    """Step 1. Failure PACKAGES names all that are missing or too old, and one command.

    only: the one package that is needed, for a check that runs nothing.
    """
    script = globals().get("__file__")
    if script is None or not script.endswith(".py"):
        console.note("the list of packages cannot be read here: they are not checked")
        return
    needed, optional = read_requirements(Path(script))
    if only:
        needed = [requirement for requirement in needed if requirement.startswith(only)]
        optional = []
    if may_install:
        groups = [needed]
        for requirement in optional:  # one by one: one may not exist for this machine
            groups.append([requirement])
        for group in groups:
            wrong = find_problems(group)
            if wrong:
                console.note(f"{'; '.join(wrong.values())}: installing")
                install(wrong)
    wrong = find_problems(needed)
    if wrong:
        command = f"{sys.executable} -m pip install"
        for requirement in wrong:
            command += f' "{requirement}"'
        why = f"{'; '.join(wrong.values())}: run  {command}  or repeat with --install."
        if may_install:
            why = f"Installing failed, see above: in a virtual environment run  {command}"
        raise Failure(Exit.PACKAGES, why)
    lacking = find_problems(optional)
    if lacking:
        what = "; ".join(lacking.values())
        console.note(f"warning: {what}; the cells that need them say so (or use --install)")
    found = len(needed) + len(optional) - len(lacking)
    console.note(f"{found} packages found, Python {platform.python_version()}")


# ---------------------------------------------------------------------------------------
# Step 2: the dataset, found or fetched by the notebook's own cells


def find_dataset(job: Job) -> None:
    """Step 2. Failure DATASET."""
    cells = cells_to_run(job.notebook, "fetch")
    folder = job.settle_input("DATA_DIR")
    named = job.env.get("BCCD_DATASET") or "DATA_DIR" in job.values
    if named and folder is not None and not folder.is_dir():
        why = f"There is no folder {folder}: name one that is there"
        raise Failure(Exit.DATASET, f"{why}, by --dataset, BCCD_DATASET or -p DATA_DIR.")
    if not cells or folder is None:
        job.console.note("the notebook asks for none")
        return
    if is_protected(folder) and not folder.is_dir():  # a checkout that is only read
        folder = job.place / folder.name
        job.env["BCCD_DATASET"] = job.relative(folder)
    fetch_dataset(job, cells, folder)


def fetch_dataset(job: Job, cells, folder: Path) -> None:
    """Executes the cells tagged `fetch`, which need the standard library alone."""

    def show(*words, **ignored) -> None:
        job.console.note(" ".join(map(str, words)))

    space = {"print": show}
    url = job.env.get("BCCD_URL", job.value("DATASET_URL"))
    here = os.getcwd()
    try:
        os.chdir(job.folder)
        for cell in cells:
            code = compile(cell.source, "<cell tagged fetch>", "exec", optimize=0)
            exec(code, space)
        found = space["fetch_dataset"](folder, url, say=job.console.note)
        job.console.note(f"{space['dataset_root'](found)}")
    except Exception as error:
        for kind in type(error).__mro__:
            if kind.__name__ in EXIT_OF_EXCEPTION:
                code = EXIT_OF_EXCEPTION[kind.__name__]
                raise Failure(code, one_line(error, 400)) from None
        raise
    finally:
        os.chdir(here)


# ---------------------------------------------------------------------------------------
# Step 3: files of weights


def check_weights(job: Job) -> None:
    """Step 3: a file that is named is there; a damaged detector is said before anybody waits."""
    file = job.settle_input("VGG16_WEIGHTS")
    if file is not None and not file.is_file():
        why = f"There is no file {file}: name VGG-16's features by --weights or VGG16_WEIGHTS."
        raise Failure(Exit.WEIGHTS, why)
    job.console.note(f"VGG-16's features: {file or 'the notebook chooses'}")
    if job.checkpoints is not None:
        detector = job.checkpoints / "best_model.pth"
        damage = find_damage(detector)
        if damage:
            why = f"{detector} is damaged ({damage}) and cannot be reused"
            advice = "restore it, or this run trains from the start"
            job.console.note(f"warning: {why}: {advice}")


def find_damage(file: Path) -> str:
    """What is wrong with a file that torch.save wrote, a zip archive; "" if nothing is."""
    if not file.is_file():
        return ""
    try:
        with zipfile.ZipFile(file) as archive:
            return archive.testzip() or ""
    except Exception as error:  # damage has many kinds: zlib.error, RuntimeError, ...
        return str(error) or type(error).__name__


# ---------------------------------------------------------------------------------------
# Step 4: nbconvert's executor in a kernel of this Python, watched, and restarted if it dies

KERNEL_ARGUMENTS = [  # warnings on the page name files, not folders of this machine
    "--HistoryManager.hist_file=:memory:",
    "--InteractiveShellApp.exec_lines=__import__('warnings').formatwarning = "
    "lambda text, kind, file, line, source=None: "
    "f'{__import__(\"os\").path.basename(file)}:{line}: {kind.__name__}: {text}\\n'",
]
# variables that would change the page, or belong to another run
NOT_FOR_THE_KERNEL = ["MPLBACKEND", "PYTHONSTARTUP", "PYTHONOPTIMIZE", "SSD_BATCH_DIVISOR"]
NOT_FOR_THE_KERNEL += ["SSD_STAGING"]
KILLED = "killed"
OUT_OF_MEMORY = "memory"


class KernelDied(Exception):
    """The kernel ended, or a cell ran out of memory.

    cause: KILLED, OUT_OF_MEMORY, or "" for any other.
    """

    def __init__(self, sentence: str, cause: str = ""):
        super().__init__(sentence)
        self.sentence = sentence
        self.cause = cause


def make_executor(execution):
    """nbconvert's executor; `execution` hears every message of the running cell."""
    from nbconvert.preprocessors import ExecutePreprocessor

    class Executor(ExecutePreprocessor):
        def process_message(self, message, cell, cell_index: int):
            """nbclient's; streams are joined as they grow, and not kept without end."""
            if message["msg_type"] != "stream":
                if message["msg_type"] == "clear_output" and execution.printed <= OUTPUT_LIMIT:
                    execution.printed = 0
                return super().process_message(message, cell, cell_index)
            if execution.printed > OUTPUT_LIMIT:
                execution.kill()  # an interrupt would wait for all that is on its way
                return None
            content = message["content"]
            content["text"] = content["text"][: OUTPUT_LIMIT + 1]
            execution.hear(content["text"])
            last = None
            if cell.outputs and not self.clear_before_next_output:
                last = cell.outputs[-1]
            if last is None or last.get("name") != content["name"]:
                execution.printed += len(content["text"])
                return super().process_message(message, cell, cell_index)
            text = joined(last["text"], content["text"])
            execution.printed += len(text) - len(last["text"])
            last["text"] = text
            return last

    executor = Executor(timeout=None, iopub_timeout=120, raise_on_iopub_timeout=True)
    executor.nb = execution.notebook
    executor.km = execution.manager
    executor.log = logging.Logger("silent", logging.CRITICAL + 1)
    return executor


class Execution:
    """One kernel. Nothing raises inside its event loop: a fault is noted, and ends the cell."""

    def __init__(self, job: Job):
        from jupyter_client.kernelspec import KernelSpecManager
        from jupyter_client.manager import AsyncKernelManager

        self.job = job
        self.console = job.console
        self.notebook = copy.deepcopy(job.notebook)
        self.names = self.name_cells()
        specs = KernelSpecManager(kernel_dirs=[])  # knows this interpreter's own kernel alone
        self.manager = AsyncKernelManager(kernel_name="python3", kernel_spec_manager=specs)
        self.manager.connection_file = str(job.work / "connection.json")
        self.executor = make_executor(self)
        self.current = None  # index of the running cell
        self.fault = None  # a Failure that is to end the running cell
        self.fault_since = 0.0  # all times are of time.monotonic
        self.cell_started = 0.0
        self.last_save = 0.0
        self.last_note = 0.0
        self.save_failed = False
        self.printed = 0  # characters, in this cell
        self.unfinished_line = ""
        self.last_line = ""

    def name_cells(self):
        """What the cells to run are called, by their positions among all cells."""
        titles = section_titles(self.notebook)
        total = len(cells_to_run(self.notebook))
        names = {}
        for index, cell in enumerate(self.notebook.cells):
            if is_run(cell):
                name = f"cell {len(names) + 1} of {total}"
                if titles[index]:
                    name += f" ({titles[index]})"
                names[index] = name
        return names

    async def run(self) -> None:
        """Executes all cells in place; Failure or KernelDied. The outputs so far are saved."""
        from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

        def ignore(loop, context) -> None:
            """Tasks that the kernel's death cut off."""

        loop = asyncio.get_running_loop()
        loop.set_exception_handler(ignore)
        watcher = loop.create_task(self.watch())
        self.job.signals.kill_kernel = self.kill
        try:
            await self.start_kernel()
            for index in self.names:
                self.current = index
                await self.run_cell(self.notebook.cells[index])
                if watcher.done():
                    watcher.result()
        except (CellExecutionError, CellTimeoutError, DeadKernelError, RuntimeError) as error:
            fault = self.fault or self.find_fault(time.monotonic())
            if fault is None:
                fault = self.explain(error)
            raise fault from None
        finally:
            watcher.cancel()
            await self.shut_down()
            self.save()

    async def start_kernel(self) -> None:
        """A kernel that is ready; RuntimeError."""
        with open(self.job.work / "kernel.log", "wb") as log:  # the last words of a crash
            await self.manager.start_kernel(
                cwd=str(self.job.folder),
                env=self.job.env,
                extra_arguments=KERNEL_ARGUMENTS,
                stdout=log,
                stderr=log,
            )
        client = self.manager.client()
        self.executor.kc = client
        client.start_channels()
        await client.wait_for_ready(timeout=120)
        client.allow_stdin = False

    async def run_cell(self, cell) -> None:
        """Executes one cell, saves, and says how it went."""
        self.cell_started = time.monotonic()
        self.printed = 0
        self.unfinished_line = ""
        self.last_line = ""
        await self.executor.async_execute_cell(cell, self.current)
        if self.fault is not None:  # the cell survived the interrupt
            raise self.fault
        self.save()
        seconds = time.monotonic() - self.cell_started
        quick_definition = seconds < 1 and "define" in tags(cell)
        if not self.console.terminal and not quick_definition:
            name = self.names[self.current]
            self.console.note(f"{name}: {seconds:.1f} s, outputs: {len(cell.outputs)}")

    def hear(self, text: str) -> None:
        """What a cell printed is shown: the last line on a terminal, else all of a long cell."""
        now = time.monotonic()
        long_cell = now - self.cell_started > 3
        lines = joined(self.unfinished_line, text[-100_000:]).split("\n")
        self.unfinished_line = lines.pop()[-10_000:]
        for line in lines:
            shown = terminal_text(line).strip()
            if shown == "":
                continue
            self.last_line = shown
            if long_cell and not self.console.terminal:
                self.console.note(f"  {one_line(shown)}")
                self.last_note = now
        self.last_line = terminal_text(self.unfinished_line).strip() or self.last_line

    async def watch(self) -> None:
        """Beside the cells: what is shown, the copy on the disk, time limits and signals."""
        while True:
            await asyncio.sleep(0.25)
            now = time.monotonic()
            if self.current is not None:
                self.show_progress(now)
            if now - self.last_save > SAVE_SECONDS:
                self.save()
            if self.fault is None:
                self.fault = self.find_fault(now)
                if self.fault is not None:
                    self.fault_since = now
                    await self.interrupt()
            elif now - self.fault_since > INTERRUPT_SECONDS:
                self.kill()

    def show_progress(self, now: float) -> None:
        """A line in place on a terminal; elsewhere a sign of life after a long silence."""
        name = self.names[self.current]
        seconds = f"{now - self.cell_started:.1f} s"
        said = one_line(self.last_line) or "silent"
        if self.console.terminal:
            self.console.show_status(f"{name} {seconds} {said}")
        elif now - max(self.last_note, self.cell_started) > SILENT_SECONDS:
            self.console.note(f"{name}: running for {seconds}: {said}")
            self.last_note = now

    async def interrupt(self) -> None:
        """Ask the running cell to end; a kernel that still starts is killed."""
        if self.current is None:
            self.kill()
        with contextlib.suppress(RuntimeError, OSError):
            await self.manager.interrupt_kernel()

    def find_fault(self, now: float):
        """A reason to end the run: a signal, a limit of time or of output; or None."""
        if self.job.signals.failure is not None:
            return self.job.signals.failure
        if self.current is None:
            return None
        limit = self.job.options.timeout
        code = Exit.TIMEOUT
        if self.printed > OUTPUT_LIMIT:
            code = Exit.CELL
            what = f"printed over {OUTPUT_LIMIT} characters"
        elif limit and now - self.cell_started > limit:
            what = f"ran longer than --timeout {limit:g} s"
        else:
            return None
        return Failure(code, f"{self.current_name()} {what}: look at what it printed last.")

    def current_name(self) -> str:
        """The running cell, as the beginning of a sentence."""
        return f"C{self.names[self.current][1:]}"

    def save(self) -> None:
        """The working copy on disk; a full disk is said once and survived."""
        self.last_save = time.monotonic()
        try:
            write_page(self.notebook, self.job.partial)
        except OSError as error:
            if not self.save_failed:
                why = f"the working copy cannot be saved ({error.strerror}); going on"
                self.console.note(f"warning: {why}")
            self.save_failed = True

    def explain(self, error: Exception) -> Exception:
        """A cell's failure, or how the kernel ended and what it said last."""
        if hasattr(error, "ename"):  # nbclient's CellExecutionError
            said = one_line(f"{error.ename}: {error.evalue}", 600).rstrip(" :.")
            if error.ename in ("MemoryError", "OutOfMemoryError"):
                sentence = f"{self.current_name()} ran out of memory ({said})"
                return KernelDied(sentence, OUT_OF_MEMORY)
            code = EXIT_OF_EXCEPTION.get(error.ename, Exit.CELL)
            return Failure(code, f"{self.current_name()} failed with {said}.")

        how = str(error)
        cause = ""
        if self.manager.has_kernel:
            code = self.manager.provisioner.process.poll()
            if code is not None and code < 0:
                how = f"signal {-code}"
            elif code is not None:
                how = f"exit code {code}"
            if code == -9:  # SIGKILL, as from a system without memory
                cause = KILLED
        log = (self.job.work / "kernel.log").read_text("utf-8", errors="replace")
        fatal = re.findall(
            r"^.*(?:error|fatal|abort|exception).*$", log, re.IGNORECASE | re.MULTILINE
        )
        if fatal:
            how += f" ({one_line(fatal[-1], 120)})"
        if self.current is None:
            return KernelDied(f"The kernel could not be started: {how}")
        return KernelDied(f"The kernel died in {self.names[self.current]}, {how}", cause)

    async def shut_down(self) -> None:
        """Ends the kernel and whatever it started, and closes the channels."""
        with contextlib.suppress(Exception):
            if await self.manager.is_alive():
                at_once = self.fault is not None
                await asyncio.wait_for(self.manager.shutdown_kernel(now=at_once), 15)
        self.kill()
        with contextlib.suppress(Exception):
            self.executor.kc.stop_channels()
            await self.manager.cleanup_resources()

    def kill(self) -> None:
        """Kills the kernel's process and all that it started, at once."""
        with contextlib.suppress(OSError, AttributeError):  # it is gone, or was never there
            group = self.manager.provisioner.pgid
            if group:
                os.killpg(group, signal.SIGKILL)
            else:
                self.manager.provisioner.process.kill()


def run_to_the_end(coroutine) -> None:
    """asyncio.run; beside a loop that runs already (in a Jupyter cell) in a thread."""
    try:
        asyncio.get_running_loop()
        loop_runs = True
    except RuntimeError:
        loop_runs = False
    if loop_runs:
        with ThreadPoolExecutor(max_workers=1) as pool:
            pool.submit(asyncio.run, coroutine).result()
    else:
        asyncio.run(coroutine)


def prepare_kernel(job: Job) -> None:
    """The kernel's environment, and a notebook without the outputs of an earlier run."""
    for name in NOT_FOR_THE_KERNEL:
        job.env.pop(name, None)
    job.env["SSD_RUN_ID"] = uuid.uuid4().hex  # by it a restarted kernel knows its own run
    job.env["SSD_NO_INSTALL"] = "1"
    job.env["IPYTHONDIR"] = str(job.work / "ipython")
    job.env["PYDEVD_DISABLE_FILE_VALIDATION"] = "1"
    if job.staging is not None:
        job.env["SSD_STAGING"] = job.relative(job.staging)
    for cell in job.notebook.cells:
        if cell.cell_type == "code" and SKIPPED not in tags(cell):
            cell["outputs"] = []
            cell["execution_count"] = None


def execute(job: Job):
    """Step 4: the executed notebook; Failure for a bad cell, or a kernel that kept dying."""
    prepare_kernel(job)
    earlier_cause = ""
    divisor = 1
    restarts = 0
    while True:
        for folder in (job.work, job.staging):
            if folder is not None:
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        execution = Execution(job)
        try:
            run_to_the_end(execution.run())
            return execution.notebook
        except KernelDied as death:
            job.signals.check()
            if restarts >= job.options.retries:
                why = f"{death.sentence}, restarts: {restarts}; look at the last output."
                raise Failure(Exit.KERNEL, why) from None
            restarts += 1
            what = death.sentence
            # a smaller batch changes the last bits: only where memory is likely what lacks
            killed_again = death.cause == KILLED and earlier_cause == KILLED
            if death.cause == OUT_OF_MEMORY or killed_again:
                divisor = min(64, 2 * divisor)
                job.env["SSD_BATCH_DIVISOR"] = str(divisor)
                what += f"; it looks like memory, so the batch is divided by {divisor}"
            earlier_cause = death.cause
            again = f"restart {restarts} of {job.options.retries}, from the top"
            job.console.note(f"{what}; {again}")


# ---------------------------------------------------------------------------------------
# Step 5: the result is checked


def validate(job: Job, notebook) -> None:
    """Step 5: the clean and stamped page, beside its place. Failure VALIDATION, STORAGE."""
    nbformat = import_nbformat()
    try:
        page, size = write_page(notebook, job.partial)
    except OSError as error:
        raise storage_failure("The result cannot be written", error) from None
    try:
        nbformat.validate(page)
    except nbformat.ValidationError as error:
        version = f"{page.nbformat}.{page.nbformat_minor}"
        why = f"The result is no valid notebook of format {version}: {one_line(error)}"
        raise Failure(Exit.VALIDATION, f"{why}.") from None
    # a path in an output is no reason to throw hours of work away; --check is stricter
    lines = check_page(page, size, job.folder, job.draft, WARNING)
    show_checklist(job.console, lines, job.target.name)


# ---------------------------------------------------------------------------------------
# Step 6: the page and what belongs to it change together


def publish(job: Job) -> None:
    """Step 6: page, checkpoints and metrics are renamed to their places, all or none.

    Failure VALIDATION, STORAGE.
    """
    if job.target == job.source and not is_untouched(job):
        why = f"{job.source.name} was edited during the run and is left alone"
        raise Failure(Exit.VALIDATION, f"{why}: run it again.")
    pairs = []
    if job.staging is not None:
        for file in job.staging.iterdir():
            pairs.append((file, job.checkpoints / file.name))
    pairs.append((job.partial, job.target))  # last: until then its outputs are kept

    job.signals.check()  # the last moment: the renames are not interrupted
    name = f".{job.target.stem}.before-"
    before = Path(tempfile.mkdtemp(prefix=name, dir=job.target.parent))
    done = []
    for new, old in pairs:
        try:
            if old.exists():
                copy_owner_and_mode(old, new)
                copy_file(old, before / old.name)
            replace(new, old)
        except OSError as error:
            why = f"{old.name} cannot be replaced"
            if take_back(done, before):
                shutil.rmtree(before, ignore_errors=True)
            else:
                why += f", and what was there before is kept in {before}"
            raise storage_failure(why, error) from None
        done.append(old)
    shutil.rmtree(before, ignore_errors=True)
    for file in done:
        job.console.note(f"{file.name}, {file.stat().st_size / 1e6:.2f} MB")
    for path in earlier_outputs(job.target):
        with contextlib.suppress(OSError):
            path.unlink()
            job.console.note(f"{path.name} of an earlier run is removed")


def is_untouched(job: Job) -> bool:
    """Whether the notebook still has the bytes that this run read."""
    return job.source.is_file() and job.source.read_bytes() == job.data


def copy_owner_and_mode(old: Path, new: Path) -> None:
    """The new file belongs to whom the old one belongs, where that is allowed."""
    status = old.stat()
    if hasattr(os, "chown"):
        with contextlib.suppress(OSError):
            os.chown(new, status.st_uid, status.st_gid)
    with contextlib.suppress(OSError):  # some file systems have no modes
        shutil.copymode(old, new)


def copy_file(old: Path, new: Path) -> None:
    """A copy with the same owner and mode, where that is allowed."""
    shutil.copyfile(old, new)
    copy_owner_and_mode(old, new)


def rename(new: Path, old: Path) -> None:
    """os.replace; on Windows, where a virus scanner may hold a new file, tried for a second."""
    tries = 5 if os.name == "nt" else 1
    for number in range(tries):
        try:
            os.replace(new, old)
            return
        except PermissionError:
            if number == tries - 1:
                raise
            time.sleep(0.2)


def replace(new: Path, old: Path) -> None:
    """Rename new to old. Where old is mounted by itself, no rename can: it is written in place.

    A copy of the old one lies beside it until that is done.
    """
    try:
        rename(new, old)
        return
    except OSError as error:
        if error.errno not in (errno.EBUSY, errno.EXDEV):
            raise
    kept = old.with_name(f".{old.name}.before")
    if old.exists():
        copy_file(old, kept)
    try:
        shutil.copyfile(new, old)
    except OSError as error:
        if kept.exists():
            put_back(kept, old, error)
        raise
    kept.unlink(missing_ok=True)
    new.unlink()


def put_back(kept: Path, old: Path, error: OSError) -> None:
    """After a write that broke off; the error says where the old content is, if that fails too."""
    try:
        shutil.copyfile(kept, old)
        kept.unlink()
    except OSError:
        reason = f"{error.strerror}; its old content is in {kept}"
        raise OSError(error.errno, reason) from None


def take_back(done, before: Path) -> bool:
    """Put the files that were there before in place again; whether that went well."""
    all_back = True
    for file in done:
        kept = before / file.name
        try:
            if kept.exists():
                replace(kept, file)
            else:
                file.unlink()
        except OSError:
            all_back = False
    return all_back


# ---------------------------------------------------------------------------------------
# The run


def as_failure(error: BaseException, signals: Signals) -> Failure:
    """Any end of a run as a Failure; an unforeseen one shows its traceback."""
    if isinstance(error, Failure):
        return error
    if isinstance(error, KeyboardInterrupt):
        return signals.failure or Failure(130, "Ended by Ctrl-C; run it again to go on.")
    if isinstance(error, OSError):
        return storage_failure(f"Cannot use {error.filename or 'a file'}", error)
    if isinstance(error, ImportError):
        why = f"A package cannot be imported ({one_line(error)}): install it again."
        return Failure(Exit.PACKAGES, why)
    with contextlib.suppress(OSError, ValueError):
        traceback.print_exception(type(error), error, error.__traceback__)
    what = f"{type(error).__name__}: {one_line(error)}"
    return Failure(Exit.INTERNAL, f"An error in this script: {what}.")


def keep_outputs(job: Job, failure: Failure) -> None:
    """The outputs of a run that failed stay beside its target, and the failure names them."""
    if not job.partial.is_file():
        return
    kept = job.partial
    if failure.code <= 128:  # not ended by a signal
        kept = free_name(job.target, "failed")
        try:
            rename(job.partial, kept)
        except OSError:
            kept = job.partial
    failure.sentence += f" Outputs so far: {job.relative(kept)}"
    same = job.target != job.source or is_untouched(job)
    if same and job.target.is_file():
        failure.sentence += f"; {job.relative(job.target)} is unchanged"
    failure.sentence += "."


def run_steps(job: Job) -> None:
    """Steps 2 to 6. A Failure names the file with the outputs so far."""
    with contextlib.ExitStack() as at_the_end:
        at_the_end.callback(Owners(job).restore)  # also where a claim fails
        room = 5e7 + 3 * len(job.data)
        at_the_end.enter_context(claim(job.target, job.target.parent, room))
        if job.staging is not None:
            room = 2e8
            if job.trains_anew():
                room = 2e9
            at_the_end.enter_context(claim(job.checkpoints, job.checkpoints, room))
        try:
            copy_checkpoints(job)
            job.console.write("2 dataset")
            find_dataset(job)
            job.console.write("3 weights")
            check_weights(job)
            job.console.write("4 execute")
            if job.trains_anew():
                job.signals.how_to_go_on = "run it again, but not fresh, to go on"
            job.signals.may_raise = False
            notebook = execute(job)
            job.signals.check()
            job.console.write("5 validate")
            validate(job, notebook)
            job.console.write("6 publish")
            publish(job)
        except BaseException as error:
            failure = as_failure(error, job.signals)
            keep_outputs(job, failure)
            raise failure from None
        finally:
            shutil.rmtree(job.work, ignore_errors=True)
            if job.staging is not None:
                shutil.rmtree(job.staging, ignore_errors=True)


def run(options, console: Console, signals: Signals) -> None:
    """All six steps; Failure where one of them ends the run."""
    started = time.monotonic()
    console.write("1 dependencies")
    ensure_packages(console, options.install)
    job = Job(options, console, signals)
    run_steps(job)
    minutes = (time.monotonic() - started) / 60
    console.write(f"done in {minutes:.1f} min: {job.target}")


def check(options, console: Console) -> None:
    """--check: the checklist of the notebook as it stands; Failure where a line of it fails."""
    ensure_packages(console, options.install, only="nbformat")
    path = find_notebook(options.notebook)
    notebook, data = read_notebook(path)
    draft = bool(cells_to_run(notebook, INJECTED))
    lines = check_page(notebook, len(data), path.parent, draft, FAILURE)
    show_checklist(console, lines, path.name)


def main(arguments=None) -> int:
    """Runs the script with these arguments; the exit code."""
    prepare_streams()
    if sys.version_info < OLDEST_PYTHON:
        oldest = ".".join(map(str, OLDEST_PYTHON))
        found = platform.python_version()
        print(f"error: needs Python {oldest} or newer, this is {found}", file=sys.stderr)
        return int(Exit.PACKAGES)
    options = read_options(arguments)
    console = Console()
    signals = Signals()
    try:
        signals.listen()
        if options.check:
            check(options, console)
        else:
            run(options, console, signals)
        return 0
    except BaseException as error:
        failure = as_failure(error, signals)
    finally:
        signals.stop_listening()
    console.end_status()
    with contextlib.suppress(OSError, ValueError):  # nobody reads any more
        print(f"error: {failure.sentence}", file=sys.stderr, flush=True)
    return failure.code


if __name__ == "__main__":
    sys.exit(main())
