"""What a run says, how it ends, and the signals that ask for it; the standard library alone."""

import os
import re
import signal
import sys
from enum import IntEnum
from typing import Any


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

    While `raising` (the first three steps) the first one raises KeyboardInterrupt where the
    program stands. Later it is only noted, as nothing may be raised inside the kernel's event
    loop: its watcher looks at `failure`, and `check` stands between the steps.
    """

    raising, failure = True, None
    kill = staticmethod(lambda: None)  # replaced while there is a kernel

    def listen(self) -> None:
        """From now on; a signal that our parent had ignored (nohup, `&`) stays ignored."""
        for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK"):
            number = getattr(signal, name, signal.SIGINT)
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self.handle)

    def handle(self, number: int, frame: Any) -> None:
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


def duration(seconds: float) -> str:
    """``8.1 s`` or ``12.4 min``."""
    return f"{seconds:.1f} s" if seconds < 60 else f"{seconds / 60:.1f} min"
