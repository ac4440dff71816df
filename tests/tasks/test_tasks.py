"""Tasks: exact rewards on hand-made answers, every row of the real files, disjoint streams, hostile responses and files.

The real files are the only ones outside the repository that tests read: public test sets in the folder `shared/data` beside it.
A test of a file that is not there is skipped, and says which one. Files written by hand test the same readers everywhere.
"""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import time
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import pytest

from ais_megatron.config import TaskConfig
from ais_megatron.tasks import TASKS, make_task
from ais_megatron.tasks.countdown import solve
from ais_megatron.tasks.equivalence import are_equivalent
from ais_megatron.tasks.gsm8k import read_number
from ais_megatron.tasks.math500 import is_equal, last_boxed, strip_wrapping
from ais_megatron.tasks.reading import read_rows
from ais_megatron.tasks.sudoku import solutions
from ais_megatron.tasks.task import extract_answer, is_held_out
from tests.helpers.paths import ROOT

DATA = ROOT.parent / "shared" / "data"
TEST_FILES = {
    "countdown": ("countdown/countdown_cd3_test.jsonl", 256),
    "sudoku": ("sudoku/4x4_test_sudoku.csv", 500),
    "gsm8k": ("gsm8k/test.jsonl", 1319),
    "math500": ("math500/test.jsonl", 500),
}
TRUTHS = {
    "countdown": {"numbers": [100, 93, 30], "target": 23},
    "sudoku": {"puzzle": "3102200002100320"},
    "gsm8k": {"answer": "1080"},
    "math500": {"answer": r"\frac{14}{3}"},
    "qa": {"answer": "42"},
}


def real_file(relative: str) -> str:
    if not (DATA / relative).is_file():
        pytest.skip(f"real data outside the repository: {DATA} lacks {relative}")
    return str(DATA / relative)


def task_of(name: str, seed: int = 0, **settings: object):
    return make_task(TaskConfig(name=name, **settings), seed)


def truth_of(name: str):
    """A question of this task, for a task that is not in TRUTHS one that it generates."""
    if name in TRUTHS:
        return TRUTHS[name]
    try:
        return task_of(name).train_problem(0).truth
    except ValueError:
        pytest.fail(f"the task {name} generates no questions: add the truth of one of them to TRUTHS in tests/tasks/test_tasks.py")


def value(name: str, answer: str, **settings: object) -> float:
    """The reward of an answer to the question in TRUTHS."""
    return task_of(name, **settings).reward(TRUTHS[name], f"Let me see. <answer>{answer}</answer>").value


def write(path: Path, *lines: str) -> str:
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return str(path)


# --- answers -----------------------------------------------------------------------------------------------------------


def test_extract_answer_wants_exactly_one_pair_at_the_end():
    assert extract_answer("so <answer> 7 </answer>\n", 10) == "7"
    for bad in (
        "",
        "7",
        "<answer>7",
        "7</answer>",
        "</answer>7<answer>",
        "<answer></answer>",
        "<answer> </answer>",
        "<answer>7</answer>.",
        "<answer>7</answer><answer>8</answer>",
        "<answer>7</answer></answer>",
        "<answer>12345678901</answer>",
    ):
        assert extract_answer(bad, 10) is None, bad


