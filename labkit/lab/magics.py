"""`%%ranks N`: a notebook cell that runs on N fresh ranks."""

import ast
import builtins
import linecache
from typing import Any

import cloudpickle
from IPython.core.error import UsageError
from IPython.core.interactiveshell import InteractiveShell
from IPython.core.magic_arguments import argument, magic_arguments, parse_argstring

from labkit.comm import Comm
from labkit.launch.local import run

GIVEN = ("rank", "world_size", "device", "comm", "torch", "dist")


@magic_arguments()
@argument("n", type=int, help="how many ranks")
@argument("--timeout", type=float, default=60.0, help="seconds for the whole cell [60]")
@argument("--out", help="also keep the list of the ranks' last values under this name")
def ranks(line: str, cell: str) -> None:
    """Run the cell on N fresh ranks.

    Predefined on each: rank, world_size, device, comm (metered collectives), torch, dist (torch.distributed). Names of the
    notebook that the cell uses are copied to the ranks. The value of a last expression is shown for each rank.
    """
    shell = InteractiveShell.instance()
    options = parse_argstring(ranks, line)
    if options.n < 1:
        raise UsageError(f"%%ranks {options.n}: use 1 or more ranks")
    name = f"<%%ranks cell {shell.execution_count}>"
    tree = ast.parse(cell, name)  # a syntax error is shown here, once, not on every rank
    values = run(_run_cell, ranks=options.n, timeout=options.timeout, args=(cell, name, _used(tree, shell.user_ns)))
    for i, value in enumerate(values):
        if value is not None:
            print(f"[rank {i}] {value!r}")
    if options.out:
        shell.user_ns[options.out] = values


def _used(tree: ast.AST, namespace: dict[str, Any]) -> dict[str, Any]:
    """What of the notebook's names the cell refers to. Raises UsageError for what can't be sent to a rank."""
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    found = {n: namespace[n] for n in names if n in namespace and n not in GIVEN and not hasattr(builtins, n)}
    for name, value in found.items():
        try:
            cloudpickle.dumps(value)
        except Exception as error:
            raise UsageError(
                f"%%ranks: {name} ({type(value).__name__}) can't be copied to the ranks: {error}"
            ) from None
    return found


def _run_cell(comm: Comm, cell: str, name: str, used: dict[str, Any]) -> Any:
    import torch
    import torch.distributed as dist

    linecache.cache[name] = (len(cell), None, cell.splitlines(keepends=True), name)  # so that tracebacks show the lines
    given = (comm.rank, comm.world_size, comm.device, comm, torch, dist)
    scope = {**used, **dict(zip(GIVEN, given, strict=True)), "__name__": "__main__"}
    tree = ast.parse(cell, name)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, name, "exec"), scope)
    return eval(compile(ast.Expression(last.value), name, "eval"), scope) if isinstance(last, ast.Expr) else None


def register(shell: InteractiveShell) -> None:
    """Makes `%%ranks` known to `shell`."""
    shell.register_magic_function(ranks, "cell")
