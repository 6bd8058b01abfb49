"""What a checkpoint's folder says about text: tokenizer files, chat template, and the ids at which a text ends.

Owns: which of these a checkpoint has, and in what a foreign tokenizer's differ from ours (they stay byte for byte as
they came, and what they lacked is added). Knows nothing of weights, nor of the other files of the folder.
"""

from __future__ import annotations

import json
from pathlib import Path

from stateofgpt.run import write_atomic, write_json
from stateofgpt.text.chat import CHAT_TEMPLATE, ChatFormat
from stateofgpt.text.tokenizer import TEMPLATE, Tokenizer

GENERATION = "generation_config.json"


class TextFiles:
    """The text side of one checkpoint. `base`: a model that continues texts and was taught no chat."""

    def __init__(self, tokenizer: Tokenizer, *, base: bool) -> None:
        self.tokenizer = tokenizer
        self._chat = None if base or tokenizer.own else ChatFormat(tokenizer)
        names = {name: number for number, name in tokenizer.specials.items()}
        self.bos: int = names.get(tokenizer.variables.get("bos_token", ""), tokenizer.eot)
        if tokenizer.own:
            self.eos: tuple[int, ...] = (tokenizer.eot,) if base else tokenizer.stops
        else:
            self.eos = self._chat.stops if self._chat else tokenizer.stops

    def write(self, folder: Path, *, generates: bool) -> None:
        """Write the files; `generates`: the model writes text, and so has settings for that."""
        self.tokenizer.save(folder)
        if self.tokenizer.own:
            write_atomic(folder / TEMPLATE, CHAT_TEMPLATE)
        elif self._chat is not None and self.tokenizer.template is None:
            write_atomic(folder / TEMPLATE, self._chat.template)
        if not generates:
            (folder / GENERATION).unlink(missing_ok=True)
            return
        settings = json.loads(self.tokenizer.files.get(GENERATION, b"{}"))
        eos = settings.get("eos_token_id")
        if self.eos[0] in (eos if isinstance(eos, list) else [eos]):
            return  # as it came
        ids = {"bos_token_id": self.bos, "eos_token_id": self._as_one(), "pad_token_id": self.tokenizer.pad}
        write_json(folder / GENERATION, {**settings, **ids} if settings else {**ids, "do_sample": True})

    def _as_one(self) -> list[int] | int:
        return list(self.eos) if len(self.eos) > 1 or self.tokenizer.own else self.eos[0]
