"""The code as it was when a job was submitted: later edits do not reach jobs that wait, or that come back.

A copy is named by what it holds, so that jobs of the same code share one.
"""

from __future__ import annotations

import hashlib
import importlib.util
import shutil
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from pretrain.errors import UserError

PACKAGES = ("pretrain", "index", "downstream", "slurm", "recipes")
SUFFIXES = (".py", ".yaml", ".json", ".toml")


def snapshot(folder: Path, modules: Iterable[str] = (), *, write: bool = True) -> Path:
    """A copy of polyview, and of the top-level packages of `modules` (plug-ins), under `folder`; where Python is to
    look for them first. write: False only names it.

    Raises:
        UserError: a module is not to be found, or the copy cannot be written.
    """
    files = dict(_polyview())
    for module in modules:
        files |= dict(_plug_in(module))
    data = {name: file.read_bytes() for name, file in sorted(files.items())}
    digest = hashlib.sha256(b"".join(b"%s\0%d\0%s" % (n.encode(), len(d), d) for n, d in data.items())).hexdigest()
    copy = folder / f"code-{digest[:12]}"
    if write and not copy.is_dir():
        _write(copy, data)
    return copy


def _write(copy: Path, data: dict[str, bytes]) -> None:
    draft = copy.with_name(f".{copy.name}.tmp")
    try:
        shutil.rmtree(draft, ignore_errors=True)
        for name, content in data.items():
            file = draft / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)
        draft.rename(copy)
    except OSError as error:
        if not copy.is_dir():  # another submission of the same code was faster
            raise UserError(f"the code cannot be copied to {copy} ({error.strerror}); make room there") from None


def _polyview() -> Iterator[tuple[str, Path]]:
    root = Path(__file__).resolve().parents[1]
    yield "polyview.py", root / "polyview.py"
    for package in PACKAGES:
        yield from _below(root / package)


def _plug_in(module: str) -> Iterator[tuple[str, Path]]:
    """Files of the top-level package of `module`; none where it is polyview's own or an installed one."""
    top = module.partition(".")[0]
    if top in PACKAGES:
        return
    try:
        spec = importlib.util.find_spec(top)
    except ValueError:
        spec = None
    if spec is None or spec.origin is None:
        raise UserError(f"the recipe names {module}, and there is no module {top} to send along with the job")
    origin = Path(spec.origin)
    if any(part in ("site-packages", "dist-packages") for part in origin.parts) or origin.is_relative_to(sys.prefix):
        return
    if origin.name == "__init__.py":
        yield from _below(origin.parent)
    else:
        yield origin.name, origin


def _below(package: Path) -> Iterator[tuple[str, Path]]:
    for file in package.rglob("*"):
        if file.suffix in SUFFIXES and file.is_file() and "__pycache__" not in file.parts:
            yield str(file.relative_to(package.parent)), file
