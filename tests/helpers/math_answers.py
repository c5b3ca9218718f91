"""Answers to mathematical problems, right or wrong by construction, with what math-verify says of them.

``python -m tests.helpers.math_answers`` writes the file; it needs math-verify, whose version is in the first
line. Of the further lines, ``math_verify`` is its verdict on the texts as they are, and ``asked`` that on the
texts that the reward gives it, null where the reward does not ask.
"""

import json
from importlib.metadata import version
from pathlib import Path
from unittest import mock

from shardes.tasks.builtin import boxed as boxed_task

PATH = Path(__file__).parents[1] / "data" / "math_answers.jsonl"

MINUS, NARROW, NO_BREAK, EN_DASH = "\u2212", "\u202f", "\u00a0", "\u2013"

# By kind, cases of a right expression, answers that are right, and answers that are wrong.
CASES = {
    "as written": [
        (
            "72",
            ["72", " 72 ", "72.0", "+72", "072", "72.", "$72$", "{72}", "(72)", r"\left(72\right)"],
            ["71", "27", "-72", "720"],
        ),
        ("-3", ["-3", "-3.0", "(-3)", r"\left(-3\right)"], ["3", "-4", "-30"]),
        ("0.5", ["0.5", ".5", "0.50", "+.5"], ["5", "0.05", "-.5", "0.5000001"]),
        ("0", ["0", "-0", "0.0"], ["1", "-1", "10"]),
        (
            r"\frac{3}{4}",
            [
                r"\frac{3}{4}",
                r"\dfrac34",
                r"\tfrac{3}{4}",
                "3/4",
                "0.75",
                ".75",
                r"\frac{6}{8}",
                r"\frac 3 4",
                "¾",
            ],
            [r"\frac{4}{3}", "4/3", "0.7500001", "0.74", "34", r"-\frac{3}{4}", "3"],
        ),
        (
            r"-\frac{1}{2}",
            [r"-\frac{1}{2}", "-1/2", "-0.5", r"-\dfrac12", r"\frac{-1}{2}", r"\frac{1}{-2}"],
            [r"\frac12", "1/2", "-2", "0.5"],
        ),
    ],
    "minus signs": [
        (
            "-5",
            [
                f"{MINUS}5",
                f"{MINUS} 5",
                "- 5",
                "-\\,5",
                f"{EN_DASH}5",
                "\ufe635",
                "\uff0d5",
                f"x = {MINUS}5",
                "x = - 5",
                f"{MINUS}5.0",
            ],
            ["5", f"{MINUS}{MINUS}5", f"4{MINUS}5", f"{MINUS}6"],
        ),
        ("5", ["5", f"{MINUS}({MINUS}5)"], [f"{MINUS}5", "- 5", f"{EN_DASH}5", f"x = {MINUS}5", "\uff0d5"]),
        ("-1/2", [f"{MINUS}1/2", f"{MINUS}\\frac{{1}}{{2}}", f"{MINUS}0.5"], ["1/2", f"{MINUS}2"]),
        ("x-1", ["x-1", f"x{MINUS}1", "-1+x", f"{MINUS}1+x"], ["x+1", f"1{MINUS}x"]),
        (
            r"(-1,2)",
            [r"(-1,2)", f"({MINUS}1, 2)", r"\left(-1,2\right)"],
            [r"(1,2)", f"(2,{MINUS}1)", f"({MINUS}1,{MINUS}2)"],
        ),
    ],
    "thousands": [
        (
            "10000",
            [
                "10000",
                "10,000",
                r"10\,000",
                "10{,}000",
                r"10,\!000",
                r"10\ 000",
                "10 000",
                f"10{NO_BREAK}000",
                f"10{NARROW}000",
                "10000.00",
                "10,000.0",
                "10~000",
            ],
            ["10", "1000", "10.000", "10,00", r"1\,000", "100 000"],
        ),
        ("10,000", ["10000", r"10\,000", "10{,}000"], ["10", "1,0000"]),
        (
            r"1\,234\,567",
            ["1234567", "1,234,567", r"1\,234\,567", "1 234 567", r"1,\!234,\!567"],
            ["1234", r"1\,234", "1,234,568"],
        ),
        ("-12500", ["-12,500", f"{MINUS}12\\,500", "-12 500"], ["12,500", "-12.5"]),
        ("1234.5", ["1,234.5", r"1\,234.50", "1234.5"], ["1.2345", "12345"]),
        ("(10000, 5)", [r"(10\,000, 5)", "(10000,5)"], [r"(5, 10\,000)", "(10, 5)"]),
    ],
    "units": [
        (
            "12",
            [
                r"12\text{ cm}",
                "12 cm",
                "12cm",
                r"12\,\mathrm{cm}",
                r"12\text{ cm}^2",
                r"12\ \text{cm}^2",
                r"12 \mbox{ cm}^3",
                "12 cm^2",
                "12 cm²",
                r"12\text{ m/s}",
                r"12\,\text{m/s}^2",
                r"12\text{ square inches}",
                "12 square inches",
                "12 feet",
                "12 hours",
                r"\text{12 cm}",
                r"12\,\text{km/h}",
                r"12^\circ",
                "12°",
                r"12^{\circ}",
                "12 degrees",
            ],
            [r"13\text{ cm}", "12 cm^2 + 1", r"1.2\text{ m}", r"12^2", "-12 cm"],
        ),
        (
            r"12\text{ cm}^2",
            ["12", r"12\text{ cm}^2", "12 cm^2", r"12\,\mathrm{cm}^2"],
            ["144", "13", r"24\text{ cm}^2"],
        ),
        (r"864 \mbox{ inches}^2", ["864", r"864\text{ in}^2", "864 square inches"], ["6", "8.64"]),
        (
            r"\$10,000",
            ["10000", r"\$10000", r"10\,000", "10000 dollars", r"\$ 10,000.00", "€10,000"],
            ["10", r"\$1,000", r"-\$10,000"],
        ),
        ("7", ["7th", r"7^{\text{th}}", r"7\text{ people}", "7 people"], ["7 + 7", "70 people"]),
    ],
    "percent": [
        (
            "50",
            [r"50\%", "50%", "50 percent", r"50\text{ percent}", r"50\text{%}"],
            [r"5\%", r"0.5\%", "0.5"],
        ),
        (r"50\%", ["50", "0.5", r"\frac12", "1/2", r"50\%", "50 %", "0.50"], ["5", "5000", "0.05", r"0.5\%"]),
        ("0.5", [r"50\%", "50%", "50 percent"], [r"5\%", r"500\%", "50"]),
        ("33.3", [r"33.3\%", "33.3%"], [r"3.33\%", "0.333"]),
        (r"12.5\%", ["12.5", "0.125", r"\frac{1}{8}"], ["125", r"\frac{1}{80}"]),
        (r"\frac{3}{4}", [r"75\%"], [r"0.75\%", r"7.5\%"]),
    ],
    "operators": [
        (
            "5",
            [r"\frac{10}{2}", "2+3", "|{-5}|", r"\sqrt{25}", r"5^1", "10/2"],
            [
                "5!",
                "5x",
                "5^2",
                r"5\pi",
                r"\sqrt{5}",
                r"\pm 5",
                r"\frac{1}{5}",
                "5i",
                r"\log 5",
                "2 - 5",
                "5 - x",
                "x - 5",
                "x^5",
                r"5\sqrt{2}",
                "55",
                "5e",
                "1/5",
                r"5 \pmod 7",
            ],
        ),
        (
            "120",
            ["5!", r"5 \cdot 4 \cdot 3 \cdot 2", r"12 \times 10", "12·10"],
            ["6!", "120!", "4!", r"12 \times 11"],
        ),
        (
            "300000",
            [r"3 \times 10^5", r"3\cdot 10^{5}", "3\u00d710^5", r"300 \times 10^3"],
            [r"3 \times 10^4", r"3 \times 10^{-5}", "3 \\times 105"],
        ),
        ("0.03", [r"3 \times 10^{-2}"], [r"3 \times 10^{2}"]),
        ("1000", ["10^3", "10^{3}"], ["10^4", "103"]),
        ("5x", ["5x", r"5 \cdot x", "5*x", "x+4x"], ["5", "x", "5y", "5 + x", "x^5"]),
        (r"5\pi", [r"5\pi", "5π", r"\pi \cdot 5", r"\frac{10\pi}{2}"], ["5", "15.7", r"\pi", r"5+\pi"]),
        ("2ab", ["2ab", "2ba", r"2 a b"], ["2", "ab", "2a", "2a+b"]),
    ],
    "mixed numbers": [
        (
            r"\frac{3}{2}",
            [r"1\frac{1}{2}", "1 1/2", "1.5", r"1 \frac12", "1½", "3/2"],
            [r"1 \frac{1}{3}", "11/2", r"\frac{1}{2}"],
        ),
        (r"6\frac{1}{2}", ["6.5", "13/2", "6½", r"\frac{13}{2}"], ["3", r"\frac{6}{2}"]),
    ],
    "equations": [
        (
            "5",
            [
                "x = 5",
                "x=5",
                "y = 5",
                "f(x) = 5",
                r"\text{Answer: } 5",
                "x = 5.0",
                r"x \approx 5",
                r"n = \frac{10}{2}",
            ],
            ["x = 6", "x > 5", "x = 5, y = 6", r"x \ne 5", r"x \le 5", "x = 5x"],
        ),
        ("x=2", ["2", "x=2", "x = 2.0", "2 = x"], ["3", "x=3", "y=2", "x=-2"]),
        ("y=2x+1", ["y=2x+1", "y = 1 + 2x", "2x+1"], ["y=2x-1", "y=x+2"]),
    ],
    "several numbers": [
        ("5", [], ["5 or 6", "5, 6", r"5 \text{ and } 6", r"\{5,6\}", "(5, 5)", "5 5", "5:6"]),
        (
            "2,3",
            ["2,3", "2, 3", "3, 2", r"\{2,3\}", r"x=2, x=3", r"2 \text{ and } 3", r"2 \text{ or } 3"],
            ["2", "3", "2,4", "2,3,4", "23"],
        ),
        (r"\{1, 2\}", [r"\{2,1\}", r"\{1,2\}", "1, 2"], [r"\{1\}", r"\{1,2,3\}", r"\{1,3\}"]),
        ("(1, 2)", ["(1,2)", r"\left(1,2\right)", r"(1,\ 2)"], ["(2,1)", "(1,3)", "(1,2,3)"]),
        (
            r"(3, \frac{\pi}{2})",
            [r"(3, \frac{\pi}{2})", r"\left( 3, \frac{1}{2}\pi \right)"],
            [r"(3, \pi)", r"(\frac{\pi}{2}, 3)"],
        ),
        (
            "[0, \\infty)",
            [r"[0,\infty)", "[0, ∞)", r"[0, +\infty)"],
            [r"(0,\infty)", "[0, 1)", r"[0,\infty]"],
        ),
        (
            r"(-\infty, 2]\cup[3,5)",
            [r"(-\infty,2]\cup [3,5)", r"[3,5)\cup(-\infty,2]"],
            [r"(-\infty,2)\cup [3,5)", r"(-\infty, 5)"],
        ),
        ("3:4", ["3:4", "3/4", r"\frac{3}{4}"], ["4:3", "3"]),
    ],
    "expressions": [
        (
            "x^2+2x+1",
            ["(x+1)^2", "1 + 2x + x^2", "x^{2} + 2x + 1", "x²+2x+1", "(x+1)(x+1)"],
            ["x^2+2x", "y^2+2y+1", "(x-1)^2", "x^2+1"],
        ),
        (
            r"2\sqrt{3}",
            [r"\sqrt{12}", r"2 \sqrt 3", r"2\cdot\sqrt{3}", "2√3", r"\frac{6}{\sqrt{3}}"],
            [r"3\sqrt{2}", "3.4641", r"\sqrt{3}", r"2\sqrt{2}", "2"],
        ),
        (
            r"\frac{\pi}{2}",
            [r"\frac{1}{2}\pi", r"\pi/2", "π/2", r"0.5\pi"],
            [r"\pi", "1.5708", r"\frac{2}{\pi}", "90"],
        ),
        (r"\frac{\sqrt{3}}{3}", [r"\frac{1}{\sqrt{3}}", r"\frac{\sqrt3}{3}"], [r"\sqrt{3}", r"\frac{1}{3}"]),
        ("1+2i", ["1+2i", "2i+1", "1 + 2 i"], ["1-2i", "2+i", "3"]),
        (r"x \le 2", [r"x \leq 2", "x ≤ 2", r"x\le2"], ["x < 2", r"x \ge 2", "2"]),
        (
            r"\frac{x+1}{x-1}",
            [r"\frac{1+x}{x-1}", r"(x+1)/(x-1)", r"-\frac{x+1}{1-x}"],
            [r"\frac{x-1}{x+1}", "1"],
        ),
        (r"2^{10}", ["1024", "2^{10}", "4^5"], ["20", "2^{11}", "210"]),
        (r"\binom{5}{2}", ["10", r"\binom{5}{2}", r"\binom{5}{3}"], ["5", "25"]),
        (
            r"\begin{pmatrix}1\\2\end{pmatrix}",
            [r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\begin{bmatrix}1\\2\end{bmatrix}"],
            [r"\begin{pmatrix}2\\1\end{pmatrix}", r"\begin{pmatrix}1\\3\end{pmatrix}"],
        ),
        ("e^2", ["e^2", "e^{2}", r"e \cdot e"], ["7.389", "2e", "e"]),
        (r"\sin x", [r"\sin x", r"\sin(x)"], [r"\cos x", r"\sin 2x"]),
        (r"\log 2", [r"\log 2", r"\log(2)"], [r"\log 3", "2"]),
    ],
    "words": [
        (r"\text{(B)}", ["B", r"\text{B}", r"\textbf{(B)}", "(B)"], ["A", r"\text{(C)}"]),
        (r"\text{Tuesday}", [r"\text{Tuesday}", "Tuesday"], [r"\text{Monday}", "2"]),
        (r"\text{even}", [r"\text{even}", "even"], [r"\text{odd}"]),
        (
            "72",
            [r"\textbf{72}", r"\text{72}", r"\mathbf{72}", r"\underline{72}"],
            [r"\textbf{71}", r"\text{seventy-one}"],
        ),
    ],
    "rounding": [
        (r"\frac{1}{3}", [r"\frac13", "1/3", r"0.\overline{3}"], ["0.333", "0.33333333", "0.3"]),
        ("0.333", ["0.333", "0.3330"], [r"\frac{1}{3}", "0.33"]),
        (r"\pi", [r"\pi", "π"], ["3.14", "3.14159265", r"\frac{22}{7}"]),
        ("3.14", ["3.14"], [r"\pi", "3.141"]),
    ],
    "costly or broken": [
        (
            "12",
            [],
            [
                r"9^{9^{9^9}}",
                r"10^{10^{10}}",
                r"((10!)!)!",
                r"2^{99999999}",
                r"(x+1)^{999}",
                "9" * 200,
                "98**47**47",
                "",
                r"\}",
                r"\frac{1}{0}",
                "1/0",
                r"\frac{12}{",
                "None",
            ],
        ),
    ],
}


def make_answers() -> list[dict[str, object]]:
    """Return the answers without math-verify's verdicts."""
    return [
        {"kind": kind, "gold": gold, "boxed": boxed, "right": is_right}
        for kind, cases in CASES.items()
        for gold, right, wrong in cases
        for is_right, answers in ((True, right), (False, wrong))
        for boxed in answers
    ]


def verdict(gold: str, boxed: str) -> bool:
    """Return what math-verify alone says."""
    import math_verify

    try:
        parsed = [math_verify.parse(rf"\boxed{{{text}}}", parsing_timeout=5) for text in (gold, boxed)]
        return bool(math_verify.verify(*parsed, timeout_seconds=5))
    except Exception:
        return False


def asked(gold: str, boxed: str) -> bool | None:
    """Return what math-verify tells the reward, or None if it is not asked."""
    answers = []
    with mock.patch.object(boxed_task, "ask_math_verify") as ask:
        ask.side_effect = lambda *texts: answers.append(verdict(*texts)) or answers[-1]
        boxed_task.expression_reward([""], [rf"\boxed{{{boxed}}}"], answer=[gold])
    return answers[-1] if answers else None


if __name__ == "__main__":
    lines: list[dict[str, object]] = [{"math_verify": version("math-verify")}]
    for row in make_answers():
        texts = str(row["gold"]), str(row["boxed"])
        lines.append(row | {"math_verify": verdict(*texts), "asked": asked(*texts)})
    PATH.write_text("".join(json.dumps(line) + "\n" for line in lines))