def test_reward_is_the_weighted_sum_of_format_and_correctness():
    assert value("countdown", "93+30-100", format_weight=0.1) == pytest.approx(1.0)
    assert value("countdown", "93+30+100", format_weight=0.1) == pytest.approx(0.1)
    assert value("countdown", "93+30+100", format_weight=0.0) == 0.0
    assert value("countdown", "ninety") == 0.0


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("93+30-100", 1.0),
        (" 30 - (100 - 93) ", 1.0),
        ("-100+93+30", 1.0),
        ("93+30-100+0", 0.1),  # one number too many
        ("23", 0.1),
        ("30-93+100", 0.1),  # 37
        ("93+93-100", 0.1),
        ("93/(30-30)-100", 0.1),  # division by zero
        ("93+30-100=23", 0.0),
        ("93 30 100", 0.0),
        ("9**9**9", 0.0),
        ("93//30", 0.0),
        ("1e3", 0.0),
        ("(30)(93)", 0.0),
        ("()", 0.0),
        ("093+30-100", 0.0),
        ("٩٣+30-100", 0.0),
        ("９３+30-100", 0.0),
        ("__import__('os')", 0.0),
        ("(" * 30 + "1" + ")" * 30, 0.1),
        ("-" * 63 + "1", 0.1),
    ],
)
def test_countdown_reward(answer: str, expected: float):
    assert value("countdown", answer) == pytest.approx(expected)


def test_countdown_arithmetic_is_exact():
    task = task_of("countdown")
    assert task.reward({"numbers": [3, 1, 3], "target": 1}, "<answer>1/3*3</answer>").correct
    big = {"numbers": [10**8, 10**8, 1], "target": 10**16 + 1}
    assert task.reward(big, "<answer>100000000*100000000+1</answer>").correct
    assert not task.reward({**big, "target": 10**16}, "<answer>100000000*100000000+1</answer>").correct


def test_countdown_solver_finds_a_solution_exactly_when_one_exists():
    operators = {"+": lambda x, y: x + y, "-": lambda x, y: x - y, "*": lambda x, y: x * y, "/": lambda x, y: x / y if y else None}
    task = task_of("countdown")
    for numbers in [(1, 1, 1), (2, 3, 6), (4, 8, 3), (1, 5, 5), (7, 9, 2), (12, 4, 6), (9, 3, 3)]:
        reachable = set()
        for x, y, z in itertools.permutations(map(Fraction, numbers)):
            for first, second in itertools.product(operators.values(), repeat=2):
                inner = first(x, y)
                reachable |= {second(inner, z), second(z, inner)} if inner is not None else set()
        for target in range(1, 120):
            solution = solve(numbers, target)
            assert (solution is not None) == (target in reachable), (numbers, target)
            if solution is not None:
                assert task.reward({"numbers": list(numbers), "target": target}, f"<answer>{solution}</answer>").correct


def test_countdown_convention_prefers_sums_in_the_order_of_the_prompt():
    assert solve((16, 93, 30), 79) == "93-30+16"
    assert solve((4, 2, 2), 4) == "4+2-2"  # and not 2*4/2
    assert solve((2, 3, 50), 44) == "50-3*2"
    assert solve((1, 1, 1), 50) is None


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("3142243142131324", 1.0),
        (" 3142243142131324 ", 1.0),
        ("3142243142131342", 0.1),  # breaks a column
        ("4132234132141423", 0.1),  # a valid grid, but not with these givens
        ("3102200002100320", 0.0),  # zeros are no answer
        ("314224314213132", 0.0),
        ("31422431421313244", 0.0),
        ("314224314213132٤", 0.0),
        ("3142 2431 4213 1324", 0.0),
    ],
)
def test_sudoku_reward(answer: str, expected: float):
    assert value("sudoku", answer) == pytest.approx(expected)


