"""Step 4: nbconvert's executor in a kernel of this Python, watched, and restarted if it dies."""

import asyncio
import contextlib
import copy
import logging
import os
import re
import shutil
import time
import uuid

from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
from nbconvert.preprocessors import ExecutePreprocessor

from . import page
from .console import Exit, Failure, one_line
from .inputs import EXITS
from .plan import Job

SAVE_SECONDS = 30.0  # a long cell is saved this often
INTERRUPT_SECONDS = 6.0  # a cell may take this long to end after an interrupt
SILENT_SECONDS = 60.0  # without a terminal: a sign of life after so much silence
OUTPUT_LIMIT = 8_000_000  # characters of text in one cell: more than a whole page may have
ARGUMENTS = [  # warnings on the page name files, not folders of this machine
    "--HistoryManager.hist_file=:memory:",
    "--InteractiveShellApp.exec_lines=__import__('warnings').formatwarning = "
    "lambda text, kind, file, line, source=None: "
    "f'{file.rpartition(\"/\")[2]}:{line}: {kind.__name__}: {text}\\n'",
]


class KernelDied(Exception):
    """The kernel ended, or a cell ran out of memory: a sentence, and "killed" or "memory"."""


class Executor(ExecutePreprocessor):
    """nbconvert's executor; streams are shown as they come, and joined as they grow."""

    def process_message(self, msg, cell, cell_index: int):
        """nbclient's, for every message of the running cell."""
        self.run.activity = time.monotonic()
        if msg["msg_type"] != "stream":
            return super().process_message(msg, cell, cell_index)
        if self.run.printed > OUTPUT_LIMIT:
            return self.run.kill()  # an interrupt would wait for all that is on its way
        text = msg["content"]["text"] = msg["content"]["text"][: OUTPUT_LIMIT + 1]
        self.run.hear(text)
        last = cell.outputs[-1] if cell.outputs and not self.clear_before_next_output else {}
        if last.get("name") != msg["content"]["name"]:
            self.run.printed += len(text)
            return super().process_message(msg, cell, cell_index)
        text = page.joined(last["text"], text)
        self.run.printed += len(text) - len(last["text"])
        last["text"] = text
        return last


