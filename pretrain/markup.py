"""Pages that open without a server and without a network: text made safe, one look, one file.

Captions come from the web, names from whoever ran it. They may hold markup, control characters, half of a surrogate
pair, or marks that turn the direction of the text after them; none of that may change the page around them.
"""

from __future__ import annotations

import datetime
import html
import math
import re
from typing import Any

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def esc(value: Any) -> str:
    """`value` as text or as a quoted attribute's content."""
    plain = str(value).encode("utf-8", "replace").decode("utf-8")
    return html.escape(_CONTROL.sub("\N{REPLACEMENT CHARACTER}", plain), quote=True)


def isolated(value: Any) -> str:
    """`value` as text that cannot turn the direction of what follows it."""
    return f"<bdi>{esc(value)}</bdi>"


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


def document(
    title: str, heading: str, head: str, body: str, *, style: str = "", script: str = "", more: str = ""
) -> str:
    """One complete HTML file; `head` and `body` are HTML already. `more`: for the file's <head>."""
    moment = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        '<meta name="referrer" content="no-referrer">'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        f"style-src 'unsafe-inline'; script-src 'unsafe-inline'\">{more}"
        f"<title>{esc(title)}</title><style>{LOOK}{style}</style></head><body>"
        f"<header><div><h1>{isolated(heading)}</h1>{head}</div></header>"
        f"<main>{body}</main>"
        f"<footer>Written {moment}. This file is complete: nothing is loaded.</footer>"
        f'<div id="tip"></div><script>{script}</script></body></html>\n'
    )


LOOK = """
:root{color-scheme:light dark;--page:#f6f6f3;--card:#fff;--ink:#1b1d21;--soft:#5c626c;--line:#e2e2dc;--grid:#ececE6;
--own:#2459c9;--own-soft:#dbe6fb;--base:#8b9099;--other:#c2621b;--third:#7a4fb5;--right:#1c8a4c;--wrong:#c33d35}
@media (prefers-color-scheme:dark){:root{--page:#131519;--card:#1c1f25;--ink:#e9eaec;--soft:#a0a6b1;--line:#31353d;
--grid:#2a2e36;--own:#7aa5ff;--own-soft:#22345c;--base:#8a909b;--other:#f0995a;--third:#bb96ee;--right:#4fc57f;
--wrong:#f0776e}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,
"Helvetica Neue",Arial,sans-serif;-webkit-text-size-adjust:100%}
main,header>div,footer{max-width:1180px;margin:0 auto;padding:0 24px}
header{padding:40px 0 8px}
h1{font-size:30px;line-height:1.2;letter-spacing:-.015em;margin:0 0 6px;overflow-wrap:anywhere}
h2{font-size:21px;letter-spacing:-.01em;margin:48px 0 4px}
h3{font-size:16px;margin:0 0 2px}
p{margin:0 0 10px}
.lead,.soft,caption,figcaption{color:var(--soft)}
.lead{max-width:75ch}
nav{display:flex;flex-wrap:wrap;gap:4px 18px;margin:14px 0 0;font-size:14px}
a{color:var(--own);text-decoration:none}a:hover{text-decoration:underline}
dl.facts{display:flex;flex-wrap:wrap;gap:8px 28px;margin:16px 0 0}
dl.facts div{min-width:0}dt{font-size:12px;color:var(--soft)}dd{margin:0;font-weight:600;overflow-wrap:anywhere}
.card{background:var(--card);border:1px solid var(--line);border-radius:12px;padding:18px 20px;margin:14px 0;
min-width:0}
.grid{display:grid;gap:14px;grid-template-columns:repeat(auto-fill,minmax(min(320px,100%),1fr))}
.grid>.card{margin:0}
.big{font-size:36px;font-weight:650;letter-spacing:-.02em;line-height:1.15;font-variant-numeric:tabular-nums}
.big small{font-size:15px;font-weight:400;color:var(--soft);letter-spacing:0;white-space:nowrap}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
th,td{padding:9px 10px;text-align:right;border-top:1px solid var(--line);vertical-align:middle}
thead th{border-top:0;overflow-wrap:anywhere;min-width:5.5em;font-size:12.5px;font-weight:600;color:var(--soft);
vertical-align:bottom}
tbody th{text-align:left;font-weight:600;min-width:210px}
.wide{overflow-x:auto}
svg text{font:11px system-ui,-apple-system,"Segoe UI",Roboto,Arial,sans-serif;fill:var(--soft)}
svg.curve{display:block;width:100%;height:auto;margin-top:6px;touch-action:pan-y}
.now{float:right;font-weight:600;font-variant-numeric:tabular-nums}
.tag{display:inline-block;font-size:12px;border-radius:11px;padding:1px 9px;
border:1px solid var(--line);color:var(--soft)}
.tag.right{color:var(--right);border-color:currentColor}.tag.wrong{color:var(--wrong);border-color:currentColor}
.legend{display:flex;flex-wrap:wrap;gap:2px 14px;font-size:13px;margin-top:8px}
.legend span{cursor:default}
#tip{position:fixed;z-index:9;pointer-events:none;background:var(--card);border:1px solid var(--line);border-radius:8px;
box-shadow:0 4px 18px rgba(0,0,0,.22);padding:6px;font-size:12.5px;max-width:190px;display:none}
details summary{cursor:pointer;font-weight:600}
.empty{border-style:dashed;color:var(--soft)}
code{font:13px ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;overflow-wrap:anywhere}
footer{padding-top:28px;padding-bottom:48px;font-size:13px;color:var(--soft)}
@media (max-width:720px){main,header>div,footer{padding-left:14px;padding-right:14px}header{padding-top:24px}
h1{font-size:24px}.card{padding:14px}}
@media print{body{background:#fff}.card{break-inside:avoid}nav{display:none}}
"""
