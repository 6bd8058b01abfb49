"""rl/guards.py: a scripted hack trips it, an honest run does not, and one resumed judges as one undisturbed."""

from __future__ import annotations

import json
import random
from collections.abc import Callable

import pytest

from stateofgpt.errors import ConfigError
from stateofgpt.rl.guards import GuardConfig, Look, Watcher, mean_and_error

N = 48
Script = Callable[[int], dict[str, float]]


def looks(script: Script, *, n: int = 12, every: int = 4, seed: int = 0, noise: float = 0.5) -> list[Look]:
    """Looks whose means follow a script; prompts differ from each other, and each answer from the one before."""
    rng = random.Random(seed)
    hard = [rng.gauss(0, 0.6) for _ in range(N)]
    made = []
    for i in range(n):
        at = {"reward": 0.0, "score": 0.7, "kl": 0.1 * i, "entropy": 0.14, "length": 33.0, **script(i)}
        scores = tuple(at["score"] + h + rng.gauss(0, noise) for h in hard)
        rewards = tuple(at["reward"] + rng.gauss(0, 0.1) for _ in hard)
        made.append(Look(every * i, at["kl"], at["entropy"], at["length"], scores, rewards))
    return made


def stopped(script: Script, config: GuardConfig | None = None, **kwargs: float) -> tuple[int | None, str, Watcher]:
    """(the look at which it stopped, why, the watcher)."""
    watcher = Watcher(config or GuardConfig())
    for i, look in enumerate(looks(script, **kwargs)):  # type: ignore[arg-type]
        if why := watcher.see(look):
            return i, why, watcher
    return None, "", watcher


def honest(i: int) -> dict[str, float]:
    """The ordinary laptop run: reward and truth rise and settle, entropy falls to a third, answers grow by a tenth."""
    up = 1 - 0.5**i
    return {"reward": -0.15 + 0.75 * up, "score": 0.7 + 0.4 * up, "entropy": 0.14 - 0.1 * up, "length": 33 + 5 * up}


def hacked(i: int) -> dict[str, float]:
    """The truth rises for two looks and then falls away while the reward goes on."""
    return {"reward": 0.3 * i, "score": 0.7 + 0.2 * min(i, 2) - 0.3 * max(0, i - 2)}


def test_an_honest_run_is_never_stopped_whatever_the_noise() -> None:
    for seed in range(200):
        at, why, watcher = stopped(honest, seed=seed)
        assert at is None, f"seed {seed}: {why}"
        assert watcher.best is not None and watcher.best.step > 0


def test_a_reward_that_rises_while_the_held_out_score_falls_is_stopped_at_the_best() -> None:
    for seed in range(20):
        at, why, watcher = stopped(hacked, seed=seed)
        assert at is not None and 4 <= at <= 7, f"seed {seed}: {at}"
        assert watcher.best is not None and watcher.best.step in (4, 8, 12)
        assert "held-out score fell" in why and f"kept is the policy of iteration {watcher.best.step}" in why
        assert "\n" not in why and not why.endswith(".")


def test_a_fall_without_a_rise_of_the_reward_is_no_hack() -> None:
    at, _, watcher = stopped(lambda i: {"reward": -0.3 * i, "score": 0.7 - 0.3 * i})
    assert at is None and watcher.bad == 0


def test_a_policy_that_was_never_better_is_given_up_for_the_one_it_began_with() -> None:
    at, why, watcher = stopped(lambda i: {"reward": 0.3 * i, "score": 0.7 - 0.4 * i})
    assert at == 2 or at == 3
    assert watcher.best is watcher.looks[0] and "kept is the policy it began with" in why


@pytest.mark.parametrize(
    ("script", "word"),
    [
        (lambda i: {"reward": 0.1 * i, "entropy": 0.14 * 0.5 ** (3 * i)}, "entropy fell"),
        (lambda i: {"reward": 0.1 * i, "length": 33.0 * 2**i}, "answers grew"),
        (lambda i: {"reward": 0.1 * i, "length": 33.0 / 2**i}, "answers shrank"),
    ],
)
def test_entropy_and_length_have_limits_of_their_own(script: Script, word: str) -> None:
    at, why, _ = stopped(script)
    assert at == 3 and word in why, why  # past the limit at the second look after the first, and at the third
    for name in ("entropy_floor", "length_drift"):
        none = GuardConfig(**{name: None})  # type: ignore[arg-type]
        if ("entropy" in word) == (name == "entropy_floor"):
            assert stopped(script, none)[0] is None


def test_one_bad_look_is_not_enough_and_a_good_one_begins_the_count_again() -> None:
    dip = {4: 0.2, 5: 1.1, 6: 0.2, 7: 1.1}
    at, _, _ = stopped(lambda i: {"reward": 0.2 * i, "score": dip.get(i, 1.1 if i else 0.7)})
    assert at is None
    at, _, _ = stopped(lambda i: {"reward": 0.2 * i, "score": dip.get(i, 1.1 if i else 0.7)}, GuardConfig(patience=1))
    assert at == 4


