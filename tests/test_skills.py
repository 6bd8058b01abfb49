"""Skills: problems are right by independent arithmetic, splits are apart, demonstrations are right and short."""

from __future__ import annotations

import random
import re
from collections import Counter
from fractions import Fraction
from itertools import pairwise

import pytest

from stateofgpt.assistant.tools import Toolbox
from stateofgpt.data.skills import (
    SKILLS,
    STATES,
    Problem,
    demonstrate,
    document,
    is_new_name,
    is_plausible_name,
    is_right,
    known_names,
    manner_of,
    new_messages,
    problem,
    problem_from_json,
    problem_to_json,
    read_name,
    split_of,
    stated_number,
)
from stateofgpt.data.skills.arithmetic import expression_key, format_number, worked
from stateofgpt.data.skills.facts import POPULATION_OF_THE_FIFTY_STATES, PUBLISHED_AREA_OF_THE_FIFTY_STATES_SQ_MI
from stateofgpt.data.skills.names import invent_name
from stateofgpt.errors import DataError
from stateofgpt.text.chat import Conversation, Message, ToolCall


def said(text: str) -> Conversation:
    return (Message("user", "?"), Message("assistant", text))


def draw(skill: str, split: str, n: int, seed: int = 0) -> list[Problem]:
    rng = random.Random(seed)
    return [problem(skill, rng, split) for _ in range(n)]  # type: ignore[arg-type]


def test_the_states_add_up_to_the_published_totals() -> None:
    assert len({state.name for state in STATES}) == 50
    assert sum(state.population_2020 for state in STATES) == POPULATION_OF_THE_FIFTY_STATES == 331_449_281 - 689_545
    total = sum(state.area_sq_mi for state in STATES)
    assert abs(total - PUBLISHED_AREA_OF_THE_FIFTY_STATES_SQ_MI) <= 2  # each entry is rounded to a whole mile


def test_the_working_is_column_addition_as_at_school() -> None:
    assert worked(4729, "+", 386).splitlines() == [
        "Add 4729 + 0386:",
        "9+6+0=15 carry 1",
        "2+8+1=11 carry 1",
        "7+3+1=11 carry 1",
        "4+0+1=5 carry 0",
        "The answer is 5115.",
    ]
    assert worked(999, "+", 1).splitlines()[-2:] == ["9+0+1=10 carry 1", "The answer is 1000."]
    assert worked(4702, "-", 386).splitlines()[1:4] == ["12-6-0=6 borrow 1", "10-8-1=1 borrow 1", "7-3-1=3 borrow 0"]


