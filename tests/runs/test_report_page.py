"""The report page in a real browser without a screen: filters, shading, probabilities, hostile text, and that it asks for nothing."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest

from ais_megatron.runs.report import SAMPLE_BYTES, write_report
from tests.runs.test_report import ROW

pytestmark = pytest.mark.browser

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
HOSTILE = "</script><script>window.hacked = 1</script><img src=x onerror='window.hacked = 2'><!-- <b>bold</b> &lt;i&gt; \u202e {{7*7}}"
PIECES = ["<answer>", "1", "+", "漢", "", "</answer>", ""]
ENGINE = [-0.1, -0.5, -1.0, -0.25, -0.001, -0.2, -0.01]


def sample(step: int, number: int, **changes: object) -> dict[str, object]:
    correct = number % 2 == 0
    return {
        "step": step,
        "prompt_index": 10 * step + number,
        "prompt": f"prompt {step}-{number}",
        "response": "".join(PIECES),
        "reward": 1.0 if correct else 0.1,
        "correct": correct,
        "well_formed": True,
        "reason": "3 equals 3" if correct else "4 is not 3",
        "advantage": 0.5,
        "finish_reason": "stop",
        "weight_version": step - 1,
        "length": len(PIECES),
        "repetition": 0.0,
        "garbled": False,
        "tokens": PIECES,
        "rollout_logprobs": ENGINE,
        "old_logprobs": [-0.1, -0.4, -1.3, -0.25, -0.001, -0.2, -0.01],
        **changes,
    }


SAMPLES = [
    *(sample(1, number) for number in range(4)),
    *(sample(5, number) for number in range(3)),
    sample(5, 3, response=HOSTILE, tokens=[HOSTILE, "\u202e", *PIECES[2:]], reason=HOSTILE, prompt=HOSTILE, garbled=True, reward=0.0),
    sample(5, 4, repetition=0.9, tokens=["a", "b", "c", "d"] * 500, length=2000, finish_reason="length", response="abcd" * 500)
    | {"rollout_logprobs": [-0.1] * 2000, "old_logprobs": [-0.1] * 2000},
    sample(5, 5, old_logprobs=None),
]


@pytest.fixture(scope="module")
def chromium():  # noqa: ANN201
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install ais_megatron[browser]")
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        pytest.skip(f"there is no browser ({', '.join(BROWSERS)}): apt-get install chromium")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("page") / "run <b>"
    run.mkdir()
    rows = [{"step": step, **ROW, "reward_mean": 0.1 * step, "time/<img src=x onerror=hack()>": 1.0} for step in range(1, 6)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (run / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in SAMPLES))
    scores = {"pass@1": 0.5, "pass@1_se": 0.05, "truncated_fraction": 0.1}
    (run / "evaluations.jsonl").write_text(json.dumps({"step": 0, "set": HOSTILE, **scores}) + "\n")
    (run / "config.yaml").write_text(f"# {HOSTILE}\n")
    return write_report(run)


@pytest.fixture
def page(chromium, index: Path):  # noqa: ANN001, ANN201
    """The page. At the end of a test nothing may have been requested, reported or run."""
    context = chromium.new_context(viewport={"width": 1200, "height": 900}, color_scheme="light")
    page = context.new_page()
    complaints: list[str] = []
    page.on("console", lambda message: complaints.append(f"console: {message.text}"))
    page.on("pageerror", lambda error: complaints.append(f"error: {error}"))
    page.on("dialog", lambda dialog: (complaints.append(f"dialog: {dialog.message}"), dialog.dismiss()))
    page.on("request", lambda request: complaints.append(f"request: {request.url}") if request.url != index.as_uri() else None)
    page.goto(index.as_uri())
    yield page
    assert page.evaluate("window.hacked") is None and complaints == []
    context.close()


def titles(page) -> list[str]:  # noqa: ANN001
    return page.locator("article h3").all_text_contents()


def test_the_newest_step_comes_first_and_steps_can_be_chosen(page) -> None:  # noqa: ANN001
    assert titles(page) == [f"Step 5, prompt {50 + number}" for number in range(6)]
    page.get_by_label("Earlier step").click()
    assert titles(page) == [f"Step 1, prompt {10 + number}" for number in range(4)]
    assert page.get_by_label("Earlier step").is_disabled()
    page.select_option("#step", "all")
    assert len(titles(page)) == 10 and page.locator("#count").inner_text() == "10 of 10 responses"


def test_rewards_outcomes_marks_and_words_are_filters(page) -> None:  # noqa: ANN001
    page.select_option("#step", "all")
    page.fill("#least", "0.5")
    assert {chip.split()[1] for chip in page.locator(".chip:first-of-type").all_text_contents() if chip.startswith("reward")} == {"1"}
    assert len(titles(page)) == 5
    page.fill("#least", "")
    page.fill("#most", "0.05")
    assert titles(page) == ["Step 5, prompt 53"]
    page.fill("#most", "")
    page.select_option("#outcome", "wrong")
    assert len(titles(page)) == 5
    page.select_option("#outcome", "all")
    for mark, title in (("repetitive", "Step 5, prompt 54"), ("garbled", "Step 5, prompt 53"), ("cut", "Step 5, prompt 54")):
        page.select_option("#flag", mark)
        assert titles(page) == [title]
    page.select_option("#flag", "all")
    page.fill("#search", "PROMPT 1-2")
    assert titles(page) == ["Step 1, prompt 12"]
    page.fill("#search", "nowhere")
    assert titles(page) == [] and page.locator("#count").inner_text() == "No response fits these filters."


def test_pointing_at_a_token_shows_both_probabilities(page) -> None:  # noqa: ANN001
    page.locator("article .tokens").first.locator("b").nth(2).hover()
    tip = page.locator("#tip")
    assert tip.is_visible()
    text = " ".join(tip.inner_text().split())
    assert text == "“+” token 3 of 7 engine 36.79 % trainer 27.25 % log ratio −0.30000 ratio 0.7408"
    page.locator("h1").hover()
    assert not tip.is_visible()


def test_the_keyboard_reads_tokens_too(page) -> None:  # noqa: ANN001
    page.locator("article .tokens").first.focus()
    for _ in range(2):
        page.keyboard.press("ArrowRight")
    text = page.locator("#tip").inner_text()
    assert "token 2 of 7" in text and f"{100 * math.exp(-0.5):.4g} %" in text and f"{100 * math.exp(-0.4):.4g} %" in text
    page.keyboard.press("Escape")
    assert not page.locator("#tip").is_visible()


def test_tokens_are_shaded_by_their_log_ratio(page) -> None:  # noqa: ANN001
    token = page.locator("article .tokens").first.locator("b")
    page.select_option("#scale", "0.5")

    def shade(number: int) -> str:
        return token.nth(number).evaluate("node => getComputedStyle(node).backgroundColor")

    # 0.85 of full colour at the end of the scale: +0.1 of 0.5 is blue and pale, -0.3 of 0.5 is red and stronger.
    assert (shade(0), shade(1), shade(2)) == ("rgba(0, 0, 0, 0)", "rgba(33, 102, 172, 0.17)", "rgba(200, 60, 30, 0.51)")
    page.uncheck("#shaded")
    assert shade(2) == "rgba(0, 0, 0, 0)"


def test_a_response_without_the_trainers_probabilities_says_so(page) -> None:  # noqa: ANN001
    unknown = page.locator("article").nth(5)
    assert "no log-probabilities of the trainer" in unknown.inner_text()
    unknown.locator(".tokens b").first.hover()
    assert "trainer\tnot recorded" in page.locator("#tip").inner_text()
    assert "written without the trainer's log-probabilities" in page.inner_text("main")


def test_marks_of_what_went_wrong(page) -> None:  # noqa: ANN001
    chips = [page.locator("article").nth(number).locator(".chip.warn").all_text_contents() for number in (0, 3, 4)]
    assert chips == [[], ["garbled"], ["repetitive, 90 %", "cut at the limit"]]
    page.check("#marked")
    marked = page.locator("article").nth(4).locator("b.again")
    assert marked.count() == 1496, "of the first 1500 tokens all but the first four, which repeat nothing"


def test_hostile_text_stays_text(page) -> None:  # noqa: ANN001
    hostile = page.locator("article").nth(3)
    for where in (".tokens", ".asked", ".reason"):
        assert "</script><script>window.hacked = 1</script><img src=x" in hostile.locator(where).inner_text()
        assert "⟨U+202E⟩" in hostile.locator(where).inner_text(), "a character that turns the line around is shown, not obeyed"
    assert page.locator("img, article script, iframe, object").count() == 0
    assert page.locator("script").count() == 2 and "<img src=x onerror=hack()>" in page.locator("#metric").inner_html().replace(
        "&lt;", "<"
    ).replace("&gt;", ">")
    page.select_option("#metric", "time/<img src=x onerror=hack()>")
    assert HOSTILE.replace("\u202e", "")[:40] in page.locator(".legend").nth(1).inner_text()


def test_no_script_runs_but_the_pages_own(chromium, index: Path) -> None:  # noqa: ANN001
    """Even if a tag got through, the content security policy would stop its script and its request."""
    page, answers = chromium.new_page(), list[str]()
    page.goto(index.as_uri())
    page.on("response", lambda response: answers.append(response.url))
    violated = page.evaluate(
        """async () => {
            const violated = [];
            document.addEventListener("securitypolicyviolation", (event) => violated.push(event.violatedDirective));
            const script = document.createElement("script");
            script.textContent = "window.hacked = 3";
            const image = document.createElement("img");
            image.src = "https://example.com/a.png";
            document.body.append(script, image);
            while (violated.length < 2) await new Promise((done) => setTimeout(done, 10));
            return violated.sort();
        }"""
    )
    assert violated == ["img-src", "script-src-elem"] and page.evaluate("window.hacked") is None and answers == []
    page.close()


def test_long_responses_are_cut_until_asked(page) -> None:  # noqa: ANN001
    long = page.locator("article").nth(4)
    assert long.locator(".tokens b").count() == 1500
    long.get_by_role("button", name="Show all 2,000 tokens").click()
    assert long.locator(".tokens b").count() == 2000 and long.get_by_role("button").count() == 0


def test_charts_are_drawn_read_by_pointer_and_keyboard_and_fit_a_phone(page) -> None:  # noqa: ANN001
    assert page.locator(".chart svg").count() == page.locator(".chart .plot").count() == 18
    reward = page.locator(".plot").first
    assert reward.get_attribute("aria-label").startswith("Reward. reward: 0.1 at first, 0.5 at last")
    reward.hover()
    assert "step 3" in page.locator("#tip").inner_text() and "0.3" in page.locator("#tip").inner_text()
    reward.focus()
    page.keyboard.press("End")
    assert "step 5" in page.locator("#tip").inner_text()
    for width in (1200, 390):
        page.set_viewport_size({"width": width, "height": 800})
        assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_both_themes(page) -> None:  # noqa: ANN001
    def background() -> str:
        return page.evaluate("getComputedStyle(document.body).backgroundColor")

    light = background()
    page.get_by_role("button", name="Dark colours").click()
    assert background() != light
    page.get_by_role("button", name="Light colours").click()
    assert background() == light
    page.emulate_media(color_scheme="dark")
    page.get_by_role("button", name="Light colours").wait_for()
    assert background() != light


def test_a_large_file_says_what_is_left_out(chromium, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: ANN001
    monkeypatch.setattr("ais_megatron.runs.report.SAMPLE_BYTES", 2500)
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 9, **ROW}) + "\n")
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps(sample(step, 0)) + "\n" for step in range(1, 10)))
    page = chromium.new_page()
    page.goto(write_report(tmp_path).as_uri())
    note = page.inner_text("main")
    steps = page.locator("#step option").all_text_contents()
    assert f"samples.jsonl has 9 steps. This page has {len(steps) - 1} of them" in note and steps[-1] == "step 9" and 2 < len(steps) < 8
    assert SAMPLE_BYTES > 10**6
    page.close()
