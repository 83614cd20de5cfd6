"""A collection on disk: immutable segments, versions that name them, and CURRENT, the one that is served.

`CURRENT` holds a version's number and is replaced by rename, so a reader finds the old version or the new
one, whenever a writer dies. Versions are built beside what is served and reach readers by `publish` alone,
which checks every byte first. A collection belongs to one writer at a time (a lock) and to any number of
readers (none).
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from index.errors import DamagedCollection, StaleParent
from index.store.durable import commit_folder, lock, new_folder, write_json
from index.store.manifest import FILE, VERSION, Manifest, read_manifest
from index.store.segment import Segment, verify_files
from pretrain.durable import write_text
from pretrain.errors import UserError


class Collection:
    """`folder` need not exist before the first build."""

    def __init__(self, folder: str | os.PathLike[str]):
        self.folder = Path(folder)
        self.segments = self.folder / "segments"

    def exists(self) -> bool:
        return (self.folder / "versions").is_dir()

    def versions(self) -> list[str]:
        """Every version that was built, oldest first."""
        folder = self.folder / "versions"
        found = [p.name for p in folder.iterdir() if VERSION.fullmatch(p.name)] if folder.is_dir() else []
        return sorted(found, key=int)

    def manifest(self, version: str) -> Manifest:
        if version not in self.versions():
            known = ", ".join(self.versions()) or "none"
            raise UserError(f"{self.folder} has no version {version!r}; there are: {known}")
        return read_manifest(self.folder / "versions" / version / FILE)

    def current(self) -> str | None:
        """The published version, None before the first; `DamagedCollection` when CURRENT names none."""
        path = self.folder / "CURRENT"
        try:
            named = path.read_text(encoding="utf-8", errors="replace").strip()
        except FileNotFoundError:
            return None
        if named not in self.versions():
            raise DamagedCollection(
                f"{path} names no version of this collection ({named[:40]!r}); publish one of "
                f"{', '.join(self.versions()) or 'none left'}: "
                f"python -m index publish {self.folder} --version N"
            )
        return named

    def open(self, version: str | None = None) -> tuple[Manifest, list[Segment]]:
        """The manifest and segments of a version (the published one), checked: sizes always, sha256 once a
        file state.

        Raises `DamagedCollection` naming the file that is missing, cut or altered.
        """
        if not self.exists():
            raise UserError(f"{self.folder} is no collection: make one with python -m index build")
        version = version or self.current()
        if version is None:
            raise UserError(f"{self.folder}: nothing is published yet: python -m index publish {self.folder}")
        manifest = self.manifest(version)
        for record in manifest.segments:
            folder = self.segments / record["id"]
            stamp = self._stamp(folder)
            known = self._verified(record["id"]) == stamp
            verify_files(folder, record["files"], digests=not known)
            if not known:
                self._remember(record["id"], stamp)
        return manifest, [Segment(self.segments / r["id"], r) for r in manifest.segments]

    def add_version(self, manifest: Manifest) -> None:
        """Write a new, unpublished version; `StaleParent` when its number was taken meanwhile."""
        versions = self.folder / "versions"
        with new_folder(versions) as folder:
            (folder / FILE).write_text(manifest.to_json(), encoding="utf-8")
            if not commit_folder(folder, versions / manifest.version):
                raise StaleParent(f"version {manifest.version} was built by another process meanwhile: build again")

    def publish(self, version: str | None = None) -> tuple[str | None, str]:
        """Serve `version` (the newest); (the version served before, the one served now).

        Every file is read and its sha256 compared first. Going back to an earlier version is allowed, and
        forward to one built on what is current; a version built on another one is refused (`StaleParent`).
        """
        if not self.versions():
            raise UserError(f"{self.folder} holds no version: make one with python -m index build")
        with lock(self.folder):
            version = version or self.versions()[-1]
            manifest = self.manifest(version)
            before = self._current_or_none()
            if before is not None and not self._related(version, before):
                raise StaleParent(
                    f"version {version} was built on {manifest.parent or 'nothing'}, but {before} is current "
                    f"now: publishing it would drop what {before} added. Build again, then publish"
                )
            for record in manifest.segments:
                verify_files(self.segments / record["id"], record["files"], digests=True)
            if before != version:
                write_text(self.folder / "CURRENT", version + "\n")
        return before, version

    def _current_or_none(self) -> str | None:
        try:
            return self.current()
        except DamagedCollection:
            return None  # publishing is how a damaged CURRENT is mended

    def _related(self, a: str, b: str) -> bool:
        return a in self._ancestry(b) or b in self._ancestry(a)

    def _ancestry(self, version: str) -> list[str]:
        line: list[str] = []
        step: str | None = version
        while step is not None and step not in line:
            line.append(step)
            step = self.manifest(step).parent if step in self.versions() else None
        return line

    def _stamp(self, folder: Path) -> list[list]:
        """State of a segment's files: a flipped bit that was written through the file system changes it."""
        try:
            files = sorted(folder.iterdir())
        except OSError as error:
            raise DamagedCollection(f"{folder} is missing ({error.strerror}): restore it from a copy") from error
        stats = [(p.name, p.stat()) for p in files]
        return [[name, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns] for name, s in stats]

    def _verified(self, segment: str) -> list | None:
        try:
            return json.loads((self.folder / "verified" / f"{segment}.json").read_text())
        except (OSError, ValueError):
            return None

    def _remember(self, segment: str, stamp: list) -> None:
        if not os.access(self.folder, os.W_OK):
            return  # a read-only collection is checked at every opening
        (self.folder / "verified").mkdir(exist_ok=True)
        write_json(self.folder / "verified" / f"{segment}.json", stamp)
