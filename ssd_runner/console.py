"""What a run says, how it ends, and the signals that ask for it; the standard library alone."""

import contextlib
import os
import re
import signal
import sys
from collections.abc import Callable
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


class Ended(KeyboardInterrupt):
    """Raised by a signal where the run may be left at once."""


class Signals:
    """Ctrl-C, SIGTERM, SIGHUP: the first ends the run in order, the second kills the kernel.

    While `raising` (the first three steps) the first signal raises `Ended` where the program
    stands. Later it is only noted: nothing may be raised inside the kernel's event loop, whose
    watcher looks at `received`; `check` stands between the steps.
    """

    def __init__(self) -> None:
        self.received, self.raising = 0, True
        self.kill: Callable[[], None] = lambda: None

    def listen(self) -> None:
        """From now on; a signal that our parent had ignored (nohup, `&`) stays ignored."""
        for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK"):
            number = getattr(signal, name, None)
            if number is not None and signal.getsignal(number) != signal.SIG_IGN:
                with contextlib.suppress(ValueError):  # not in the main thread
                    signal.signal(number, self.handle)

    def handle(self, number: int, frame: object) -> None:
        """What the system calls."""
        if self.received:
            self.kill()
        self.received = self.received or number
        if self.raising:
            self.raising = False
            raise Ended

    def failure(self) -> Failure:
        """The end that was asked for."""
        name = signal.Signals(self.received).name
        sentence = f"Ended by {name}; run it again to go on, finished epochs are kept."
        return Failure(128 + self.received, sentence)

    def check(self) -> None:
        """Failure, where a signal has asked for the end."""
        if self.received:
            raise self.failure()


class Console:
    """Lines on standard output; no poor encoding and no reader that goes away ends the run."""

    def __init__(self, quiet: bool = False):
        self.quiet = quiet
        self.bar: Any = None  # a tqdm, while cells run on a terminal
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(AttributeError, ValueError):
                stream.reconfigure(errors="replace")
        self.terminal = sys.stdout.isatty() and not quiet and os.environ.get("TERM") != "dumb"

    def line(self, text: str) -> None:
        """One line that stays, above the bar."""
        if not self.quiet:
            try:
                if self.bar is not None:
                    self.bar.clear()
                print(text, flush=True)
            except OSError:  # nobody reads any more
                self.quiet = True
                sys.stdout = open(os.devnull, "w", encoding="utf-8")

    def note(self, text: str) -> None:
        """One line below the heading of a step."""
        self.line(f"  {text}")


def one_line(text: object, limit: int = 200) -> str:
    """The text on one line without colours, at most `limit` characters."""
    line = " ".join(re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", str(text)).split())
    return line if len(line) <= limit else line[: limit - 3] + "..."


def duration(seconds: float) -> str:
    """``8.1 s`` or ``12.4 min``."""
    return f"{seconds:.1f} s" if seconds < 60 else f"{seconds / 60:.1f} min"


def megabytes(size: float) -> str:
    """Bytes in MB of 10**6."""
    return f"{size / 1e6:.2f} MB"


def plural(number: int, word: str) -> str:
    """``1 cell``, ``2 cells``."""
    return f"{number} {word}" + ("" if number == 1 else "s")