def test_sudoku_solver_knows_all_grids_and_accepts_any_completion():
    assert len(solutions("0" * 16)) == 288
    two = solutions("1200340000000000")
    assert len(two) > 1 and all(task_of("sudoku").reward({"puzzle": "1200340000000000"}, f"<answer>{s}</answer>").correct for s in two)
    assert solutions("11" + "0" * 14) == []


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("1080", 1.0),
        ("1,080", 1.0),
        ("$1,080.00", 1.0),
        ("1080.", 1.0),
        ("1,080 eggs per day.", 1.0),
        ("+1080", 1.0),
        ("-1080", 0.1),
        ("1080.5", 0.1),
        ("108", 0.1),
        (r"\boxed{\$1,080}", 1.0),
        (r"1{,}080\text{ eggs}", 1.0),
        (r"$1\,080$", 1.0),
        ("**1080**", 1.0),
        ("#### 1080", 1.0),
        (r"1080\%", 1.0),
        (r"1080\sqrt{x}", 0.0),
        (r"\frac{1080}{x}", 0.0),
        (r"1080\text{ or }1081", 0.0),
        ("10,80", 0.0),
        ("1080 or 1081", 0.0),
        ("1e3", 0.0),
        ("one thousand and eighty", 0.0),
        ("١٠٨٠", 0.0),
        ("1080½", 0.0),
    ],
)
def test_gsm8k_reward(answer: str, expected: float):
    assert value("gsm8k", answer, test_path=None) == pytest.approx(expected)


def test_gsm8k_says_how_it_judged():
    task = task_of("gsm8k")
    judged = {
        "<answer>1080</answer>": "answer 1080 from the <answer> pair; it is 1080, expected 1080",
        r"\boxed{7} or rather \boxed{\$8}": r"answer \$8 from the last of 2 \boxed{}; it is 8, expected 1080",
        "<answer>7 or 8</answer>": "answer 7 or 8 from the <answer> pair; it is not exactly one number",
        "So the answer is\n#### 1080": r"no <answer> pair and no \boxed{}",
    }
    assert {response: task.reward(TRUTHS["gsm8k"], response).reason for response in judged} == judged


def test_puzzles_say_how_they_judged_and_keep_the_strict_rule():
    task, truth = task_of("countdown"), TRUTHS["countdown"]
    judged = {
        "<answer>93+30-100</answer>": "answer 93+30-100 from the only <answer> pair; it is 23, expected 23",
        "<answer>93/30*100</answer>": "answer 93/30*100 from the only <answer> pair; it is 310, expected 23",
        "<answer>23</answer>": "answer 23 from the only <answer> pair; it must use each of [100, 93, 30] exactly once",
        "<answer>93/(30-30)</answer>": "answer 93/(30-30) from the only <answer> pair; it divides by zero",
        "<answer>ninety</answer>": "answer ninety from the only <answer> pair; it is not an arithmetic expression",
        "<answer>93+30-100</answer>.": "the response does not end with its only <answer> pair, of 1 to 64 characters",
    }
    assert {response: task.reward(truth, response).reason for response in judged} == judged
    sudoku, puzzle = task_of("sudoku"), TRUTHS["sudoku"]
    assert "; it solves the puzzle" in sudoku.reward(puzzle, "<answer>3142243142131324</answer>").reason
    assert "; expected 16 digits from 1 to 4" in sudoku.reward(puzzle, "<answer>314224314213132</answer>").reason


def test_read_number_reads_signs_decimals_and_separators():
    cases = {"-5": "-5", "\u22125": "-5", "-$5": "-5", "$-5": "-5", ".5": "0.5", "109,200,000": "109200000", "18%": "18", "0.20": "0.2"}
    assert {text: read_number(text) for text in cases} == {text: Decimal(number) for text, number in cases.items()}
    assert read_number("3/4") is None and read_number("") is None


@pytest.mark.parametrize(
    ("gold", "answer", "equal"),
    [
        (r"\frac{14}{3}", r"$\dfrac{14}{3}$", True),
        (r"\frac{14}{3}", r"\boxed{14/3}.", True),
        (r"\frac{14}{3}", "4.667", False),
        ("p - q", "-q+p", True),
        (r"10,\!080", "10080", True),
        (r"\$18.90", "18.9", True),
        (r"90^\circ", "90", True),
        ("1,-2", "-2, 1", True),
        (r"\text{Evelyn}", "Evelyn", True),
        ("(3,4]", "(3,4)", False),
        (r"3\sqrt{13}", r"\sqrt{117}", True),
        ("5", "5, 6", False),
        ("5", "$5$ and $6$", False),
        ("5", r"5 \text{ or } 6", False),
        ("5", "٥", False),
        ("5", "no idea", False),
    ],
)
def test_math500_equality(gold: str, answer: str, equal: bool):
    assert is_equal(gold, answer) is equal


