"""The session with a scripted engine (what it says is known, so what must come out is known), and with a real one."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import made_elsewhere
import pytest
import torch

from stateofgpt.assistant.session import Done, Session, TextDelta, ToolCalled, ToolReturned
from stateofgpt.errors import ModelError
from stateofgpt.infer.engine import Engine, Event
from stateofgpt.infer.loop import EngineLoop
from stateofgpt.infer.sampling import SamplingParams, derive_seed
from stateofgpt.infer.score import score
from stateofgpt.model.gpt import GPT, GPTConfig
from stateofgpt.text.chat import ChatFormat, Conversation, Message, ToolCall
from stateofgpt.text.tokenizer import Tokenizer


class Adder:
    """A toolbox of one tool that adds."""

    def __init__(self) -> None:
        self.calls: list[ToolCall] = []

    def call(self, call: ToolCall) -> str:
        self.calls.append(call)
        if call.name != "calculator":
            return "error: no such tool"
        return str(sum(int(x) for x in call.arguments["expression"].split("+")))


class ScriptedEngine:
    """Says what it is told to, one token per request and step; checks that a session keeps the engine's rules."""

    def __init__(self, scripts: Sequence[list[int]], max_context: int = 400) -> None:
        self.max_context = max_context
        self._scripts = deque(scripts)
        self.texts: dict[int, list[int]] = {}  # prompt, drawn and given ids
        self.params: dict[int, SamplingParams] = {}
        self.left: dict[int, deque[int]] = {}
        self.state: dict[int, str] = {}
        self.drawn: dict[int, int] = {}
        self.hold: dict[int, bool] = {}

    def add(self, prompt: Sequence[int], params: SamplingParams, *, hold: bool = False) -> int:
        if len(prompt) > self.max_context - 1:
            raise ModelError("too long")
        request = 100 + len(self.texts)
        self.texts[request], self.params[request], self.hold[request] = list(prompt), params, hold
        self.left[request], self.state[request], self.drawn[request] = deque(self._scripts.popleft()), "live", 0
        return request

    def extend(self, request: int, ids: Sequence[int]) -> None:
        assert self.state[request] == "held"
        assert len(self.texts[request]) + len(ids) <= self.max_context - 1
        assert self.drawn[request] < self.params[request].max_tokens
        self.texts[request] += ids
        self.state[request] = "live"

    def cancel(self, request: int) -> None:
        self.state[request] = "gone"

    def events(self, requests: Iterable[int]) -> Iterator[Event]:
        wanted = list(requests)
        while any(self.state[r] == "live" for r in wanted):
            for r in [r for r in wanted if self.state[r] == "live"]:
                token = self.left[r].popleft()
                self.texts[r].append(token)
                self.drawn[r] += 1
                finish = None
                if token in self.params[r].stop_ids:
                    finish = "stop"
                elif self.drawn[r] >= self.params[r].max_tokens or len(self.texts[r]) >= self.max_context:
                    finish = "length"
                if finish:
                    self.state[r] = "held" if self.hold[r] else "gone"
                yield Event(r, token, -0.25 * self.drawn[r], finish)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def chat() -> ChatFormat:
    texts = ["What is 12 + 30? The answer is 42. calculator expression arguments name tool assistant user system"] * 20
    return ChatFormat(Tokenizer.train(iter(texts), 300))


@pytest.fixture(scope="module", params=["ours", "made elsewhere, calls in plain text"])
def any_chat(request: pytest.FixtureRequest, chat: ChatFormat, tmp_path_factory: pytest.TempPathFactory) -> ChatFormat:
    if request.param == "ours":
        return chat
    return ChatFormat(Tokenizer.load(made_elsewhere.smol(tmp_path_factory.mktemp("smol"))))


def user(text: str) -> Conversation:
    return (Message("user", text),)


def call(expression: str) -> ToolCall:
    return ToolCall("calculator", {"expression": expression})


