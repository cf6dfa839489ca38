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
# ]
# ///
"""Run the notebook from beginning to end and publish the result, or say in one sentence why not.

Six steps: dependencies, dataset, weights, execute, validate, publish. The run works on a copy; the
notebook, its checkpoints and metrics change together, by renames, and only after the result was
validated. A failed run leaves them byte for byte as they were. The steps stand in ssd_runner/.

Exit codes: 0 done, or --check found nothing wrong; 1 an error in this script; 2 wrong use;
3 packages; 4 dataset; 5 weights; 6 a cell failed; 7 the kernel died, also after the retries;
8 --timeout or --stall; 9 the result did not pass, or the notebook was edited meanwhile;
10 no notebook; 11 disk space or a place that cannot be written; 12 another run works here;
129, 130, 143 ended by SIGHUP, SIGINT (Ctrl-C), SIGTERM.
"""

import sys
import time
import traceback
from pathlib import Path

from ssd_runner import packages
from ssd_runner.console import Console, Exit, Failure, Signals, one_line, read_options


def run(options, console: Console, signals: Signals) -> None:
    """The six steps; Failure where one of them ends the run."""
    started = time.monotonic()
    console.write("1 dependencies")
    packages.ensure(Path(__file__), console, options.install)
    from ssd_runner import inputs, kernel, plan, publish  # they import what was only now found

    job = plan.Job(options, console, signals)
    with job.held():
        console.write("2 dataset")
        inputs.dataset(job)
        console.write("3 weights")
        inputs.weights(job)
        console.write("4 execute")
        signals.raising = False
        notebook = kernel.execute(job)
        signals.check()
        console.write("5 validate")
        result = publish.validate(job, notebook)
        console.write("6 publish")
        publish.publish(job, result)
    console.write(f"done in {(time.monotonic() - started) / 60:.1f} min: {job.target}")


def check(options, console: Console) -> None:
    """--check: the checklist of the notebook as it stands; Failure where a line of it fails."""
    packages.ensure(Path(__file__), console, options.install)
    from ssd_runner import page

    path, notebook, data = page.read(options.notebook)
    draft = bool(page.code_cells(notebook, page.INJECTED))
    page.show(console, page.check(notebook, len(data), path.parent, draft, "failure"), path.name)


def main(arguments: list[str] | None = None) -> int:
    """Runs the script with these arguments; the exit code."""
    options = read_options(arguments, __doc__[__doc__.index("Exit codes") :])
    console, signals = Console(options.quiet), Signals()
    try:
        signals.listen()
        check(options, console) if options.check else run(options, console, signals)
        return 0
    except Failure as error:
        failure = error
    except KeyboardInterrupt:
        failure = signals.failure
    except OSError as error:
        failure = Failure(Exit.STORAGE, f"{error.strerror}: {error.filename or 'no file named'}.")
    except Exception as error:
        traceback.print_exc()
        what = f"An error in this script: {type(error).__name__}: {one_line(error)}."
        failure = Failure(Exit.INTERNAL, what)
    print(f"error: {failure.sentence}", file=sys.stderr, flush=True)
    return failure.code


if __name__ == "__main__":
    sys.exit(main())