def test_latex_wrapping():
    assert strip_wrapping(r" $\boxed{\(5\)}$. ") == "5"
    assert strip_wrapping(r"**\boxed{\boxed{ 5 }}**") == "5"
    assert strip_wrapping(r"\boxed{5}+\boxed{6}") == r"\boxed{5}+\boxed{6}"
    assert strip_wrapping("$") == "$"
    assert last_boxed(r"\boxed{1} then \boxed{\frac{1}{2}} end") == r"\frac{1}{2}"
    assert last_boxed("none") is None and last_boxed(r"\boxed{open") is None


def test_math500_comparison_that_never_ends_is_cut_off_and_the_next_one_works():
    started = time.monotonic()
    assert not are_equivalent("42", "9^{9^{9}}", cpu_seconds=0.3)
    assert time.monotonic() - started < 20  # CPU time is limited to 0.3 s; the rest is a busy machine and starting the child
    assert are_equivalent("42", "41+1")


@pytest.mark.parametrize("name", TASKS)
def test_hostile_responses_score_nothing_quickly(name: str):
    task, truth = task_of(name), truth_of(name)
    mega = 1 << 20
    hostile = [
        "",
        " ",
        "garbage \x00 \ud800",
        "1" * mega,
        "<answer>" * 100_000,
        "<answer>" + "(" * mega + "</answer>",
        "<answer>" + " " * mega + "</answer>",
        "<answer>" + "9" * mega + "</answer>",
        "٤٢</answer><answer>",
        "<answer>\x00\u200b</answer>",
        "<answer></answer>" * 60_000,
        r"\boxed{" * 150_000 + "}" * 1000,
        r"\boxed" + "{" * mega,
        "<answer>" + r"\boxed{ " * 60_000 + "}" * 60_000 + "</answer>",
        "<think></think>" * 60_000 + "<think>",
    ]
    started = time.process_time()
    assert [task.reward(truth, response).value for response in hostile] == [0.0] * len(hostile)
    assert time.process_time() - started < 2


# --- streams -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TEST_FILES)
def test_every_real_row_parses_and_its_gold_answer_scores_one(name: str):
    relative, num_rows = TEST_FILES[name]
    task = task_of(name, test_path=real_file(relative))
    problems = task.test_problems(10_000)
    assert len(problems) == num_rows
    assert [p.text for p in problems if p.solution is None or task.reward(p.truth, p.solution).value != 1.0] == []
    assert task.test_problems(3) == problems[:3]


def test_gsm8k_training_file_parses_and_an_epoch_shows_every_row_once():
    settings = {"train_path": real_file("gsm8k/train.jsonl"), "test_path": real_file("gsm8k/test.jsonl")}
    task, other_seed = task_of("gsm8k", **settings), task_of("gsm8k", seed=1, **settings)
    epoch = [task.train_problem(index) for index in range(7473)]
    assert len({p.text for p in epoch}) == 7473
    assert all(task.reward(p.truth, p.solution).value == 1.0 for p in epoch)
    assert task.train_problem(7473 + 5).text in {p.text for p in epoch}
    assert [task.train_problem(7473 + i) for i in range(9)] != epoch[:9]  # another order in the next epoch
    assert [other_seed.train_problem(i) for i in range(9)] != epoch[:9]
    assert task.train_problem(0) == epoch[0]


@pytest.mark.parametrize("name", ["countdown", "sudoku"])
def test_generated_streams_are_pure_functions_of_seed_and_index(name: str):
    first, again, other = (task_of(name, seed=seed) for seed in (0, 0, 1))
    stream = [first.train_problem(index) for index in range(200)]
    assert [again.train_problem(index) for index in reversed(range(200))] == stream[::-1]
    assert [other.train_problem(index) for index in range(200)] != stream
    assert other.test_problems(50) == first.test_problems(50)
    assert all(first.reward(p.truth, p.solution).value == 1.0 for p in stream + first.test_problems(50))


