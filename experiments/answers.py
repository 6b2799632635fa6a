"""What a completion answers and whether that is right: the rules for GSM8K (arXiv 2110.14168) and MATH (2103.03874).

GSM8K: the number after the last of "the answer is", "answer:", "####" and a box, else the last number; of an equation its result;
right when numerically equal. What follows the line of "####" counts only where it says the answer again. MATH: what follows the last
"The answer is:", else the last box; right when mathematically equal, as math-verify sees it. Bold type doesn't count.
"""

import re
import unicodedata
from collections.abc import Callable
from fractions import Fraction
from typing import NamedTuple

_INTEGER = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)"
_DECIMAL = rf"(?:{_INTEGER}(?:\.\d+)?|\.\d+)"
NUMBER = re.compile(
    r"(?P<minus>(?<![\w)}])[-\u2212\u2013]|\bnegative )?(?:\\?\$)?(?:"  # 10-3 ends in 3, not in -3
    rf"(?P<units>{_INTEGER}(?:[ -]| and |(?= ?\\[cdt]?frac)))?(?:"  # 1 1/2
    rf"(?P<top>{_DECIMAL}) ?/ ?(?P<bottom>{_DECIMAL})"
    rf"| ?\\[cdt]?frac *(?:{{ *(?P<latex_top>-?{_DECIMAL}) *}}|(?P<digit_top>\d)) *(?:{{ *(?P<latex_bottom>{_DECIMAL}) *}}|(?P<digit_bottom>\d)))"
    rf"|(?P<decimal>{_DECIMAL}))"
)
_ANY = re.sub(r"\?P<\w+>", "?:", NUMBER.pattern)
_UNIT = r"(?: ?(?:\\?%|\\text\{[^{}]*\}|(?!(?:and|or|but|as|because|since|if|when|where|while|with|x(?= *[\d$(.]))\b)[A-Za-z]+\b)){0,2}"
_TERM = rf"[( ]*{_ANY}{_UNIT}[) ]*"
_SIDE = re.compile(rf"{_TERM}(?P<more>(?:(?:\*\*|[-+*/^x\u00d7\u00b7\u00f7\u2212]|\\(?:times|cdot|div)\b){_TERM})*)")
_EQUALS = re.compile(r"[ $]*=[ $]*")
_ANSWER = r"the (?:final |correct )?answer is|answer ?:"
_MARKER = re.compile(_ANSWER, re.IGNORECASE)
_GSM8K = re.compile(rf"####[^\w\n]*(?:boxed{{)?(?={_ANY})[^\n]*(?:\n\s*(?:{_ANSWER})[^\n]*)?", re.IGNORECASE)
_BOX = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])")


class Rule(NamedTuple):
    answer: Callable[[str], str | None]  # of a completion, as it is written; None: it has none
    equal: Callable[[str, str], bool]  # an answer, and the right one


def gsm8k_answer(completion: str) -> str | None:
    """The number that a completion gives, as it is written there."""
    text = _plain(completion)
    if own := _GSM8K.search(text):  # GSM8K's own end of an answer: what comes after is another problem
        text = text[: own.end()]
    ends = [found.end() for found in _MARKER.finditer(text)] + ([own.start()] if own else [])
    if box := _last_box(text):
        ends.append(box[0])
    for end in sorted(ends, reverse=True):
        if found := _result(text, end):
            return found
    *_, last = [None, *NUMBER.finditer(text)]
    return None if last is None else last.group().strip()


def _result(text: str, start: int) -> str | None:
    """The first number after `start`; where an equation begins there, that of its last side which is a number alone."""
    first = result = NUMBER.search(text, start)
    at = first.start() if first else len(text)
    while side := _SIDE.match(text, at):
        if not side["more"]:
            result = NUMBER.search(text, at)
        if not (equals := _EQUALS.match(text, side.end())):
            break
        at = equals.end()
    return result and result.group().strip()


