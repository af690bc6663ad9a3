"""`%%ranks N`: runs a notebook cell on N fresh ranks. Ranks import this file too, so it leaves IPython to the notebook."""

import argparse
import ast
import builtins
import linecache
import shlex
from typing import Any, NoReturn

import cloudpickle

from labkit.comm import Comm
from labkit.launch.local import run

GIVEN = ("rank", "world_size", "device", "comm", "torch", "dist")  # names that every rank finds defined


def register(ipython: Any) -> None:
    """Makes `%%ranks` known to an IPython shell; called by `%load_ext labkit`."""

    def ranks(line: str, cell: str) -> None:
        on_ranks(ipython, line, cell)

    ranks.__doc__ = on_ranks.__doc__
    ipython.register_magic_function(ranks, magic_kind="cell", magic_name="ranks")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        from IPython.core.error import UsageError

        raise UsageError(f"{message}. Use: %%ranks N [--timeout SECONDS] [--link LINK] [-> NAME]")


def on_ranks(ipython: Any, line: str, cell: str) -> None:
    """`%%ranks N [--timeout SECONDS] [--link LINK] [-> NAME]`: runs the cell on N fresh ranks.

    The cell finds `rank`, `world_size`, `device`, `comm`, `torch` and `dist` (torch.distributed) defined, and copies of
    those of the notebook's variables that it mentions. What ranks print, and the value of a last expression, is shown with
    the rank's number. With `-> NAME` (or `--out NAME`) the notebook's variable NAME becomes the list of these values, in
    rank order (of the variable `result`, if the cell doesn't end with an expression). Default timeout: 60 seconds. LINK, as
    "1gbit", is emulated between the ranks.

    Raises UsageError for a line and SyntaxError for a cell that doesn't parse, RankError when a rank fails.
    """
    parser = _Parser(add_help=False)
    parser.add_argument("N", type=int)
    parser.add_argument("--timeout", type=float, default=60.0)
    parser.add_argument("--link")
    parser.add_argument("--out", metavar="NAME")
    options = parser.parse_args(shlex.split(line.replace("->", " --out ")))
    if options.N < 1:
        parser.error(f"{options.N} ranks: use 1 or more")
    source = "\n" + cell  # the first line is %%ranks itself: errors have the line numbers that the notebook shows
    filename = f"In[{ipython.execution_count}]"
    mentioned = {node.id for node in ast.walk(ast.parse(source, filename)) if isinstance(node, ast.Name)}
    linecache.cache[filename] = (len(source), None, source.splitlines(keepends=True), filename)
    sent, kept = {}, {}
    for name in mentioned & ipython.user_ns.keys() - {*GIVEN, *dir(builtins), *ipython.user_ns_hidden}:
        try:
            cloudpickle.dumps(ipython.user_ns[name])
            sent[name] = ipython.user_ns[name]
        except Exception as error:  # whatever a __reduce__ raises
            kept[name] = f"{name} ({type(ipython.user_ns[name]).__name__}) can't be copied to the ranks: {error}"
    values = run(_cell, options.N, options.timeout, args=(source, filename, sent, kept, options.out), link=options.link)
    for rank, (shown, _) in enumerate(values):
        print("".join(f"[rank {rank}] {line}\n" for line in shown.splitlines()), end="")
    if options.out:
        ipython.user_ns[options.out] = [value for _, value in values]


def _cell(
    comm: Comm, source: str, filename: str, sent: dict[str, Any], kept: dict[str, str], out: str | None
) -> tuple[str, Any]:
    """In a rank: runs the cell. What to show of its last expression, and the value to hand back if somebody wants it."""
    import torch
    import torch.distributed as dist

    given = zip(GIVEN, (comm.rank, comm.world_size, comm.device, comm, torch, dist), strict=True)
    names = {"__name__": "__main__", **sent, **dict(given)}
    tree = ast.parse(source, filename)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    try:
        exec(compile(tree, filename, "exec"), names)
        if not isinstance(last, ast.Expr):
            return "", names.get("result") if out else None
        value = eval(compile(ast.Expression(last.value), filename, "eval"), names)
    except NameError as error:
        if error.name in kept:
            error.add_note(f"The notebook's {kept[error.name]}")
        raise
    return "" if value is None else repr(value), value if out else None
