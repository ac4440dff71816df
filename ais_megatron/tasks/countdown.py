"""Countdown: reach a target with three numbers, each used exactly once, with + - * / and exact rational arithmetic.

    prompt    93 30 16=79:
    response  <answer>93-30+16</answer>

A response has at most 32 tokens for numbers up to 100: one per character, one per tag, and the end-of-sequence token. The file format
is that of dllm-reasoning/d1 (arXiv:2504.12216): ``input`` "30,100,93", ``output`` "23". As in its grader, a number or a parenthesis
may have a sign.
"""

from __future__ import annotations

import ast
import operator
import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Any

from ais_megatron.tasks.extraction import finder_of
from ais_megatron.tasks.reading import Row
from ais_megatron.tasks.streams import StreamTask
from ais_megatron.tasks.task import Problem, Reward, make_reward, wrap_answer

INSTRUCT = """\
Find an arithmetic expression that equals {target} and is made of the numbers {numbers}.
Use each of these numbers exactly once, and no other number. The operators are + - * /, and parentheses are allowed.
Think first. Then write the expression, without an equals sign, within <answer> and </answer>, for example <answer>(2+3)*4</answer>."""
MAX_ANSWER_CHARS = 64  # limits the parser's depth and the size of every integer
_BINARY: dict[type[ast.operator], Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}
_UNARY: dict[type[ast.unaryop], Callable[[Fraction], Fraction]] = {ast.UAdd: operator.pos, ast.USub: operator.neg}
_EXPRESSION = re.compile(r"[0-9+\-*/() ]+")  # not \d, which also matches digits of other scripts

# Signs of a >= b >= c, and the text. The other three sign patterns are never positive.
_SUMS = (
    (1, 1, 1, "{0}+{1}+{2}"),
    (1, 1, -1, "{0}+{1}-{2}"),
    (1, -1, 1, "{0}-{1}+{2}"),
    (1, -1, -1, "{0}-{1}-{2}"),
    (-1, 1, 1, "{1}+{2}-{0}"),
)


class Countdown(StreamTask):
    name = "countdown"
    alphabet = "0123456789 +-*/()=:"

    def parse(self, row: Row) -> Problem:
        numbers = [_positive_int(row, "input", part) for part in row.text("input").split(",")]
        if len(numbers) != 3:
            raise ValueError(f"{row.where}: column 'input' must hold three numbers such as '30,100,93', got {row.text('input')!r}")
        target = _positive_int(row, "output", row.text("output"))
        problem = make_problem(numbers, target)
        if problem is None:
            raise ValueError(f"{row.where}: no expression of {numbers} reaches {target}")
        return problem

    def draw(self, rng: random.Random) -> Problem | None:
        """A random expression of three random numbers, or None unless every step is an integer and the result is in range."""
        top = self.config.max_number
        x, y, z = (rng.randint(1, top) for _ in range(3))
        inner = _apply(rng.choice("+-*/"), x, y)
        if inner is None:
            return None
        left, right = (inner, z) if rng.random() < 0.5 else (z, inner)
        target = _apply(rng.choice("+-*/"), left, right)
        return make_problem((x, y, z), target) if target is not None and 1 <= target <= top else None

    def present(self, problem: Problem) -> Problem:
        if self.config.prompt_style == "terse":
            return problem
        numbers, target = problem.truth["numbers"], problem.truth["target"]
        return replace(problem, text=INSTRUCT.format(numbers=", ".join(map(str, numbers)), target=target))

    def reward(self, problem_truth: Mapping[str, Any], response: str) -> Reward:
        found = finder_of(self.config.prompt_style)(response, MAX_ANSWER_CHARS)
        if found.answer is None:
            return make_reward(self.config.format_weight, False, False, found.reason)
        said = f"answer {found.answer} from {found.reason}"
        tree = _parse(found.answer)
        if tree is None:
            return make_reward(self.config.format_weight, False, False, f"{said}; it is not an arithmetic expression")
        numbers: list[int] = []
        try:
            value = _evaluate(tree, numbers)
        except ZeroDivisionError:
            return make_reward(self.config.format_weight, True, False, f"{said}; it divides by zero")
        target, given = problem_truth["target"], problem_truth["numbers"]
        if sorted(numbers) != sorted(given):
            return make_reward(self.config.format_weight, True, False, f"{said}; it must use each of {given} exactly once")
        return make_reward(self.config.format_weight, True, value == target, f"{said}; it is {_shown(value)}, expected {target}")