def said(chat: ChatFormat, *messages: Message) -> list[int]:
    """What a model that answers with these assistant messages draws, in all."""
    ids: list[int] = []
    for message in messages:
        rendered = chat.render((message,))
        ids += [i for i, m in zip(rendered.ids, rendered.loss_mask, strict=True) if m]
    return ids


def test_ids_and_mask_of_turns_with_tools_are_those_of_the_rendered_conversation(any_chat: ChatFormat) -> None:
    chat = any_chat
    dialogues: list[Conversation] = [
        (*user("hi"), Message("assistant", "Hello.")),
        (
            *user("What is 12 + 30?"),
            Message("assistant", "Let me see.", (call("12+30"),)),
            Message("tool", "42"),
            Message("assistant", "42"),
        ),
        (
            Message("system", "Be brief."),
            *user("two sums"),
            Message("assistant", "", (call("1+2"), call("3+4"))),
            Message("tool", "3"),
            Message("tool", "7"),
            Message("assistant", "Once more.", (call("3+7"),)),
            Message("tool", "10"),
            Message("assistant", "10 <|im_end|> \u00e9\U0001f642"),
        ),
    ]
    starts = [next(i for i, m in enumerate(d) if m.role == "assistant") for d in dialogues]
    scripts = [said(chat, *(m for m in d if m.role == "assistant")) for d in dialogues]
    engine = ScriptedEngine(scripts, max_context=2000)
    turns = Session(engine, chat, Adder()).converse([d[:n] for d, n in zip(dialogues, starts, strict=True)])
    for dialogue, start, turn in zip(dialogues, starts, turns, strict=True):
        whole = chat.render(dialogue)
        end = len(turn.prompt_ids) + len(turn.ids)
        assert turn.finish == "stop"
        assert turn.messages == dialogue[start:]
        assert turn.prompt_ids + turn.ids == whole.ids[:end]
        assert whole.ids[end:] == chat.tokenizer.encode("\n")  # what the template puts behind a closed turn
        assert turn.mask == whole.loss_mask[len(turn.prompt_ids) : end]
        drawn = [p for p, m in zip(turn.logprobs, turn.mask, strict=True) if m]
        assert drawn == [-0.25 * (i + 1) for i in range(len(drawn))]
        assert all(p == 0.0 for p, m in zip(turn.logprobs, turn.mask, strict=True) if not m)
    assert all(state == "gone" for state in engine.state.values())


def test_each_row_has_its_own_seed_and_stops_at_the_end_of_its_turn(chat: ChatFormat) -> None:
    answer = said(chat, Message("assistant", "ok"))
    engine = ScriptedEngine([answer] * 4)
    session = Session(engine, chat)
    session.converse([user("a"), user("a")], SamplingParams(seed=9, stop_ids=(77,)))
    session.converse([user("a"), user("a")], SamplingParams(seed=9), seeds=[5, 6])
    assert [p.seed for p in engine.params.values()] == [derive_seed(9, 0), derive_seed(9, 1), 5, 6]
    assert engine.params[100].stop_ids == (77, chat.tokenizer.im_end, chat.tokenizer.eot)


def test_max_tokens_counts_what_is_drawn_in_the_whole_turn(chat: ChatFormat) -> None:
    first, second = Message("assistant", "", (call("1+2"),)), Message("assistant", "The answer is 3.")
    budget = len(said(chat, first)) + 3
    engine = ScriptedEngine([said(chat, first, second)])
    (turn,) = Session(engine, chat, Adder()).converse([user("1+2?")], SamplingParams(max_tokens=budget))
    assert sum(turn.mask) == budget and turn.finish == "length"
    assert [m.role for m in turn.messages] == ["assistant", "tool", "assistant"]
    engine = ScriptedEngine([said(chat, first, second)])
    (turn,) = Session(engine, chat, Adder()).converse([user("1+2?")], SamplingParams(max_tokens=budget - 3))
    assert turn.finish == "length" and [m.role for m in turn.messages] == ["assistant"]