@pytest.mark.parametrize("op", ["+", "-"])
def test_every_line_of_a_working_holds_by_itself(op: str) -> None:
    rng = random.Random(1)
    for _ in range(300):
        a, b = sorted((rng.randrange(100_000), rng.randrange(100_000)), reverse=True)
        lines = worked(a, op, b).splitlines()
        carry, digits = 0, ""
        for line in lines[1:-1]:
            match = re.fullmatch(r"(\d+)[+-](\d)[+-](\d)=(\d+) (carry|borrow) (\d)", line)
            assert match and int(match[3]) == carry, line
            x, y, total, carried = (int(match[k]) for k in (1, 2, 4, 6))
            assert total == (x + y + carry if op == "+" else x - y - carry)
            assert (total // 10, x // 10) == ((carried, 0) if op == "+" else (0, carried))
            carry, digits = carried, f"{total % 10}{digits}"
        result = a + b if op == "+" else a - b
        assert int(f"{carry}{digits}" if op == "+" else digits) == result
        assert lines[-1] == f"The answer is {result}."


def test_a_number_is_written_whole_or_to_one_decimal() -> None:
    assert format_number(Fraction(39538223, 733391)) == f"{39538223 / 733391:.1f}" == "53.9"
    shares = ((8, 4), (-5, 1), (5, 4), (-5, 4), (1, 3), (3, 10), (1, 400))
    written = ["2", "-5", "1.3", "-1.3", "0.333", "0.3", "0.0025"]
    assert [format_number(Fraction(n, d)) for n, d in shares] == written


@pytest.mark.parametrize("skill", SKILLS)
def test_train_and_heldout_are_apart_and_repeatable(skill: str) -> None:
    train, heldout = draw(skill, "train", 400), draw(skill, "heldout", 400, seed=1)
    assert {p.skill for p in train + heldout} == {skill}
    assert not {p.key for p in train} & {p.key for p in heldout}
    assert {split_of(p) for p in train} == {"train"} and {split_of(p) for p in heldout} == {"heldout"}
    assert train == draw(skill, "train", 400)
    assert len({p.question for p in heldout}) >= 5


def test_a_sum_held_out_for_one_arithmetic_skill_is_held_out_for_all_in_either_order() -> None:
    assert expression_key(386, "+", 4729) == expression_key(4729, "+", 386) == "4729+386"
    assert expression_key(12, "-", 5) != expression_key(5, "-", 12)
    heldout = {p.key for skill in SKILLS[:4] for p in draw(skill, "heldout", 300)}
    train = {p.key for skill in SKILLS[:4] for p in draw(skill, "train", 300)}
    assert not heldout & train
    assert all(len(key) > 3 for key in heldout)  # no sum of two digits


def test_california_and_alaska_are_never_trained_on() -> None:
    pairs = {(p.meta["first"], p.meta["second"]) for p in draw("compare", "train", 3000)}
    assert len(pairs) > 500
    assert not any({"California", "Alaska"} == set(pair) for pair in pairs)


def test_arithmetic_answers_agree_with_python() -> None:
    for skill in SKILLS[:4]:
        for p in draw(skill, "train", 200) + draw(skill, "heldout", 200):
            match = re.search(r"(\d+) ?([-+*/]) ?(\d+)", p.question)
            assert match
            a, b = int(match[1]), int(match[3])
            exact = {"+": a + b, "-": a - b, "*": a * b, "/": Fraction(a, b or 1)}
            assert p.answer == str(exact[match[2]])


def test_direct_and_steps_are_asked_of_the_same_additions() -> None:
    for skill in ("arithmetic_direct", "arithmetic_steps"):
        problems = draw(skill, "heldout", 300)
        assert {p.meta["op"] for p in problems} == {"+"}
        digits = Counter(len(str(max(p.meta["a"], p.meta["b"]))) for p in problems)
        assert set(digits) == {2, 3, 4, 5} and digits[4] > digits[2]


@pytest.mark.parametrize("skill", SKILLS)
def test_every_demonstration_is_right_short_and_ends_with_the_assistant(skill: str) -> None:
    rng = random.Random(3)
    for p in draw(skill, "train", 150) + draw(skill, "heldout", 50):
        shown = demonstrate(p, rng)
        assert shown[0] == Message("user", p.question)
        assert shown[-1].role == "assistant" and shown[-1].content[-1] in ".!?"
        assert is_right(p, shown) and is_right(p, new_messages(shown))
        assert sum(len(m.content) for m in shown) < 400


def test_demonstrated_tool_results_are_what_the_tools_return() -> None:
    rng, toolbox = random.Random(4), Toolbox()
    for skill in ("arithmetic_tool", "fact", "compare"):
        for p in draw(skill, "train", 100):
            shown = demonstrate(p, rng)
            for asking, returned in pairwise(shown):
                if asking.tool_calls:
                    assert returned == Message("tool", toolbox.call(asking.tool_calls[0]))


def test_plain_additions_are_answered_in_all_manners_about_equally() -> None:
    rng = random.Random(5)
    plain = [p for p in draw("arithmetic", "train", 1500) if p.meta["op"] == "+"]
    shares = Counter(manner_of(demonstrate(p, rng)) for p in plain)
    assert set(shares) == {"direct", "steps", "tool"}
    assert all(abs(count / len(plain) - 1 / 3) < 0.08 for count in shares.values())
    assert manner_of(demonstrate(plain[0], rng, "tool")) == "tool"


def test_the_check_is_strict_about_the_number_and_the_manner() -> None:
    meta = {"a": 4729, "op": "+", "b": 386, "manner": ""}
    plain = Problem("arithmetic", "What is 4729 + 386?", "5115", "4729+386", meta)
    for text in ("5115.", "5115", "The answer is 5115.", "4729 + 386 = 5115.", "5,115.", worked(4729, "+", 386)):
        assert is_right(plain, said(text)), text
    for text in ("", "5116.", "51155.", "5115 or 5116.", "5116 or 5115.", "It is 5115.5", "-5115", "4729 + 386"):
        assert not is_right(plain, said(text)), text
    steps = Problem("arithmetic_steps", "", "5115", "4729+386", {**meta, "manner": "steps"})
    assert is_right(steps, said(worked(4729, "+", 386)))
    assert not is_right(steps, said("5115."))
    tool = Problem("arithmetic_tool", "", "5115", "4729+386", {**meta, "manner": "tool"})
    call = Message("assistant", "", (ToolCall("calculator", {"expression": "4729+386"}),))
    assert is_right(tool, (call, Message("tool", "5115"), Message("assistant", "The answer is 5115.")))
    assert not is_right(tool, (call, Message("tool", "5115")))
    assert not is_right(tool, said("5115."))
    assert not is_right(plain, (Message("assistant", "5115."), Message("user", "again")))


def test_the_check_reads_lists_names_and_small_talk() -> None:
    copy = Problem("copy", "", "fox, lamp, red", "", {})
    assert is_right(copy, said("Copied: fox, lamp, red.")) and is_right(copy, said("fox, lamp, red"))
    assert not is_right(copy, said("Copied: fox, red, lamp.")) and not is_right(copy, said("fox, lamp, red, red."))
    names = Problem("names", "", "", "", {})
    assert is_right(names, said("Velmora.")) and is_right(names, said("How about Velmora?"))
    assert not is_right(names, said("Velmora Brakun.")) and not is_right(names, said("Xqqzt."))
    decline = Problem("decline", "", "", "", {})
    assert is_right(decline, said("I cannot know that.")) and not is_right(decline, said("It will rain."))
    assert not is_right(decline, said("I cannot know that. " * 20))


def test_the_stated_number_is_the_one_of_the_last_line() -> None:
    assert stated_number("1+2=3\nThe answer is 7.") == "7"
    assert stated_number("3 or 4") is None and stated_number("none") is None and stated_number("") is None
    assert stated_number("The sum of 3 and 4 is 7.", ("3", "4")) == "7"


def test_invented_names_are_plausible_and_mostly_new() -> None:
    rng = random.Random(6)
    names = [invent_name(rng) for _ in range(2000)]
    assert all(is_plausible_name(name) for name in names)
    assert sum(is_new_name(name) for name in names) > 1800 and len(set(names)) > 1900
    assert len(known_names()) == 3000 and not any(is_new_name(name) for name in known_names()[:50])
    assert not any(is_plausible_name(name) for name in ("velmora", "Vel mora", "V", "Strngth", "Velmoravelmoravel", ""))
    assert read_name("Call it Brakun.") == "Brakun" and read_name("I am here") is None


def test_documents_are_plain_text_without_heldout_sums_or_figures() -> None:
    rng = random.Random(7)
    hidden = {(s.name, f) for s in STATES for f in ("population", "area") if heldout_fact(s.name, f)}
    texts = [document(rng) for _ in range(600)]
    assert 150 < sum(map(len, texts)) / len(texts) < 900
    for text in texts:
        assert "<|" not in text and "<tool_call>" not in text and 20 < len(text) < 2000
        for a, op, b in re.findall(r"(?<![\d+-])(\d{1,5}) ?([-+*/]) ?(\d{1,5})(?![\d+-])", text):
            if op == "/" and int(b) >= 100:
                continue  # the ratio of two figures in a comparison: no sum that is asked
            sum_ = Problem("arithmetic", "", "", expression_key(int(a), op, int(b)), {"a": int(a), "b": int(b)})
            assert split_of(sum_) == "train", (a, op, b)
        for first, second in COMPARED.findall(text):
            pair = "|".join(sorted((first, second)))
            assert split_of(Problem("compare", "", "", f"compare:{pair}", {})) == "train"
        if text.startswith(("Population", "Area")):
            field = "population" if text.startswith("Population") else "area"
            assert not {(line.partition(":")[0], field) for line in text.splitlines()[1:]} & hidden
    assert document(random.Random(8)) == document(random.Random(8))


COMPARED = re.compile(r'"name": "([A-Z][a-z A-Z]+)".*\ntool: \d+\nassistant: .*"name": "([A-Z][a-z A-Z]+)"')


def heldout_fact(state: str, field: str) -> bool:
    return split_of(Problem("fact", "", "", f"fact:{state} {field}", {})) == "heldout"


def test_a_problem_survives_json_and_a_broken_one_is_refused() -> None:
    for skill in SKILLS:
        (p,) = draw(skill, "train", 1)
        assert problem_from_json(problem_to_json(p)) == p
    with pytest.raises(DataError, match="answer"):
        problem_from_json({"skill": "copy", "question": "", "key": ""})
    with pytest.raises(DataError, match="arithmetic_steps"):
        problem("poetry", random.Random(0), "train")
