"""What a completion answers and whether that is right: the rules for GSM8K (arXiv 2110.14168) and MATH (2103.03874).

GSM8K: the number after the last "the answer is" or "answer:", else the last number; right when numerically equal. MATH:
what follows the last "The answer is:", else the last box; right when mathematically equal, as math-verify sees it.
"""

import re
from collections.abc import Callable
from fractions import Fraction
from typing import NamedTuple

_INTEGER = r"\d{1,3}(?:,\d{3})+(?!\d)|\d+"
NUMBER = re.compile(
    r"(?P<minus>(?<![\w)}])[-\u2212])?(?:\\?\$)?(?:"  # 10-3 ends in 3, not in -3
    r"(?P<units>\d+[ -])?(?P<top>\d+)/(?P<bottom>\d+)"  # 1/2, and 1 1/2
    r"|\\[dt]?frac\{(?P<latex_top>\d+)\}\{(?P<latex_bottom>\d+)\}"
    rf"|(?P<decimal>(?:{_INTEGER})(?:\.\d+)?|\.\d+))"
)


class Rule(NamedTuple):
    answer: Callable[[str], str | None]  # of a completion, as it is written; None: it has none
    equal: Callable[[str, str], bool]  # an answer, and the right one


def gsm8k_answer(completion: str) -> str | None:
    """The number that a completion gives, as it is written there."""
    text = re.sub(r"\{,\}|,\\!", ",", completion)  # LaTeX's thousands
    markers = list(re.finditer(r"the answer is|answer:", text, re.IGNORECASE))
    found = NUMBER.search(text, markers[-1].end()) if markers else None
    if found is None:
        *_, found = [None, *NUMBER.finditer(text)]
    return None if found is None else found.group()


def gsm8k_equal(answer: str, right: str) -> bool:
    value = number(answer)
    return value is not None and value == number(right)


def number(text: str) -> Fraction | None:
    """The value of a number as NUMBER finds it; None for what is none, or divides by zero."""
    found = NUMBER.fullmatch(text.strip())
    if found is None:
        return None
    top, bottom = found["top"] or found["latex_top"], found["bottom"] or found["latex_bottom"]
    if top is None:
        value = Fraction(found["decimal"].replace(",", ""))
    elif int(bottom) == 0:
        return None
    else:
        value = Fraction(int((found["units"] or "0").strip(" -"))) + Fraction(int(top), int(bottom))
    return -value if found["minus"] else value


def math_answer(completion: str) -> str | None:
    """What a completion gives as its answer, without the dollars around it and the full stop after it."""
    _, marker, after = completion.rpartition("The answer is:")
    answer = ""
    if marker:  # the rest of the line, and of a matrix that goes over several
        answer = re.match(r"(?:\\begin\{(\w+)\}.*?\\end\{\1\}|[^\n])*", after.strip(), re.DOTALL).group()
        answer = boxed(answer) or answer
    answer = (answer or boxed(completion) or "").strip().rstrip(".").strip()
    if len(answer) > 1 and answer[0] == answer[-1] == "$" and "$" not in answer[1:-1].strip("$"):
        answer = answer.strip("$").strip()
    return answer or None


def boxed(text: str) -> str | None:
    r"""What the last complete \boxed{...} holds."""
    for start in reversed([found.end() for found in re.finditer(r"\\boxed", text)]):
        if found := re.match(r"\s+([^\s${]+)", text[start:]):
            return found[1]
        depth = 0
        for at in range(start, len(text)):
            depth += {"{": 1, "}": -1}.get(text[at], 0) if text[at - 1] != "\\" else 0
            if depth == 0:
                if text[start:at].startswith("{"):
                    return text[start + 1 : at].strip()
                break
    return None


def math_equal(answer: str, right: str) -> bool:
    """Whether two answers in LaTeX are equal. What takes longer than five seconds to tell isn't.

    To be called in the main thread, where math-verify can set its alarm.
    """
    if "".join(answer.split()) == "".join(right.split()):
        return True
    import math_verify  # here, because it brings a computer algebra along

    answer, right = (
        math_verify.parse(text if re.search(r"(?<!\\)\$", text) else f"${text}$") for text in (answer, right)
    )
    return math_verify.verify(right, answer)


RULES = {"gsm8k": Rule(gsm8k_answer, gsm8k_equal), "math": Rule(math_answer, math_equal)}
