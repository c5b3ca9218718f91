"""Environments made of tools: what the model is told, what an episode earns, and what is refused."""

import asyncio
import subprocess
import sys
import textwrap

import pytest
from transformers.utils import get_json_schema

from shardes.environments.base import EnvironmentSpec
from shardes.environments.tools import ERROR_KINDS, make_tool_factory
from shardes.rollout.conversation import Conversation
from shardes.rollout.encoding import PromptEncoder
from shardes.rollout.tool_calls import parse_tool_calls
from shardes.tasks.base import ChatTemplate
from tests.helpers.tokenizers import CHATML_TOOLS, byte_pieces

MODULE = """
import enum

class Unit(enum.Enum):
    METRE = "m"
    FOOT = "ft"

def add(a: int, b: float = 1.0) -> float:
    '''Add numbers.

    Args:
        a: The first.
        b: The second.

    Returns:
        Their sum.
    '''
    if a == 13:
        raise ArithmeticError("no thirteens")
    if a == 14:
        raise ArithmeticError
    if a == 15:
        raise MemoryError
    return a + b

async def look(words: list[str], unit: Unit | None = None) -> str:
    '''Look words up.

    Args:
        words: The words (choices: ["a", "b"]).
        unit: The unit.
    '''
    return f"{words} {unit}"

# As TRL's documentation has it: no base class, nothing of this package.
class Counter:
    def __init__(self):
        self.total, self.secret = 0, None

    def reset(self, secret: int, **kwargs) -> str | None:
        self.secret, self.total, self.columns = secret, 0, sorted(kwargs)
        return f" Reach {secret}." if secret else None

    def increase(self, by: int) -> str:
        '''
        Increase the counter.

        Args:
            by: By how much.

        Returns:
            What it is now.
        '''
        self.total += by
        return f"{self.total}"

    def again(self) -> list[dict]:
        '''Show the counter.'''
        return [{"type": "text", "text": str(self.total)}]

    def _hidden(self):
        return None

    def get_reward(self) -> float:
        return 1.0 if self.total == self.secret else 0.0

class Narrow:
    numbers = {"success": 1.0}

    def reset(self, word, length=3):
        return [{"role": "user", "content": f"{word} {length}"}]

    async def say(self, word: str):
        '''Say a word.

        Args:
            word: The word.
        '''
        return {"said": word}

    async def get_reward(self):
        return 0.5

class Broken:
    def reset(self, what=None, **kwargs):
        return {"none": None, "number": 5}[what]

    def tool(self) -> str:
        '''Do nothing.'''
        return ""

    def get_reward(self):
        return None

class Arguments(Counter):
    def __init__(self, start):
        self.start = start

class NoReset:
    def tool(self) -> str:
        '''Do nothing.'''

class NoTools:
    def reset(self, **kwargs):
        pass

    def get_reward(self):
        return 1.0

class Steps(NoTools):
    def step(self, completion):
        return "", 0.0, True

def no_docstring(a: int): ...

def no_hint(a):
    '''Do it.'''

def rest(*words: str):
    '''Do it.'''

def undescribed(a: int):
    '''Do it.'''

def unknown_type(a: Counter):
    '''Do it.

    Args:
        a: A.
    '''

def bad_hint(a: "Nothing"):
    '''Do it.'''

class Adds(NoTools):
    def add(self) -> str:
        '''Do nothing.'''
"""


@pytest.fixture
def module(tmp_path):
    (tmp_path / "their_tools.py").write_text(MODULE)
    return str(tmp_path / "their_tools.py")


@pytest.fixture
def factory(module):
    def made(reference="", *tools, **arguments):
        named = f"{module}:{reference}" if reference else ""
        return make_tool_factory(
            EnvironmentSpec(named, arguments, tuple(f"{module}:{tool}" for tool in tools))
        )

    return made


def calling(*calls):
    """A message that calls tools: their names and arguments."""
    functions = [{"name": name, "arguments": arguments} for name, arguments in calls]
    return {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "function": f} for f in functions],
    }


def answers(environment, *calls):
    """What calls return; the episode goes on after them, and has earned nothing yet."""
    step = environment.step("text", message=calling(*calls))
    observation, reward, is_done = asyncio.run(step) if asyncio.iscoroutine(step) else step
    assert (reward, is_done) == (0.0, False)
    assert [(message["role"], message["name"]) for message in observation] == [
        ("tool", name) for name, _ in calls
    ]
    return [message["content"] for message in observation]


