r"""Word problems with a number for an answer, in the form of GSM8K (Cobbe et al., arXiv 2110.14168).

Owns the rows of such a file: a question, and a solution in sentences whose last line is "#### 18" and in which sums are
marked, "48/2 = <<48/2=24>>24 clips". A mark becomes a call of the calculator, or is removed. Knows nothing of models,
tokens or rewards.

    {"question": "How many clips did she sell?", "answer": "She sold 48/2 = <<48/2=24>>24 clips.\n#### 24"}
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stateofgpt.data.documents import bounded_lines
from stateofgpt.data.skills import Problem
from stateofgpt.errors import DataError
from stateofgpt.text.chat import Conversation, Message, ToolCall

SKILL = "word_problem"
MAX_LINE_BYTES = 1 << 20
_MARK = re.compile(r"<<([^<>=]{1,200})=([^<>]{0,100})>>")
_FINAL = re.compile(r"^####\s*(.+?)\s*$", re.MULTILINE)
_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


def problem_from_row(row: Mapping[str, Any]) -> Problem:
    """The problem of one row; DataError says what is wrong with it."""
    question, solution = row.get("question"), row.get("answer")
    if not isinstance(question, str) or not question.strip() or not isinstance(solution, str):
        raise DataError("a row needs question and answer as texts")
    return Problem(SKILL, question.strip(), final_number(solution), f"{SKILL}:{question.strip()}")


def final_number(solution: str) -> str:
    """The number after "####", without thousands separators and currency signs; DataError where there is none."""
    found = _FINAL.findall(solution)
    told = found[-1].replace(",", "").replace("$", "").strip().removesuffix(".") if found else ""
    if not _NUMBER.fullmatch(told):
        raise DataError('the answer has no last line "#### NUMBER"')
    return told


def demonstration(row: Mapping[str, Any], *, tools: bool) -> Conversation:
    """The row as a conversation: with calculator calls where sums are marked, or with the marks removed."""
    problem, solution = problem_from_row(row), _FINAL.sub("", row["answer"]).strip()
    ending = f"\nThe answer is {problem.answer}."
    asked = Message("user", problem.question)
    if not tools:
        return asked, Message("assistant", _MARK.sub("", solution) + ending)
    messages: list[Message] = [asked]
    at = 0
    for mark in _MARK.finditer(solution):
        call = ToolCall("calculator", {"expression": mark[1].strip()})
        messages.append(Message("assistant", solution[at : mark.start()], (call,)))
        messages.append(Message("tool", mark[2].strip()))
        at = mark.end()
    return (*messages, Message("assistant", solution[at:] + ending))


def read_problems(path: Path) -> list[Problem]:
    """Every problem in a JSONL file, each question once. DataError names the file and the first line that is wrong."""
    found: dict[str, Problem] = {}
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(bounded_lines(file, MAX_LINE_BYTES), start=1):
                if line is not None and not line.strip():
                    continue
                try:
                    problem = problem_from_row(_row(line))
                except DataError as error:
                    raise DataError(f"{path}:{number}: {error}") from error
                found.setdefault(problem.key, problem)
    except OSError as error:
        raise DataError(f"the problems {path} cannot be read ({error.strerror}); give a JSONL file") from error
    if not found:
        raise DataError(f"{path} holds no problems; each line is a JSON object with question and answer")
    return list(found.values())


def _row(line: bytes | None) -> dict[str, Any]:
    if line is None:
        raise DataError(f"the line has more than {MAX_LINE_BYTES:,} bytes; a row is one problem")
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise DataError("the line is not JSON in UTF-8") from error
    if not isinstance(row, dict):
        raise DataError(f"the line is a JSON {type(row).__name__}, not an object")
    return row