@pytest.mark.parametrize("name", ["countdown", "sudoku"])
def test_training_never_shows_a_held_out_puzzle(name: str):
    # So few puzzles exist that training sees most of them: if it could meet a held-out one, it would.
    task = task_of(name, max_number=6, empty_cells=1)
    train, test = {task.train_problem(i).text for i in range(3000)}, {p.text for p in task.test_problems(20)}
    assert len(train) > 150 and len(test) == 20 and not train & test
    assert all(map(is_held_out, test)) and not any(map(is_held_out, train))


def test_puzzles_of_the_test_file_are_never_generated(tmp_path: Path):
    free = task_of("countdown", max_number=4)
    texts = sorted({free.train_problem(index).text for index in range(2000)})
    chosen = texts[::2]
    rows = [json.dumps({"input": t.split("=")[0].replace(" ", ","), "output": t.split("=")[1][:-1]}) for t in chosen]
    task = task_of("countdown", max_number=4, test_path=write(tmp_path / "t.jsonl", *rows))
    assert [p.text for p in task.test_problems(9999)] == chosen
    assert {task.train_problem(index).text for index in range(2000)} == set(texts) - set(chosen)


def test_generated_puzzles_respect_their_settings():
    countdown = task_of("countdown", max_number=20)
    for problem in (countdown.train_problem(index) for index in range(300)):
        assert all(1 <= n <= 20 for n in [*problem.truth["numbers"], problem.truth["target"]])
    for empty in (1, 8, 12):
        puzzle = task_of("sudoku", empty_cells=empty).train_problem(0).truth["puzzle"]
        assert puzzle.count("0") == empty and len(solutions(puzzle)) == 1


def test_too_small_a_space_of_puzzles_is_an_error_not_a_hang():
    task = task_of("countdown", max_number=1)  # its one puzzle, 1 1 1 = 1, is on one side only
    sides = []
    for side in (lambda: [task.train_problem(0)], lambda: task.test_problems(1)):
        try:
            sides.append(side()[0].text)
        except ValueError as error:
            assert "task.max_number=1" in str(error)
    assert sides == ["1 1 1=1:"]


def test_corpus_holds_the_whole_alphabet():
    for name in ("countdown", "sudoku"):
        corpus = task_of(name).tokenizer_corpus(5)
        assert len(corpus) == 5 and set(TASKS[name].alphabet) <= set("".join(corpus))


# --- what the user may get wrong ---------------------------------------------------------------------------------------


def test_unknown_task_names_the_nearest():
    with pytest.raises(ValueError, match=rf"task\.name='sudokku'.*allowed: {', '.join(TASKS)}, or module:Class; did you mean sudoku\?"):
        task_of("sudokku")


def test_questions_cannot_be_generated():
    with pytest.raises(ValueError, match="set task.train_path"):
        task_of("gsm8k").train_problem(0)


def test_sudoku_without_unique_solutions_is_refused():
    with pytest.raises(ValueError, match="task.empty_cells=13.*1 to 12"):
        task_of("sudoku", empty_cells=13)


