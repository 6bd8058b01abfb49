"""Folders of the Hugging Face hub, fetched or on this disk, as folders of ours.

Owns: which of their files are taken, and the checks before they are. Knows nothing of other formats.

The weights are copied as they are. What would run code is not fetched: no Python files, and no pickles.
"""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from stateofgpt.errors import CheckpointError
from stateofgpt.interchange.imported import Origin, model_card, publish
from stateofgpt.model import folder
from stateofgpt.model.convert import from_huggingface

PATTERNS = ("*.json", "*.safetensors", "chat_template.jinja")
PAGES = "https://huggingface.co"
_OPTIONAL = ("generation_config.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
_MAX_TOKENIZER_BYTES = 64 << 20


def fetch(repository: str, into: Path, say: Callable[[str], None]) -> tuple[Path, Origin]:
    """Download `OWNER/NAME` or `OWNER/NAME@REVISION` into a folder; CheckpointError when it is not to be had."""
    name, _, revision = repository.partition("@")
    if not re.fullmatch(r"[\w][\w.\-]*/[\w][\w.\-]*", name):
        raise CheckpointError(
            f'"hf:{repository}" is no repository of the hub; write hf:OWNER/NAME or hf:OWNER/NAME@REVISION'
        )
    say(f"fetching {repository} from the Hugging Face hub")
    try:
        from huggingface_hub import snapshot_download

        here = snapshot_download(
            repo_id=name, revision=revision or None, allow_patterns=list(PATTERNS), local_dir=str(into)
        )
    except Exception as error:  # its errors are of many kinds, most of them of the network
        why = " ".join(str(error).split())[:160] or type(error).__name__
        raise CheckpointError(
            f"cannot fetch {name} from the hub: {why}; fetch its folder elsewhere and give its path"
        ) from error
    source = f"{PAGES}/{name}" + (f" at revision {revision}" if revision else "")
    return Path(here), Origin(name.partition("/")[2], source)


def publish_folder(source: Path, out: Path, origin: Origin) -> None:
    """Make `out` a checked copy of the model folder `source`; CheckpointError says what is wrong with it."""
    if (source / folder.MANIFEST).exists():
        raise CheckpointError(f"{source} is a checkpoint of this program already; use it where it is")
    raw = folder.read_json_file(source / "config.json")
    described = from_huggingface(raw, str(source / "config.json"))
    if described.kind != "causal":
        raise CheckpointError(f"{source} is a reward model; a language model can be imported")
    weights = sorted(source.glob("*.safetensors"))
    if not weights:
        raise CheckpointError(f"{source} has no safetensors file, and other weights are not read")
    n_params = sum(math.prod(info.shape) for file in weights for info in folder.read_header(file).values())
    words = source / "tokenizer.json"
    if not words.is_file() or words.stat().st_size > _MAX_TOKENIZER_BYTES:
        raise CheckpointError(f"{source} has no tokenizer.json of at most {_MAX_TOKENIZER_BYTES:,} bytes")
    index = [file for file in (source / "model.safetensors.index.json",) if file.is_file()]
    small = [file for file in (source / name for name in _OPTIONAL) if file.is_file()]
    for file in small:
        if file.stat().st_size > folder.MAX_JSON_BYTES:
            raise CheckpointError(f"{file} has more than the {folder.MAX_JSON_BYTES:,} bytes such a file may have")
    template = _template(source)
    card = model_card(origin, raw["architectures"][0], described.config, n_params)
    taken = [source / "config.json", words, *index, *small, *weights]

    def fill(work: Path) -> None:
        for file in taken:
            shutil.copyfile(file, work / file.name)
        if template is not None:
            (work / "chat_template.jinja").write_text(template, encoding="utf-8")
        (work / "README.md").write_text(card, encoding="utf-8")

    publish(out, origin.name, fill, sum(file.stat().st_size for file in taken) + (1 << 20))


def _template(source: Path) -> str | None:
    """The chat template that older folders keep in tokenizer_config.json, when there is no file of its own."""
    settings = source / "tokenizer_config.json"
    if (source / "chat_template.jinja").is_file() or not settings.is_file():
        return None
    template = folder.read_json_file(settings).get("chat_template")
    return template if isinstance(template, str) else None
