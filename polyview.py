"""polyview: pretrain vision and vision-language encoders, index what they see, judge what they learned.

The console door: it dispatches by name and imports nothing heavy. For notebooks: `load`, `open_index`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from index.search.opened import Index
    from pretrain.encoder import Encoder
    from pretrain.weights.which import Which

DOC = """Pretrain vision and vision-language encoders, index what they see, judge what they learned.

`polyview RECIPE [key=value …]` trains. The same verbs stand behind `python -m pretrain|index|downstream|slurm`."""


def load(checkpoint: str | Path, device: str = "auto", weights: Which = "model") -> Encoder:
    """The encoder of a run, a checkpoint, or an export `--to safetensors`: `.encode_image(…)`, `.encode_text(texts)`.

    `weights`: "model" is what was trained; "teacher" its momentum teacher, where an objective has one (DINO, MoCo);
    "ema" its running average, where the recipe keeps one.
    """
    from pretrain.encoder import load as load_encoder

    return load_encoder(checkpoint, device=device, weights=weights)


def open_index(folder: str | Path) -> Index:
    """The published version of a collection: `.search(vectors | images | texts, k, filter=None)`."""
    from index import open_index as open_collection

    return open_collection(folder)


def verbs() -> dict[str, str]:
    """Every verb of every package, and the module behind it."""
    from downstream.__main__ import VERBS as downstream
    from index.__main__ import VERBS as index
    from pretrain.__main__ import VERBS as pretrain
    from slurm.__main__ import VERBS as slurm

    return {"demo": "downstream.cli_demo", **pretrain, **index, **downstream, **slurm}


def main(argv: Sequence[str] | None = None) -> int:
    """The console command `polyview`."""
    from pretrain import cli

    argv = list(sys.argv[1:] if argv is None else argv)
    table = verbs()
    shipped = Path(__file__).parent / "recipes"
    if argv and argv[0] not in table and (Path(argv[0]).is_file() or (shipped / f"{argv[0]}.yaml").is_file()):
        argv = ["train", *argv]
    return cli.main("polyview", DOC, table, argv)


if __name__ == "__main__":
    sys.exit(main())
