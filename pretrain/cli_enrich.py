"""give shards objects (from COCO, Open Images or a detector) and summaries of their captions: new shards beside

python -m pretrain enrich data/coco --out data/coco-rich --coco annotations/instances_train2017.json
python -m pretrain enrich data/open --out data/open-rich --open-images openimages/ --summary first-sentence
python -m pretrain enrich data/pairs --out data/pairs-rich --detector fasterrcnn_resnet50_fpn_v2 \\
    --detector-weights fasterrcnn_resnet50_fpn_v2.pth --store-features --summary shortest-caption

Every sample is written again, in its order, with what it lacks: objects in .json (box, label, attributes, score),
a detector's features in .roi.npy, summaries in .summary.txt. Nothing of the old shards is changed. For millions of
images, start one command for some shards each: SHARDS may be a-{000..099}.tar.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from pretrain.errors import UserError
from pretrain.shards.summaries import SUMMARIES

if TYPE_CHECKING:
    from pretrain.shards.enrich import Annotator, Counts


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("shards", nargs="+", metavar="SHARDS", help="folders, tars, globs, or a-{000..009}.tar; ours or anyone's")
    add("--out", type=Path, required=True, metavar="DIR", help="new folder for the shards")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--coco", type=Path, metavar="JSON", help="objects of COCO's instances_X.json")
    where.add_argument(
        "--open-images",
        type=Path,
        metavar="DIR",
        help="objects of Open Images: the folder of its CSVs of boxes, class names and, for attributes, relations",
    )
    where.add_argument("--detector", metavar="MODEL", help="objects that this detection model of torchvision finds")
    add("--detector-weights", type=Path, metavar="FILE", help="the detector's weights (.pth, .safetensors)")
    add("--labels", type=Path, metavar="FILE", help="its classes, a name a line from class 1 on (default: COCO's)")
    add("--score", type=float, default=0.5, metavar="S", help="detections of at least this score (default 0.5)")
    add("--most", type=int, default=10, metavar="N", help="detections an image at most, the best (default 10)")
    add("--store-features", action="store_true", help="also the features of an R-CNN's box head, as .roi.npy")
    add("--device", metavar="DEVICE", help="where the detector runs, such as cuda:1 (default: a GPU if there is one)")
    add("--summary", choices=tuple(SUMMARIES), help="how summaries are made of a sample's captions")
    add("--replace", action="store_true", help="put objects, features and summaries also where there are some")


def run(args: argparse.Namespace) -> int:
    from pretrain.cli_pack import named_errors, progress
    from pretrain.shards.enrich import enrich
    from pretrain.shards.source import open_source

    if not (args.coco or args.open_images or args.detector or args.summary):
        raise UserError("say what the shards shall get: --coco, --open-images, --detector or --summary")
    if bool(args.detector) != bool(args.detector_weights):
        raise UserError("--detector MODEL and --detector-weights FILE go together: nothing is downloaded")
    if args.store_features and not args.detector:
        raise UserError("--store-features are a detector's: name one with --detector")
    if args.most < 1 or not 0 <= args.score <= 1:
        raise UserError(f"--most must be at least 1 and --score between 0 and 1, not {args.most} and {args.score:g}")
    source = open_source(args.shards)
    annotator = _annotator(args)
    with named_errors(args.out), progress("enriching", source.samples) as advance:
        counts = enrich(source, args.out, annotator, args.summary, replace=args.replace, advance=advance)
    _tell(counts, args.out, asked=annotator is not None)
    return 0


def _annotator(args: argparse.Namespace) -> Annotator | None:
    if args.detector:
        return _detector(args)
    if not (args.coco or args.open_images):
        return None
    from pretrain.shards.enrich_tables import coco_objects, open_images_objects

    table = coco_objects(args.coco) if args.coco else open_images_objects(args.open_images)
    if table.skips:
        first = table.skips[0]
        print(f"{len(table.skips):,} annotations left out, such as {first.name}: {first.reason} ({first.detail})")
    return table


def _detector(args: argparse.Namespace) -> Annotator:
    import torch

    from pretrain.cli_verify import decode_image
    from pretrain.shards.enrich_detector import Detector

    return Detector(
        args.detector,
        args.detector_weights,
        decode_image,
        labels=args.labels,
        score=args.score,
        most=args.most,
        features=args.store_features,
        device=args.device or ("cuda" if torch.cuda.is_available() else "cpu"),
    )


def _tell(counts: Counts, out: Path, *, asked: bool) -> None:
    unmatched = f", {counts.unmatched:,} not matched by the annotations" if asked else ""
    print(
        f"{out}: {counts.samples:,} samples, {counts.objects:,} with objects, {counts.summaries:,} with summaries"
        + unmatched
    )
    if asked and counts.samples and counts.unmatched == counts.samples:
        print("none of the samples is in the annotations: are they of these photographs?")
    for notes, what in (
        (counts.damaged, "damaged, passed on as they are"),
        (counts.lost, "places of damage in the tars"),
    ):
        if notes:
            print(f"{len(notes):,} {what}, such as {notes[0]['key'] or notes[0]['shard']}: {notes[0]['reason']}")
    if counts.damaged or counts.lost:
        print(f"all of them: {out / 'damaged.jsonl'}")
