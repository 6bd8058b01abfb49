"""Problems with known answers from a file or a package: read, asked in order, held out, and checked."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from stateofgpt.assistant.tools import Toolbox
from stateofgpt.data import gsm8k
from stateofgpt.data.demonstrations import read_demonstrations
from stateofgpt.data.prompts import PromptConfig, prompts
from stateofgpt.data.skills import is_right
from stateofgpt.data.tasks import FileTasks, GymTasks, SkillTasks, tasks_of
from stateofgpt.errors import ConfigError, DataError
from stateofgpt.text.chat import Message

ROW = {
    "question": "Ann sold 48 clips in April, and half as many in May. How many in all?",
    "answer": "In May she sold 48/2 = <<48/2=24>>24 clips.\nIn all 48+24 = <<48+24=72>>72 clips.\n#### 72",
}


def said(text: str) -> tuple[Message, ...]:
    return (Message("user", "?"), Message("assistant", text))


def test_the_marks_become_calls_of_the_calculator_that_return_what_they_say() -> None:
    asked, *answer = gsm8k.demonstration(ROW, tools=True)
    assert asked == Message("user", ROW["question"])
    assert [m.role for m in answer] == ["assistant", "tool", "assistant", "tool", "assistant"]
    for call, returned in ((answer[0], answer[1]), (answer[2], answer[3])):
        assert Toolbox().call(call.tool_calls[0]) == returned.content
    text = "".join(m.content for m in answer if m.role == "assistant")
    assert text == "In May she sold 48/2 = 24 clips.\nIn all 48+24 = 72 clips.\nThe answer is 72."
    assert is_right(gsm8k.problem_from_row(ROW), (asked, *answer))


def test_or_they_are_removed() -> None:
    asked, answer = gsm8k.demonstration(ROW, tools=False)
    assert answer.content == "In May she sold 48/2 = 24 clips.\nIn all 48+24 = 72 clips.\nThe answer is 72."
    assert is_right(gsm8k.problem_from_row(ROW), (asked, answer))


@pytest.mark.parametrize(
    ("told", "right"),
    [("72", True), ("The answer is $72.", True), ("72.00", True), ("It is 1,072 less 1,000, so 72", True),
     ("7.2", False), ("72 or 73", False), ("", False), ("-72", False), ("#### 72", True)],
)  # fmt: skip
def test_the_last_number_is_the_answer(told: str, right: bool) -> None:
    assert is_right(gsm8k.problem_from_row(ROW), said(told)) == right


@pytest.mark.parametrize(
    ("ending", "number"), [("#### 1,234", "1234"), ("#### $5", "5"), ("#### -3.5", "-3.5"), ("#### 2\n#### 18 ", "18")]
)
def test_the_final_number_is_read_as_it_is_written(ending: str, number: str) -> None:
    assert gsm8k.final_number("Some words.\n" + ending) == number


def test_a_file_of_problems_is_a_file_of_demonstrations_too(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text(json.dumps(ROW) + "\n")
    assert read_demonstrations(path) == [gsm8k.demonstration(ROW, tools=True)]


@pytest.mark.parametrize(
    ("line", "why"),
    [("{}", "question and answer"), ("[1]", "list"), ("nonsense", "not JSON"),
     ('{"question": "a", "answer": "b"}', "####"),
     ('{"question": " ", "answer": "#### 2"}', "question"), ('{"question": "a", "answer": "#### many"}', "####")],
)  # fmt: skip
def test_a_bad_row_is_named_with_its_file_and_line(tmp_path: Path, line: str, why: str) -> None:
    path = tmp_path / "problems.jsonl"
    path.write_text(json.dumps(ROW) + "\n" + line + "\n")
    with pytest.raises(DataError, match=why) as error:
        gsm8k.read_problems(path)
    assert f"{path}:2" in str(error.value)


def test_no_file_and_no_problems_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("\n\n")
    for name, why in (("empty.jsonl", "no problems"), ("nowhere.jsonl", "cannot be read")):
        with pytest.raises(DataError, match=why):
            gsm8k.read_problems(tmp_path / name)
    with pytest.raises(DataError, match="at least 20"):
        FileTasks([gsm8k.problem_from_row(ROW)] * 3, 0)


def some(n: int = 40) -> list[Any]:
    return [gsm8k.problem_from_row({"question": f"{i}?", "answer": f"#### {i}"}) for i in range(n)]


def test_every_problem_is_asked_once_an_epoch_and_what_is_held_out_never() -> None:
    tasks = FileTasks(some(), 3)
    held_out = tasks.problems(99, "heldout", 10_000)
    assert len(held_out) == 4 and len({p.key for p in held_out}) == 4
    first, second = tasks.problems(36, "train", 36 * 7), tasks.problems(36, "train", 36 * 8)
    assert {p.key for p in first} == {p.key for p in second} == {p.key for p in some()} - {p.key for p in held_out}
    assert first != second and tasks.problems(5, "train", 36 * 7 + 3) == first[3:8]
    shuffled = FileTasks(some()[::-1], 3)
    assert shuffled.problems(36, "train", 36 * 7) == first  # the file's order is no matter
    assert FileTasks(some(), 4).problems(36, "train", 0) != tasks.problems(36, "train", 0)


def test_without_a_name_the_skills_are_asked() -> None:
    tasks = tasks_of(None, 5, PromptConfig())
    assert isinstance(tasks, SkillTasks)
    assert tasks.problems(6, "train", 9) == prompts(5, 6, PromptConfig(), "train", 9)


def test_tasks_of_a_package_that_is_not_there_say_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install reasoning-gym"):
        tasks_of("reasoning_gym:chain_sum", 0, PromptConfig())


class Sums:
    """A procedural dataset in the package's manner: entry i belongs to seed + i."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def __getitem__(self, i: int) -> dict[str, Any]:
        return {"question": f"{self.seed + i} + 1?", "answer": str(self.seed + i + 1), "metadata": {}}

    def score_answer(self, answer: str, entry: dict[str, Any]) -> float:
        return 1.0 if answer == entry["answer"] else 0.67 * (entry["answer"] in answer)


def test_tasks_of_the_package_are_asked_by_index_and_checked_by_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for the package; the next test asks the real one where it is installed."""
    package, factory = ModuleType("reasoning_gym"), ModuleType("reasoning_gym.factory")
    package.create_dataset = lambda name, seed, size: Sums(seed)  # type: ignore[attr-defined]
    factory.DATASETS = {"sums": 0}  # type: ignore[attr-defined]
    package.__spec__ = SimpleNamespace(name="reasoning_gym")  # type: ignore[assignment]
    monkeypatch.setitem(sys.modules, "reasoning_gym", package)
    monkeypatch.setitem(sys.modules, "reasoning_gym.factory", factory)
    check_gym(GymTasks("sums", 7))
    with pytest.raises(ConfigError, match='did you mean "sums"'):
        GymTasks("sum", 7)


def test_tasks_of_reasoning_gym() -> None:
    pytest.importorskip("reasoning_gym")
    check_gym(GymTasks("chain_sum", 7))


def check_gym(tasks: GymTasks) -> None:
    train, held_out = tasks.problems(50, "train", 1000), tasks.problems(20, "heldout", 10)
    assert not {p.question for p in train} & {p.question for p in held_out}
    assert tasks.problems(3, "train", 1010) == train[10:13]
    for p in train[:5]:
        assert tasks.check(p, said(p.answer)) == 1.0 == tasks.check(p, said(f"The answer is {p.answer}."))
        assert tasks.check(p, said(f"The answer is {p.answer}7.")) == 0.0 == tasks.check(p, said(""))
