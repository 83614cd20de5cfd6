"""The demo's control: its CLIP alone, three seeds, trained on captions that belong to other scenes.

What is left of retrieval and kNN there is not learned from captions (SwAV, which reads none, is left out). The
results go to `recipes/demo_control/`, and the demo's report shows them beside the trained and the untrained encoder.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

SEEDS = (0, 1, 2)
OUT = Path(__file__).parents[1] / "recipes" / "demo_control"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="folder for data and runs (kept); default a temporary one")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = args.work or Path(temporary)
        # named as the demo's folder: the test scenes are the same, only the training captions are shuffled
        shuffled, test = work / "digits", work / "digits" / "test"
        if not shuffled.exists():
            run("pretrain", "digits", shuffled, "--shuffle-captions")
        for seed in SEEDS:
            folder, results = work / f"run{seed}", work / f"results{seed}"
            source = f"data.sources.0.shards={shuffled / 'train'}"
            clip = "objectives={clip: {scale: [0.9, 1.0]}}"
            run("pretrain", "demo", source, f"output={folder}", f"seed={seed}", "world=1", clip)
            name = ["--out", results, "--name", f"shuffled captions, seed {seed}"]
            run("downstream", "retrieval", folder, test, *name)
            run("downstream", "knn", folder, "--train", shuffled / "train", "--test", test, *name)
            OUT.mkdir(exist_ok=True)
            for file in results.glob("*.json"):
                shutil.copy(file, OUT / file.name)
    return 0


def run(*command: object) -> None:
    subprocess.run([sys.executable, "-m", *map(str, command)], check=True)


if __name__ == "__main__":
    sys.exit(main())
