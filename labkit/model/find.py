"""From the name of a model to its config and weights: an alias, a folder, a GGUF file, `random:NAME`, a Hub id."""

from dataclasses import dataclass
from pathlib import Path

from labkit.model.checkpoint import Checkpoint, RandomWeights, Weights
from labkit.model.config import ModelConfig
from labkit.model.errors import ModelError
from labkit.model.gguf_import import DEFAULT_SHA256, default_gguf, import_gguf
from labkit.model.shapes import SHAPES

DEFAULT = "smollm2-135m"
TINY_MOE = Path(__file__).parent / "tiny-moe"


@dataclass(frozen=True)
class Model:
    """A model that was found: its config, and its folder, or None where the weights are to be random."""

    name: str
    config: ModelConfig
    folder: Path | None

    def weights(self, seed: int) -> Weights:
        """Opens the weights; `seed` makes the random ones."""
        return Checkpoint(self.folder) if self.folder else RandomWeights(seed)


def find(name: str) -> Model:
    """Finds `name`; a GGUF is converted to a cached folder, a Hub id is downloaded. Raises ModelError."""
    if name.startswith("random:"):
        return Model(name, _shape(name.removeprefix("random:")), None)
    if name == DEFAULT:
        folder = import_gguf(default_gguf(), sha256=DEFAULT_SHA256)
    elif name == TINY_MOE.name:
        folder = TINY_MOE
    elif name.endswith(".gguf"):
        folder = import_gguf(Path(name))
    elif Path(name).is_dir():
        folder = Path(name)
    else:
        folder = _download(name)
    return Model(name, ModelConfig.read(folder), folder)


def _shape(name: str) -> ModelConfig:
    if name in SHAPES:
        return ModelConfig.from_dict(SHAPES[name], where=f"shape {name}")
    if Path(name).exists():
        return ModelConfig.read(Path(name))
    raise ModelError(f"random:{name}: neither a config.json nor a known shape; known are {', '.join(SHAPES)}")


def _download(name: str) -> Path:
    if name.count("/") != 1 or name.startswith(("/", ".")):
        raise ModelError(
            f"no model {name!r}: use {DEFAULT!r}, 'tiny-moe', a folder with config.json and safetensors, a .gguf file, "
            "random:NAME, or a Hub id like owner/name"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt"]))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ModelError(f"{name!r} is no local folder, and fetching it from the Hub failed: {error}") from error
