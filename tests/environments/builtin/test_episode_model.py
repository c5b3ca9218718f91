import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from shardes.config.loading import load_config
from shardes.environments.builtin.guess_number import GuessNumber, make_puzzle, num_ranges

ROOT = Path(__file__).parents[3]
CONFIG = load_config(ROOT / "configs" / "environments" / "guess_number.yaml", [])
ARGUMENTS = CONFIG.task.environment_arguments
RANGES = {key: ARGUMENTS[key] for key in ("numbers", "sizes")}


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(ROOT / CONFIG.model.path)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(ROOT / CONFIG.model.path)


@pytest.fixture(scope="module")
def tool():
    sys.path.insert(0, str(ROOT / "tools"))
    try:
        path = ROOT / "tools" / "make_episode_model.py"
        spec = importlib.util.spec_from_file_location(path.stem, path)
        tool = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(tool)
    finally:
        sys.path.remove(str(ROOT / "tools"))
    return tool


def test_a_conversation_is_a_token_for_each_number_and_each_word(tokenizer):
    messages = [
        {"role": "user", "content": "10-59"},
        {"role": "assistant", "content": "34"},
        {"role": "user", "content": "higher"},
    ]
    text = "<user>10-59<model>34<eos><user>higher<model>"
    assert tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == text
    ids = tokenizer(text)["input_ids"]
    assert ids == [2, 6, 106, 55, 3, 30, 1, 2, 4, 3]
    assert tokenizer.decode([30, 1, 0], skip_special_tokens=True) == "34"
    assert tokenizer("?")["input_ids"] == [107]


def test_no_range_is_on_both_sides():
    count = num_ranges(**RANGES)
    assert (str(CONFIG.task.data), str(CONFIG.task.heldout_data)) == (f"range:256:{count}", "range:0:256")


def test_the_tool_trains_on_what_the_tokenizer_and_the_environment_say(tool, tokenizer):
    assert {"numbers": list(tool.NUMBERS), "sizes": list(tool.SIZES)} == RANGES
    assert (tool.NUM_GUESSES, tool.NUM_HELDOUT) == (ARGUMENTS["guesses"], 256) == (CONFIG.task.max_turns, 256)
    assert tool.make_tokenizer().get_vocab() == tokenizer.get_vocab()
    heldout = {str(GuessNumber(**ARGUMENTS).reset(index=index)) for index in range(256)}
    ids = tool.Corpus(tokenizer).draw(torch.Generator().manual_seed(0))
    numbers = {
        index: int(word) for word, index in tokenizer.get_vocab().items() if word.isdigit() and index < 100
    }
    num_over = 0
    for episode in ids[:64].tolist():
        low, high = numbers[episode[1]], numbers[episode[3]]
        assert f"{low}-{high}" not in heldout
        for place in range(5, len(episode), 5):
            guess = numbers[episode[place]]
            assert episode[place + 1] == 1
            assert guess in (10, (low + high) // 2)
            if place + 3 >= len(episode) or episode[place + 3] == 0:
                num_over += place + 3 < len(episode)
                assert not any(episode[place + 2 :])
                break
            answer = tokenizer.decode([episode[place + 3]])
            assert answer in ("higher", "lower")
            if answer == "higher":
                low = max(low, guess + 1)
            else:
                high = min(high, guess - 1)
    assert num_over > 5
    is_answer = tool.is_guess(torch.arange(5, 17)).tolist()
    assert is_answer == [True, True, False, False, False] * 2 + [True, True]


def test_the_base_model_guesses_badly_in_the_right_format(model, tokenizer):
    environments = [GuessNumber(**ARGUMENTS) for _ in range(256)]
    texts = [f"<user>{each.reset(index=index)}<model>" for index, each in enumerate(environments)]
    is_over = [False] * 256
    for _ in range(ARGUMENTS["guesses"]):
        inputs = tokenizer(texts, return_tensors="pt")  # all of one length
        ids = model.generate(**inputs, max_new_tokens=2)[:, -2:]
        assert set(ids[:, 1].tolist()) == {1}
        for index, guess in enumerate(tokenizer.decode(ids[:, :1])):
            observation = "higher"
            if not is_over[index]:
                observation, _, is_over[index] = environments[index].step(guess)
            texts[index] += f"{guess}<eos><user>{observation or 'higher'}<model>"
    assert sum(each.numbers["success"] for each in environments) / 256 < 0.05
    assert make_puzzle(0, **RANGES).secret == 69
