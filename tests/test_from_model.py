"""From a model made elsewhere, with its own tokenizer and template, through every stage, kills included."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import made_elsewhere as foreign
import pytest
import torch
from command import TRAINED, one_sentence, records, result, sog, weights

from stateofgpt.cli import main
from stateofgpt.config import to_dict
from stateofgpt.errors import CheckpointError, ConfigError, RunError
from stateofgpt.infer.engine import Engine
from stateofgpt.model.checkpoint import load_model, read_lineage, save_checkpoint, verify
from stateofgpt.model.folder import read_header
from stateofgpt.recipes import load
from stateofgpt.run import STAGES, Run
from stateofgpt.stages import parent
from stateofgpt.text.chat import ChatFormat, Message, message_to_json
from stateofgpt.text.tokenizer import Tokenizer

pytest.importorskip("transformers")

SMALL = {
    "pretrain.steps": 8,
    "pretrain.context": 64,
    "pretrain.sample_tokens": 8,
    "sft.steps": 6,
    "reward.n_prompts": 24,
    "reward.held_out_prompts": 8,
    "reward.max_tokens": 24,
    "rl.batch": 8,
    "rl.held_out_prompts": 8,
    "rl.max_tokens": 24,
    "eval.key": 4,
    "eval.max_tokens": 24,
    "arena.prompts": 8,
    "arena.max_tokens": 24,
    "pretrain.loop.save_every_s": 0,
    "sft.loop.save_every_s": 0,
    "reward.training.loop.save_every_s": 0,
    "rl.save_every_s": 0,
}
TALK = (Message("user", "What is 1 + 1?"), Message("assistant", "2."), Message("user", "And 2 + 2?"))


def smol(folder: Path) -> Path:
    return foreign.add_model(foreign.smol(folder), 400)


def llama(folder: Path) -> Path:
    return foreign.add_model(foreign.llama(folder, foreign.INST), 416)


def command(run: Path, model: Path, corpus: Path) -> list[object]:
    settings = [f"--{setting}={value}" for setting, value in SMALL.items()]
    return ["run", "debug", "--from", model, "--corpus", corpus, "--out", run, *settings]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "mine.txt"
    path.write_text("\n\n".join(f"Note {i}: the lamp is {i * 7 % 100} paces from the door." for i in range(600)))
    return path


@pytest.fixture(scope="module", params=[smol, llama], ids=["smol", "llama"])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> tuple[Path, Path]:
    """A foreign model's folder, and the finished run that began from it."""
    root = tmp_path_factory.mktemp("from")
    model = request.param(root / "theirs")
    done = sog(*command(root / "run", model, corpus))
    assert done.returncode == 0, done.stderr
    return model, root / "run"


@pytest.mark.slow
def test_every_checkpoint_keeps_the_tokenizer_byte_for_byte_and_loads_in_transformers(made: tuple[Path, Path]) -> None:
    import transformers

    model, run = made
    theirs = transformers.AutoTokenizer.from_pretrained(str(model))
    for stage in TRAINED:
        folder = run / stage / "checkpoint"
        verify(folder)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            assert (folder / name).read_bytes() == (model / name).read_bytes()
        tokenizer = transformers.AutoTokenizer.from_pretrained(str(folder))
        messages = [message_to_json(message) for message in TALK]
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert ids == theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert ids == ChatFormat(Tokenizer.load(folder)).render(TALK, add_generation_prompt=True).ids
    for stage in ("pretrain", "sft", "rl"):
        folder = run / stage / "checkpoint"
        network = transformers.AutoModelForCausalLM.from_pretrained(str(folder))
        (ours,) = Engine(load_model(folder)).score([ids])
        with torch.no_grad():
            logprobs = torch.log_softmax(network(torch.tensor([ids])).logits[0, :-1], -1)
        expected = logprobs.gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
        assert torch.allclose(torch.tensor(ours), expected, atol=1e-4)
        ends = network.generation_config.eos_token_id
        assert ChatFormat(Tokenizer.load(folder)).end in (ends if isinstance(ends, list) else [ends])
    reward = transformers.AutoModelForSequenceClassification.from_pretrained(str(run / "reward" / "checkpoint"))
    assert reward.config.num_labels == 1 and reward.config.pad_token_id == Tokenizer.load(model).pad


@pytest.mark.slow
def test_the_weights_are_the_models_moved_a_little_and_the_lineage_says_so(made: tuple[Path, Path]) -> None:
    model, run = made
    theirs, base = read_lineage(model), read_lineage(run / "pretrain" / "checkpoint")
    assert [p.id for p in base.parents] == [theirs.id] and base.parents[0].name == "theirs"
    before, after = (
        dict(load_model(model).named_parameters()),
        dict(load_model(run / "pretrain" / "checkpoint").named_parameters()),
    )
    moved = [float((after[name] - before[name]).detach().abs().max()) for name in before]
    assert 0 < max(moved) < 0.02  # a new model's weights are of another order
    assert after.keys() == before.keys() and load_model(run / "rl" / "checkpoint").config == load_model(model).config
    assert result(run, "pretrain")["plan"]["context"] == 64
    assert "corpus" in {source["name"] for source in result(run, "collect")["sources"]}


