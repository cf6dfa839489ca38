"""Steps 5 and 6: the result is checked, then the page and what belongs to it change together."""

from typing import Any

import nbformat
from nbconvert import HTMLExporter

from . import files, page
from .console import Exit, Failure, megabytes, one_line
from .plan import Job, shown


def validate(job: Job, notebook: Any) -> Any:
    """Step 5: the clean and stamped page, written beside its place. Failure VALIDATION, STORAGE."""
    result = page.clean(notebook)
    result.metadata[page.STAMP] = {"source_sha256": page.source_digest(result)}
    content = page.to_bytes(result)
    try:
        files.write_file(job.partial, content)
        nbformat.validate(result)
    except OSError as error:
        why = f"The result cannot be written ({error.strerror}): make room and run again."
        raise Failure(Exit.STORAGE, why) from None
    except nbformat.ValidationError as error:
        why = f"The result is no valid notebook: {one_line(error, 120)}."
        raise Failure(Exit.VALIDATION, why) from None
    # a path in an output is no reason to throw hours of work away; --check is stricter
    lines = page.check(result, len(content), job.folder, bool(job.kind), "warning")
    page.show(job.console, lines, job.target.name)
    return result


def publish(job: Job, result: Any) -> None:
    """Step 6: page, checkpoints and metrics change together. Failure VALIDATION, STORAGE."""
    if job.target == job.source:
        if not job.source.is_file() or job.source.read_bytes() != job.data:
            why = f"{job.source.name} was edited during the run and is left alone: run it again."
            raise Failure(Exit.VALIDATION, why)
    pairs = [(job.partial, job.target)]
    if job.options.html:
        name = {"metadata": {"name": job.target.stem}}
        text, _ = HTMLExporter().from_notebook_node(result, name)
        pairs.insert(0, (job.work / "page.html", job.target.with_suffix(".html")))
        files.write_file(pairs[0][0], text.encode("utf-8"))
    if job.staging:
        pairs = [(file, job.checkpoints / file.name) for file in job.staging.iterdir()] + pairs
    job.signals.check()  # the last moment: the renames are not interrupted
    try:
        files.replace_together(pairs)
    except OSError as error:
        why = f"{job.target.name} cannot be replaced ({error.strerror}): close it elsewhere."
        raise Failure(Exit.STORAGE, why) from None
    job.failed.unlink(missing_ok=True)
    for _, file in pairs:
        job.console.note(f"{shown(file)}, {megabytes(file.stat().st_size)}")