GOOD = {
    "countdown": '{"input": "30,100,93", "output": "23"}',
    "sudoku": "3102200002100320,3142243142131324",
    "gsm8k": '{"question": "1+1?", "answer": "easy\\n#### 2"}',
    "math500": '{"problem": "1+1?", "solution": "It is $\\\\boxed{2}$.", "answer": "2"}',
}
BAD = [
    ("countdown", '{"input": "30,100", "output": "23"}', "three numbers"),
    ("countdown", '{"input": "30,100,x", "output": "23"}', "'input' must hold positive integers"),
    ("countdown", '{"input": "30,100,93", "output": "2.5"}', "'output' must hold positive integers"),
    ("countdown", '{"input": "30,100,93"}', "'output' is missing; columns found: input"),
    ("countdown", '{"input": "1,1,1", "output": "77"}', "no expression"),
    ("countdown", '{"input": "30,', "not valid JSON"),
    ("countdown", '["30,100,93"]', "expected a JSON object, got list"),
    ("sudoku", "310220000210032,3142243142131324", "16 digits"),
    ("sudoku", "3102200002100320,3142243142131342", "does not solve"),
    ("sudoku", "3102200002100320", "'Solution' must be text, got None"),
    ("gsm8k", '{"question": "1+1?", "answer": "2"}', "#### "),
    ("gsm8k", '{"question": "", "answer": "#### 2"}', "'question' must be text"),
    ("gsm8k", '{"question": 3, "answer": "#### 2"}', "'question' must be text, got 3"),
    ("math500", '{"problem": "1+1?", "solution": "It is 2."}', "no answer"),
]


@pytest.mark.parametrize(("name", "line", "complaint"), BAD)
def test_malformed_row_is_named_by_file_and_line(tmp_path: Path, name: str, line: str, complaint: str):
    header = ["Puzzle,Solution"] * (name == "sudoku")
    path = write(tmp_path / ("rows.csv" if header else "rows.jsonl"), *header, GOOD[name], line)
    with pytest.raises(ValueError) as caught:
        task_of(name, test_path=path)
    assert f"{path}:{2 + len(header)}: " in str(caught.value) and complaint in str(caught.value)


@pytest.mark.parametrize("name", GOOD)
def test_blank_last_line_is_fine_and_an_empty_file_is_not(tmp_path: Path, name: str):
    suffix, header = (".csv", ["Puzzle,Solution"]) if name == "sudoku" else (".jsonl", [])
    assert len(task_of(name, test_path=write(tmp_path / f"a{suffix}", *header, GOOD[name], "")).test_problems(9)) == 1
    for lines in ([], header, [*header, ""]):
        with pytest.raises(ValueError, match=r"task\.test_path=.*empty"):
            task_of(name, test_path=write(tmp_path / f"b{suffix}", *lines))


def test_training_row_that_is_also_a_test_row_is_an_error(tmp_path: Path):
    train, test = (write(tmp_path / f"{split}.jsonl", GOOD["gsm8k"]) for split in ("train", "test"))
    with pytest.raises(ValueError, match=r"train\.jsonl:1: this problem is also in task\.test_path"):
        task_of("gsm8k", train_path=train, test_path=test)


def test_lines_are_cut_at_newlines_only(tmp_path: Path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"question": "a\xe2\x80\xa8b", "answer": "#### 2"}\r\n{"question": "c", "answer": "#### 3"}')
    assert [row.values["question"] for row in read_rows(path, "test")] == ["a\u2028b", "c"]
    path.write_bytes(b'{"question": "\xff"}')
    with pytest.raises(ValueError, match=r"a\.jsonl:1: not valid JSON"):
        read_rows(path, "test")


def test_paths_that_lead_nowhere(tmp_path: Path):
    with pytest.raises(ValueError, match=r"task\.train_path=.*no such file"):
        read_rows(tmp_path / "none.jsonl", "train")
    with pytest.raises(ValueError, match=r"unknown kind of file '\.txt'.*\.jsonl"):
        read_rows(write(tmp_path / "a.txt", "x"), "train")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"has no file that matches \*\.jsonl"):
        read_rows(tmp_path / "empty", "train")


