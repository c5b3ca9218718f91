r"""Parser of an amount: one number with what people write around it, such as units, words and currency signs.

``x = -5``, ``\$12\,500.00``, ``12\text{ cm}^2`` and ``about 72 pens`` are amounts; ``5!``, ``2x``, ``5\pi``,
``x - 5`` and ``5 or 6`` are none, though they hold a number. All functions take any text, and cost time
linear in its length.
"""

import functools
import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

MAX_CHARACTERS = 300

_MINUS = dict.fromkeys("\u2212\ufe63\uff0d\u2010\u2011", "-")
_SPACES = dict.fromkeys("\u00a0\u2007\u2009\u202f", " ")
_DIGITS = {chr(0xFF10 + digit): str(digit) for digit in range(10)}
_SYMBOLS = {
    "\u00b2": "^2",
    "\u00b3": "^3",
    "\u00b0": r"^\circ ",
    "\u00b7": r"\cdot ",
    "\u00d7": r"\times ",
    "\u00bc": r"\frac{1}{4}",
    "\u00bd": r"\frac{1}{2}",
    "\u00be": r"\frac{3}{4}",
    "\u221e": r"\infty ",
    "\u03c0": r"\pi ",
    "\u2264": r"\le ",
    "\u2265": r"\ge ",
    "\u2260": r"\ne ",
    "\u2248": r"\approx ",
    "\u2208": r"\in ",
    "\u222a": r"\cup ",
    "\u2229": r"\cap ",
    "\u2205": r"\emptyset ",
}
_PLAIN = str.maketrans({**_MINUS, **_SPACES, **_DIGITS, **_SYMBOLS, "\uff05": "%", "\uff0b": "+"})
# A dash is a minus sign where a number begins, and elsewhere may mean a range.
_LEADING_DASH = re.compile(r"(^|[=:(,{\[])(\s*)[\u2013\u2014]")
_ROOT = re.compile(r"\u221a\s*(?:([0-9]+|[a-zA-Z])|\(([^()]*)\)|\{([^{}]*)\})")
_PERIOD = re.compile(r"\\bar\s*(?=\{[0-9]+\})")
_PI = re.compile(r"(?<![a-zA-Z\\])pi(?![a-zA-Z])")
_EMPTY_SET = re.compile(r"\\varnothing(?![a-zA-Z])")
_THIN = r"\\[,;: ]|~| "
# Digits in groups are one number unless more of the list that they may be part of stands beside them.
_THOUSANDS = re.compile(
    r"(?<![0-9.])(?<![0-9],)[1-9][0-9]{0,2}(?:(?:,[0-9]{3})+|(?:,[0-9]{2})+,[0-9]{3})(?!,?[0-9])"  # or lakhs
    rf"|(?<![0-9.])[1-9][0-9]{{0,2}}(?P<by>\{{,\}}|'|\u2019|{_THIN})[0-9]{{3}}(?:(?P=by)[0-9]{{3}})*(?![0-9])"
)
_BRACKETS = re.compile(r"\\[{}]|[()\[\]]")
_SEPARATORS = re.compile(r"[^0-9]")


def plain(text: str, *, has_lists: bool = True) -> str:
    """Write minus signs, separators of thousands, and some symbols as a parser of LaTeX expects them.

    Args:
        text: Any text.
        has_lists: Whether ``(1,200)`` may be a point, an interval or the like, as against 1200.
    """
    text = text.replace(r"\!", "").translate(_PLAIN)
    text = _ROOT.sub(r"\\sqrt{\1\2\3}", _LEADING_DASH.sub(r"\1\2-", text))
    text = _EMPTY_SET.sub(r"\\emptyset", _PERIOD.sub(r"\\overline", text))
    text = _THOUSANDS.sub(functools.partial(_joined, has_lists=has_lists), _PI.sub(r"\\pi ", text))
    text = text.strip()
    if not text.endswith(".."):
        text = text.removesuffix(".")
    return text.rstrip("\\ \n\t")


def _joined(match: re.Match[str], *, has_lists: bool) -> str:
    """Return a number without its separators; ``0,100`` in brackets is an interval, or a point, or a set."""
    if has_lists and "," in match[0].replace("{,}", ""):
        brackets = _BRACKETS.findall(match.string, 0, match.start())
        is_group = re.search(",0", match[0])  # which no coordinate begins with
        if not is_group and 2 * sum(each in (r"\{", "(", "[") for each in brackets) > len(brackets):
            return match[0]
    return _SEPARATORS.sub("", match[0])