def test_an_assistant_that_never_stops_calling_is_stopped(chat: ChatFormat) -> None:
    again = Message("assistant", "", (call("1+1"),))
    tools = Adder()
    engine = ScriptedEngine([said(chat, *[again] * 9)], max_context=4000)
    (turn,) = Session(engine, chat, tools, max_rounds=2).converse([user("x")])
    assert turn.finish == "tool_limit" and len(tools.calls) == 2
    assert [m.role for m in turn.messages] == ["assistant", "tool", "assistant", "tool", "assistant"]


def test_a_tool_answer_that_does_not_fit_the_context_ends_the_turn(chat: ChatFormat) -> None:
    first = Message("assistant", "", (call("1+2"),))
    used = len(chat.render(user("x"), add_generation_prompt=True).ids) + len(said(chat, first))
    engine = ScriptedEngine([said(chat, first)], max_context=used + 3)
    (turn,) = Session(engine, chat, Adder()).converse([user("x")])
    assert turn.finish == "length" and len(turn.messages) == 1 and all(turn.mask)


def test_a_broken_call_is_answered_with_an_error_and_one_cut_short_is_never_run(chat: ChatFormat) -> None:
    t = chat.tokenizer
    broken = [t.tool_open, *t.encode('{"name": calculator'), t.tool_close, t.im_end]
    tools = Adder()
    (turn,) = Session(ScriptedEngine([broken + said(chat, Message("assistant", "Sorry."))]), chat, tools).converse(
        [user("x")]
    )
    assert [m.content for m in turn.messages[1:]] == ["error: no such tool", "Sorry."]
    whole = said(chat, Message("assistant", "", (call("1+2"),)))
    for script in (whole[:-3], [*whole[:-1], t.eot]):  # out of tokens, or ended as a document ends
        tools = Adder()
        engine = ScriptedEngine([script])
        (turn,) = Session(engine, chat, tools).converse([user("x")], SamplingParams(max_tokens=len(script)))
        assert tools.calls == [] and len(turn.messages) == 1


def test_without_a_toolbox_calls_are_only_read(chat: ChatFormat) -> None:
    first = Message("assistant", "", (call("1+2"),))
    engine = ScriptedEngine([said(chat, first)])
    (turn,) = Session(engine, chat).converse([user("x")])
    assert turn.messages == (first,) and turn.finish == "stop" and engine.hold == {100: False}


def test_a_stream_shows_whole_characters_calls_and_answers_but_no_special_token(chat: ChatFormat) -> None:
    first = Message("assistant", "Look: \U0001f642\u4e2d", (call("12+30"),))
    second = Message("assistant", "It is <tool_call> 42 \u00e9.")
    engine = ScriptedEngine([said(chat, first, second)])
    events = list(Session(engine, chat, Adder()).stream(user("What is 12 + 30?"), SamplingParams(seed=4)))
    shape = [
        type(e)
        for i, e in enumerate(events)
        if i == 0 or not isinstance(e, TextDelta) or type(events[i - 1]) is not TextDelta
    ]
    assert shape == [TextDelta, ToolCalled, ToolReturned, TextDelta, Done]
    cut = next(i for i, e in enumerate(events) if isinstance(e, ToolCalled))
    assert "".join(e.text for e in events[:cut] if isinstance(e, TextDelta)) == first.content
    assert "".join(e.text for e in events[cut:] if isinstance(e, TextDelta)) == second.content
    assert all("\ufffd" not in e.text for e in events if isinstance(e, TextDelta))
    assert events[cut : cut + 2] == [ToolCalled(call("12+30")), ToolReturned(call("12+30"), "42")]
    done = events[-1]
    assert isinstance(done, Done) and done.turn.messages == (first, Message("tool", "42"), second)
    assert engine.params[100].seed == 4 and engine.state[100] == "gone"


