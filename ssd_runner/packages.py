"""Step 1: are the packages of the script's own header here and recent enough?"""

import contextlib
import importlib.metadata
import importlib.util
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

from .console import Console, Exit, Failure

MODULES = {"pillow": "PIL", "opencv-python": "cv2"}  # import names that are not the package's own


def requirements(script: Path) -> tuple[list[str], list[str]]:
    """A script's PEP 723 header: what is needed, and what stands below its comment `optional`."""
    header = re.search(r"^# dependencies = \[\n(.*?)^# \]", script.read_text("utf-8"), re.S | re.M)
    needed, _, optional = header[1].partition("# optional")
    return re.findall(r'"([^"]+)"', needed), re.findall(r'"([^"]+)"', optional)


def problems(wanted: list[str]) -> dict[str, str]:
    """Of requirements ``name>=version`` those that are not met, and why in words."""
    importlib.invalidate_caches()
    found = {}
    for need in wanted:
        name, _, floor = need.partition(">=")
        if importlib.util.find_spec(MODULES.get(name, name.replace("-", "_"))) is None:
            found[need] = f"{name} is missing"
            continue
        with contextlib.suppress(ImportError, ValueError, TypeError):  # no metadata: let it pass
            from packaging.version import Version  # a bare Python has none

            version = importlib.metadata.version(name)
            if Version(version) < Version(floor):
                found[need] = f"{name} {version} is older than {floor}"
    return found


def ensure(script: Path, console: Console, may_install: bool) -> None:
    """Makes sure that the packages in the script's header are here; installs them if it may.

    Failure PACKAGES names all that are missing or too old, and one command.
    """
    needed, optional = requirements(script)
    if may_install and (wrong := problems(needed + optional)):
        console.note(f"{'; '.join(wrong.values())}: installing")
        pip = [sys.executable, "-m", "pip", "install", "--disable-pip-version-check"]
        if importlib.util.find_spec("pip") is None and shutil.which("uv"):
            pip = ["uv", "pip", "install", "--python", sys.executable]
        subprocess.run([*pip, *wrong], stdin=subprocess.DEVNULL)  # shows its own progress
    if wrong := problems(needed):
        command = "python -m pip install " + " ".join(f'"{need}"' for need in wrong)
        what = f"{'; '.join(wrong.values())}: run  {command}  or repeat with --install."
        if may_install:
            what = f"Installing failed, see above: in a virtual environment run  {command}"
        raise Failure(Exit.PACKAGES, what)
    if lacking := problems(optional):
        what = "; ".join(lacking.values())
        console.note(f"warning: {what}; the cells that need them say so (or use --install)")
    found = len(needed) + len(optional) - len(lacking)
    console.note(f"{found} packages found, Python {platform.python_version()}")
