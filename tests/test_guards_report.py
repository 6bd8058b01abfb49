"""The report shows what the guards saw and how varied answers are, and leaves both out where nothing was measured."""

from __future__ import annotations

from pathlib import Path

from fake_run import fake_run

from stateofgpt.report.build import build
from stateofgpt.run import Run, read_json, write_json

KEYS = ("prompt_distinct", "prompt_ngrams", "prompt_self_bleu", "across_distinct", "across_ngrams", "across_self_bleu")


def guarded_run(root: Path) -> Path:
    fake_run(root)
    stage = Run.read(root).stage("rl")
    lines = [
        f'{{"step": {4 * i}, "held_out_score": {0.6 + 0.1 * i}, "held_out_reward": {0.2 * i}, "held_out_won": 0.6}}\n'
        for i in range(4)
    ]
    with open(stage.dir / "metrics.jsonl", "a") as file:
        file.writelines(lines)
    told = {"looks": 4, "prompts": 48, "judge": "a <careful> judge", "best_step": 12, "score_best": 0.91,
            "score_last": 0.9, "won_last": 0.61}  # fmt: skip
    why = "the held-out score ended at 0.2, below the 0.6 before training; kept is <the> policy"
    write_json(stage.dir / "result.json", {**read_json(stage.dir / "result.json"), "guards": told, "given_up": why})
    row = {**dict.fromkeys(KEYS, 0.25), "entropy": 0.11, "prompts": 16, "answers": 8}
    summary = read_json(root / "summary.json")
    write_json(root / "summary.json", {**summary, "variety": {"base": row, "sft": row, "rl": row, "rl_stopped": row}})
    return root


def test_looks_and_variety_are_in_the_report(tmp_path: Path) -> None:
    text = build(guarded_run(tmp_path / "runs" / "laptop")).read_text(encoding="utf-8")
    assert "What the guards saw" in text and "Held-out prompts: reward and judge" in text
    assert "4 looks at 48 prompts" in text and "a &lt;careful&gt; judge" in text and "best at iteration 12" in text
    assert "How different answers are, to one prompt and to different ones" in text
    assert "Its last policy was given up: the held-out score ended at 0.2" in text and "kept is &lt;the&gt;" in text
    assert "8 answers at temperature 1 to each of 16 held-out prompts" in text and "rl_stopped" in text


def test_a_run_of_before_there_were_guards_is_told_without_them(tmp_path: Path) -> None:
    text = build(fake_run(tmp_path / "runs" / "laptop")).read_text(encoding="utf-8")
    assert "What the guards saw" not in text and "given up" not in text and "How different answers are" not in text
