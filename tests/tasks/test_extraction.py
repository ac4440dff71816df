"""Finding the answer in a response: what counts, what does not, and what is said about it."""

from __future__ import annotations

import pytest

from ais_megatron.tasks.extraction import Found, find_answer, find_only_answer, last_boxed

NONE = r"no <answer> pair and no \boxed{}"


@pytest.mark.parametrize(
    ("response", "answer", "reason"),
    [
        ("so <answer> 7 </answer>", "7", "the <answer> pair"),
        (r"so \boxed{7}", "7", r"the \boxed{}"),
        ("<answer>7</answer> I hope this helps!", "7", "the <answer> pair"),
        (r"The answer is $\boxed{7}$. Have a nice day.", "7", r"the \boxed{}"),
        # what is thought is not judged
        ("<think><answer>6</answer></think><answer>7</answer>", "7", "the <answer> pair"),
        ("<answer>6</answer></think>7", None, NONE),
        (r"\boxed{6}</think><think>no \boxed{5}</think>\boxed{7}", "7", r"the \boxed{}"),
        ("<think>it is <answer>7</answer>", None, "<think> is not closed"),
        ("<answer>7</answer><think>or", None, "<think> is not closed"),
        # the last one counts
        ("<answer>6</answer> no, <answer>7</answer>", "7", "the last of 2 <answer> pairs"),
        (r"\boxed{5}, \boxed{6}, \boxed{7}", "7", r"the last of 3 \boxed{}"),
        (r"\boxed{6} so <answer>7</answer>", "7", "the <answer> pair"),
        (r"<answer>6</answer> so \boxed{7}", "7", r"the \boxed{}"),
        (r"<answer>\boxed{7}</answer>", r"\boxed{7}", "the <answer> pair"),
        (r"\boxed{<answer>7</answer>}", "7", r"the \boxed{}"),
        # tags that repeat the prompt
        ("within <answer> and </answer>: <answer>7</answer>", "7", "the <answer> pair"),
        ("<answer>7</answer>, as asked within `<answer>` and `</answer>`.", "7", "the <answer> pair"),
        ("inside <answer> tags: <answer>7</answer></answer>", "7", "the <answer> pair"),
        (r"<answer>7</answer> (not in \boxed{}, <answer>...</answer>)", "7", "the <answer> pair"),
        ("I write it within <answer> and </answer>.", None, NONE),
        # what is incomplete
        ("", None, NONE),
        ("<answer>7", None, NONE),
        ("</answer>7<answer>", None, NONE),
        (r"\boxed{7", None, NONE),
        (r"\boxed{6} and then \boxed{7", "6", r"the \boxed{}"),
        ("<answer> </answer>", None, NONE),
        ("<answer>" + " " * 99 + "</answer>", None, "the answer is empty"),
        ("<answer>12345678901</answer>", None, "the answer is longer than 10 characters"),
        ("<answer>7</answer><answer>12345678901</answer>", None, "the answer is longer than 10 characters"),
        # braces
        (r"} {\boxed{\frac12}", r"\frac12", r"the \boxed{}"),
        (r"\boxed{\{1,2\}}", r"\{1,2\}", r"the \boxed{}"),
        (r"\boxed{\left\{3\right.}", None, "the answer is longer than 10 characters"),
        (r"\boxed {7}", "7", r"the \boxed{}"),
    ],
)
def test_find_answer(response: str, answer: str | None, reason: str) -> None:
    assert find_answer(response, 10) == Found(answer, reason)


def test_the_strict_rule_wants_one_pair_at_the_end() -> None:
    assert find_only_answer("so <answer>7</answer>\n", 10) == Found("7", "the only <answer> pair")
    for response in ("<answer>7</answer>.", r"\boxed{7}", "<answer>6</answer><answer>7</answer>"):
        found = find_only_answer(response, 10)
        assert found == Found(None, "the response does not end with its only <answer> pair, of 1 to 10 characters")


def test_last_boxed_is_the_one_that_ends_last() -> None:
    assert last_boxed(r"\boxed{\boxed{1} + 2}") == r"\boxed{1} + 2"