@dataclass(frozen=True)
class Amount:
    """Number that a text states.

    Attributes:
        value: The number as it is written, not divided by 100 for percent.
        is_percent: A percent sign, or the word, follows it.
    """

    value: Fraction
    is_percent: bool = False

    def is_same(self, other: "Amount") -> bool:
        """Return True for the same amount; of percent, the sign may be left out, or be worked out."""
        if self.is_percent == other.is_percent:
            return self.value == other.value
        percent, number = (self, other) if self.is_percent else (other, self)
        # Who leaves out the sign of less than one percent has probably meant a fraction.
        is_left_out = percent.value == number.value and abs(number.value) >= 1
        return is_left_out or percent.value / 100 == number.value


class _Token(NamedTuple):
    kind: str
    text: str
    start: int
    end: int


_DECIMAL = r"(?:[0-9]+(?:\.[0-9]+)?|\.[0-9]+)"
_FRAC = (
    rf"\\[cdt]?frac\s*(?:\{{\s*(-?{_DECIMAL})\s*\}}\s*\{{\s*(-?{_DECIMAL})\s*\}}"
    r"|([0-9])\s*([0-9])|\{([0-9]+)\}([0-9])"
    r"|([0-9])\{([0-9]+)\})"
)
_NUMBERS = [
    re.compile(r"(?P<fixed>[0-9]*\.[0-9]*)\\overline\{(?P<period>[0-9]+)\}"),
    re.compile(
        rf"(?:(?P<mantissa>{_DECIMAL})\s*(?:\\times|\\cdot|\*|x)\s*)?10\s*\^\s*"
        r"(?:\{\s*(?P<power>-?[0-9]{1,2})\s*\}|(?P<digit>-?[0-9]{1,2})\b)"
    ),
    re.compile(rf"(?P<mantissa>{_DECIMAL})[eE](?P<power>[-+]?[0-9]{{1,2}})(?![0-9a-zA-Z.])"),
    re.compile(rf"(?P<whole>[0-9]+)?\s*{_FRAC}"),
    re.compile(rf"(?:(?P<whole>[0-9]+)\s+)?({_DECIMAL})\s*/\s*({_DECIMAL})"),
    re.compile(rf"({_DECIMAL})"),
]
_TEXT = re.compile(
    r"\\(?:text|textbf|textit|textrm|underline|fbox|hbox|mathrm|mathbf|mbox|operatorname)\s*\{([^{}]*)\}"
)
_TOKENS = {
    "space": re.compile(rf"(?:\s|{_THIN}|\\q?quad(?![a-zA-Z]))+"),
    "text": _TEXT,
    "degree": re.compile(r"\^\s*(?:\{\s*\\circ\s*\}|\\circ(?![a-zA-Z]))|\\degree(?![a-zA-Z])"),
    "ordinal": re.compile(
        r"\^\s*(?:\\text\s*\{(?:th|st|nd|rd)\}|\{\s*(?:\\text\s*\{(?:th|st|nd|rd)\}|(?:th|st|nd|rd))\s*\})"
    ),
    "power": re.compile(r"\^\s*(?:[0-9]|\{\s*-?[0-9]\s*\})"),
    "word": re.compile(r"[^\W\d_]+"),
    "percent": re.compile(r"\\?%"),
    "currency": re.compile(r"\\?\$|[\u20ac\u00a3\u00a5\u20b9]"),
    "sign": re.compile(r"[-+]"),
    "mark": re.compile(r"[:.,;]"),
    "bracket": re.compile(r"[()]"),
    "slash": re.compile(r"/|\\cdot(?![a-zA-Z])"),
}
_PATTERNS = [*(("number", number) for number in _NUMBERS), *_TOKENS.items()]
# Where any word may stand, these still change the number: before it, right behind it, or anywhere behind it.
_FUNCTIONS = frozenset(["pi", "sqrt", "log", "ln", "sin", "cos", "tan", "exp", "mod", "factorial"])
_CHANGES_BEFORE = _FUNCTIONS | frozenset(
    """
    negative minus plus not than least most below above under over half third quarter twice double triple
    square cube squared cubed root or
    """.split()  # noqa: SIM905
)
_CHANGES_NEXT = _FUNCTIONS | frozenset(
    """
    squared cubed halves third thirds fourth fourths fifths sixths sevenths eighths ninths tenths
    hundredths thousandths millionths
    """.split()  # noqa: SIM905
)
_CHANGES_BEHIND = frozenset(["half", "or", "plus", "minus"])
# One letter is a variable, unless it is one of these behind the number of a word problem.
_LETTERS = frozenset("mghls")
_SCALES = {
    "dozen": 12,
    "hundred": 100,
    "thousand": 10**3,
    "million": 10**6,
    "billion": 10**9,
    "trillion": 10**12,
    "mn": 10**6,
    "bn": 10**9,
}
_SCALES |= {f"{word}s": value for word, value in _SCALES.items() if len(word) > 2}
# In front of "=": a product, a sum, a power or a function of a variable, whose value is not the variable's.
_OF_A_VARIABLE = re.compile(
    r"(?:(?<=[0-9})])\s*(?![mghlsL](?![a-zA-Z])|x\s*\\?[$0-9])|[-+*/{|]\s*"
    r"|\\(?:sqrt|cdot|times|sin|cos|tan|log|ln)\s*\{?)(?<![a-zA-Z_])[a-zA-Z](?![a-zA-Z])"
    r"|(?<![a-zA-Z])(?:[a-fi-kn-rt-zA-KM-Z]|(?<![0-9])(?<![0-9] )[mghlsL])\s*"
    r"(?:[-+*/^|]|\\(?:not|cdot|times)(?![a-zA-Z]))"
)
_UNITS = frozenset(
    """
    cm mm km dm nm ft in feet foot inch inches yard yards yd mile miles mi meter meters metre metres kilometer
    kilometers kg mg gram grams lb lbs pound pounds oz ounce ounces ton tons ml liter liters litre litres cup
    cups gallon gallons sec secs second seconds min mins minute minutes hr hrs hour hours day days week weeks
    month months year years mph kmh kph cent cents dollar dollars usd euro euros degree degrees radians square
    sq cubic unit units per percent people students ways th st nd rd
    """.split()  # noqa: SIM905
)


