"""Step 4: nbconvert's executor in a kernel of this Python, watched, and restarted if it dies."""

import asyncio
import contextlib
import copy
import logging
import os
import re
import shutil
import signal
import sys
import time
import uuid
from typing import Any

from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient.exceptions import CellExecutionError, DeadKernelError
from nbconvert.preprocessors import ExecutePreprocessor
from tqdm import tqdm

from . import files, page
from .console import Exit, Failure, duration, megabytes, one_line, plural
from .inputs import EXITS
from .plan import Job

SAVE_SECONDS = 30.0  # a long cell is saved this often
INTERRUPT_SECONDS = 6.0  # a cell may take this long to end after an interrupt
SILENT_SECONDS = 60.0  # without a terminal: a sign of life after so much silence
OUTPUT_LIMIT = 8_000_000  # characters of text in one cell: more than a whole page may have
WARNINGS = (  # on the page they name files, not folders of this machine
    "__import__('warnings').formatwarning = lambda message, category, filename, lineno, line=None: "
    "f'{__import__(\"os\").path.basename(filename)}:{lineno}: {category.__name__}: {message}\\n'"
)


class KernelDied(Exception):
    """The kernel ended by itself, or a cell ran out of memory."""

    killed = memory = False  # by SIGKILL; by a MemoryError


class Executor(ExecutePreprocessor):
    """nbconvert's executor, which shows messages as they come and joins streams as they grow."""

    def process_message(self, msg: dict, cell: Any, cell_index: int) -> Any:
        """nbclient's, for every message of the running cell."""
        self.run.message(msg)
        return super().process_message(msg, cell, cell_index)

    def output(self, outs: list[Any], msg: dict, display_id: Any, cell_index: int) -> Any:
        """nbclient's, for every output."""
        if msg["msg_type"] != "stream" or self.output_hook_stack[msg["parent_header"]["msg_id"]]:
            return super().output(outs, msg, display_id, cell_index)
        if self.run.printed > OUTPUT_LIMIT:
            return self.run.kill()  # an interrupt would wait for all that is on its way
        out = outs[-1] if outs and not self.clear_before_next_output else {}
        if out.get("name") != msg["content"]["name"]:
            out = super().output(outs, msg, display_id, cell_index)
            self.run.printed += len(out["text"])
            return out
        text = page.joined(out["text"], msg["content"]["text"])
        self.run.printed += len(text) - len(out["text"])
        out["text"] = text
        return out


