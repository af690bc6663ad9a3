"""What is written in C: `shm.c`, collectives through shared memory, and `kernels.c`, the operations of a decode step
and some of a prompt's.

Both are compiled when labkit is installed, where there is GCC, and called through ctypes, which releases Python's lock. What
could not be compiled, or does not suit the processor, is absent, and labkit does without it.
"""

import ctypes
import importlib.util
from functools import cache

Signatures = dict[str, tuple[object, tuple[object, ...]]]  # of each function: what it returns, and its arguments


@cache
def load(name: str) -> ctypes.CDLL | None:
    """The compiled part `name`, or None where there is none."""
    spec = importlib.util.find_spec(f"labkit.native.{name}")
    if spec is None or spec.origin is None:
        return None
    try:
        return ctypes.CDLL(spec.origin)
    except OSError:  # compiled against another OpenMP than the one that PyTorch has brought along
        return None


def declare(library: ctypes.CDLL, signatures: Signatures) -> ctypes.CDLL:
    """`library` with the types of its functions `labkit_...` known."""
    for name, (result, arguments) in signatures.items():
        function = getattr(library, f"labkit_{name}")
        function.restype, function.argtypes = result, arguments
    return library
