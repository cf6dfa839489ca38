"""Steps 5 and 6: the result is checked, then the page and what belongs to it change together."""

import os
import shutil

import nbformat
from nbconvert import HTMLExporter

from . import page
from .console import Exit, Failure
from .plan import Job


def validate(job: Job, notebook):
    """Step 5: the clean and stamped page, written beside its place. Failure VALIDATION, STORAGE."""
    try:
        result, size = page.write(notebook, job.partial)
        nbformat.validate(result)
    except OSError as error:
        why = f"The result cannot be written ({error.strerror}): make room and run again."
        raise Failure(Exit.STORAGE, why) from None
    # a path in an output is no reason to throw hours of work away; --check is stricter
    lines = page.check(result, size, job.folder, bool(job.kind), "warning")
    page.show(job.console, lines, job.target.name)
    return result


def publish(job: Job, result) -> None:
    """Step 6: page, checkpoints and metrics change together. Failure VALIDATION, STORAGE."""
    now = job.source.read_bytes() if job.source.is_file() else b""
    if job.target == job.source and now != job.data:
        why = f"{job.source.name} was edited during the run and is left alone: run it again."
        raise Failure(Exit.VALIDATION, why)
    pairs = [(job.partial, job.target)]
    if job.options.html:
        text, _ = HTMLExporter().from_notebook_node(result)
        pairs.append((job.work / "page.html", job.target.with_suffix(".html")))
        pairs[-1][0].write_text(text, encoding="utf-8")
    if job.staging:
        pairs += [(file, job.checkpoints / file.name) for file in job.staging.iterdir()]
    job.signals.check()  # the last moment: the renames are not interrupted
    before, done = job.work / "before", []
    before.mkdir()
    try:
        for new, old in pairs:
            if old.exists():
                shutil.copymode(old, new)
                shutil.copy2(old, before)
            os.replace(new, old)
            done.append(old)
    except OSError as error:
        for file in done:  # all or nothing
            kept = before / file.name
            shutil.copy2(kept, file) if kept.exists() else file.unlink()
        why = f"{old.name} cannot be replaced ({error.strerror}): close it elsewhere."
        raise Failure(Exit.STORAGE, why) from None
    job.failed.unlink(missing_ok=True)
    for _, file in pairs:
        job.console.note(f"{file.name}, {file.stat().st_size / 1e6:.2f} MB")
