"""How varied a model's answers are: several to each of some held-out prompts, by an assistant or a tricked base model.

Owns what is asked and how answers become tokens; the measures are `eval/variety.py`'s. Every model of a run is asked
the same prompts at temperature 1, and its answers are cut into tokens by the run's one tokenizer, as text: so that an
answer counts the same whichever model gave it.
"""

from __future__ import annotations

from collections.abc import Sequence

from stateofgpt.assistant.session import Session
from stateofgpt.assistant.tools import Toolbox
from stateofgpt.data.skills import Problem
from stateofgpt.eval.suites import conversation, fake_transcript_prompt, read_completion
from stateofgpt.eval.variety import variety
from stateofgpt.infer.engine import Engine, SamplingParams
from stateofgpt.model.gpt import GPT
from stateofgpt.stages.transcript import written
from stateofgpt.text.chat import ChatFormat
from stateofgpt.text.tokenizer import Tokenizer

AT_ONCE = 96


def varied(
    model: GPT,
    tokenizer: Tokenizer,
    asked: Sequence[Problem],
    each: int,
    *,
    chat: bool,
    max_tokens: int,
    seed: int,
    native: bool = False,
) -> dict[str, float]:
    """`each` answers of a model to every prompt, measured; `chat` False asks it inside a fake transcript.

    `entropy` is estimated by the mean of -log p of the tokens that were drawn, in nats; `tokens` is how many there were
    in an answer. `native` is the engine's. The other keys are those of `eval/variety.py`.
    """
    texts, logprobs = _answers(
        model, tokenizer, asked, each, chat=chat, max_tokens=max_tokens, seed=seed, native=native
    )
    drawn = [logprob for row in logprobs for logprob in row]
    tokens = [tokenizer.encode(text) for text in texts]
    return {
        "entropy": -sum(drawn) / max(1, len(drawn)),
        "tokens": len(drawn) / max(1, len(logprobs)),
        **variety([tokens[i : i + each] for i in range(0, len(tokens), each)], tokenizer.vocab_size),
        "prompts": len(asked),
        "answers": each,
    }


def _answers(
    model: GPT,
    tokenizer: Tokenizer,
    asked: Sequence[Problem],
    each: int,
    *,
    chat: bool,
    max_tokens: int,
    seed: int,
    native: bool,
) -> tuple[list[str], list[list[float]]]:
    """Texts and the log-probabilities of what was drawn, `each` to a prompt side by side."""
    engine = Engine(model, max_batch=AT_ONCE, native=native)
    if chat:
        session = Session(engine, ChatFormat(tokenizer), Toolbox())
        params = SamplingParams(max_tokens, temperature=1.0, seed=seed)
        turns = session.converse([conversation(p) for p in asked for _ in range(each)], params)
        logprobs = [[lp for lp, own in zip(t.logprobs, t.mask, strict=True) if own] for t in turns]
        return [written(turn.messages) for turn in turns], logprobs
    room = model.config.max_position_embeddings - max_tokens
    prompts = [[tokenizer.eot, *tokenizer.encode(fake_transcript_prompt(p))[-(room - 1) :]] for p in asked]
    params = SamplingParams(max_tokens=max_tokens, temperature=1.0, seed=seed, stop_ids=(tokenizer.eot,))
    made = engine.complete([ids for ids in prompts for _ in range(each)], params)
    texts = [written(read_completion(tokenizer.decode(c.ids, inner=True))) for c in made]
    return texts, [c.logprobs for c in made]
