"""ResumeState: what a resumed run knows, on rank 0 and after it was sent to others."""

import json

import pytest

from shardes.runs.journal import History
from shardes.runs.resume import ResumeState

HEADER = {"type": "header", "settings": {}}
PROBE = {"type": "probe", "pairs": [[[1, 2], [3]]], "log_likelihoods": [-0.1]}


def member(iteration, number, reward, **changes):
    kept = {"num_failures": 0, "num_tokens": 7, "num_scored": 2, "least": 0.1, "by_problem": [0.1, 1 / 3]}
    components = {"right": reward}
    return {"type": "member", "iteration": iteration, "member": number, "reward": reward} | (
        kept | {"components": components, "is_finite": reward is not None} | changes
    )


def update(iteration):
    return {"type": "update", "iteration": iteration, "coefficients": [0.5, -0.25], "alpha": 0.1}


def portion(iteration, number, member, values, **changes):
    part = {"indices": [*range(len(values))], "values": values, "is_finite": True} | changes
    return {"type": "portion", "iteration": iteration, "round": number, "member": member, "part": part}


RECORDS = [
    HEADER,
    PROBE,
    {"type": "kl", "iteration": 0, "kl": 0.0},
    {"type": "evaluation", "iteration": 0, "reward": 0.25},
    member(0, 0, 0.5),
    member(0, 1, 0.75),
    update(0),
    {"type": "weights", "iteration": 1, "digest": "0" * 16},
    {"type": "kl", "iteration": 1, "kl": None},
    {"type": "evaluation", "iteration": 1, "reward": 0.1, "sets": {"other": {"reward": 1.0}}},
    member(1, 2, 0.1, problems=[3, 0]),
    member(1, 0, None),
    update(1),
    {"type": "weights", "iteration": 2, "digest": "1" * 16},
]


@pytest.fixture
def state_after():
    """Return the state after some records of the journal."""

    def of(count):
        history = History()
        for record in json.loads(json.dumps(RECORDS[:count])):
            history.add(record)
        return ResumeState.from_history(history)

    return of


@pytest.mark.parametrize("count", range(len(RECORDS) + 1))
def test_the_state_that_was_sent_is_the_state(state_after, count):
    state = state_after(count)
    assert ResumeState.from_json(json.loads(json.dumps(state.to_json()))) == state


def test_a_new_run_has_done_nothing(state_after):
    for count in (0, 1):
        state = state_after(count)
        assert (state.first_iteration, state.is_cut_off, state.has_kl) == (0, False, False)
        assert not (state.results or state.updates or state.evaluation or state.kl_probe)


def test_the_first_iteration_to_do_brings_what_is_recorded_of_it(state_after):
    state = state_after(12)
    assert (state.first_iteration, state.is_cut_off) == (1, False)
    assert state.updates == [update(0)]
    assert state.digests == {1: "0" * 16}
    assert list(state.results) == [2]  # the member without a reward is asked again
    result = state.results[2]
    assert (result.member, result.reward, result.problems) == (2, 0.1, [3, 0])
    assert (result.num_tokens, result.by_problem, result.is_finite) == (7, [0.1, 1 / 3], True)
    assert state.evaluation["sets"] == {"other": {"reward": 1.0}}
    assert state.best_reward == 0.25  # of earlier evaluations: the record of this one may have to be kept yet
    assert (state.kl_probe, state.has_kl) == (PROBE, True)


def test_a_member_of_an_iteration_that_has_ended_is_no_result(state_after):
    state = state_after(14)
    assert (state.first_iteration, state.results, state.evaluation, state.has_kl) == (2, {}, None, False)
    assert state.best_reward == 0.25


def test_a_job_that_died_before_the_weights_were_recorded_is_cut_off(state_after):
    assert [count for count in range(15) if state_after(count).is_cut_off] == [7, 13]


def test_portions_of_the_iteration_that_is_not_decided_are_known_if_they_have_a_reward():
    history = History()
    old, known = portion(0, 0, 0, [0.5]), portion(1, 0, 1, [None, 0.25])
    nothing = [portion(1, 1, 1, [None, None]), portion(1, 0, 2, [0.5], is_finite=False)]
    for record in [HEADER, old, member(0, 0, 0.5), update(0), known, *nothing]:
        history.add(record)
    state = ResumeState.from_history(history)
    assert state.portions == {(0, 1): known["part"]}
    assert ResumeState.from_json(json.loads(json.dumps(state.to_json()))) == state
    with pytest.raises(ValueError, match="does not belong here"):
        history.add(portion(0, 1, 0, [0.5]))
