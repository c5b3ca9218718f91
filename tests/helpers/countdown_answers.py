"""200 answers to Countdown problems, right and wrong by construction, and the paper's rule for judging them.

``python -m tests.helpers.countdown_answers`` writes tests/data/countdown_answers.jsonl again: an object a
line with the problem, the response, its ``kind``, whether it is ``right`` and has the ``form`` (by
construction, no grader asked), and what the paper's rule makes of it.

The rule is written from its description, with an evaluator that cannot hang in place of Python's ``eval``:

- answer: what the first ``<answer>`` pair holds consists of digits, ``+-*/()`` and spaces; its runs of
  digits, sorted, are the given numbers; and its value in Python's arithmetic is within 1e-5 of the target;
- format: the response is ``<think>``, anything, ``</think>``, one line break, ``<answer>``, anything,
  ``</answer>``.
"""

import ast
import json
import operator
import re
from fractions import Fraction
from pathlib import Path
from random import Random

PATH = Path(__file__).parents[1] / "data" / "countdown_answers.jsonl"
NUM_ANSWERS = 200

_OPERATORS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.UAdd: operator.pos,
    ast.USub: operator.neg,
}
_MAX_BITS = 10_000


def paper_answer(response, numbers, target):
    """1.0, 0.0, or "hangs" for an answer whose value could not be computed in a lifetime."""
    pair = re.search(r"<answer>(.*?)</answer>", response, re.DOTALL)
    if pair is None or not re.search(r"^[0-9+\-*/() ]+$", pair[1]):
        return 0.0
    if sorted(map(int, re.findall(r"\d+", pair[1]))) != sorted(numbers):
        return 0.0
    try:
        return float(abs(_value(ast.parse(pair[1].strip(), mode="eval").body) - float(target)) < 1e-5)
    except OverflowError:
        return "hangs"
    except (SyntaxError, TypeError, ValueError, ZeroDivisionError):
        return 0.0


def paper_format(response):
    """1.0 or 0.0."""
    return float(re.search(r"^<think>.*?</think>\n<answer>.*?</answer>$", response, re.DOTALL) is not None)


def _value(node):
    match node:
        case ast.Constant(value=int()):
            return node.value
        case ast.UnaryOp():
            return _OPERATORS[type(node.op)](_value(node.operand))
        case ast.BinOp(op=ast.Pow()):
            base, exponent = _value(node.left), _value(node.right)
            if isinstance(base, int) and base.bit_length() * abs(exponent) > _MAX_BITS:
                raise OverflowError
            return base**exponent
        case ast.BinOp():
            return _OPERATORS[type(node.op)](_value(node.left), _value(node.right))
    raise TypeError("a call, or a list of numbers")


def make_answers():
    """The rows of the file."""
    random = Random(2025)
    made = [*_hand_made()]
    while len(made) < NUM_ANSWERS:
        made.append(_drawn(random, number=len(made)))
    return [row | {"paper": _paper(row)} for row in made]


def _paper(row):
    return {
        "answer": paper_answer(row["response"], row["numbers"], Fraction(row["target"])),
        "format": paper_format(row["response"]),
    }


def _row(kind, numbers, target, response, *, right, form):
    return {
        "kind": kind,
        "numbers": numbers,
        "target": target,
        "response": response,
        "right": right,
        "form": form,
    }


def _chat(expression, thoughts="Some of these have to be multiplied."):
    return f"<think>{thoughts}</think>\n<answer>{expression}</answer>"