def test_a_policy_past_a_limit_is_never_the_best_whatever_its_score() -> None:
    told = {1: {"score": 0.9}, 2: {"score": 3.0, "entropy": 0.001}, 3: {"score": 3.0, "length": 200.0}}
    _, _, watcher = stopped(lambda i: {"reward": 0.1 * i, **told.get(i, {})}, n=4, noise=0.0)
    assert watcher.best is not None and watcher.best.step == 4
    free = GuardConfig(entropy_floor=None, length_drift=None)
    _, _, watcher = stopped(lambda i: {"reward": 0.1 * i, **told.get(i, {})}, free, n=4, noise=0.0)
    assert watcher.best is not None and watcher.best.step == 8


def closed(script: Script, config: GuardConfig | None = None, **kwargs: float) -> tuple[str, Watcher]:
    """(what is said after the last look, the watcher)."""
    watcher = Watcher(config or GuardConfig())
    for look in looks(script, **kwargs):  # type: ignore[arg-type]
        watcher.see(look)
    return watcher.close(), watcher


def test_a_policy_that_ends_below_what_it_began_with_is_given_up_though_the_reward_fell_too() -> None:
    fell = lambda i: {"reward": -0.3 * i, "score": 0.7 - 0.4 * i}  # noqa: E731
    why, watcher = closed(fell, n=2)
    assert "below the 0." in why and why.endswith("kept is the policy it began with") and "\n" not in why
    assert watcher.bad == 0  # no guard would have stopped it
    rose_and_fell = lambda i: {"reward": 0.0, "score": (0.7, 1.5, 0.2)[i]}  # noqa: E731
    why, _ = closed(rose_and_fell, n=3)
    assert why.endswith("kept is the policy of iteration 4")


def test_a_policy_that_ends_surely_below_its_best_is_given_up_for_it() -> None:
    why, watcher = closed(lambda i: {"reward": 0.0, "score": (0.5, 1.5, 1.0)[i]}, n=3)
    assert watcher.looks[-1].score > watcher.looks[0].score
    assert f"surely below the {watcher.looks[1].score:.2f} of iteration 4" in why


def test_what_rose_and_settled_is_published_as_it_ended_nearly_always() -> None:
    given_up = [bool(closed(honest, seed=seed)[0]) for seed in range(200)]
    assert sum(given_up) <= 40  # looks of independent noise: those of one training are alike, and give up fewer
    assert not any(closed(honest, seed=seed, noise=0.0)[0] for seed in range(5))


def test_nothing_is_given_up_where_nothing_is_judged_or_stopped_or_only_one_look_was_taken() -> None:
    fell = lambda i: {"reward": -0.3 * i, "score": 0.7 - 0.4 * i}  # noqa: E731
    assert closed(fell, GuardConfig(fall=None))[0] == "" and closed(fell, GuardConfig(stop=False))[0] == ""
    assert closed(fell, n=1)[0] == "" and Watcher(GuardConfig()).close() == ""
    past = {1: {"score": 3.0, "length": 200.0}}  # better than the best, and past a limit: one such look stops nothing
    assert closed(lambda i: {"reward": 0.1 * i, **past.get(i, {})}, n=2)[0] == ""


def test_told_not_to_stop_it_only_watches() -> None:
    at, _, watcher = stopped(hacked, GuardConfig(stop=False))
    assert at is None and watcher.bad >= 5 and len(watcher.looks) == 12


def test_a_watcher_that_was_stored_as_json_judges_as_one_that_was_not() -> None:
    seen = looks(hacked, seed=3)
    whole = Watcher(GuardConfig())
    verdicts = [whole.see(look) for look in seen]
    for cut in range(1, len(seen)):
        stored = json.loads(json.dumps([look.as_json() for look in seen[:cut]]))
        resumed = Watcher.resumed(GuardConfig(), stored)
        assert [resumed.see(look) for look in seen[cut:]] == verdicts[cut:], cut
        assert resumed.best == whole.best and resumed.bad == whole.bad


def test_the_share_won_counts_ties_as_half() -> None:
    watcher = Watcher(GuardConfig())
    first = Look(0, 0.0, 0.1, 30.0, (0.0, 1.0, 2.0, 3.0), (0.0,) * 4)
    watcher.see(first)
    assert watcher.won(first) == 0.5
    assert watcher.won(Look(4, 0.1, 0.1, 30.0, (1.0, 1.0, 1.0, 4.0), (0.0,) * 4)) == pytest.approx(2.5 / 4)


def test_the_error_of_a_paired_difference_is_that_of_the_mean() -> None:
    mean, error = mean_and_error([1.0, 2.0, 4.0], [0.0, 0.0, 0.0])
    assert mean == pytest.approx(7 / 3)
    squares = sum((x - 7 / 3) ** 2 for x in (1, 2, 4)) / 2
    assert error == pytest.approx((squares / 3) ** 0.5)
    assert mean_and_error([1.0], [0.5]) == (0.5, 0.0)


@pytest.mark.parametrize(
    "wrong",
    [{"every": -1}, {"prompts": 1}, {"patience": 0}, {"entropy_floor": 1.0}, {"length_drift": 1.0}, {"fall": -0.1},
     {"errors": float("nan")}],
)  # fmt: skip
def test_a_limit_that_cannot_be_is_refused_by_name(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        GuardConfig(**wrong)  # type: ignore[arg-type]
