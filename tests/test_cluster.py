"""Several hosts: torchrun over network namespaces with their own addresses, what crosses between them, and where groups lie."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from torch.distributed.run import get_args_parser

from labkit import LLM, Layout, SamplingParams
from labkit.launch.cluster import Cluster, kubernetes, slurm
from labkit.links import Link, LinkError, Network
from labkit.mesh import ORDERS
from labkit.predict.dryrun import dryrun
from labkit.predict.placement import parted
from labkit.shm import library
from labkit.split import LayoutError

PROMPT, TOKENS = 513, 4


@pytest.fixture(scope="module")
def kernel() -> None:
    try:
        Network(Link(1.0), 1).close()
    except LinkError as error:
        pytest.skip(f"this kernel refuses network namespaces: {error}")


def on_hosts(script: Path, **arguments: Any) -> subprocess.CompletedProcess[str]:
    """Runs a script on emulated hosts; whatever it starts must have ended when this returns."""
    call = "import sys; from labkit.launch.cluster import on_emulated_hosts as run; "
    call += f"sys.exit(run([{str(script)!r}], **{arguments}))"
    done = subprocess.run([sys.executable, "-c", call], capture_output=True, text=True, timeout=200, check=False)
    assert not [p for p in psutil.process_iter() if str(script) in " ".join(_command(p))]
    return done


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


# -- where ranks lie -----------------------------------------------------------------------------------------------------


def test_neighbours_are_tensor_parallel_unless_said_otherwise() -> None:
    layout = Layout(tp=2, pp=3, dp=2)
    assert [layout.place(r)["tp"] for r in range(4)] == [0, 1, 0, 1]
    assert [layout.place(r)["pp"] for r in range(6)] == [0, 0, 1, 1, 2, 2]
    assert [layout.place(r)["dp"] for r in (0, 5, 6)] == [0, 0, 1]
    for order in ORDERS:
        layout = Layout(tp=2, pp=3, dp=2, order=order)
        assert len({tuple(layout.place(r).values()) for r in range(12)}) == 12
        last = order.split("-")[-1]
        assert layout.peers(0, last) == list(range({"tp": 2, "pp": 3, "dp": 2}[last]))
    with pytest.raises(LayoutError, match="rank_order='tp-pp': use dp-pp-tp, dp-tp-pp"):
        Layout(order="tp-pp")


def test_hosts_part_tensor_parallel_groups_only_where_they_must() -> None:
    hosts = ["a", "a", "b", "b"]
    assert parted(Layout(tp=2, pp=2), hosts) == []
    assert parted(Layout(tp=2, pp=2, order="dp-tp-pp"), hosts) == [[0, 2], [1, 3]]
    assert parted(Layout(tp=4), hosts) == [[0, 1, 2, 3]]
    assert parted(Layout(tp=2, dp=2), ["a", "b", "b", "b"]) == [[0, 1]]


def test_a_ring_over_hosts_is_crossed_where_it_leaves_one() -> None:
    layout, hosts = Layout(tp=4), ["a", "a", "b", "b"]
    assert [layout.crosses(rank, "tp", hosts) for rank in range(4)] == [False, True, False, True]
    assert not any(layout.crosses(rank, "pp", hosts) for rank in range(4))


# -- torchrun on two hosts -----------------------------------------------------------------------------------------------

SERVE = f"""
import json, os, sys
from pathlib import Path
from labkit import LLM, SamplingParams
from labkit.measure.bench import hosts

def sent():
    # Bytes that this host has sent, by its network card's counter.
    line = next(line for line in Path("/proc/self/net/dev").read_text().splitlines() if "eth0" in line)
    return int(line.split(":")[1].split()[8])

llm = LLM("smollm2-135m", tensor_parallel_size=2, pipeline_parallel_size=2, dtype="float32", max_model_len=2048)
comm = llm._engine.comm
seen = {{}}
for length in (1, 1, {PROMPT}):  # the first one also makes connections
    comm.barrier()
    before = sent()
    [output] = llm.generate([list(range(100, 100 + length))], SamplingParams(temperature=0.0, max_tokens={TOKENS}))
    comm.barrier()
    counters = comm.gather_objects(sent() - before)
    report = llm.report()
    seen[length] = {{"ids": output.outputs[0].token_ids, "report": report, "counter": counters[0] + counters[2]}}