def _hand_made():
    """What models really write where graders disagree, and where a careless one is fooled."""
    tidy = [
        ("powers", "98**47**47", [98, 47, 47], 1, False),
        ("powers", "9**9**9**9", [9, 9, 9, 9], 9, False),
        ("powers", "(99**99)**99**9", [99, 99, 99, 9], 1, False),
        ("powers", "2**3+4", [2, 3, 4], 12, False),
        ("powers", "3**2*5", [3, 2, 5], 45, False),
        ("powers", "10**2-1", [10, 2, 1], 99, False),
        ("floor division", "7//2+10", [7, 2, 10], 13, False),
        ("floor division", "(50//3)*4", [50, 3, 4], 64, False),
        ("floor division", "99//10-5", [99, 10, 5], 4, False),
        ("rounding", "5+1/200000", [5, 1, 200000], 5, False),
        ("rounding", "40-3/999999", [40, 3, 999999], 40, False),
        ("rounding", "1/(7*50000)+12", [1, 7, 50000, 12], 12, False),
        ("signs", "+3*5-2", [3, 5, 2], 13, True),
        ("signs", "3*(+5)-2", [3, 5, 2], 13, True),
        ("signs", "--3+10", [3, 10], 13, True),
        ("signs", "20---7", [20, 7], 13, True),
        ("line breaks in the answer", "\n3*5-2\n", [3, 5, 2], 13, True),
        ("line breaks in the answer", "\n(8 + 2) * 4\n", [8, 2, 4], 40, True),
        ("line breaks in the answer", "3*5\n-2", [3, 5, 2], 13, True),
        ("line breaks in the answer", "\t12/4", [12, 4], 3, True),
        ("leading zeros", "07+5", [7, 5], 12, True),
        ("leading zeros", "03*5", [3, 5], 15, True),
        ("decimals", "2.5*4", [2.5, 4], 10, True),
        ("decimals", "0.5+7.5", [0.5, 7.5], 8, True),
        ("decimals", "10-2.50", [10, 2.5], 7.5, True),
        ("fractional target", "7/2", [7, 2], "7/2", True),
        ("fractional target", "(1+2)/4", [1, 2, 4], 0.75, True),
        ("fractional target", "1/3", [1, 3], 0.333333, False),
        ("fractional target", "2/3", [2, 3], 0.666667, False),
        ("negative target", "2-6", [2, 6], -4, True),
        ("negative target", "6-2", [2, 6], -4, False),
        ("negative target", "3-5*4", [3, 4, 5], -17, True),
        ("division by zero", "7/(3-3)", [7, 3, 3], 7, False),
        ("division by zero", "0/0", [0, 0], 0, False),
        ("an equation", "3*5-2=13", [3, 5, 2], 13, False),
        ("an equation", "13=3*5-2", [3, 5, 2], 13, False),
        ("an equation", "3*5-2==13", [3, 5, 2], 13, False),
        ("the target alone", "13", [3, 5, 2], 13, False),
        ("the target alone", "40", [8, 2, 4], 40, False),
        ("implicit product", "2(3+4)", [2, 3, 4], 14, False),
        ("implicit product", "(2)(7)", [2, 7], 14, False),
        ("other signs", "3\u00d75-2", [3, 5, 2], 13, False),
        ("other signs", "12\u00f74", [12, 4], 3, False),
        ("other signs", "3*5\u22122", [3, 5, 2], 13, False),
        ("other signs", "[8+2]*4", [8, 2, 4], 40, False),
        ("other digits", "\u0663+\u0665", [3, 5], 8, False),
        ("LaTeX", r"3 \times 5 - 2", [3, 5, 2], 13, False),
        ("LaTeX", r"\frac{12}{4}", [12, 4], 3, False),
        ("LaTeX", "$3*5-2$", [3, 5, 2], 13, False),
        ("words around it", "The answer is 3*5-2", [3, 5, 2], 13, False),
        ("words around it", "3*5-2.", [3, 5, 2], 13, False),
        ("words around it", "`3*5-2`", [3, 5, 2], 13, False),
        ("code", "__import__('os').system('true')", [3, 5, 2], 13, False),
        ("code", "max(3,5)*2", [3, 5, 2], 10, False),
        ("code", "3*5-2 if 1 else 0", [3, 5, 2, 1, 0], 13, False),
        ("digits joined", "35-2", [3, 5, 2], 33, False),
        ("digits joined", "3 5-2", [3, 5, 2], 33, False),
        ("unbalanced", "(3*5-2", [3, 5, 2], 13, False),
        ("unbalanced", "3*5-2)", [3, 5, 2], 13, False),
        ("unbalanced", "3*5-", [3, 5], 13, False),
        ("nothing", "", [3, 5, 2], 13, False),
        ("nothing", "   ", [3, 5, 2], 13, False),
        ("nothing", "none", [3, 5, 2], 13, False),
        ("deeply nested", "(" * 15 + "3*5" + ")" * 15 + "-2", [3, 5, 2], 13, True),
    ]
    for kind, expression, numbers, target, right in tidy:
        yield _row(kind, numbers, target, _chat(expression), right=right, form=True)
    right, wrong = "<answer>3*5-2</answer>", "<answer>3+5+2</answer>"
    shaped = [
        ("a draft before the answer", f"<think>Perhaps {wrong}, no.</think>\n{right}", True, False),
        ("a draft before the answer", f"<think>Perhaps {right}, no.</think>\n{wrong}", False, False),
        ("a draft before the answer", f"<think>a</think>\n{wrong}\nWait, better: {right}", True, False),
        ("a draft before the answer", f"<think>a</think>\n{right}\nWait, better: {wrong}", False, False),
        ("a draft before the answer", f"<think>a</think>\n{wrong}{right}", True, False),
        ("tags inside tags", "<think>a<think>b</think></think>\n" + right, True, False),
        ("tags inside tags", f"<think>a</think><think>b</think>\n{right}", True, False),
        ("tags inside tags", "<think>a</think>\n<answer><answer>3*5-2</answer></answer>", False, False),
        ("tags inside tags", "<think>a</think>\n<answer><think>3*5-2</think></answer>", False, False),
        ("tags inside tags", f"<think>a</think> so\n</think>\n{right}", True, False),
        ("white space around the pairs", f"<think>a</think>{right}", True, True),
        ("white space around the pairs", f"<think>a</think>\n\n{right}", True, True),
        ("white space around the pairs", f"<think>a</think> {right}", True, True),
        ("white space around the pairs", f"\n<think>a</think>\n{right}", True, True),
        ("white space around the pairs", f"<think>a</think>\n{right} \n", True, True),
        ("white space around the pairs", f"<think>a</think>\n\n{wrong}", False, True),
        ("text around the pairs", f"Sure! <think>a</think>\n{right}", True, False),
        ("text around the pairs", f"<think>a</think>\n{right} Done.", True, False),
        ("text around the pairs", f"<think>a</think>\nso\n{right}", True, False),
        ("text around the pairs", f"a</think>\n{right}", True, False),
        ("a pair is missing", right, True, False),
        ("a pair is missing", wrong, False, False),
        ("a pair is missing", "<think>3*5-2</think>", False, False),
        ("a pair is missing", "3*5-2", False, False),
        ("a pair is missing", "", False, False),
        ("cut off", "<think>a</think>\n<answer>3*5-2", False, False),
        ("cut off", "<think>Let me try 3*5-2, then 3*5", False, False),
        ("cut off", f"<think>a</think>\n{right}<answer>3+", True, False),
        ("other tags", "<THINK>a</THINK>\n<ANSWER>3*5-2</ANSWER>", False, False),
        ("other tags", "<think>a</think>\n<result>3*5-2</result>", False, False),
        ("other tags", r"<think>a</think>\boxed{3*5-2}", False, False),
    ]
    for kind, response, is_right, form in shaped:
        yield _row(kind, [3, 5, 2], 13, response, right=is_right, form=form)