@pytest.mark.slow
def test_killed_while_one_stage_after_another_saves_the_same_command_ends_with_the_same_weights(
    made: tuple[Path, Path], corpus: Path, tmp_path: Path
) -> None:
    model, undisturbed = made
    run = tmp_path / "run"
    shutil.copytree(undisturbed, run)
    for later in STAGES[STAGES.index("tokenize") :]:
        shutil.rmtree(run / later)
    (run / "tokenize").mkdir()  # killed between the files of the tokenizer, of which tokenizer.json is the last
    shutil.copy(model / "tokenizer_config.json", run / "tokenize")
    for stage, step in (("pretrain", 5), ("sft", 5), ("rl", 2)):
        where = f"save:before_rename@{stage}/resume/step_{step}"
        killed = sog(*command(run, model, corpus), SOG_CRASH_AT=where)
        assert killed.returncode == 137, f"{stage}: {killed.stderr}"
    again = sog(*command(run, model, corpus))
    assert again.returncode == 0, again.stderr
    for each in STAGES:
        assert result(run, each) == result(undisturbed, each), each
        assert records(run / each / "metrics.jsonl") == records(undisturbed / each / "metrics.jsonl"), each
        if each in TRAINED:
            assert weights(run, each) == weights(undisturbed, each), each


@pytest.mark.slow
def test_another_model_in_the_same_place_is_refused(made: tuple[Path, Path], corpus: Path, tmp_path: Path) -> None:
    model, undisturbed = made
    run, moved = tmp_path / "run", tmp_path / "moved"
    shutil.copytree(undisturbed, run)
    shutil.copytree(model, moved)
    (run / "pretrain" / "result.json").unlink()
    try:
        foreign.add_model(model, load_model(model).config.vocab_size, seed=9)
        refused = sog(*command(run, model, corpus))
    finally:
        shutil.copytree(moved, model, dirs_exist_ok=True)
    assert refused.returncode == 2 and "another model" in one_sentence(refused.stderr)


# ---------------------------------------------------------------------------------------------- the verbs for a folder


