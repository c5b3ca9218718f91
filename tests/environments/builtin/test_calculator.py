import re

import pytest

from shardes.environments.base import EnvironmentSpec
from shardes.environments.builtin.calculator import answer_reward, calculate, make_problem
from shardes.environments.loading import make_factory

MODULE = "shardes.environments.builtin.calculator"


def called(name, **arguments):
    call = {"type": "function", "function": {"name": name, "arguments": arguments}}
    return {"role": "assistant", "content": "", "tool_calls": [call]}


@pytest.mark.parametrize(
    ("expression", "value"),
    [("3 * (17 - 4.5)", "37.5"), ("7/2", "3.5"), ("1/3", "0.333333333333"), ("-12*12", "-144"), ("6/3", "2")],
)
def test_the_calculator_is_right(expression, value):
    assert calculate(expression) == value


# The numbers of each kind's text, in the order in which they stand there.
ANSWERS = [
    lambda a, b, c: a * b - c,
    lambda a, b, c: a * b + c,
    lambda a, b, c: a * b + c * b,
    lambda a, b, c: a * (b - c),
    lambda a, b, c: b // a + c,
    lambda a, b, c: a // b + c,
]


def test_answers_follow_from_the_texts():
    for index in range(600):
        problem = make_problem(index)
        numbers = list(map(int, re.findall("[0-9]+", problem.question)))
        assert problem.answer == ANSWERS[index % 6](*numbers), problem
    assert make_problem(0).answer == 43 * 64 - 46


def test_the_rows_of_the_configuration_are_different_problems():
    questions = [make_problem(index).question for index in range(1000)]
    assert not set(questions[:800]) & set(questions[800:])


def test_only_the_right_number_in_the_last_pair_earns():
    texts = [
        "<answer>2706</answer>",
        "<answer>1</answer> no, <answer> 2706.0 </answer>",
        "2706",
        "<answer>2707</answer>",
    ]
    assert answer_reward([], texts, index=[0] * 4) == [1.0, 1.0, 0.0, 0.0]


def test_an_episode_calls_the_tool_until_it_answers():
    factory = make_factory(EnvironmentSpec(reference=f"{MODULE}:WordProblems"))
    assert factory.required == ["index"]
    (schema,) = factory.tools
    assert schema["function"]["name"] == "calculate"
    assert schema["function"]["parameters"]["required"] == ["expression"]
    environment = factory.make()
    assert environment.reset(index=0)[-1]["content"].startswith("A shop has 43 boxes with 64 pencils in each")
    (said,), reward, is_done = environment.step("", message=called("calculate", expression="43*64-46"))
    assert (said["role"], said["content"], reward, is_done) == ("tool", "2706", 0.0, False)
    (said,), reward, is_done = environment.step("", message=called("calculate", expression="2**9"))
    assert "Error" in said["content"] or "error" in said["content"]
    assert environment.numbers["tool_errors"] == 1
    last = "<answer>2706</answer>"
    assert environment.step(last, message={"role": "assistant", "content": last})[2]


def test_the_function_alone_is_a_tool_for_other_problems():
    factory = make_factory(EnvironmentSpec(tools=(f"{MODULE}:calculate",)))
    assert [tool["function"]["name"] for tool in factory.tools] == ["calculate"]
    assert factory.required == ["prompt"]