def _drawn(random, *, number):
    """A tidy answer to a drawn problem, right or wrong in one way."""
    numbers, expression, value = _expression(random)
    target = value
    kind = ("right", "right", "right", "wrong value", "wrong numbers", "wrong numbers")[number % 6]
    if kind == "wrong value":
        target += random.choice([-2, -1, 1, 2, 10])
    elif kind == "wrong numbers":
        change = random.choice(["left out", "added", "another"])
        if change == "left out":
            numbers = [*numbers, random.randint(1, 99)]
        elif change == "added":
            expression += "+0"
        else:
            numbers = [numbers[0] + 100, *numbers[1:]]
    thoughts = random.choice(
        ["Let me see.", f"{expression} is {value}.", "I try products first.\n\nThat works."]
    )
    random.shuffle(numbers)
    return _row(kind, numbers, target, _chat(expression, thoughts), right=kind == "right", form=True)


def _expression(random):
    """Numbers, an expression that uses them all once, and its value, an integer."""
    while True:
        numbers = [random.randint(1, 99) for _ in range(random.choice([3, 4]))]
        parts = [(str(number), Fraction(number)) for number in numbers]
        while len(parts) > 1:
            (left, a), (right, b) = (parts.pop(random.randrange(len(parts))) for _ in range(2))
            sign = random.choice("+-*/")
            if sign == "/" and b == 0:
                break
            result = {"+": a + b, "-": a - b, "*": a * b, "/": a / b if b else a}[sign]
            parts.append((f"({left} {sign} {right})", result))
        else:
            text, value = parts[0]
            if value.denominator == 1 and 0 < value < 1000:
                return numbers, random.choice([text, text[1:-1], text[1:-1].replace(" ", "")]), int(value)


if __name__ == "__main__":
    PATH.parent.mkdir(exist_ok=True)
    PATH.write_text("".join(json.dumps(row) + "\n" for row in make_answers()))
