"""Text into HTML, safely: everything a data set or a log says passes through here before it stands in the
page.

Captions come from the web. They may hold markup, control characters, half of a surrogate pair, or marks that
turn the direction of the text after them; none of that may change the page around them.
"""

from __future__ import annotations

import html
import math
import re
from typing import Any

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_IMAGE = re.compile(r"data:image/(jpeg|png|webp);base64,[A-Za-z0-9+/=]+\Z")


def esc(value: Any) -> str:
    """`value` as text or as a quoted attribute's content."""
    plain = str(value).encode("utf-8", "replace").decode("utf-8")
    return html.escape(_CONTROL.sub("\N{REPLACEMENT CHARACTER}", plain), quote=True)


def isolated(value: Any) -> str:
    """`value` as text that cannot turn the direction of what follows it."""
    return f"<bdi>{esc(value)}</bdi>"


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


def number(value: float | None) -> str:
    """A figure of unknown size in about four digits: 5e-05, 0.0012, 1.234, 56.71, 12,345."""
    if value is None or not math.isfinite(value):
        return "–"
    if float(value).is_integer() and abs(value) < 1e15:
        return f"{value:,.0f}"
    if abs(value) < 1e-4 or abs(value) >= 1e6:
        mantissa, power = f"{value:.2e}".split("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(power)}"
    shown = f"{value:,.{max(0, 3 - math.floor(math.log10(abs(value))))}f}"
    return shown.rstrip("0").rstrip(".") if "." in shown else shown


def share(value: float | None) -> str:
    """A share of 1 as a percentage: two digits after the point below 1 %, else one."""
    if value is None or not math.isfinite(value):
        return "–"
    return f"{100 * value:.{2 if 0 < value < 0.01 else 1}f}\N{NO-BREAK SPACE}%"