cores = sorted(os.sched_getaffinity(0))
host = {{"local": os.environ["LOCAL_RANK"], "cores": cores, "gloo": os.environ["GLOO_SOCKET_IFNAME"]}}
everyones = comm.gather_objects(host)
rows = hosts("smollm2-135m", dtype="bfloat16", prompt=8, tokens=4, repeats=1)
if comm.rank == 0:
    print(json.dumps({{"seen": seen, "hosts": everyones, "rows": rows}}))
"""


@pytest.fixture(scope="module")
def served(kernel: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    """What the script above printed, and what came on stderr."""
    script = tmp_path_factory.mktemp("hosts") / "serve_on_hosts.py"
    script.write_text(SERVE)
    done = on_hosts(script, nodes=2, per_node=2)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), done.stderr


@pytest.mark.slow
def test_torchrun_serves_tp_inside_and_pp_across_two_hosts(served: tuple[dict[str, Any], str]) -> None:
    long, hosts = served[0]["seen"][str(PROMPT)], served[0]["hosts"]
    with LLM("smollm2-135m", dtype="float32") as llm:
        [alone] = llm.generate([list(range(100, 100 + PROMPT))], SamplingParams(temperature=0.0, max_tokens=TOKENS))
    assert long["ids"] == alone.outputs[0].token_ids
    ranks = long["report"]["ranks"]
    assert [rank["host"] for rank in ranks] == [0, 0, 1, 1] and long["report"]["hosts"] == 2
    assert [rank["stage"] for rank in ranks] == [0, 0, 1, 1]
    assert all(rank["shared_memory"] == (["tp"] if library() else []) for rank in ranks)
    assert [host["local"] for host in hosts] == ["0", "1", "0", "1"]
    assert {host["gloo"] for host in hosts} == {"eth0"}
    crowded = len(os.sched_getaffinity(0)) < 4
    assert long["report"]["oversubscribed"] == crowded
    assert (hosts[0]["cores"] == hosts[1]["cores"]) == crowded  # else each rank is pinned to its own


@pytest.mark.slow
def test_bytes_between_hosts_are_the_dry_runs_and_the_network_cards(served: tuple[dict[str, Any], str]) -> None:
    short, long = (served[0]["seen"][str(length)] for length in (1, PROMPT))
    dry = dryrun("smollm2-135m", tp=2, pp=2, context=PROMPT + 1, device="cpu", dtype="float32", ranks_per_host=2)
    measured, predicted = (each["between_hosts_bytes_per_token"] for each in (long["report"], dry))
    assert measured == pytest.approx(predicted, rel=1e-12)
    # Of two runs the card's counts differ by the payload, and by what frames TCP's and gloo's headers and answers are in.
    per_token = short["report"]["between_hosts_bytes_per_token"]["prefill"]
    more = PROMPT * measured["prefill"] - per_token
    assert more == pytest.approx((PROMPT - 1) * 2 * 576 * 4)
    assert 0.98 * more <= long["counter"] - short["counter"] <= 1.1 * more


@pytest.mark.slow
def test_groups_across_hosts_cost_what_was_foretold_and_warn(served: tuple[dict[str, Any], str]) -> None:
    """SmolLM2-135M: 30 layers of hidden size 576, two all-reduces each and one of the embedding, in bfloat16."""
    inside, across = served[0]["rows"]
    row, ranks = 576 * 2, 2
    stages = ranks * 2 * row + ranks * 2 * 16  # hidden states forward, those for the head back, two numbers both ways
    assert inside["measured_bytes"] == inside["predicted_bytes"] == stages
    logits = 2 * ranks * 16  # a number and an id of each, on each stage
    assert across["measured_bytes"] == across["predicted_bytes"] == ranks * row * 61 + logits
    assert across["same_tokens"] and inside["link"] is None
    assert [rank["shared_memory"] for rank in across["ranks"]] == [["pp"] if library() else []] * 4
    said = "ranks [0, 2] are on 2 hosts: each decoded token waits 62 times for an exchange of some 1,152 bytes between them"
    assert served[1].count("SplitGroupWarning") == 1
    assert said in served[1] and f"sends {across['measured_bytes']:,.0f} bytes from host to host" in served[1]


@pytest.mark.usefixtures("kernel")
def test_a_program_that_fails_on_one_host_ends_on_all(tmp_path: Path) -> None:
    script = tmp_path / "fails_on_hosts.py"
    script.write_text(
        "import os, time\nif os.environ['RANK'] == '1':\n    raise ValueError('the one cause')\ntime.sleep(100)\n"
    )
    done = on_hosts(script, nodes=2, per_node=1)
    assert done.returncode != 0 and "the one cause" in done.stderr


@pytest.mark.usefixtures("kernel")
def test_the_command_runs_another_on_hosts() -> None:
    done = labkit("launch", "hosts", "--nodes", "1", "--per-node", "2", "--", "plan", "--gpus", "0")
    assert done.returncode == 1 and "labkit: gpus=0: use 1 or more" in done.stderr


# -- files for Slurm and Kubernetes --------------------------------------------------------------------------------------

# Options that sbatch documents, of those that are used, and what they take.
SBATCH = {
    "job-name": r"[\w-]+", "nodes": r"[1-9]\d*", "ntasks-per-node": "1", "gpus-per-node": r"[1-9]\d*",
    "cpus-per-task": r"[1-9]\d*", "time": r"(\d+-)?\d+:\d\d:\d\d", "output": r"[\w%.-]+",
}  # fmt: skip
PROMPT_TO_QUOTE = 'What\'s $HOME? "a" $(b) `c` \\ é'


def batch_file(*arguments: str, nodes: int, gpus: int = 0, cpus: int = 0, **options: str) -> str:
    return slurm(["generate", PROMPT_TO_QUOTE, *arguments], Cluster(nodes, gpus, cpus), **options)


@pytest.mark.parametrize(("nodes", "gpus", "cpus"), [(2, 8, 0), (4, 1, 16), (1, 0, 2)])
def test_a_batch_file_has_options_that_slurm_knows_before_valid_bash(nodes: int, gpus: int, cpus: int) -> None:
    text = batch_file(f"--tp={gpus or cpus}", "--pp", str(nodes), nodes=nodes, gpus=gpus, cpus=cpus)
    lines = text.splitlines()
    assert lines[0] == "#!/bin/bash"
    code = next(i for i, line in enumerate(lines) if line and not line.startswith("#"))
    given = dict(line.removeprefix("#SBATCH --").split("=", 1) for line in lines if line.startswith("#SBATCH"))
    assert all(re.fullmatch(SBATCH[option], value) for option, value in given.items())
    assert sum(line.startswith("#SBATCH") for line in lines[:code]) == len(given)  # sbatch stops reading at a command
    assert given["nodes"] == str(nodes) and given.get("gpus-per-node") == (str(gpus) if gpus else None)
    assert given.get("cpus-per-task") == (str(cpus) if cpus else None)
    subprocess.run(["bash", "-n"], input=text, text=True, check=True)


def test_a_batch_file_runs_torchrun_where_srun_would(tmp_path: Path) -> None:
    """Two commands of Slurm's stand in: one names this machine, the other runs what it is given on one node."""
    for name, line in {
        "scontrol": "echo localhost; echo elsewhere",
        "srun": 'while [[ $1 == --* ]]; do shift; done; "$@"',
    }.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{line}\n")
        (tmp_path / name).chmod(0o755)
    text = batch_file(
        "--tp", "2", "--dtype", "float32", "--max-tokens", "3", "--json", nodes=1, cpus=2, python=sys.executable
    )
    environ = os.environ | {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "4711",
        "SLURM_JOB_NODELIST": "n[1-2]",
    }
    done = subprocess.run(["bash"], input=text, capture_output=True, text=True, env=environ, timeout=150, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    with LLM("smollm2-135m", dtype="float32") as llm:
        [alone] = llm.generate([PROMPT_TO_QUOTE], SamplingParams(temperature=0.0, max_tokens=3))
    assert result["token_ids"] == alone.outputs[0].token_ids and result["layout"]["tp"] == 2


def keys(value: Any, known: Any, where: str = "") -> None:
    """Checks that a document has the fields that `known` requires (those that start with *) and no others."""
    if isinstance(known, list):
        assert isinstance(value, list) and value, where
        for each in value:
            keys(each, known[0], where)
    elif isinstance(known, dict):
        fields = {name.lstrip("*"): kind for name, kind in known.items()}
        assert {name[1:] for name in known if name.startswith("*")} <= value.keys() <= fields.keys(), where
        for name, each in value.items():
            keys(each, fields[name], f"{where}.{name}")
    elif isinstance(known, str):
        assert re.fullmatch(known, str(value)), (where, value)
    else:
        assert isinstance(value, known), (where, value)


NAME = "[a-z]([a-z0-9-]*[a-z0-9])?"
LABELS = {"*batch.kubernetes.io/job-name": NAME}
SERVICE = {
    "*apiVersion": "v1", "*kind": "Service", "*metadata": {"*name": NAME},
    "*spec": {"*clusterIP": "None", "publishNotReadyAddresses": bool, "*selector": LABELS},
}  # fmt: skip
CONTAINER = {
    "*name": NAME, "*image": r"\S+", "command": [str], "resources": {"limits": {"nvidia.com/gpu": int, "cpu": int}},
    "volumeMounts": [{"*name": NAME, "*mountPath": "/.+"}],
}  # fmt: skip
TERM = {"*topologyKey": "kubernetes.io/hostname", "labelSelector": {"matchLabels": LABELS}}
POD = {
    "subdomain": NAME, "*restartPolicy": "Never|OnFailure", "*containers": [CONTAINER],
    "affinity": {"podAntiAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": [TERM]}},
    "volumes": [{"*name": NAME, "*emptyDir": {"medium": "Memory"}}],
}  # fmt: skip
JOB = {
    "*apiVersion": "batch/v1", "*kind": "Job", "*metadata": {"*name": NAME},
    "*spec": {
        "completionMode": "Indexed", "*completions": int, "*parallelism": int, "backoffLimit": int, "*template": {"*spec": POD},
    },
}  # fmt: skip