class Execution:
    """One kernel. Nothing raises inside its event loop: a fault is noted, and ends the cell."""

    def __init__(self, job: Job):
        self.job, self.console, self.notebook = job, job.console, copy.deepcopy(job.notebook)
        cells = enumerate(zip(self.notebook.cells, page.titles(self.notebook), strict=True))
        code = [(n, t) for n, (c, t) in cells if c.cell_type == "code" and c.source.strip()]
        self.names = {}  # by the position among all cells
        for number, (index, title) in enumerate(code, 1):
            self.names[index] = f"cell {number} of {len(code)}" + (f" ({title})" if title else "")
        self.current: int | None = None  # index of the running cell
        self.fault: Failure | None = None
        self.started = self.activity = self.saved = self.spoken = self.since = 0.0  # monotonic
        self.printed, self.pending, self.last_line, self.unsaved = 0, "", "", False
        specs = KernelSpecManager(kernel_dirs=[])  # knows this interpreter's own kernel alone
        self.km = AsyncKernelManager(kernel_name="python3", kernel_spec_manager=specs)
        self.km.connection_file = str(job.work / "connection.json")
        self.client = Executor(timeout=None, iopub_timeout=120, raise_on_iopub_timeout=True)
        self.client.run, self.client.km, self.client.nb = self, self.km, self.notebook
        self.client.log = logging.Logger("silent", logging.CRITICAL + 1)

    async def run(self) -> None:
        """Executes all cells in place; Failure or KernelDied. The outputs so far are saved."""
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda loop, context: None)  # of tasks that a death cut off
        watcher = loop.create_task(self.watch())
        self.job.signals.kill = self.kill
        try:
            with open(self.job.work / "kernel.log", "wb") as log:  # the last words of a crash
                place = {"cwd": str(self.job.folder), "env": self.job.env}
                place |= {"extra_arguments": ARGUMENTS, "stdout": log, "stderr": log}
                await self.km.start_kernel(**place)
            self.client.kc = self.km.client()
            self.client.kc.start_channels()
            await self.client.kc.wait_for_ready(timeout=120)
            self.client.kc.allow_stdin = False
            for index in self.names:
                self.current = index
                await self.run_cell(self.notebook.cells[index])
                if watcher.done():
                    watcher.result()
        except (CellExecutionError, CellTimeoutError, DeadKernelError, RuntimeError) as error:
            fault = self.fault or self.find_fault(time.monotonic())
            raise fault or self.explain(error) from None
        finally:
            watcher.cancel()
            await self.shut_down()
            self.save()

    async def run_cell(self, cell) -> None:
        """Executes one cell, saves, and says how it went."""
        self.started = self.activity = time.monotonic()
        self.printed, self.pending, self.last_line = 0, "", ""
        await self.client.async_execute_cell(cell, self.current)
        if self.fault:  # it survived the interrupt
            raise self.fault
        self.save()
        took = time.monotonic() - self.started
        if not self.console.terminal and (took > 1 or "define" not in page.tags(cell)):
            said = f"{took:.1f} s, outputs: {len(cell.outputs)}"
            self.console.note(f"{self.names[self.current]}: {said}")

    def hear(self, text: str) -> None:
        """What a cell printed is shown: the last line on a terminal, else all of a long cell."""
        *lines, pending = page.joined(self.pending, text[-100_000:]).split("\n")
        lines = [shown for line in lines if (shown := page.terminal_text(line).strip())]
        self.pending = pending[-10_000:]
        shown = page.terminal_text(self.pending).strip()
        self.last_line = shown or (lines or [self.last_line])[-1]
        if not self.console.terminal and self.activity - self.started > 3:
            for line in lines:
                self.console.note(f"  {one_line(line)}")
                self.spoken = self.activity

    async def watch(self) -> None:
        """Beside the cells: what is shown, the copy on the disk, time limits and signals."""
        while True:
            await asyncio.sleep(0.25)
            now = time.monotonic()
            took, said = now - self.started, one_line(self.last_line) or "silent"
            if self.current is not None and self.console.terminal:
                text = f"{self.names[self.current]} {took:.1f} s {said}"
                self.console.write(text[: shutil.get_terminal_size().columns - 1], end="")
            elif self.current is not None and now - max(self.spoken, self.started) > SILENT_SECONDS:
                self.console.note(f"{self.names[self.current]}: running for {took:.1f} s: {said}")
                self.spoken = now
            if now - self.saved > SAVE_SECONDS:
                self.save()
            if self.fault and now - self.since > INTERRUPT_SECONDS:
                self.kill()
            elif not self.fault and (fault := self.find_fault(now)):
                self.fault, self.since = fault, now
                if self.current is None:  # the kernel starts
                    self.kill()
                with contextlib.suppress(RuntimeError, OSError):
                    await self.km.interrupt_kernel()

    def find_fault(self, now: float) -> Failure | None:
        """A reason to end the run: a signal, a limit of time or of output."""
        code, what, options = Exit.TIMEOUT, "", self.job.options
        if self.job.signals.failure or self.current is None:
            return self.job.signals.failure
        if self.printed > OUTPUT_LIMIT:
            code, what = Exit.CELL, f"printed over {OUTPUT_LIMIT} characters"
        elif options.timeout and now - self.started > options.timeout:
            what = f"ran longer than --timeout {options.timeout:g} s"
        elif options.stall and now - self.activity > options.stall:
            what = f"printed nothing for --stall {options.stall:g} s"
        said = f"C{self.names[self.current][1:]} {what}: look at what it printed last."
        return Failure(code, said) if what else None

    def save(self) -> None:
        """The working copy on disk; a full disk is said once and survived."""
        self.saved = time.monotonic()
        try:
            page.write(self.notebook, self.job.partial)
        except OSError as error:
            if not self.unsaved:
                why = f"the working copy cannot be saved ({error.strerror}); going on"
                self.console.note(f"warning: {why}")
            self.unsaved = True

    def explain(self, error: Exception) -> Exception:
        """A cell's failure, or how the kernel ended and what it said last."""
        if isinstance(error, CellExecutionError):
            said = one_line(f"{error.ename}: {error.evalue}").rstrip(" :.")
            if error.ename in ("MemoryError", "OutOfMemoryError"):
                return KernelDied(
                    f"C{self.names[self.current][1:]} ran out of memory ({said})", "memory"
                )
            code = EXITS.get(error.ename, Exit.CELL)
            return Failure(code, f"C{self.names[self.current][1:]} failed with {said}.")
        code = self.km.provisioner.process.poll() if self.km.has_kernel else None
        how = str(error) if code is None else f"signal {-code}" if code < 0 else f"exit code {code}"
        log = (self.job.work / "kernel.log").read_text("utf-8", errors="replace")
        fatal = re.findall(r"^.*(?:error|fatal|abort|exception).*$", log, re.I | re.M)
        how += f" ({one_line(fatal[-1], 120)})" if fatal else ""
        if self.current is None:
            return KernelDied(f"The kernel could not be started: {how}", "")
        return KernelDied(
            f"The kernel died in {self.names[self.current]}, {how}", "killed" * (code == -9)
        )

    async def shut_down(self) -> None:
        """Ends the kernel and whatever it started, and closes the channels."""
        with contextlib.suppress(Exception):
            if await self.km.is_alive():
                await asyncio.wait_for(self.km.shutdown_kernel(now=bool(self.fault)), 15)
        self.kill()
        with contextlib.suppress(Exception):
            self.client.kc.stop_channels()
            await self.km.cleanup_resources()

    def kill(self) -> None:
        """Kills the kernel's process and all that it started, at once."""
        with contextlib.suppress(OSError, AttributeError):  # it is gone, or was never there
            group, process = self.km.provisioner.pgid, self.km.provisioner.process
            os.killpg(group, 9) if group else process.kill()  # 9: SIGKILL