class Execution:
    """One kernel. Nothing raises inside its event loop: a fault is noted, and ends the cell."""

    def __init__(self, job: Job):
        self.job, self.console, self.notebook = job, job.console, copy.deepcopy(job.notebook)
        self.titles = page.titles(self.notebook)
        code = [n for n, c in enumerate(self.notebook.cells) if c.cell_type == "code" and c.source]
        self.numbers = {index: number for number, index in enumerate(code, 1)}
        self.current: int | None = None  # index of the running cell
        self.fault: Failure | None = None
        self.started = self.activity = self.saved = self.spoken = self.since = 0.0  # monotonic
        self.printed, self.pending, self.last_line, self.unsaved = 0, "", "", False
        self.km = AsyncKernelManager(
            kernel_name="python3",
            kernel_spec_manager=KernelSpecManager(kernel_dirs=[]),  # this interpreter's own
            connection_file=str(job.work / "connection.json"),
        )
        self.client = Executor(timeout=None, iopub_timeout=120, record_timing=False)
        self.client.run, self.client.km, self.client.nb = self, self.km, self.notebook
        self.client.log = logging.Logger("silent", logging.CRITICAL + 1)

    async def run(self) -> None:
        """Executes all cells in place; Failure or KernelDied. The outputs so far are saved."""
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda loop, context: None)  # of tasks that a death cut off
        watcher = loop.create_task(self.watch())
        self.job.signals.kill = self.kill
        try:
            await self.start()
            for index in self.numbers:
                await self.run_cell(index)
                if watcher.done():
                    watcher.result()
        except CellExecutionError as error:
            raise self.fault or self.cell_failure(error) from None
        except (DeadKernelError, RuntimeError) as error:
            fault = self.fault or self.find_fault(time.monotonic())
            raise fault or self.death(error) from None
        finally:
            watcher.cancel()
            await self.shut_down()
            self.save()

    async def start(self) -> None:
        """Starts the kernel's process; RuntimeError if it does not answer."""
        arguments = ["--HistoryManager.hist_file=:memory:"]
        arguments += [f"--InteractiveShellApp.exec_lines={WARNINGS}"]
        kernel = {"extra_arguments": arguments, "cwd": str(self.job.folder), "env": self.job.env}
        with open(self.job.work / "kernel.log", "wb") as log:  # the last words of a crash
            await self.km.start_kernel(**kernel, stdout=log, stderr=log)
        self.client.kc = self.km.client()
        self.client.kc.start_channels()
        await self.client.kc.wait_for_ready(timeout=120)
        self.client.kc.allow_stdin = False

    async def run_cell(self, index: int) -> None:
        """Executes one cell, saves, and says how it went."""
        cell, self.current = self.notebook.cells[index], index
        self.started = self.activity = time.monotonic()
        self.printed, self.pending, self.last_line = 0, "", ""
        await self.client.async_execute_cell(cell, index)
        if self.fault:  # it survived the interrupt
            raise self.fault
        self.save()
        took, self.current = time.monotonic() - self.started, None
        tell = took > 1 or "define" not in page.tags(cell)  # quick definitions: nothing to tell
        if tell and not self.console.terminal:
            if self.pending and took > 3:
                self.console.line(f"    {one_line(page.terminal_text(self.pending), 160)}")
            made = plural(len(page.join_streams(cell.outputs)), "output")
            self.console.note(f"{self.head(index)}: {duration(took)}, {made}")

    def head(self, index: int) -> str:
        """``[7/40] 3. Dataset``."""
        return f"[{self.numbers[index]}/{len(self.numbers)}] {self.titles[index] or 'cell'}"

    def message(self, msg: dict) -> None:
        """A message of the running cell: lines are shown as they are printed."""
        if msg["msg_type"] not in ("status", "execute_input"):
            self.activity = time.monotonic()
        if msg["msg_type"] == "stream":
            text = page.joined(self.pending, msg["content"]["text"][-100_000:])
            *lines, self.pending = text.split("\n")
            for line in filter(None, (page.terminal_text(line).rstrip() for line in lines)):
                self.last_line = line
                if not self.console.terminal and self.activity - self.started > 3:
                    self.console.line(f"    {one_line(line, 160)}")
                    self.spoken = self.activity
            self.pending = self.pending[-10_000:]
            self.last_line = page.terminal_text(self.pending).strip() or self.last_line

    async def watch(self) -> None:
        """Beside the cells: the bar, the copy on the disk, time limits and signals."""
        while True:
            await asyncio.sleep(0.25)
            now = time.monotonic()
            if self.current is not None:
                self.show(now)
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
        if self.job.signals.received:
            return self.job.signals.failure()
        timeout, stall = self.job.options.timeout, self.job.options.stall
        limits = [
            (self.printed > OUTPUT_LIMIT, Exit.CELL, f"printed over {megabytes(OUTPUT_LIMIT)}"),
            (
                timeout and now - self.started > timeout,
                Exit.TIMEOUT,
                f"ran longer than --timeout {timeout} s",
            ),
            (
                stall and now - self.activity > stall,
                Exit.TIMEOUT,
                f"printed nothing for --stall {stall} s",
            ),
        ]
        for over, code, what in limits if self.current is not None else []:
            if over:
                return Failure(code, f"{self.where()} {what}: look at what it printed last.")
        return None

    def where(self) -> str:
        """``Cell 7 of 40 (3. Dataset)``."""
        title = f" ({self.titles[self.current]})" if self.titles[self.current] else ""
        return f"Cell {self.numbers[self.current]} of {len(self.numbers)}{title}"

    def show(self, now: float) -> None:
        """The bar on a terminal; elsewhere a sign of life after a minute of silence."""
        said = one_line(self.last_line)
        if self.console.terminal:
            if self.console.bar is None:
                form = {"bar_format": "{bar:20} {desc}{elapsed}{postfix}", "leave": False}
                width, height = shutil.get_terminal_size()
                form |= {"file": sys.stdout, "ncols": width - 1, "nrows": height}
                self.console.bar = tqdm(total=len(self.numbers), **form)
            self.console.bar.n = self.numbers[self.current] - 1
            self.console.bar.set_description_str(f"{self.head(self.current)} ", refresh=False)
            self.console.bar.set_postfix_str(said)
        elif now - max(self.spoken, self.started) > SILENT_SECONDS:
            took, self.spoken = duration(now - self.started), now
            self.console.note(f"{self.head(self.current)}: running for {took}: {said}")

    def save(self) -> None:
        """The working copy on disk; a full disk is said once and survived."""
        self.saved = time.monotonic()
        try:
            files.write_file(self.job.partial, page.to_bytes(page.clean(self.notebook)))
        except OSError as error:
            if not self.unsaved:
                why = f"the working copy cannot be saved ({error.strerror}); going on"
                self.console.note(f"warning: {why}")
            self.unsaved = True

    def cell_failure(self, error: CellExecutionError) -> Exception:
        """The failure of a cell, or a lack of memory that a smaller batch may cure."""
        said = one_line(f"{error.ename}: {error.evalue}").rstrip(" :.")
        if error.ename not in ("MemoryError", "OutOfMemoryError"):
            code = EXITS.get(error.ename, Exit.CELL)
            return Failure(code, f"{self.where()} failed with {said}.")
        death = KernelDied(f"{self.where()} ran out of memory ({said})")
        death.memory = True
        return death

    def death(self, error: Exception) -> KernelDied:
        """How the kernel ended, and what it said last."""
        code = self.km.provisioner.process.poll() if self.km.has_kernel else None
        how = str(error) if code is None else f"signal {-code}" if code < 0 else f"exit code {code}"
        log = (self.job.work / "kernel.log").read_text("utf-8", errors="replace")
        fatal = re.findall(r"^.*(?:error|fatal|abort|exception).*$", log, re.I | re.M)
        how += f" ({one_line(fatal[-1], 120)})" if fatal else ""
        if self.current is None:
            return KernelDied(f"The kernel could not be started: {how}")
        death = KernelDied(f"The kernel died in c{self.where()[1:]}, {how}")
        death.killed = code == -9
        return death

    async def shut_down(self) -> None:
        """Ends the kernel and whatever it started, and closes the channels."""
        if self.console.bar is not None:
            self.console.bar = self.console.bar.close()
        with contextlib.suppress(Exception):
            if await self.km.is_alive():
                await asyncio.wait_for(self.km.shutdown_kernel(now=bool(self.fault)), 15)
        self.kill()
        with contextlib.suppress(Exception):
            self.client.kc.stop_channels()
            await self.km.cleanup_resources()

    def kill(self) -> None:
        """Kills the kernel's process and all that it started, at once."""
        group = getattr(self.km.provisioner, "pgid", None)
        with contextlib.suppress(OSError, AttributeError):
            if group and group != os.getpgrp():
                os.killpg(group, signal.SIGKILL)
            else:
                self.km.provisioner.process.kill()