def make_problem(numbers: Sequence[int], target: int) -> Problem | None:
    """The puzzle with its canonical solution, or None if it has no solution.

    The prompt shows the largest number first, whatever the order in the file. The order does not matter, and with one text per puzzle
    two puzzles can be compared by their texts.
    """
    solution = solve(numbers, target)
    if solution is None:
        return None
    shown = sorted(numbers, reverse=True)
    return Problem(f"{' '.join(map(str, shown))}={target}:", {"numbers": shown, "target": target}, wrap_answer(solution))


def solve(numbers: Sequence[int], target: int) -> str | None:
    """The canonical expression of three positive numbers for a positive target, or None if there is none.

    The convention is one that a small model learns fast. Plain sums come first; nine of ten puzzles in d1's file have one. Their numbers
    have the order of the prompt, so the model chooses two signs and permutes almost nothing. Products and quotients are used only if no
    sum exists. After 400 steps of 128 puzzles, a transformer with 0.7 M parameters solves 66 % of d1's file this way, and 42 % with
    numbers in the file's random order.
    """
    a, b, c = sorted(numbers, reverse=True)
    for i, j, k, text in _SUMS:
        if i * a + j * b + k * c == target:
            return text.format(a, b, c)
    return _solve_with_products(a, b, c, target)


def _solve_with_products(a: int, b: int, c: int, t: int) -> str | None:
    """Try every expression with a product or a quotient, except those of equal value, as integer equations. a >= b >= c >= 1, t >= 1."""
    for x, y, z in ((a, b, c), (a, c, b), (b, c, a)):
        p = x * y
        candidates = (
            (p + z == t, "{0}*{1}+{2}"),
            (p - z == t, "{0}*{1}-{2}"),
            (z - p == t, "{2}-{0}*{1}"),
            (x == (t - z) * y, "{0}/{1}+{2}"),
            (x == (t + z) * y, "{0}/{1}-{2}"),
            (x == (z - t) * y, "{2}-{0}/{1}"),
            (p == t * z, "{0}*{1}/{2}"),
            (z == t * p, "{2}/{0}/{1}"),
            (p * z == t, "{0}*{1}*{2}"),
            ((x + y) * z == t, "({0}+{1})*{2}"),
            ((x - y) * z == t, "({0}-{1})*{2}"),
            (x + y == t * z, "({0}+{1})/{2}"),
            (x - y == t * z, "({0}-{1})/{2}"),
            (z == t * (x + y), "{2}/({0}+{1})"),
            (z == t * (x - y), "{2}/({0}-{1})"),
        )
        for holds, text in candidates:
            if holds:
                return text.format(x, y, z)
    return None


def _apply(op: str, x: int, y: int) -> int | None:
    if op == "/":
        return x // y if y and x % y == 0 else None
    return x + y if op == "+" else x - y if op == "-" else x * y


def _parse(answer: str) -> ast.expr | None:
    """The syntax tree of an arithmetic expression, or None for anything else. Nothing is executed."""
    if not _EXPRESSION.fullmatch(answer):
        return None
    try:
        tree = ast.parse(answer, mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    return tree if _is_arithmetic(tree) else None


def _is_arithmetic(node: ast.expr) -> bool:
    if isinstance(node, ast.BinOp):  # "**" and "//" are parsed too, but are not in the table
        return type(node.op) in _BINARY and _is_arithmetic(node.left) and _is_arithmetic(node.right)
    if isinstance(node, ast.UnaryOp):
        return type(node.op) in _UNARY and _is_arithmetic(node.operand)
    return isinstance(node, ast.Constant)  # with the allowed characters every constant is an integer


def _evaluate(node: ast.expr, numbers: list[int]) -> Fraction:
    """The exact value of an expression. Appends the numbers that it uses. Raises ZeroDivisionError."""
    if isinstance(node, ast.BinOp):
        return _BINARY[type(node.op)](_evaluate(node.left, numbers), _evaluate(node.right, numbers))
    if isinstance(node, ast.UnaryOp):
        return _UNARY[type(node.op)](_evaluate(node.operand, numbers))
    assert isinstance(node, ast.Constant) and isinstance(node.value, int)
    numbers.append(node.value)
    return Fraction(node.value)


def _shown(value: Fraction) -> str:
    text = str(value)
    return text if len(text) <= 20 else "a number that is too long to show"


def _positive_int(row: Row, column: str, text: str) -> int:
    if not re.fullmatch(r"\s*0*[1-9][0-9]{0,8}\s*", text):
        raise ValueError(f"{row.where}: column {column!r} must hold positive integers, got {text!r}")
    return int(text)
