"""The rules on completions as models write them, and as they should not."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.answers import RULES, boxed, number

GSM8K = [  # completion, the right answer, what is extracted, verdict
    ("She has 3 + 4 = 7 apples.\n#### 7\nThe answer is: 7", "7", "7", True),
    ("The answer is: 7", "8", "7", False),
    (" The answer is 7.", "7", "7", True),
    ("so the answer is 72", "72", "72", True),
    ("THE ANSWER IS: 72", "72", "72", True),
    ("Answer: 5 apples", "5", "5", True),
    ("Final answer: 12", "12", "12", True),
    ("The answer is: $18", "18", "$18", True),
    ("The answer is: $18.00", "18", "$18.00", True),
    (r"The answer is: \$1,234.50", "1234.5", r"\$1,234.50", True),
    ("The answer is: 109,200,000", "109,200,000", "109,200,000", True),
    ("The answer is: 10,000", "10000", "10,000", True),
    (r"The answer is: 10{,}000", "10,000", "10,000", True),
    (r"The answer is: 10,\!000", "10,000", "10,000", True),
    ("The answer is: 50%", "50", "50", True),
    (r"The answer is: 50\%.", "50", "50", True),
    ("The answer is: 3.5 hours", "3.5", "3.5", True),
    ("The answer is: .5", "0.5", ".5", True),
    ("The answer is: 5kg", "5", "5", True),
    ("The answer is: 1/2", "0.5", "1/2", True),
    ("The answer is: 12/4", "3", "12/4", True),
    ("The answer is: 1 1/2", "1.5", "1 1/2", True),
    ("The answer is: 1-1/2", "1.5", "1-1/2", True),
    (r"The answer is: \frac{3}{4}", "3", r"\frac{3}{4}", False),
    (r"The answer is: $\dfrac{3}{4}$", "0.75", r"$\dfrac{3}{4}", True),
    ("The answer is: 5/0", "5", "5/0", False),
    ("The answer is: -5", "-5", "-5", True),
    ("The answer is: -5", "5", "-5", False),
    ("The answer is: -$5", "-5", "-$5", True),
    ("The answer is: \u22125", "-5", "\u22125", True),
    ("The answer is: x = 5", "5", "5", True),
    (r"The answer is: \boxed{42}", "42", "42", True),
    ("The answer is: **42**", "42", "42", True),
    ("The answer is:\n42", "42", "42", True),
    ("The answer is 5. Wait, no. The answer is: 6", "6", "6", True),
    ("Answer: 5. But the answer is 6, of 7", "6", "6", True),
    ("The answer is: 5 of the 12 apples", "5", "5", True),
    ("The answer is: five", "5", None, False),
    ("There are 5 apples. The answer is: five", "5", "5", True),  # no number follows, so the last one
    ("He has 10 - 3 = 7 left", "7", "7", True),
    ("He has 12 left, of 15-3", "3", "3", True),
    ("He has 12 left, of 15 - 3", "3", "3", True),
    ("It is -3 degrees", "-3", "-3", True),
    ("It is between 3 and 4", "4", "4", True),
    ("It costs $1,000, or 1,250 with tax.", "1250", "1,250", True),
    ("The numbers are 1,2,3", "3", "3", True),
    ("The total is 18.", "18", "18", True),
    ("#### 72", "72", "72", True),
    ("I don't know.", "0", None, False),
    ("", "0", None, False),
    ("The answer is: 007", "7", "007", True),
    ("The answer is: 3.999", "4", "3.999", False),
    ("The answer is: 1234567890123456789", "1234567890123456788", "1234567890123456789", False),
    # An equation gives its result: the last side that is a number alone
    ("The answer is 2 * 9 = 18", "18", "18", True),
    (r"The answer is $9 \times 2 = 18$.", "18", "18", True),
    ("Answer: 5 + 13 = 18 dollars for 3 eggs", "18", "18", True),
    ("The answer is: 18 = 2 * 9", "18", "18", True),
    ("The answer is: 2 * 9 = 3 * 6 = 18", "18", "18", True),
    ("The answer is (2 + 3) * 4 = 20.", "20", "20", True),
    ("The answer is 2 boxes * 9 pens = 18 pens", "18", "18", True),
    ("The answer is: $20 - $5 = $15.", "15", "15", True),
    ("The answer is: 50% * 30 = 15", "15", "15", True),
    ("The answer is: 2.5 x 4 = 10", "10", "10", True),
    ("The answer is: 2**3 = 8", "8", "8", True),
    (r"The answer is: $\frac{10}{2} = 5$", "5", "5", True),
    ("The answer is: 3x = 15 so x = 5", "5", "5", True),
    ("The answer is 5 (since 2 + 3 = 5)", "5", "5", True),
    ("The answer is 5, because 20 - 15 = 5, or 4 + 1", "5", "5", True),
    ("The answer is 5 and y = 3", "5", "5", True),
    ("The answer is 5. Check: 2 + 4 = 6", "5", "5", True),
    # "####" is GSM8K's own end; "answer:" before it is no end
    ("9 + 9 = 18.\n#### 18\n\nProblem 2: Tom has 5 pens.", "18", "18", True),
    ("#### 18\nThe answer is: 18\nProblem 2: The answer is: 5", "18", "18", True),
    ("#### 18\nProblem 2: The answer is: 5", "18", "18", True),
    ("9 + 9 = 18\n#### 18 dollars for 3 eggs", "18", "18", True),
    ("Answer: 3 * 4 = 12, and 6 more.\n#### 18", "18", "18", True),
    ("#### -$1,800.00, of 7", "-1800", "-$1,800.00", True),
    ("#### **18**\n4", "18", "18", True),
    ("### Step 1\nIt is 4.\n### Answer\n18", "18", "18", True),
    # Fractions and mixed numbers
    ("The answer is: 3 / 4", "0.75", "3 / 4", True),
    ("The answer is: 1,000/2", "500", "1,000/2", True),
    (r"The answer is: \frac34", "0.75", r"\frac34", True),
    (r"The answer is: -\tfrac{3}{4}", "-0.75", r"-\tfrac{3}{4}", True),
    (r"The answer is: \frac{-3}{4}", "-0.75", r"\frac{-3}{4}", True),
    (r"The answer is: $2\dfrac{1}{2}$ hours", "2.5", r"$2\dfrac{1}{2}", True),
    ("The answer is: 2\u00bd", "2.5", r"2\frac{1}{2}", True),
    ("The answer is: 3 and 1/2", "3.5", "3 and 1/2", True),
    ("The answer is: 3\u20444", "0.75", "3/4", True),
    # Thousands
    *[(f"The answer is: 1{space}234", "1234", "1,234", True) for space in ("\u2009", "\u202f", "\u00a0", r"\,", "{,}", "~", "'")],
    (r"The answer is: 1{,}234{,}567", "1234567", "1,234,567", True),
    ("The answer is: 12 345", "12", "12", True),  # two numbers
    # Bold type, boxes, text, currencies, signs
    ("**Answer**: **5**. That is 3 more than 2.", "5", "5", True),
    ("**Answer:** 5", "5", "5", True),
    ("The answer is: `5`", "5", "5", True),
    (r"So it is \boxed{5}. Check: 2 + 3 = 5 = 10 / 2", "5", "5", True),
    (r"The answer is: $9 \cdot 2 = \boxed{18}$", "18", "18", True),
    (r"\boxed{\text{Total} = \$18\text{ dollars}}, of 20", "18", r"\$18", True),
    (r"\fbox{\frac{3}{4}}, of 20", "0.75", r"\frac{3}{4}", True),
    ("Answer: $5.00.", "5", "$5.00", True),
    ("The answer is: \u20ac5", "5", "5", True),
    ("The answer is: \u201312", "-12", "\u201312", True),
    ("The answer is: negative 12", "-12", "negative 12", True),
    ("The final answer is $18$. I hope it is right for all 3.", "18", "$18", True),
    ("The answer is: 5. The answer is: five", "5", "5", True),
]
MATH = [
    (r"The answer is: \frac{1}{2}", "0.5", r"\frac{1}{2}", True),
    (r"The answer is: $\dfrac12$.", r"\frac{1}{2}", r"\dfrac12", True),
    (r"The answer is: $$\frac{2}{4}$$", r"\frac{1}{2}", r"\frac{2}{4}", True),
    (r"The answer is: 1\frac{3}{4}", r"\frac{7}{4}", r"1\frac{3}{4}", True),
    (r"The answer is: \frac{3}{4}", r"\frac{4}{3}", r"\frac{3}{4}", False),
    ("The answer is: 10,000", r"10{,}000", "10,000", True),
    (r"The answer is: 10\%", r"10\%", r"10\%", True),
    (r"The answer is: 50\%", "0.5", r"50\%", True),
    (r"The answer is: 5\text{ cm}", "5", r"5\text{ cm}", True),
    ("The answer is: 12 apples.", "12", "12 apples", True),
    (r"The answer is: 90^\circ", "90", r"90^\circ", True),
    (r"The answer is: \$1.50", "1.50", r"\$1.50", True),
    (r"The answer is: \sqrt{12}", r"2\sqrt{3}", r"\sqrt{12}", True),
    (r"The answer is: \frac{\sqrt{2}}{2}", r"\frac{1}{\sqrt{2}}", r"\frac{\sqrt{2}}{2}", True),
    ("The answer is: x(x+2)", "x^2+2x", "x(x+2)", True),
    ("The answer is: y = 2x + 3", "2x+3", "y = 2x + 3", True),
    ("The answer is: (1, 2)", "(1,2)", "(1, 2)", True),
    ("The answer is: (2,1)", "(1,2)", "(2,1)", False),
    ("The answer is: 3,2,1", "1,2,3", "3,2,1", True),
    (r"The answer is: 2 \text{ and } 3", "2,3", r"2 \text{ and } 3", True),
    ("The answer is: 3", "3,4", "3", False),
    (r"The answer is: [0,1]", "[0,1)", "[0,1]", False),
    (r"The answer is: (-\infty,2)\cup(3,5)", r"(-\infty, 2) \cup (3,5)", r"(-\infty,2)\cup(3,5)", True),
    (r"The answer is: \text{Evelyn}", r"\text{Evelyn}", r"\text{Evelyn}", True),
    ("The answer is: Evelyn", r"\text{Evelyn}", "Evelyn", True),
    (r"The answer is: \text{Tuesday}", r"\text{Monday}", r"\text{Tuesday}", False),
    ("The answer is: B", r"\text{(B)}", "B", True),
    (
        "The answer is: \\begin{pmatrix} 1 \\\\\n2 \\end{pmatrix}\nQuestions?",
        r"\begin{pmatrix}1\\2\end{pmatrix}", "\\begin{pmatrix} 1 \\\\\n2 \\end{pmatrix}", True,
    ),
    ("The answer is: 5\nI hope this helps with 6.", "5", "5", True),
    ("The answer is:\n\n5", "5", "5", True),
    ("The answer is: 4. No. The answer is: 5", "5", "5", True),
    (r"The answer is: $\boxed{5}$.", "5", "5", True),
    (r"So it is \boxed{6}. The answer is: 5", "5", "5", True),
    (r"So it is \boxed{6}.", "6", "6", True),
    (r"First \boxed{5}, then $\boxed{\frac{1}{2}}$", r"\frac{1}{2}", r"\frac{1}{2}", True),
    (r"So it is \boxed{\left\{1, 2\right\}}", r"\{1,2\}", r"\left\{1, 2\right\}", True),
    (r"So it is $\boxed 5$.", "5", "5", True),
    (r"\boxed{5} and then \boxed{\frac{1}{", "5", "5", True),  # cut short: the last complete one
    ("The answer is 5", "5", None, False),  # the rule has a colon
    ("I think it is 5.", "5", None, False),
    ("The answer is:", "5", None, False),
    ("The answer is: $", "5", "$", False),
    (r"The answer is: \frac{", "5", r"\frac{", False),
    ("", "5", None, False),
    ("The answer is: **42**", "42", "42", True),
    ("**The answer is:** 42", "42", "42", True),
    ("The final answer is: 5. I hope it is correct.", "5", "5", True),
    (r"The answer is: \(5\).", "5", "5", True),
    ("The answer is:\n$$\n5\n$$", "5", "5", True),
    ("The answer is:\n\\[\n\\frac{1}{2}\n\\]\nas 1 of 2.", "0.5", r"\frac{1}{2}", True),
    (r"So it is \fbox{5}.", "5", "5", True),
    (r"So it is \boxed {5}.", "5", "5", True),
    (r"So it is \boxed{\frac{\sqrt{3}}{\frac{1}{2}}}.", r"2\sqrt{3}", r"\frac{\sqrt{3}}{\frac{1}{2}}", True),
    (r"So it is \boxed{x^{2}\\}", "x^2", r"x^{2}\\", False),  # the brace after a line's end is one
    (r"The answer is: 1\,234", "1234", r"1\,234", True),
    ("The answer is: 1\u202f234", "1234", "1\u202f234", True),
    ("The answer is: 2\u00bd", r"2\frac{1}{2}", "2\u00bd", True),
    (r"The answer is: 3\pi", r"9.42", r"3\pi", False),
    ("The answer is: -1", "1", "-1", False),
]  # fmt: skip


@pytest.mark.parametrize(
    "rule, completion, right, answer, verdict", [("gsm8k", *row) for row in GSM8K] + [("math", *row) for row in MATH]
)
def test_answers_and_verdicts(rule, completion, right, answer, verdict):
    found = RULES[rule].answer(completion)
    assert found == answer
    assert (found is not None and RULES[rule].equal(found, right)) == verdict


def test_numbers_and_boxes_that_are_none():
    assert number("five") is None and number("1/0") is None and number("5 apples") is None
    assert boxed("no box") is None and boxed(r"\boxed{") is None and boxed(r"\boxed") is None


@given(st.text("0123456789 .,-+*/=$#\\{}()\nx%abAnswer:is"))
def test_any_completion_has_an_answer_or_none(text):
    for completion in (text, f"The answer is: {text}", f"#### {text}", rf"\\boxed{{{text}"):
        found = RULES["gsm8k"].answer(completion)
        assert found is None or number(found) is not None or "/" in found or "frac" in found  # 1/0 is no number
        assert RULES["math"].answer(completion) != ""


@given(st.integers(-(10**9), 10**9), st.sampled_from(["{}", "{:,}", "${:,}", "{}.", "{:.2f}", "**{:,}**", r"\boxed{{{:,}}}", "{} apples"]))
def test_a_whole_number_is_found_in_any_dress(value, dress):
    for start in ("The answer is: ", "#### ", "Answer: 1 + 1 = ", "so the answer is "):
        found = RULES["gsm8k"].answer(start + dress.format(value) + "\n")
        assert RULES["gsm8k"].equal(found, str(value)), (start, found)