def test_kubernetes_gets_a_job_whose_pods_find_each_other() -> None:
    command = ["generate", PROMPT_TO_QUOTE, "--tp", "8", "--pp", "2"]
    text = kubernetes(command, Cluster(2, gpus=8, cpus=32, name="tide-2"), image="example.org/labkit:1")
    service, job = yaml.safe_load_all(text)
    keys(service, SERVICE)
    keys(job, JOB)
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    [container] = pod["containers"]
    assert spec["completions"] == spec["parallelism"] == 2
    assert container["resources"]["limits"] == {"nvidia.com/gpu": 8, "cpu": 32}
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    # An indexed Job's pods are called NAME-0, NAME-1, ..., and their subdomain is that of a headless service of this name.
    assert pod["subdomain"] == service["metadata"]["name"]
    assert service["spec"]["selector"]["batch.kubernetes.io/job-name"] == job["metadata"]["name"] == "tide-2"
    python, module, program, *arguments = container["command"]
    assert (python, module, program) == ("python", "-m", "torch.distributed.run")
    asked = get_args_parser().parse_args(arguments)
    assert (asked.nnodes, asked.nproc_per_node, asked.rdzv_backend) == ("2", "8", "c10d")
    assert asked.rdzv_endpoint == f"tide-2-0.{pod['subdomain']}:29400"
    assert asked.module and asked.training_script == "labkit"
    assert asked.training_script_args == [word.replace("$(b)", "$$(b)") for word in command]