def test_a_class_as_trl_has_it_is_an_environment(factory):
    made = factory("Counter")
    assert (made.columns, made.required) == (None, ["secret"])
    inner = made.make()._inner
    assert made.tools == [get_json_schema(inner.again), get_json_schema(inner.increase)]
    assert [tool["function"]["name"] for tool in made.tools] == ["again", "increase"]

    environment, other = made.make(), made.make()
    prompt = [{"role": "system", "content": "s"}, {"role": "user", "content": "Count."}]
    row = {"prompt": prompt, "secret": 5, "extra": 1}
    assert environment.reset(**row) == [prompt[0], {"role": "user", "content": "Count. Reach 5."}]
    assert environment._inner.columns == ["extra", "prompt"]
    assert prompt[1]["content"] == "Count."
    assert other.reset(prompt="Count.", secret=0) == "Count."
    # Without a prompt, what reset returns is the user's message.
    assert made.make().reset(secret=7) == [{"role": "user", "content": " Reach 7."}]

    calls = ("increase", {"by": 2}), ("increase", {"by": 3}), ("again", {})
    assert answers(environment, *calls) == ["2", "5", [{"type": "text", "text": "5"}]]
    assert answers(other, ("increase", {"by": 1})) == ["1"]
    assert environment.step("I have it.") == ("", 1.0, True)
    assert environment.step("So.", message={"role": "assistant", "content": "So."}) == ("", 1.0, True)
    assert (other.finish(), other.step("?")) == (0.0, ("", 0.0, True))
    assert environment.numbers["tool_calls"] == 3
    assert environment.numbers["tool_errors"] == 0
    environment.close()


def test_functions_alone_are_an_environment(factory):
    made = factory("", "add")
    assert (made.columns, made.required) == (["prompt"], ["prompt"])
    environment = made.make()
    assert environment.reset(prompt="What is 1 + 2?") == "What is 1 + 2?"
    assert answers(environment, ("add", {"a": 1, "b": 2}), ("add", {"a": 2})) == ["3", "3.0"]
    assert environment.step("3") == ("", 0.0, True)
    assert environment.finish() == 0.0
    environment.close()


def test_schemas_are_those_of_transformers_and_do_without_torch(factory, module):
    tools = factory("Counter", "add", "look").tools
    assert [tool["function"]["name"] for tool in tools] == ["add", "look", "again", "increase"]
    assert tools[0]["function"]["parameters"] == {
        "type": "object",
        "properties": {
            "a": {"type": "integer", "description": "The first."},
            "b": {"type": "number", "description": "The second."},
        },
        "required": ["a"],
    }
    script = f"""
        import sys
        from shardes.environments.base import EnvironmentSpec
        from shardes.environments.tools import make_tool_factory
        made = make_tool_factory(EnvironmentSpec("{module}:Counter", tools=("{module}:add",)))
        environment = made.make()
        environment.reset(secret=1)
        print(environment.step("", message={calling(("add", {"a": "x"}))})[0][0]["content"])
        assert "transformers" not in sys.modules
        assert len(made.tools) == 3
        assert "torch" not in sys.modules
    """
    ran = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=120
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout == str({"error": 'add: a: Input should be a valid integer, got "x"'}) + "\n"