def amount_in(text: str, *, any_words: bool) -> Amount | None:
    r"""Parse a text as one amount; None if it is something else.

    Args:
        text: A text, at most ``MAX_CHARACTERS`` long; a longer one is None.
        any_words: Whatever words stand around the number are taken for a sentence and its unit, as fits word
            problems. Otherwise only known units and ``\text{...}`` are; ``2ab`` may be a product.
    """
    if len(text) > MAX_CHARACTERS:
        return None
    text = re.sub(r"\\approx(?![a-zA-Z])", "=", plain(text, has_lists=not any_words))
    text = re.sub(r"\\(?:left|right|displaystyle|bf|rm|it)(?![a-zA-Z])", "", text).strip("*`\"' ")
    left, equals, right = _without_parentheses(text).rpartition("=")
    if equals and (left.rstrip()[-1:] in ("<", ">", "!") or re.search(r"[,;]|\band\b|\bor\b", left)):
        return None
    if any_words and equals and _OF_A_VARIABLE.search(_TEXT.sub("", left)):
        return None
    right = _without_parentheses(right)
    tokens = _tokenize(right)
    if tokens is None or [token.kind for token in tokens].count("number") != 1:
        return None
    place = next(i for i, token in enumerate(tokens) if token.kind == "number")
    value = _value(tokens[place].text)
    sign = _sign(tokens[:place], any_words=any_words)
    suffix = _suffix(tokens[place:], any_words=any_words)
    if value is None or sign is None or suffix is None:
        return None
    scale, is_percent = suffix
    return Amount(sign * value * scale, is_percent)


def _without_parentheses(text: str) -> str:
    text = text.strip()
    for opening, closing in ("()", "[]", ("$", "$"), ("{", "}")):
        inner = text[1:-1]
        if text[:1] == opening and text[-1:] == closing and not set("()[]$") & set(inner) and inner:
            text = inner.strip()
    return text


def _tokenize(text: str) -> list[_Token] | None:
    """Split a text into tokens without the spaces; None if something else is in it."""
    tokens: list[_Token] = []
    place = 0
    while place < len(text):
        found = next(((kind, m) for kind, pattern in _PATTERNS if (m := pattern.match(text, place))), None)
        if found is None:
            return None
        kind, match = found
        place = match.end()
        if kind == "text":
            inner = match[1].strip()
            if re.search(r"[0-9]", inner):  # a number in bold, say
                within = _tokenize(inner)
                if within is None:
                    return None
                tokens += [_Token(*token[:2], match.start(), place) for token in within]
                continue
        if kind != "space":
            tokens.append(_Token(kind, match[0], match.start(), place))
    return tokens