def execute(job: Job) -> Any:
    """Step 4: the executed notebook; Failure for a bad cell, or a kernel that kept dying."""
    for name in ("MPLBACKEND", "PYTHONSTARTUP", "SSD_BATCH_DIVISOR"):  # would change the page
        job.env.pop(name, None)
    job.env |= {"SSD_RUN_ID": uuid.uuid4().hex, "SSD_NO_INSTALL": "1"}
    job.env |= {"IPYTHONDIR": str(job.work / "ipython"), "PYDEVD_DISABLE_FILE_VALIDATION": "1"}
    job.env |= {"SSD_TRAINING": "fresh"} if job.options.fresh else {}
    job.env |= {"SSD_STAGING": job.relative(job.staging)} if job.staging else {}
    for cell in page.code_cells(job.notebook):
        cell["outputs"], cell["execution_count"] = [], None
    killed, divisor, retries = False, 1, job.options.retries
    for attempt in range(retries + 1):
        for folder in filter(None, (job.work, job.staging)):
            files.remove(folder)
            folder.mkdir(mode=0o700, parents=True)
        execution = Execution(job)
        try:
            asyncio.run(execution.run())
            break
        except KernelDied as death:
            job.signals.check()
            if attempt == retries:
                tries = f" after {plural(retries, 'restart')}" if retries else ""
                why = f"{death}{tries}; look at the last output."
                raise Failure(Exit.KERNEL, why) from None
            # a smaller batch changes the last bits: for a lack of memory or a second kill in a row
            said = ""
            if death.memory or (killed and death.killed):
                divisor = min(64, 2 * divisor)
                job.env["SSD_BATCH_DIVISOR"] = str(divisor)
                said = f"it looks like memory, so the batch is divided by {divisor}; "
            killed = death.killed
            job.console.note(f"{death}; {said}restart {attempt + 1} of {retries}, from the top")
    return execution.notebook
