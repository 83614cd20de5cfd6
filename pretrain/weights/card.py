"""The model card of an export: what the weights are, what goes in, how to load them, what was verified."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from pretrain.telemetry.provenance import versions
from pretrain.weights.source import Source
from pretrain.weights.targets import Target

WHICH = {
    "model": "the weights that were trained",
    "teacher": "the momentum teacher of the trained weights",
    "ema": "a running average of the trained weights",
}


@dataclass(frozen=True)
class Proof:
    """What was embedded by both, and the least cosine of a row."""

    images: int
    image_cosine: float
    texts: int
    text_cosine: float | None

    def __str__(self) -> str:
        texts = "" if self.text_cosine is None else f", {self.texts} texts (least cosine {self.text_cosine:.7f})"
        return f"{self.images} images (least cosine {self.image_cosine:.7f}){texts}"


def card(source: Source, target: Target, proof: Proof | None) -> str:
    """The card as Markdown; without `proof` it says that nothing was verified."""
    installs = "pip install " + " ".join(target.packages)
    sections = {
        "Load it": f'`{installs}`; then, in this folder:\n\n```python\nfolder = "."\n\n{target.code(source.model)}```',
        "Input": _table(_input(source, target)),
        "Architecture": _table(_architecture(source)),
        "Training": _table(_training(source)),
        "Verification": _verified(target, proof),
        "Versions": _table(_versions(target)),
    }
    head = f"---\nlibrary_name: {target.library}\ntags: [polyview]\n---\n\n# {source.run}\n\n"
    body = "\n\n".join(f"## {title}\n\n{text}" for title, text in sections.items())
    return f"{head}{target.holds} These are {WHICH[source.which]}.\n\n{body}\n"


def _table(rows: Mapping[str, Any]) -> str:
    lines = [f"| {name} | {value} |" for name, value in rows.items() if value is not None]
    return "\n".join(["| | |", "|---|---|", *lines])


def _input(source: Source, target: Target) -> dict[str, Any]:
    model = source.model
    resize = model.eval_resize or model.image_size
    rows = {
        "images": f"RGB, {model.image_size} x {model.image_size} pixels",
        "made by": f"shortest side to {resize}, bicubic, antialiased; centre crop",
        "mean, std": f"{list(model.mean)}, {list(model.std)} of pixels / 255",
    }
    if resize != model.image_size and not target.resizes:
        rows["note"] = f"the code above resizes to {model.image_size}: {target.library} cannot be told of {resize}"
    if model.text and not target.backbone:
        kind = model.text.tokenizer.name if model.text.tokenizer else "CLIP's byte pairs, lower case"
        rows["texts"] = f"{model.text.context} tokens, longer ones cut; tokenizer {kind}"
    return rows


def _architecture(source: Source) -> dict[str, Any]:
    model, text = source.model, source.model.text
    count = sum(p.numel() for p in source.trunk.parameters())
    scale = source.temperature.get("logit_scale")
    return {
        "image tower": f"timm {model.image} {model.image_kwargs or ''}".strip(),
        "text tower": text and f"{text.layers} layers, {text.width} wide, {text.heads} heads, pool {text.pool}",
        "activation": model.activation,
        "embedding": f"{source.trunk.embed_dim} dimensions",
        "parameters": f"{count / 1e6:.1f} M",
        "logit_scale (log)": scale,
        "logit_bias": source.temperature.get("logit_bias"),
        "fingerprint": f"`{source.encoder.fingerprint}`",
    }


def _training(source: Source) -> dict[str, Any]:
    meta = source.checkpoint.meta
    recipe = meta["recipe"]
    seen = meta.get("samples_seen")
    return {
        "run": source.run,
        "steps": f"{source.checkpoint.step:,}",
        "samples seen": None if seen is None else f"{seen:,}",
        "global batch": recipe.get("global_batch"),
        "objectives": ", ".join(recipe.get("objectives", {})) or None,
        "data": ", ".join(_data(recipe)) or None,
        "precision": recipe.get("precision"),
        "weights": source.which,
    }


def _data(recipe: Mapping[str, Any]) -> list[str]:
    """Sources by the name of their folder: where that lies is nobody's business."""
    shards = [s["shards"] for s in recipe.get("data", {}).get("sources", [])]
    paths = [Path(p) for s in shards for p in ([s] if isinstance(s, str) else s)]
    return list(dict.fromkeys(p.parent.name if p.suffix == ".tar" else p.name for p in paths))


def _versions(target: Target) -> dict[str, str]:
    """Those that wrote the export, and those that read it."""
    found = {package: _version(package) for package in target.packages}
    return {name: v for name, v in (versions() | found).items() if name in ("python", "polyview", "torch", *found)}


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _verified(target: Target, proof: Proof | None) -> str:
    if proof is None:
        return "**Not verified**: the files were written and never loaded."
    return f"The code above and the run itself embedded {proof}."
