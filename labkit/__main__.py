"""`python -m labkit`, and `torchrun --nproc-per-node N -m labkit generate ...`."""

from labkit.cli import main

main()
