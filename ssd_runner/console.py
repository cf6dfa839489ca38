"""What a run is asked, what it says and how it ends; the standard library alone."""

import argparse
import os
import re
import signal
import sys
from enum import IntEnum


class Exit(IntEnum):
    """Exit codes, as the script's docstring explains them; a signal ends with 128 + its number."""

    INTERNAL, USAGE, PACKAGES, DATASET, WEIGHTS, CELL = range(1, 7)
    KERNEL, TIMEOUT, VALIDATION, NOTEBOOK, STORAGE, LOCKED = range(7, 13)


class Failure(Exception):
    """An end of the run: an exit code, and one sentence that says what to do."""

    def __init__(self, code: int, sentence: str):
        super().__init__(sentence)
        self.code, self.sentence = int(code), sentence


class Signals:
    """Ctrl-C, SIGTERM, SIGHUP: the first ends the run in order, the second kills the kernel.

    While `raising` (the first three steps) the first one raises KeyboardInterrupt. Later, in the
    kernel's event loop, it is only noted: the watcher there and `check` look at `failure`.
    """

    raising, failure = True, None
    kill = staticmethod(lambda: None)  # replaced while there is a kernel

    def listen(self) -> None:
        """From now on; a signal that our parent had ignored (nohup, `&`) stays ignored."""
        for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK"):
            number = getattr(signal, name, signal.SIGINT)
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self.handle)

    def handle(self, number: int, frame) -> None:
        """What the system calls."""
        if self.failure:
            return self.kill()
        what = f"Ended by {signal.Signals(number).name}; run it again to go on"
        self.failure = Failure(128 + number, f"{what}, finished epochs are kept.")
        if self.raising:
            raise KeyboardInterrupt

    def check(self) -> None:
        """Failure, where a signal has asked for the end."""
        if self.failure:
            raise self.failure


class Console:
    """Lines on standard output; no poor encoding and no reader that goes away ends the run."""

    def __init__(self, quiet: bool = False):
        self.quiet, self.below = quiet, ""  # below: on a terminal, the line that is replaced
        for stream in (sys.stdout, sys.stderr):
            stream.reconfigure(errors="replace")
        self.terminal = sys.stdout.isatty() and not quiet and os.environ.get("TERM") != "dumb"

    def write(self, text: str, end: str = "\n") -> None:
        """Writes a line, or with another end the line below, in place of the line below."""
        if not self.quiet:
            try:
                print("\r\x1b[K" * bool(self.below) + text, end=end, flush=True)
            except OSError:  # nobody reads any more
                self.quiet, sys.stdout = True, open(os.devnull, "w", encoding="utf-8")
            self.below = "" if end else text

    def note(self, text: str) -> None:
        """One line below the heading of a step."""
        self.write(f"  {text}")


def one_line(text: object, limit: int = 160) -> str:
    """The text on one line without colours, at most `limit` characters."""
    line = " ".join(re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", str(text)).split())
    return line if len(line) <= limit else line[: limit - 3] + "..."


def read_options(arguments: list[str] | None, below: str) -> argparse.Namespace:
    """The options of this call; below: text that ends --help."""
    parser = argparse.ArgumentParser(
        usage="%(prog)s [NOTEBOOK] [options]",
        description="Run the notebook from beginning to end, check the result and publish it.",
        epilog=below,
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, 2, 22, 100),
        allow_abbrev=False,
    )
    add, yes = parser.add_argument, {"action": "store_true"}
    add("notebook", nargs="?", metavar="NOTEBOOK", help="default: ssd_bccd_detection.ipynb")
    add("--check", **yes, help="check the notebook as it stands, run nothing")
    add("--demo", **yes, help="the whole notebook on drawn smears, no download, in runs/demo")
    add("-p", dest="param", metavar="NAME=VALUE", action="append", default=[], help="a constant")
    add("--dataset", metavar="DIR", help="an existing copy of the dataset (also BCCD_DATASET)")
    add("--dataset-url", metavar="URL", help="another git mirror (also BCCD_URL)")
    add("--weights", metavar="FILE", help="VGG-16's features from a file (also VGG16_WEIGHTS)")
    add("--images", metavar="DIR", help="only count the cells in a folder of your own pictures")
    add("--results", metavar="DIR", help="where the results of --images go")
    add("--output", metavar="NB", help="write the executed notebook there")
    add("--html", **yes, help="also write it as a page")
    add("--fresh", **yes, help="train from the start, whatever checkpoints there are")
    add("--install", **yes, help="install missing packages")
    add("--retries", type=int, default=3, metavar="N", help="restarts of a dead kernel: 3")
    add("--timeout", type=float, metavar="S", help="seconds that a cell may take")
    add("--stall", type=float, metavar="S", help="seconds that a cell may stay silent")
    add("--quiet", **yes, help="say nothing but errors")
    return parser.parse_args(arguments)