@pytest.mark.parametrize(
    ("name", "arguments", "kind", "problem"),
    [
        ("ad", {}, "unknown_tool", "Tool ad not found; did you mean add?"),
        ("zzz", {}, "unknown_tool", "Tool zzz not found; the tools are add, again, increase."),
        ("_hidden", {}, "unknown_tool", "Tool _hidden not found; the tools are add, again, increase."),
        ("get_reward", {}, "unknown_tool", "Tool get_reward not found; the tools are add, again, increase."),
        ("add", {}, "bad_arguments", "add: missing a required argument: 'a'; it takes a, b"),
        (
            "add",
            {"a": 1, "c": 2},
            "bad_arguments",
            "add: got an unexpected keyword argument 'c'; it takes a, b",
        ),
        (
            "again",
            {"a": 1},
            "bad_arguments",
            "again: got an unexpected keyword argument 'a'; it takes nothing",
        ),
        ("increase", {"self": 1, "by": 1}, "bad_arguments", None),
        ("add", {"a": "1"}, "bad_arguments", 'add: a: Input should be a valid integer, got "1"'),
        ("add", {"a": True}, "bad_arguments", "add: a: Input should be a valid integer, got true"),
        ("add", {"a": 1.5}, "bad_arguments", None),
        ("add", {"a": None}, "bad_arguments", "add: a: Input should be a valid integer, got null"),
        ("add", [1], "bad_arguments", "add: the arguments are no JSON object"),
        ("add", {"a": 13}, "raised", "no thirteens"),
        ("add", {"a": 14}, "raised", "ArithmeticError"),
    ],
)
def test_bad_calls_come_back_to_the_model_and_are_counted(factory, name, arguments, kind, problem):
    environment = factory("Counter", "add").make()
    environment.reset(secret=3)
    # Calls before and after it are made.
    first, bad, last = answers(
        environment, ("increase", {"by": 1}), (name, arguments), ("increase", {"by": 2})
    )
    assert (first, last) == ("1", "3")
    if problem is not None:
        assert bad == str({"error": problem})
    assert bad.startswith("{'error': ")
    assert environment.numbers == {
        "tool_calls": 3.0,
        "tool_errors": 1.0,
        **{f"tool_errors_{each}": float(each == kind) for each in ERROR_KINDS},
    }
    assert environment.step("3") == ("", 1.0, True)


def test_a_call_that_cannot_be_parsed_comes_back_as_well(factory):
    environment = factory("Counter").make()
    environment.reset(secret=3)
    message = {"role": "assistant", "content": "<tool_call>oh", "tool_call_error": "not valid JSON"}
    told = [{"role": "user", "content": "{'error': 'not valid JSON'}"}]
    assert environment.step("<tool_call>oh", message=message) == (told, 0.0, False)
    assert environment.numbers["tool_errors_unparsable"] == environment.numbers["tool_errors"] == 1.0


def test_ids_of_calls_come_back(factory):
    environment = factory("", "add").make()
    message = calling(("add", {"a": 1}))
    message["tool_calls"][0]["id"] = "call00000"
    ((told,), _, _) = environment.step("", message=message)
    assert told == {"role": "tool", "name": "add", "tool_call_id": "call00000", "content": "2.0"}


def test_memory_that_is_exhausted_is_no_answer(factory):
    environment = factory("", "add").make()
    with pytest.raises(MemoryError):
        environment.step("", message=calling(("add", {"a": 15})))


def test_tools_and_methods_may_be_coroutines(factory):
    made = factory("Narrow", "add", "look")
    assert (made.columns, made.required) == (["length", "prompt", "word"], ["word"])
    environment = made.make()
    # Columns that reset does not take are kept from it.
    assert asyncio.run(environment.reset(word="ab", other=1)) == [{"role": "user", "content": "ab 3"}]
    asked = environment.reset(prompt="Say it.", word="ab", length=2)
    assert [message["content"] for message in asyncio.run(asked)] == ["Say it.", "ab 2"]
    calls = (
        ("say", {"word": "w"}),
        ("add", {"a": 1}),
        ("look", {"words": ["a"], "unit": "ft"}),
        ("look", {"words": "a"}),
    )
    said, added, looked, bad = answers(environment, *calls)
    # An enumeration's value is given as JSON has it, as TRL does.
    assert (said, added, looked) == ("{'said': 'w'}", "2.0", "['a'] ft")
    assert bad == str({"error": 'look: words: Input should be a valid array, got "a"'})
    assert answers(environment, ("look", {"words": [], "unit": "x"}))[0].startswith("{'error': ")
    assert asyncio.run(environment.step("done")) == ("", 0.5, True)
    assert asyncio.run(environment.finish()) == 0.5
    assert environment.numbers["success"] == 1.0
    asyncio.run(environment.close())


def test_what_a_class_returns_is_checked(factory):
    made = factory("Broken")
    with pytest.raises(ValueError, match="no column prompt, and reset returns None"):
        made.make().reset(what="none")
    with pytest.raises(ValueError, match="reset returns int; wanted a text, None, or messages"):
        made.make().reset(what="number", prompt="p")
    with pytest.raises(ValueError, match="get_reward returns None; wanted a number"):
        made.make().step("done")


