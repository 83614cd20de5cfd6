"""What each logged number is, in one line: the words that stand beside it in a run's page and in the report."""

from __future__ import annotations

import re

FIGURES: tuple[tuple[str, str, str, str], ...] = (
    (r"loss", "Loss", "Loss", "What training minimises, all objectives together; less is better within one recipe."),
    (r"loss[./_](.+)", "Loss", "Loss: {0}", "This objective's own part of the loss."),
    (r"eval/(.+)", "Evaluation", "{0}", "On evaluate.shards."),
    (r"lr|learning_rate", "Learning", "Learning rate", "The schedule as it was run."),
    (r"grad_norm", "Learning", "Gradient norm", "Before clipping; a spike names a step worth replaying."),
    (
        r"loss_scale",
        "Learning",
        "Loss scale",
        "Of fp16: halved when gradients overflow.",
    ),
    (
        r"(?:(.+)[./])?(?:logit_scale|scale|temperature)",
        "Learning",
        "Scale (1 / temperature): {0}",
        "As the objective learnt it.",
    ),
    (r"(?:(.+)[./])?accuracy", "Learning", "In-batch accuracy: {0}", "Share of rows whose partner is the nearest."),
    (
        r"(?:.*[./])?rankme(?:/(.+))?",
        "Signals",
        "RankMe: {0}",
        "How many directions are used; a fall towards 1 is collapse.",
    ),
    (
        r"(?:.*[./_])?(?:embedding_)?std(?:/(.+))?",
        "Signals",
        "Embedding spread: {0}",
        "1/√dimension is healthy, 0 is collapse.",
    ),
    (r"images_per_s|images_s|samples_per_s|images/s", "Speed", "Images a second", "Over all ranks."),
    (r"mfu", "Speed", "MFU", "What the model needs by definition, as a share of the device's peak."),
    (r"tflops", "Speed", "TFLOP/s a rank", "By the model's definition: nothing computed twice counts twice."),
    (r"step_s|step_time", "Speed", "Time a step", "Seconds."),
    (r"data_wait(?:_s)?", "Speed", "Waiting for data", "Share of the time that rank 0 stood without a batch."),
    (r"time/(.+)_s", "Time", "Time: {0}", "Seconds a step."),
    (r"memory_share", "Memory", "Memory, share", "Highest reserved, of what the device has."),
    (
        r"memory_reserved_gib",
        "Memory",
        "Memory reserved (GiB)",
        "Taken of the device, at its highest.",
    ),
    (
        r"alloc_retries",
        "Memory",
        "Allocation retries",
        "Times that memory had to be given back first; each waits.",
    ),
    (r"mem.*|.*memory.*", "Memory", "Memory (GiB)", "Highest in use on rank 0."),
)
"""(pattern of the name, group, title, line), in the order they are shown."""

OTHER = "Objectives"
"""The group of what is not known here: signals of objectives."""
GROUPS = ("Loss", "Evaluation", "Learning", "Signals", OTHER, "Speed", "Memory", "Time")


def about(key: str) -> tuple[str, str]:
    """The title and the line of explanation of a logged figure; its own name where it is not known."""
    for pattern, _, title, line in FIGURES:
        if found := re.fullmatch(pattern, key):
            of = next(iter(found.groups()), None)
            return (title.format(of) if of else title.removesuffix(": {0}")), line
    return key, ""


def group(key: str) -> str:
    """Which of GROUPS a logged figure stands in."""
    return next((g for pattern, g, _, _ in FIGURES if re.fullmatch(pattern, key)), OTHER)


def place(key: str) -> tuple[int, str]:
    """Sorts figures into the order they are shown in."""
    known = (i for i, (pattern, _, _, _) in enumerate(FIGURES) if re.fullmatch(pattern, key))
    return next(known, len(FIGURES)), key
