"""The Model Parallelism Lab: one large language model, served from several devices, measured."""

from typing import Any

__version__ = "0.1.0"
_WHERE = {
    "AsyncLLM": "labkit.engine.async_llm",
    "LLM": "labkit.engine.llm",
    "SamplingParams": "labkit.engine.requests",
    "Layout": "labkit.mesh",
    "run": "labkit.launch.local",
    "check": "labkit.lab.check",
    "predict_then": "labkit.lab.predict_then",
    "progress": "labkit.lab.progress",
}
__all__ = [
    "LLM",
    "AsyncLLM",
    "Layout",
    "SamplingParams",
    "check",
    "load_ipython_extension",
    "predict_then",
    "progress",
    "run",
]


def __getattr__(name: str) -> Any:
    """Imports what is asked for when it is asked for: a rank needs no notebook, `labkit --help` needs no torch."""
    if name not in _WHERE:
        raise AttributeError(f"module 'labkit' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_WHERE[name]), name)


def load_ipython_extension(ipython: Any) -> None:
    """`%load_ext labkit`: the `%%ranks` cell magic, and the server that ranks are forked from, which gets ready meanwhile."""
    from labkit.launch import prepare

    prepare()
    from labkit.lab.magics import register

    register(ipython)