@pytest.mark.parametrize(
    ("reference", "tools", "problem"),
    [
        ("NoReset", [], "their_tools.py:NoReset: NoReset has no reset; wanted reset\\(\\*\\*row\\)"),
        ("NoTools", [], "it has neither step nor a public method besides reset and get_reward"),
        ("Steps", ["add"], "Steps has a step, .* without task.tools"),
        ("Arguments", [], "task.environment_arguments {} fails \\(TypeError: .*missing .*'start'"),
        ("Missing", [], "has no function 'Missing'"),
        ("", ["no_docstring"], "^task.tools: .*: the tool no_docstring has no docstring; a tool needs"),
        ("", ["no_hint"], "the argument a of the tool no_hint has no type hint; a tool needs"),
        ("", ["rest"], "the tool rest takes \\*words: str, which no call can give by its name"),
        ("", ["bad_hint"], "type hints of the tool bad_hint cannot be read \\(NameError"),
        ("", ["undescribed"], "^task.tools: .*: the tool undescribed: .*no description for the argument 'a'"),
        ("", ["unknown_type"], "the tool unknown_type: Couldn't convert the type hint"),
        ("Adds", ["add"], "there are 2 tools of the name 'add'; rename them"),
    ],
)
def test_what_cannot_be_an_environment_is_refused(factory, reference, tools, problem):
    with pytest.raises(ValueError, match=problem) as error:
        assert factory(reference, *tools).tools
    assert "\n" not in str(error.value)


def test_arguments_are_those_of_the_class(factory, module):
    assert factory("Arguments", start=3).make()._inner.start == 3
    with pytest.raises(ValueError, match=r"no class that task\.environment_arguments are of"):
        factory("", "add", start=3)


def test_a_whole_episode(factory):
    """A model that is played by hand, from the row to the reward, with a mistake of each kind on its way."""
    tokenizer = byte_pieces(
        special=["<|im_start|>", "<|im_end|>"], eos="<|im_end|>", chat_template=CHATML_TOOLS
    )
    made = factory("Counter")
    environment = made.make()
    encoder = PromptEncoder(tokenizer)
    encoder.chats.check_tools(ChatTemplate(), made.tools)
    conversation = Conversation(encoder, ChatTemplate(), made.tools, end_ids=[tokenizer.eos_token_id])
    conversation.begin(environment.reset(prompt="Count.", secret=5))
    asked = conversation.tokens
    answers = [
        '<tool_call>\n{"name": "increase", "arguments": {"by": 2}}\n</tool_call>',
        '<tool_call>\n{"name": "increase_by", "arguments": {}}\n</tool_call>',
        "<tool_call>\nby 3\n</tool_call>",
        'So.\n<tool_call>\n{"name":"increase","arguments":{"by":3}}\n</tool_call>',
        "Done.",
    ]
    sampled = list(asked)
    for text in answers:
        ids = [*tokenizer(text, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        message = parse_tool_calls(text, ids, tokenizer, prefix=conversation.tokens, tools=made.tools)
        conversation.answer(ids, text, message)
        sampled = [*sampled, *ids]
        assert conversation.tokens == sampled
        observation, reward, is_done = environment.step(text, message=message)
        if not is_done:
            conversation.observe(observation)
            assert conversation.tokens[: len(sampled)] == sampled
            sampled = conversation.tokens
    assert (reward, is_done, conversation.num_reencoded) == (1.0, True, 0)

    def turn(role, content):
        return f"<|im_start|>{role}\n{content}<|im_end|>\n"

    told = ["2", str({"error": "Tool increase_by not found; did you mean increase?"}), None, "5"]
    wrong = str({"error": "The tool call is not valid JSON (Expecting value): '\\nby 3\\n</tool_call>'"})
    told = [wrong if each is None else f"<tool_response>\n{each}\n</tool_response>" for each in told]
    turns = [turn("assistant", a) + turn("user", t) for a, t in zip(answers, told, strict=False)]
    wanted = turn("user", "Count. Reach 5.") + "".join(turns) + turn("assistant", "Done.")
    assert tokenizer.decode(conversation.tokens).endswith(wanted.removesuffix("\n"))
    assert environment.numbers["tool_errors"] == 2
    assert environment.numbers["tool_errors_unparsable"] == 1
