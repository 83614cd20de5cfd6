"""Pictures a person judges by: what a caption found, what a photograph found, and an image's nearest
neighbours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from downstream.report.markup import image, short
from pretrain.markup import esc, isolated

CAPTION_LENGTH = 160


def captions(examples: Sequence[Mapping[str, Any]]) -> str:
    """Captions and the photographs they found, best first, each one's own photograph framed."""
    return "".join(_caption(e) for e in examples)


def _caption(example: Mapping[str, Any]) -> str:
    text = isolated(short(example.get("text", ""), CAPTION_LENGTH))
    place = _place(example.get("rank"), example.get("of"), "own photograph")
    found = _found(example.get("found", ()))
    return f'<div class="query"><div><blockquote>{text}</blockquote><p>{place}</p></div>{found}</div>'


def photographs(examples: Sequence[Mapping[str, Any]], own: str = "own caption") -> str:
    """Photographs and the texts they found, best first, the right ones marked; `own`: what a right one is."""
    return f'<div class="pairs">{"".join(_photograph(e, own) for e in examples)}</div>' if examples else ""


def _photograph(example: Mapping[str, Any], own: str) -> str:
    texts = "".join(
        f"<li{_right(t)}>{isolated(short(t.get('text', ''), CAPTION_LENGTH))}</li>" for t in example.get("found", ())
    )
    return (
        f'<div class="query"><div class="asked">{image(example.get("src"), example.get("name", ""))}'
        f"<p>{_place(example.get('rank'), example.get('of'), own)}</p></div>"
        f'<ol class="texts">{texts}</ol></div>'
    )


def neighbours(examples: Sequence[Mapping[str, Any]]) -> str:
    """Images and their nearest neighbours; of labelled ones, neighbours of the same class are framed."""
    return "".join(_neighbours(e) for e in examples)


def _neighbours(example: Mapping[str, Any]) -> str:
    name = isolated(short(example.get("name", ""), 60))
    verdict = ""
    if "predicted" in example:
        kind = "right" if example.get("hit") else "wrong"
        verdict = f'<p><span class="tag {kind}">voted: {isolated(short(example["predicted"], 40))}</span></p>'
    return (
        f'<div class="query"><div class="asked">{image(example.get("src"), example.get("name", ""))}'
        f"<p>{name}</p>{verdict}</div>{_found(example.get('found', ()))}</div>"
    )


def _found(found: Sequence[Mapping[str, Any]]) -> str:
    return f'<div class="found">{"".join(_figure(f) for f in found)}</div>'


def _figure(found: Mapping[str, Any]) -> str:
    kinds = [k for k in ("right", "gap") if found.get(k)]
    place = f"#{found['place']:,} " if isinstance(found.get("place"), int) else ""
    score = f"{found['score']:.3f}" if isinstance(found.get("score"), int | float) else ""
    name = f"<br>{isolated(short(found['name'], 40))}" if found.get("name") else ""
    return (
        f'<figure class="{" ".join(kinds)}">{image(found.get("src"), found.get("name", ""))}'
        f"<figcaption>{esc(place + score)}{name}</figcaption></figure>"
    )


def _right(text: Mapping[str, Any]) -> str:
    return ' class="right"' if text.get("right") else ""


def _place(rank: Any, of: Any, own: str) -> str:
    if not isinstance(rank, int):
        return ""
    kind = "right" if rank == 1 else ""
    among = f" of {of:,}" if isinstance(of, int) else ""
    return f'<span class="tag {kind}">{own} at place {rank:,}{among}</span>'