def execute(job: Job):
    """Step 4: the executed notebook; Failure for a bad cell, or a kernel that kept dying."""
    for name in ("MPLBACKEND", "PYTHONSTARTUP", "SSD_BATCH_DIVISOR"):  # would change the page
        job.env.pop(name, None)
    job.env |= {"SSD_RUN_ID": uuid.uuid4().hex, "SSD_NO_INSTALL": "1"}
    job.env |= {"IPYTHONDIR": str(job.work / "ipython"), "PYDEVD_DISABLE_FILE_VALIDATION": "1"}
    job.env |= {"SSD_STAGING": job.relative(job.staging)} if job.staging else {}
    for cell in page.code_cells(job.notebook):
        cell["outputs"], cell["execution_count"] = [], None
    before, divisor, retries = "", 1, job.options.retries
    for attempt in range(retries + 1):
        for folder in filter(None, (job.work, job.staging)):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(mode=0o700, parents=True)
        execution = Execution(job)
        try:
            asyncio.run(execution.run())
            break
        except KernelDied as death:
            job.signals.check()
            what, cause = death.args
            if attempt == retries:
                why = f"{what}, restarts: {retries}; look at the last output."
                raise Failure(Exit.KERNEL, why) from None
            # a smaller batch changes the last bits: for a lack of memory or a second kill in a row
            if cause == "memory" or cause == before == "killed":
                divisor = min(64, 2 * divisor)
                job.env["SSD_BATCH_DIVISOR"] = str(divisor)
                what += f"; it looks like memory, so the batch is divided by {divisor}"
            before = cause
            job.console.note(f"{what}; restart {attempt + 1} of {retries}, from the top")
    return execution.notebook
