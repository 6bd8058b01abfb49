"""The weights of a model folder: which files they are in, whether they are the model's, and reading them into it.

Owns all checks between a header and a filled model. Knows nothing of configs, manifests or saving.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from stateofgpt.errors import CheckpointError
from stateofgpt.model import folder, layout
from stateofgpt.model.folder import TensorInfo
from stateofgpt.model.gpt import GPTConfig

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".distcp")
_FLOATS = ("F32", "F16", "BF16")

M = TypeVar("M", bound=nn.Module)
Shards = dict[Path, dict[str, TensorInfo]]


def open_shards(path: Path) -> Shards:
    """The checked headers of all weight files of the folder `path`, without reading a weight."""
    return {file: folder.read_header(file) for file in _weight_files(path)}


def _weight_files(path: Path) -> list[Path]:
    if (path / WEIGHTS).is_file():
        return [path / WEIGHTS]
    if (path / INDEX).is_file():
        placed = folder.read_json_file(path / INDEX).get("weight_map")
        names = sorted({str(v) for v in placed.values()}) if isinstance(placed, dict) else []
        for name in names:
            if Path(name).name != name or not name.endswith(".safetensors") or not (path / name).is_file():
                raise CheckpointError(f"{path / INDEX} names {name[:80]!r}, which is no safetensors file of the folder")
        if names:
            return [path / name for name in names]
        raise CheckpointError(f"{path / INDEX} names no files")
    for file in sorted(path.iterdir()):
        if file.suffix in _PICKLED:
            raise CheckpointError(
                f"{file} is a pickle, which can run code when it is read, so it is not; convert it to model.safetensors"
            )
    raise CheckpointError(f"{path} has no {WEIGHTS}")


def load(path: Path, config: GPTConfig, shards: Shards, make: Callable[[], M]) -> M:
    """The model that `make` makes, with the weights of `shards`; CheckpointError where they are not its weights."""
    with torch.device("meta"):
        expected = layout.to_file(config, layout.own_tensors(make(), config))
    _match(path, config, expected, shards)
    with torch.random.fork_rng(devices=[]):  # loading must not move the random state of a run that resumes
        model = make()
    _fill(path, model, config, shards)
    return model


def _match(path: Path, config: GPTConfig, expected: Mapping[str, Tensor], shards: Shards) -> None:
    """The files hold exactly the model's tensors, by name, shape and type."""
    found: dict[str, TensorInfo] = {}
    for file, header in shards.items():
        for theirs, info in header.items():
            name = layout.known_as(theirs, expected, config)
            if name in found:
                raise CheckpointError(f"{file} holds tensor {name} a second time")
            if name is not None:
                found[name] = info
    twin = layout.tied_embedding(config, expected)
    if twin is not None and layout.HEAD in found:
        expected = {**expected, layout.HEAD: expected[twin]}
    _refuse_names(path, "lacks", expected.keys() - found.keys())
    _refuse_names(path, "holds unknown", found.keys() - expected.keys())
    for name, info in found.items():
        if info.shape != tuple(expected[name].shape):
            raise CheckpointError(
                f"{path}: tensor {name} has shape {list(info.shape)}, config.json asks for {list(expected[name].shape)}"
            )
        if info.dtype not in _FLOATS:
            raise CheckpointError(f"{path}: tensor {name} has type {info.dtype}, readable are {', '.join(_FLOATS)}")


def _refuse_names(path: Path, verb: str, names: Iterable[str]) -> None:
    listed = sorted(names)
    if listed:
        more = f" and {len(listed) - 3} more" if len(listed) > 3 else ""
        raise CheckpointError(f"{path} {verb} tensors: {', '.join(n[:80] for n in listed[:3])}{more}")


@torch.no_grad()
def _fill(path: Path, model: nn.Module, config: GPTConfig, shards: Shards) -> None:
    """Copy tensor by tensor, so that the peak is one model and one tensor, or two where a tied head is stored too."""
    own = layout.own_tensors(model, config)
    places = layout.places(config, own)
    head: Tensor | None = None
    for file in shards:
        for theirs, tensor in folder.each_tensor(file):
            name = layout.known_as(theirs, places, config)
            if name is None:
                continue
            if folder.non_finite({name: tensor}):
                raise CheckpointError(f"{file}: tensor {name} holds NaN or infinite values")
            if name in places:
                places[name].fill(own, tensor)
            else:
                head = tensor
    if head is not None and not torch.equal(head.to(torch.float32), own[layout.EMBEDDING]):
        raise CheckpointError(
            f"{path}: {layout.HEAD} is not the embedding, though config.json says tie_word_embeddings = true; set it "
            "to false if the head is a matrix of its own"
        )
