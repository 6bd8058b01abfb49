"""Folders of models made elsewhere, made up for tests: tokenizers of both kinds, several templates, random weights."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from stateofgpt.text.tokenizer import split_pattern

TEXTS = (
    "The quick brown fox jumps over the lazy dog. It's what we'll say, and they've said it.\n\n",
    "def add(a, b):\n    return a + b\n\nprint(add(4729, 386))\n",
    "Grüße aus Köln: 12345 Äpfel, naïve café, 你好, 世界, 😀\n",
    "user\nassistant\nsystem\nWhat is the capital of France? Paris. You are a helpful assistant.\n",
)

# As SmolLM2's: any role, and a system message of its own where there is none.
CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# As TinyLlama's: roles by name, the end token behind each message.
ZEPHYR = (
    "{% for message in messages %}\n{% if message['role'] == 'user' %}\n"
    "{{ '<|user|>\n' + message['content'] + eos_token }}\n{% elif message['role'] == 'system' %}\n"
    "{{ '<|system|>\n' + message['content'] + eos_token }}\n{% elif message['role'] == 'assistant' %}\n"
    "{{ '<|assistant|>\n'  + message['content'] + eos_token }}\n{% endif %}\n"
    "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}"
)
# As Llama 2's: no system messages, no tools, roles that must alternate, contents stripped, spaces around them.
INST = (
    "{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + message['content'].strip() + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'].strip() + ' ' + eos_token }}{% endif %}"
    "{% endfor %}"
)
# As Qwen3's: tools are known, and an answer's thoughts are left out once it is past.
THINKING = (
    "{%- for message in messages -%}"
    "{%- if message.role == 'assistant' -%}{{- '<|im_start|>assistant\n' -}}"
    "{%- if loop.last -%}{{- '<think>\n\n</think>\n\n' -}}{%- endif -%}{{- message.content + '<|im_end|>\n' -}}"
    "{%- elif message.role == 'tool' -%}"
    "{{- '<|im_start|>user\n<tool_response>\n' + message.content + '\n</tool_response><|im_end|>\n' -}}"
    "{%- else -%}{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' -}}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"
    "{# calls would be '<tool_call>\\n' and so on #}"
)


def special(name: str) -> AddedToken:
    return AddedToken(name, special=True, normalized=False)


@cache
def byte_level(*names: str, vocab_size: int = 400, prefix_space: bool = False, modern: bool = False) -> str:
    """A tokenizer.json as GPT-2's: byte-level, the specials first; `modern`: with GPT-4's pattern."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
    if modern:
        split = pre_tokenizers.Split(Regex(split_pattern(3)), behavior="isolated")
        backend.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[special(name) for name in names],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([text for text in TEXTS for _ in range(30)], trainer)
    return backend.to_str()


@cache
def sentencepiece(*names: str, vocab_size: int = 150, metaspace: str = "") -> str:
    """A tokenizer.json as Llama 2's: a space is "▁", other characters fall back to bytes, and merges were made up from
    the vocabulary, so that some of them lead to the specials. `metaspace`: the prepend_scheme of the newer way."""
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.Metaspace()
    learner.train_from_iterator(
        [text for text in TEXTS for _ in range(30)], trainers.BpeTrainer(vocab_size=vocab_size, show_progress=False)
    )
    learned = json.loads(learner.to_str())["model"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokens += [token for token in learned["vocab"] if token != "\n"]
    tokens += [token for token in ("<", "/", "s", ">", "</", "s>", "<s") if token not in tokens]
    merges = [tuple(merge) for merge in learned["merges"] if "\n" not in "".join(merge)]
    merges += [("<", "/"), ("s", ">"), ("</", "s>"), ("<", "s>"), ("<", "s"), ("<s", ">")]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    backend = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if metaspace:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=metaspace, split=False)
    else:
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens([special(name) for name in ("<unk>", "<s>", "</s>", *names)])
    return backend.to_str()


def write(folder: Path, definition: str, template: str | None = None, **settings: Any) -> Path:
    """A folder with this tokenizer; `settings` go to tokenizer_config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(definition, encoding="utf-8")
    known = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **settings}
    if template is not None:
        known["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(known, indent=1), encoding="utf-8")
    return folder


SMOL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<repo_name>", "<empty_output>")


def smol(folder: Path, template: str | None = CHATML) -> Path:
    """As SmolLM2-Instruct: byte-level, ChatML, bos and pad taken from the marks of turns, no marks for tools."""
    definition = byte_level(*SMOL)
    return write(
        folder, definition, template, bos_token=SMOL[1], eos_token=SMOL[2], pad_token=SMOL[2], unk_token=SMOL[0]
    )


def llama(folder: Path, template: str | None = ZEPHYR, metaspace: str = "") -> Path:
    """As TinyLlama or Llama 2: SentencePiece's kind, <s> and </s>."""
    definition = sentencepiece(metaspace=metaspace)
    return write(folder, definition, template, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>")


def add_model(folder: Path, vocab_size: int, *, context: int = 512, width: int = 32, seed: int = 0) -> Path:
    """Weights of a tiny Llama beside the tokenizer, written by transformers."""
    import transformers

    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=context,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder
