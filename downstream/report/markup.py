"""Pictures, shares and shortened text for the report; see `pretrain.markup` for what makes text safe."""

from __future__ import annotations

import math
import re
from typing import Any

from pretrain.markup import esc

_IMAGE = re.compile(r"data:image/(jpeg|png|webp);base64,[A-Za-z0-9+/=]+\Z")


def short(value: Any, length: int) -> str:
    """The first `length` characters of `value`, as text not yet escaped."""
    plain = " ".join(str(value).split())
    return plain if len(plain) <= length else plain[: length - 1].rstrip() + "…"


def image(uri: Any, alt: Any = "", attributes: str = "") -> str:
    """An <img> of a picture carried in the page; a grey box where `uri` is anything but such a picture."""
    if not is_picture(uri):
        return f'<span class="missing" title="no picture">{esc(short(alt, 40))}</span>'
    return f'<img src="{uri}" alt="{esc(short(alt, 120))}" loading="lazy" {attributes}>'


def is_picture(uri: Any) -> bool:
    """Whether `uri` is a picture's bytes, not an address."""
    return isinstance(uri, str) and _IMAGE.match(uri) is not None


def share(value: float | None) -> str:
    """A share of 1 as a percentage: two digits after the point below 1 %, else one."""
    if value is None or not math.isfinite(value):
        return "–"
    return f"{100 * value:.{2 if 0 < value < 0.01 else 1}f}\N{NO-BREAK SPACE}%"