def _value(text: str) -> Fraction | None:
    match = next(match for number in _NUMBERS if (match := number.fullmatch(text)))
    named = match.groupdict()
    if "period" in named:
        digits, period = named["fixed"].partition(".")[2], named["period"]
        tail = Fraction(int(period), 10 ** len(digits) * (10 ** len(period) - 1))
        return Fraction(f"0{named['fixed']}0") + tail
    if "power" in named:
        power = int(named["power"] or named["digit"])
        return Fraction(named["mantissa"] or 1) * Fraction(10) ** power
    whole = named.get("whole")
    numerator, denominator = ([part for part in match.groups()[whole is not None :] if part] + ["1"])[:2]
    if Fraction(denominator) == 0:
        return None
    return Fraction(numerator) / Fraction(denominator) + int(whole or 0)


def _sign(before: Sequence[_Token], *, any_words: bool) -> int | None:
    """Return the sign of a number, from what stands before it; None if that is no part of an amount."""
    rest = [token for token in before if token.kind != "currency"]
    sign = 1
    if rest and rest[-1].kind == "sign":
        sign = -1 if rest.pop().text == "-" else 1
        # After a word it is a sign; after a variable it would subtract.
        if rest and rest[-1].text != ":" and not (any_words and _is_word(rest[-1])):
            return None
    # The article is no variable: a word follows it.
    rest = [token for i, token in enumerate(rest) if token.text != "a" or not rest[i + 1 : i + 2]]
    kinds = {"mark", "text"} | ({"bracket"} if any_words else set())
    fits = all(token.kind in kinds or (any_words and _is_word(token)) for token in rest)
    return sign if fits and not any(_CHANGES_BEFORE.intersection(_words(token)) for token in rest) else None


def _words(token: _Token) -> list[str]:
    r"""Return the words of a token, such as a word or a ``\text{...}``."""
    return re.findall(r"[a-z]+(?:-[a-z]+)*", re.sub(r"\\[a-z]+\s*\{", "", token.text.lower()))


def _is_word(token: _Token) -> bool:
    word = token.text.lower()
    # One character of Chinese, say, is a word.
    return token.kind == "text" or (token.kind == "word" and (len(word) > 1 or word > "\u2e7f"))


def _suffix(tokens: Sequence[_Token], *, any_words: bool) -> tuple[int, bool] | None:
    """Return the factor after a number, the first token, and whether percent follow; None: no amount."""
    scale, is_percent = 1, False
    is_scaling = True  # no other word has followed the number yet
    for i, (previous, token) in enumerate(itertools.pairwise(tokens)):
        word = token.text.lower()
        words = _words(token)
        if is_scaling and words and token.kind == "text":
            if words[0] in _CHANGES_NEXT:
                return None
            num_scales = next((n for n, each in enumerate(words) if each not in _SCALES), len(words))
            scale *= math.prod(_SCALES[each] for each in words[:num_scales])
        if token.kind == "text" and _CHANGES_BEHIND.intersection(words):
            return None
        is_scaling &= token.kind == "currency" or (bool(words) and words[-1] in _SCALES)
        is_attached = previous.end == token.start and previous.kind == "number"
        match token.kind:
            case "word" if word in _CHANGES_BEHIND or (i == 0 and word in _CHANGES_NEXT):
                return None
            case "percent":
                is_percent = True
            case "currency" | "text" | "degree" | "ordinal":
                pass
            case "mark" if previous.kind != "number" or token.text != ".":
                pass
            case "mark" if tokens[i + 2 : i + 3] and tokens[i + 2].kind == "mark":
                return None  # "0.333...": the digits go on
            case "mark":
                pass
            case "power" | "slash" if previous.kind in ("word", "text", "power"):
                pass
            case "word" if is_scaling and any_words and not is_attached:
                scale *= _SCALES[word]
            case "word" if word in _UNITS or (previous.kind in ("degree", "slash") and len(word) == 1):
                is_percent |= word == "percent"
            case "word" if any_words and word in _LETTERS and token.text != "M":  # millions
                pass
            case "word" if (
                any_words and _is_word(token) and not (is_attached and word.isascii() and len(word) < 4)
            ):
                pass
            case "bracket" if any_words:
                pass
            case _:
                return None
    return scale, is_percent