def test_folder_of_jsonl_files_keeps_splits_apart(tmp_path: Path):
    for split in ("train", "test"):
        write(tmp_path / f"{split}-00000.jsonl", json.dumps({"question": split, "answer": "#### 1"}))
    assert [row.values["question"] for row in read_rows(tmp_path, "train")] == ["train"]
    assert [row.values["question"] for row in read_rows(tmp_path, "test")] == ["test"]
    (tmp_path / "test-00000.jsonl").unlink()
    with pytest.raises(ValueError, match="named after the 'test' split"):
        read_rows(tmp_path, "test")
    (tmp_path / "one_split").mkdir()
    write(tmp_path / "one_split" / "b.jsonl", GOOD["gsm8k"])
    assert len(read_rows(tmp_path / "one_split", "test")) == 1


def test_arrow_without_the_extra_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.ipc", None)
    with pytest.raises(ValueError, match=r"ais_megatron\[datasets\]"):
        read_rows(write(tmp_path / "a.parquet", "PAR1"), "train")


def test_parquet_and_save_to_disk_folders(tmp_path: Path):
    reason = "pyarrow of the `datasets` extra is not installed"
    pyarrow, ipc, parquet = (pytest.importorskip(name, reason=reason) for name in ("pyarrow", "pyarrow.ipc", "pyarrow.parquet"))
    table = pyarrow.table({"question": ["1+1?", "2+2?"], "answer": ["#### 2", "#### 4"]})
    parquet.write_table(table, tmp_path / "train-00000-of-00001.parquet")
    saved = tmp_path / "saved" / "test"  # as `datasets.DatasetDict.save_to_disk` lays it out
    saved.mkdir(parents=True)
    (tmp_path / "saved" / "dataset_dict.json").write_text('{"splits": ["test"]}')
    (saved / "state.json").write_text('{"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}')
    with pyarrow.OSFile(str(saved / "data-00000-of-00001.arrow"), "wb") as sink, ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    for folder, split in ((tmp_path / "train-00000-of-00001.parquet", "train"), (tmp_path / "saved", "test")):
        assert [row.values["answer"] for row in read_rows(folder, split)] == ["#### 2", "#### 4"]
    with pytest.raises(ValueError, match="no 'train' split"):
        read_rows(tmp_path / "saved", "train")


def test_tasks_do_not_import_math_verify_by_themselves():
    code = "import sys, ais_megatron.tasks; print(sorted({'math_verify', 'sympy', 'torch', 'pyarrow'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# --- puzzles in words --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "shown"), [("countdown", "equals {target}"), ("sudoku", "{puzzle}")])
def test_puzzles_in_words_are_the_same_puzzles(name: str, shown: str):
    terse, instruct = task_of(name), task_of(name, prompt_style="instruct")
    for ours, theirs in zip(
        [*instruct.test_problems(20), *map(instruct.train_problem, range(20))],
        [*terse.test_problems(20), *map(terse.train_problem, range(20))],
        strict=True,
    ):
        assert (ours.truth, ours.solution) == (theirs.truth, theirs.solution)
        assert shown.format(**ours.truth) in ours.text and "<answer> and </answer>" in ours.text and "Think first." in ours.text
        said = f"<think>maybe <answer>1</answer></think>So I get {ours.solution}. Done!"
        assert instruct.reward(ours.truth, said).value == instruct.reward(ours.truth, ours.solution).value == 1.0
        assert terse.reward(ours.truth, said).value == 0.0
    assert instruct.tokenizer_corpus(3)[1].startswith(instruct.train_problem(0).text)


def test_puzzles_in_words_read_well():
    countdown, sudoku = (task_of(name, prompt_style="instruct") for name in ("countdown", "sudoku"))
    numbers = ", ".join(map(str, countdown.train_problem(0).truth["numbers"]))
    assert f"is made of the numbers {numbers}.\n" in countdown.train_problem(0).text
    puzzle = sudoku.train_problem(0).truth["puzzle"]
    assert f"0 is an empty cell.\n{puzzle[:4]}\n{puzzle[4:8]}\n{puzzle[8:12]}\n{puzzle[12:]}\nPut" in sudoku.train_problem(0).text
