"""`labkit launch ...`: several machines."""

import sys
from typing import Annotated

import typer

launch = typer.Typer(
    help="Several machines: rehearse on emulated ones, or print what starts real ones.", no_args_is_help=True
)

LaunchedCommand = Annotated[list[str], typer.Argument(help="a command of labkit and its options, after --")]
Nodes = Annotated[int, typer.Option(help="how many machines")]
GpusPerNode = Annotated[int, typer.Option(help="GPUs of each, with a rank each")]
CpusPerNode = Annotated[int, typer.Option(help="CPUs of each, with a rank each where there are no GPUs")]
JobName = Annotated[str, typer.Option("--name", help="of the job")]


@launch.command("hosts")
def launch_hosts(
    command: LaunchedCommand,
    nodes: Nodes = 2,
    per_node: Annotated[int, typer.Option(help="ranks on each host")] = 2,
    link: Annotated[str, typer.Option(help="rate of each host's link, as 1gbit")] = "10gbit",
) -> None:
    """Run a command of labkit on hosts emulated on this machine, as it would run on real ones.

    labkit launch hosts --nodes 2 --per-node 2 --link 1gbit -- generate "The tide" --tp 2 --pp 2
    """
    from labkit.launch.cluster import on_emulated_hosts

    raise typer.Exit(min(1, on_emulated_hosts(["-m", "labkit", *command], nodes=nodes, per_node=per_node, link=link)))


@launch.command("slurm")
def launch_slurm(
    command: LaunchedCommand,
    nodes: Nodes = 2,
    gpus_per_node: GpusPerNode = 0,
    cpus_per_node: CpusPerNode = 0,
    name: JobName = "labkit",
    time: Annotated[str, typer.Option(help="at most, as hours:minutes:seconds")] = "01:00:00",
    python: Annotated[str, typer.Option(help="the interpreter on the nodes")] = sys.executable,
) -> None:
    """Print a batch file that runs a command of labkit over several nodes, for sbatch.

    labkit launch slurm --nodes 2 --gpus-per-node 8 -- generate "The tide" --tp 8 --pp 2 > job.sh && sbatch job.sh
    """
    from labkit.launch.cluster import Cluster, slurm

    cluster = Cluster(nodes, gpus_per_node, cpus_per_node, name)
    print(slurm(command, cluster, time=time, python=python), end="")


@launch.command("kubernetes")
def launch_kubernetes(
    command: LaunchedCommand,
    image: Annotated[str, typer.Option(help="container image with labkit installed")],
    nodes: Nodes = 2,
    gpus_per_node: GpusPerNode = 0,
    cpus_per_node: CpusPerNode = 0,
    name: JobName = "labkit",
    python: Annotated[str, typer.Option(help="the interpreter in the image")] = "python",
) -> None:
    """Print an indexed Job that runs a command of labkit over several nodes, for kubectl apply.

    labkit launch kubernetes --nodes 2 --gpus-per-node 8 --image IMAGE -- generate "The tide" --tp 8 --pp 2 | kubectl apply -f -
    """
    from labkit.launch.cluster import Cluster, kubernetes

    cluster = Cluster(nodes, gpus_per_node, cpus_per_node, name)
    print(kubernetes(command, cluster, image=image, python=python), end="")