def test_the_command_line_prints_the_files_and_refuses_what_would_not_start() -> None:
    done = labkit("launch", "slurm", "--gpus-per-node", "8", "--", "generate", "The tide", "--tp", "8", "--pp=2")
    assert done.returncode == 0 and "-m labkit generate 'The tide' --tp 8 --pp=2\n" in done.stdout
    done = labkit(
        "launch", "kubernetes", "--cpus-per-node", "4", "--image", "x", "--", "generate", "The tide", "--tp", "4"
    )
    assert done.returncode == 2 and "tp=4 x pp=1 x dp=1 needs 4 ranks; 2 x 4 would start" in done.stderr
    with pytest.raises(ValueError, match="nodes=2, gpus=0, cpus=0: use 1 node or more, and GPUs or CPUs on each"):
        Cluster(2)
    with pytest.raises(ValueError, match="name='The job': use up to 40 lower-case letters"):
        Cluster(2, gpus=1, name="The job")


def test_what_cannot_be_launched_or_compared_is_refused() -> None:
    done = labkit("bench", "hosts", "--tp", "1")
    assert done.returncode == 2 and "tp=1, pp=2: use 2 or more" in done.stderr
    done = labkit("launch", "hosts", "--nodes", "0", "--", "doctor")
    assert done.returncode == 2 and "nodes=0, per_node=2: use 1 or more" in done.stderr


def labkit(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "labkit", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