@pytest.mark.parametrize("make", [smol, llama])
def test_sample_and_logprobs_work_with_a_folder_made_elsewhere(
    make: object, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import transformers

    folder = make(tmp_path / "theirs")  # type: ignore[operator]
    assert main(["sample", str(folder), "--prompt", "The quick", "--max-tokens", "4"]) == 0
    assert capsys.readouterr().out.startswith("The quick")
    assert main(["logprobs", str(folder), "--text", "The quick brown fox </s>"]) == 0
    told = json.loads(capsys.readouterr().out)
    theirs = transformers.AutoTokenizer.from_pretrained(str(folder))
    assert told["ids"][:5] == theirs.encode("The quick brown fox", add_special_tokens=False)[:5]
    assert not set(told["ids"]) & Tokenizer.load(folder).specials.keys()
    assert len(told["logprobs"]) == len(told["ids"]) - 1


@pytest.mark.slow
def test_chat_works_with_a_folder_made_elsewhere_and_says_what_is_unusual(tmp_path: Path) -> None:
    done = sog("chat", smol(tmp_path / "theirs"), code="import sys, io\nsys.stdin = io.StringIO('Hi\\n')\n" + MAIN)
    assert done.returncode == 0, done.stderr
    assert "theirs (imported)" in done.stdout and "note: the tokenizer pads with" in done.stderr


MAIN = "from stateofgpt.cli import main\nsys.exit(main(sys.argv[1:]))"


# ----------------------------------------------------------------------------------------------------- saving, refusing


def test_a_base_model_without_a_template_gets_one_when_it_is_finetuned(tmp_path: Path) -> None:
    folder = foreign.add_model(foreign.smol(tmp_path / "theirs", None), 400)
    tokenizer, model = Tokenizer.load(folder), load_model(folder)
    save_checkpoint(tmp_path / "base", model, tokenizer=tokenizer, stage="pretrain", run="r", parents=[folder])
    save_checkpoint(tmp_path / "sft", model, tokenizer=tokenizer, stage="sft", run="r", parents=[tmp_path / "base"])
    assert not (tmp_path / "base" / "chat_template.jinja").exists()
    text = (tmp_path / "sft" / "chat_template.jinja").read_text()
    assert ChatFormat(Tokenizer.load(tmp_path / "sft")).template == text == ChatFormat(tokenizer).template
    before, after = ChatFormat(tokenizer), ChatFormat(Tokenizer.load(tmp_path / "sft"))
    assert before.render(TALK).ids == after.render(TALK).ids


def test_generation_settings_stay_unless_they_lack_the_end_of_a_turn(tmp_path: Path) -> None:
    folder = foreign.add_model(foreign.smol(tmp_path / "theirs"), 400)
    for eos, kept in ((2, True), ([0, 2], True), (0, False)):
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": eos, "temperature": 0.5}))
        save_checkpoint(tmp_path / "c", load_model(folder), tokenizer=Tokenizer.load(folder), stage="sft", run="r")
        there = (tmp_path / "c" / "generation_config.json").read_bytes()
        assert (there == (folder / "generation_config.json").read_bytes()) == kept
        assert json.loads(there)["temperature"] == 0.5
    assert json.loads(there)["eos_token_id"] == [2, 0]


def test_a_folder_whose_tokenizer_is_larger_than_its_model_is_refused(tmp_path: Path) -> None:
    folder = foreign.add_model(foreign.smol(tmp_path / "theirs"), 300)
    with pytest.raises(CheckpointError, match="belong together"):
        parent.check(folder)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        parent.check(tmp_path)


def test_a_shape_cannot_be_chosen_for_a_model_that_has_one(tmp_path: Path) -> None:
    asked = {"minutes": None, "seed": 0, "corpus": ()}
    with pytest.raises(ConfigError, match="that model's shape"):
        load("debug", overrides={"pretrain.width": "64"}, model=tmp_path, **asked)
    made = load("debug", overrides={"pretrain.lr": "3e-4"}, model=tmp_path, **asked)
    assert made.pretrain.loop.optim.lr == 3e-4 and made.tokenize.parent == str(tmp_path.resolve())


def test_everything_is_gentler_when_there_is_something_to_lose(tmp_path: Path) -> None:
    asked = {"minutes": 10.0, "seed": 0, "corpus": (), "overrides": {}}
    scratch, gentle = load("laptop", **asked), load("laptop", model=tmp_path, **asked)
    for of in (
        lambda r: r.pretrain.loop,
        lambda r: r.sft.loop,
        lambda r: r.reward.training.loop,
        lambda r: r.rl.ppo.policy,
    ):
        assert of(gentle).optim.lr <= of(scratch).optim.lr / 4
        assert of(gentle).optim.muon_lr <= of(scratch).optim.muon_lr / 4 or not of(scratch).optim.use_muon
    assert gentle.pretrain.warmup > scratch.pretrain.warmup


def test_a_large_model_is_asked_less_and_measured_less_often(tmp_path: Path) -> None:
    asked = {"minutes": 30.0, "seed": 0, "corpus": (), "overrides": {}}
    made = {}
    for name, layers in (("small", 2), ("large", 30)):
        (tmp_path / name).mkdir()
        shape = {"hidden_size": 576, "num_hidden_layers": layers, "intermediate_size": 1536, "vocab_size": 49152}
        heads = {"num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 8192}
        config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **heads, **shape}
        (tmp_path / name / "config.json").write_text(json.dumps(config))
        made[name] = load("laptop", model=tmp_path / name, **asked)
    small, large = made["small"], made["large"]
    assert large.sft.validation_rows < small.sft.validation_rows
    assert large.reward.held_out_prompts < small.reward.held_out_prompts
    assert large.reward.training.looks < small.reward.training.looks
    assert large.rl.batch < small.rl.batch and large.rl.guards.prompts < small.rl.guards.prompts
    assert not large.sft.loop.optim.use_muon


def test_runs_made_before_there_were_parents_go_on(tmp_path: Path) -> None:
    config = to_dict(load("debug", minutes=None, seed=0, corpus=(), overrides={}))
    old = json.loads(json.dumps(config))
    del old["pretrain"]["parent"], old["tokenize"]["parent"]
    Run.open(tmp_path / "r", "debug", old, 0).close()
    Run.open(tmp_path / "r", "debug", config, 0).close()
    changed = json.loads(json.dumps(config))
    changed["pretrain"]["parent"] = "x"
    with pytest.raises(RunError, match="another configuration"):
        Run.open(tmp_path / "r", "debug", changed, 0)


@pytest.mark.slow
def test_with_adapters_only_matrices_of_blocks_change_and_a_killed_run_ends_the_same(
    tmp_path: Path, corpus: Path
) -> None:
    model = smol(tmp_path / "theirs")

    def asked(run: Path) -> list[object]:
        return [
            *command(run, model, corpus),
            "--stages",
            "collect,tokenize,pretrain,sft",
            "--pretrain.lora=4",
            "--sft.lora=4",
        ]

    whole, torn = tmp_path / "whole", tmp_path / "torn"
    assert sog(*asked(whole)).returncode == 0
    killed = sog(*asked(torn), SOG_CRASH_AT="save:renamed@pretrain/resume/step_4")
    assert killed.returncode == 137
    state = read_header(torn / "pretrain" / "resume" / "step_4" / "tensors.safetensors")
    assert state and all("lora_" in name or name.startswith("optimizer.") for name in state)
    assert sog(*asked(torn)).returncode == 0
    before = load_model(model).state_dict()
    for stage in ("pretrain", "sft"):
        assert weights(whole, stage) == weights(torn, stage)
        after = load_model(whole / stage / "checkpoint").state_dict()
        changed = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
        assert changed == {name for name in before if "_proj." in name}
        before = after