def _plain(text: str) -> str:
    """The text without bold type, with commas between thousands, and with \u00bd as LaTeX has it."""
    text = re.sub(r"(?<![\w)])(?:\*\*|__)|(?:\*\*|__)(?![\w(])|`", "", text)  # not 2**3
    text = re.sub(r"(?<=\d)(?:\{,\}|,\\!|\\[,;: ]|[~'\u2019\u00a0\u2007\u2009\u202f])(?=\d{3}(?!\d))", ",", text)
    text = re.sub(r"[\u00a0\u2007\u2009\u202f]", " ", text)
    spelled = lambda found: r"\frac{%s}{%s}" % tuple(unicodedata.normalize("NFKC", found[0]).split("\u2044"))
    return re.sub("[\u00bc-\u00be\u2150-\u215e]", spelled, text).replace("\u2044", "/")


def gsm8k_equal(answer: str, right: str) -> bool:
    value = number(answer)
    return value is not None and value == number(right)


def number(text: str) -> Fraction | None:
    """The value of a number as NUMBER finds it; None for what is none, or divides by zero."""
    found = NUMBER.fullmatch(text.strip())
    if found is None:
        return None
    top, bottom = (found[f"latex_{part}"] or found[f"digit_{part}"] or found[part] for part in ("top", "bottom"))
    if top is None:
        value = _decimal(found["decimal"])
    elif not _decimal(bottom):
        return None
    else:
        value = _decimal(re.sub(r"[^\d,]", "", found["units"] or "0")) + _decimal(top) / _decimal(bottom)
    return -value if found["minus"] else value


def _decimal(text: str) -> Fraction:
    return Fraction(text.replace(",", ""))


def math_answer(completion: str) -> str | None:
    """What a completion gives as its answer, without the dollars around it and the full stop after it."""
    completion = re.sub(r"\*\*|__", "", completion)
    *_, after = re.split(r"[Tt]he (?:final |correct )?answer is:", completion)
    answer = ""
    if after != completion:  # the rest of the line, and of what goes over several; not the sentence after it
        whole = r"\\begin\{(\w+)\}.*?\\end\{\1\}|\$\$.*?\$\$|\\\[.*?\\\]|(?!\. +[A-Z])[^\n]"
        answer = re.match(rf"(?:{whole})*", after.strip(), re.DOTALL).group()
        answer = boxed(answer) or answer
    answer = (answer or boxed(completion) or "").strip().rstrip(".").strip()
    if wrapped := re.fullmatch(r"\\\((.*)\\\)|\\\[(.*)\\\]", answer, re.DOTALL):
        answer = (wrapped[1] or wrapped[2] or "").strip()
    if len(answer) > 1 and answer[0] == answer[-1] == "$" and "$" not in answer[1:-1].strip("$"):
        answer = answer.strip("$").strip()
    return answer or None


def boxed(text: str) -> str | None:
    r"""What the last complete \boxed{...} or \fbox{...} holds."""
    found = _last_box(text)
    return found and found[1]


def _last_box(text: str) -> tuple[int, str] | None:
    """Where the last complete box begins, and what it holds."""
    for box in reversed(list(_BOX.finditer(text))):
        if found := re.match(r"\s+([^\s${]+)", text[box.end() :]):
            return box.start(), found[1]
        opened = re.match(r"\s*\{", text[box.end() :])
        depth, start = 1, box.end() + (opened.end() if opened else 0)
        for brace in re.finditer(r"\\.|[{}]", text[start:], re.DOTALL) if opened else ():
            depth += {"{": 1, "}": -1}.get(brace[0], 0)
            if depth == 0:
                return box.start(), text[start : start + brace.start()].strip()
    return None


def math_equal(answer: str, right: str) -> bool:
    """Whether two answers in LaTeX are equal. What takes longer than five seconds to tell isn't.

    To be called in the main thread, where math-verify can set its alarm.
    """
    if "".join(answer.split()) == "".join(right.split()):
        return True
    import math_verify  # here, because it brings a computer algebra along

    answer, right = _plain(answer), _plain(right)
    answer, right = (
        math_verify.parse(text if re.search(r"(?<!\\)\$", text) else f"${text}$") for text in (answer, right)
    )
    return math_verify.verify(right, answer)


RULES = {"gsm8k": Rule(gsm8k_answer, gsm8k_equal), "math": Rule(math_answer, math_equal)}
