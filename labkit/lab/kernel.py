"""The notebook kernel that lessons and grading run in: always this interpreter's."""

from typing import Any

import zmq
from ipykernel.kernelspec import get_kernel_dict
from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import AsyncKernelManager


class OwnKernel(AsyncKernelManager):
    """A kernel of the running interpreter, whatever kernels are installed, on PATH, or named in the notebook."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.transport_encryption = "auto" if zmq.has("curve") else "disabled"

    @property
    def kernel_spec(self) -> KernelSpec:
        return KernelSpec(**get_kernel_dict(), env={"LABKIT_PROGRESS": "off"})  # it is nobody's work that is noted
