"""The time that a run has left counts the evaluations that are to come."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from lorica.run.progress import Remaining, pauses


def strategy(**given):
    plain = {"eval_strategy": "no", "eval_steps": None, "save_strategy": "no", "save_steps": 500}
    return SimpleNamespace(**plain | given)


def test_the_estimate_is_right_after_the_first_evaluation_and_never_jumps():
    args, last, every, step, pause = strategy(eval_strategy="steps", eval_steps=20), 200, 20, 1, 15
    remaining, clock, told = Remaining(0, pause=10.0), 0.0, []
    whole = last * step + last // every * pause
    for done in range(1, last + 1):
        clock += step
        remaining.stepped(step)
        if done % 5 == 0:  # the line of a step comes before its evaluation
            left = remaining.seconds(done, last, pauses=pauses(args, 0, last, 1.0))
            told.append((done, left, whole - clock))
        if done % every == 0:
            clock += pause
            remaining.paused(pause - 1, whole=True)
            remaining.paused(1, whole=False)  # a checkpoint after it
    for done, left, truth in told:
        if done > every:
            assert left == pytest.approx(truth)
        else:
            assert left == pytest.approx(truth, rel=0.2), "a guess until one was measured"
    assert all(b[1] < a[1] for a, b in zip(told[4:], told[5:], strict=False))


@pytest.mark.parametrize(
    ("given", "at", "wanted"),
    [
        ({}, (0, 100, 1.0), 0),
        ({"eval_strategy": "steps", "eval_steps": 30}, (0, 100, 1.0), 4),
        ({"eval_strategy": "steps", "eval_steps": 25}, (0, 100, 1.0), 4),
        ({"eval_strategy": "steps", "eval_steps": 25}, (50, 100, 1.0), 2),
        ({"eval_strategy": "epoch"}, (30, 90, 3.0), 2),
        ({"save_strategy": "steps", "save_steps": 50}, (0, 100, 1.0), 2),
    ],
)
def test_evaluations_are_counted_where_they_come(given, at, wanted):
    """Or checkpoints, where a run does not evaluate; the last step always has one."""
    assert pauses(strategy(**given), *at) == wanted
