"""The real photographs that benchmarks read: from $POLYVIEW_DATA, which they cannot do without."""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path

SETS = ("imagenet-sample-250", "flickr1k")


def folder() -> Path:
    """$POLYVIEW_DATA; ends the program with a sentence where it is not set."""
    named = os.environ.get("POLYVIEW_DATA")
    if not named or not Path(named).is_dir():
        raise SystemExit("set POLYVIEW_DATA to the folder that holds " + " and ".join(SETS))
    return Path(named)


def photographs(name: str, limit: int) -> dict[str, bytes]:
    """Up to `limit` JPEG files of a set, by name."""
    files = sorted(path for path in (folder() / name).rglob("*") if path.suffix.lower() in (".jpg", ".jpeg"))
    return {path.name: path.read_bytes() for path in files[:limit]}


def captions(name: str) -> dict[str, list[str]]:
    """The captions of flickr1k; of another set, its class names, which stand in the file names."""
    if name != "flickr1k":
        return {
            file: ["a photo of a " + Path(file).stem.partition("_")[2].replace("_", " ")]
            for file in photographs(name, 1 << 20)
        }
    found: dict[str, list[str]] = {}
    for line in (folder() / name / "captions.tsv").read_text().splitlines()[1:]:
        image, caption = line.split("\t")
        found.setdefault(image, []).append(caption)
    return found


def write_tars(to: Path, images: dict[str, bytes], texts: dict[str, list[str]], a_shard: int = 250) -> list[Path]:
    """Shards of jpg + txt, the first caption alone, as img2dataset writes them."""
    names = list(images)
    shards: list[Path] = []
    for first in range(0, len(names), a_shard):
        shards.append(to / f"{len(shards):05d}.tar")
        with tarfile.open(shards[-1], "w") as tar:
            for name in names[first : first + a_shard]:
                key = Path(name).stem
                for extension, data in (("jpg", images[name]), ("txt", texts[name][0].encode())):
                    info = tarfile.TarInfo(f"{key}.{extension}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    return shards