def test_bytes_that_never_become_a_character_are_shown_once_at_the_end_as_in_the_message(chat: ChatFormat) -> None:
    t = chat.tokenizer
    script = [*t.encode("ab"), *t.encode_bytes("\u4e2d".encode()[:2]), t.im_end]
    events = list(Session(ScriptedEngine([script]), chat).stream(user("x")))
    done = events[-1]
    assert isinstance(done, Done)
    assert "".join(e.text for e in events if isinstance(e, TextDelta)) == done.turn.messages[0].content == "ab\ufffd"


def test_closing_a_stream_cancels_its_request(chat: ChatFormat) -> None:
    engine = ScriptedEngine([said(chat, Message("assistant", "a long answer"))])
    stream = Session(engine, chat, Adder()).stream(user("x"))
    next(stream)
    assert engine.state[100] == "live"
    stream.close()  # type: ignore[attr-defined]
    assert engine.state[100] == "gone"


def test_a_long_conversation_loses_its_oldest_exchanges_but_never_system_or_question(chat: ChatFormat) -> None:
    system, last = Message("system", "Be brief."), Message("user", "last question")
    talk = tuple(
        m for i in range(8) for m in (Message("user", f"question {i}"), Message("assistant", f"answer {i} " * 5))
    )
    session = Session(ScriptedEngine([]), chat)
    whole = (system, *talk, last)
    kept = session.fit(whole)
    assert kept[0] == system and kept[-1] == last and kept[1].role == "user" and 2 < len(kept) < len(whole)
    assert kept[1:] == whole[-len(kept) + 1 :]
    assert len(chat.render(kept, add_generation_prompt=True).ids) <= 300
    assert session.fit((system, last)) == (system, last)
    monster = (Message("user", "word " * 500),)
    assert session.fit(monster) == monster
    with pytest.raises(ModelError):
        next(session.stream(monster))


def restless_model(vocab_size: int) -> GPT:
    """A random model that often calls tools and ends turns."""
    config = GPTConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        intermediate_size=48,
        max_position_embeddings=256,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    model = GPT(config)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.ones_like(p) if p.ndim == 1 else torch.randn_like(p) * 0.3)
        model.lm_head.weight[[2, 4, 5]] *= 4  # <|im_end|>, <tool_call>, </tool_call>
    return model.eval()


def test_with_a_real_engine_turns_are_as_probable_as_the_model_says_through_all_tool_calls(chat: ChatFormat) -> None:
    model = restless_model(320)
    engine = Engine(model, max_batch=4)
    tools = Adder()
    questions = [user(f"question {i % 5}") for i in range(12)]
    params = SamplingParams(max_tokens=60, seed=2)
    turns = Session(engine, chat, tools, max_rounds=3).converse(questions, params)
    assert engine.idle and not engine._requests
    assert sum(len(t.messages) > 1 for t in turns) >= 3  # else this test would show nothing
    for turn, scores in zip(turns, score(model, [t.prompt_ids + t.ids for t in turns]), strict=True):
        assert len(turn.ids) == len(turn.mask) == len(turn.logprobs)
        wanted = [s * m for s, m in zip(scores[len(turn.prompt_ids) - 1 :], turn.mask, strict=True)]
        assert turn.logprobs == pytest.approx(wanted, abs=1e-4)
    again = Session(Engine(model, max_batch=12), chat, tools, max_rounds=3).converse(questions, params)
    assert [t.ids for t in again] == [t.ids for t in turns]
    with EngineLoop(Engine(model, max_batch=3)) as loop:
        session = Session(loop, chat, tools, max_rounds=3)
        assert [t.ids for t in session.converse(questions, params)] == [t.ids for t in turns]
        with ThreadPoolExecutor(5) as pool:
            seeds = [derive_seed(2, i) for i in range(12)]
            streams = pool.map(lambda q, s: list(session.stream(q, replace(params, seed=s))), questions, seeds)
            done = [events[-1] for events in streams]
        assert [d.turn.ids for d in done if isinstance(d, Done)] == [t.ids for t in turns]
        assert loop.busy == 0
