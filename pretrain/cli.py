"""One door for every package: a table of verbs, each a module that is imported only when it is called.

A verb module has a one-line docstring (its help), ``add_arguments(parser)`` and ``run(args) -> int``, and imports
what is heavy inside ``run``: so ``--help`` answers at once.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import logging
import os
import sys
from collections.abc import Mapping, Sequence

from pretrain.errors import UserError
from pretrain.exit_codes import REFUSED


def main(prog: str, doc: str, verbs: Mapping[str, str], argv: Sequence[str] | None = None) -> int:
    """Run ``python -m PROG VERB …``; `verbs` maps a verb to its module. The exit code: 0 well, 2 the user's error."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help"):
        try:
            print(_overview(prog, doc, verbs), flush=True)
        except BrokenPipeError:  # `… --help | head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    if argv[0] not in verbs:
        near = difflib.get_close_matches(argv[0], verbs, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(verbs)}"
        return _complain(prog, f"unknown verb {argv[0]!r}{hint}")
    return call(f"{prog} {argv[0]}", verbs[argv[0]], argv[1:])


def call(prog: str, module_name: str, argv: Sequence[str]) -> int:
    """Parse `argv` for one verb module and run it."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    logging.getLogger("faiss").setLevel(logging.WARNING)  # it tells of every instruction set it looks for
    module = importlib.import_module(module_name)
    parser = argparse.ArgumentParser(
        prog=_shown(prog), description=module.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    module.add_arguments(parser)
    args = parser.parse_intermixed_args(argv)  # key=value may stand behind flags
    try:
        return int(module.run(args) or 0)
    except UserError as error:
        return error.exit_code if error.told_already else _complain(prog, str(error), error.exit_code)
    except KeyboardInterrupt:
        print(f"{prog}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `… | head`
        return 141


def _shown(prog: str) -> str:
    return prog if prog.startswith("polyview") else f"python -m {prog}"


def _overview(prog: str, doc: str, verbs: Mapping[str, str]) -> str:
    width = max(map(len, verbs))
    lines = [f"  {verb:<{width}}  {_summary(module)}" for verb, module in verbs.items()]
    usage = f"usage: {_shown(prog)} VERB …\n\n{doc.strip()}\n\n"
    return usage + "\n".join(lines) + f"\n\n`{_shown(prog)} VERB --help` tells more."


def _summary(module_name: str) -> str:
    return (importlib.import_module(module_name).__doc__ or "").strip().splitlines()[0]


def _complain(prog: str, message: str, code: int = REFUSED) -> int:
    print(f"{prog}: error: {message}", file=sys.stderr)
    return code
