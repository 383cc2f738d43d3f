"""The page: bounded, self-contained, and safe whatever the rows hold. The browser tests run it in headless Chromium."""

import base64
import hashlib
import json
import re
import shutil

import numpy as np
import pytest

from fastsel.errors import UsageError
from fastsel.io import bundled_pool_path, open_pool
from fastsel.report import write_report
from fastsel.report.content import BARS, CHARACTERS_SHOWN, SAMPLED, report_content
from fastsel.report.page import _percent, _plain, _seconds, _ticks
from fastsel.selection import build_selection, choose

ATTACK = '<script>window.attacked = 1</script><img src=x onerror="window.attacked = 1"></textarea></script>{{ 7 * 7 }}'


def scored(pool, budget="10%", *, scores=None, largest=True, tokens=True, per=None, **more):
    n = len(pool)
    status = np.array(pool.status)
    scores = np.random.default_rng(1).random(n) * 1.1 if scores is None else np.asarray(scores, float)
    scores = np.where(status > 1, np.nan, scores)
    n_tokens = np.where(status > 1, -1, np.arange(n) % 900 + 5).astype(np.int32) if tokens else None
    eligible = scores <= 1
    arguments = {
        "pool": pool,
        "method": "ifd",
        "indices": choose(scores, eligible, budget, pool=pool, n_tokens=n_tokens, per=per, largest=largest),
        "scores": scores,
        "status": status,
        "reasons": dict(pool.reasons),
        "n_tokens": n_tokens,
        "metrics": {"ifd": scores},
        "config": {"budget": budget, "template": "alpaca", "model": ATTACK},
        "timings": {"forward": 83.21, "choose": 0.004},
        "seed": 0,
        "notes": ["a note & <b>no markup</b>"],
        "budget": budget,
        "per": per,
        "eligible": eligible,
        "rule": "IFD above 1",
        "largest": largest,
        "provenance": {"model": {"name": "tiny", "revision": None}},
    }
    return build_selection(**(arguments | more))


def attacked_pool():
    rows = [
        {"instruction": f"plain question {i}", "output": f"plain answer {i}", "source": "ab"[i % 2]} for i in range(60)
    ]
    rows[7] = {"id": ATTACK, "instruction": ATTACK, "output": ATTACK, "source": ATTACK}
    rows[8] = {"instruction": "\ud800 \x00\x1b[31m\u2028 \u202e", "output": "control", "source": "a"}
    rows[9] = {"instruction": "q", "output": "", "source": "b"}
    return open_pool(rows)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """A page about the bundled pool."""
    return write_report(scored(open_pool(bundled_pool_path())), tmp_path_factory.mktemp("report") / "report.html")


@pytest.fixture(scope="module")
def attacked_page(tmp_path_factory):
    """A page whose rows, ids, sources and configuration try to run a script; the attacking row is shown as the best."""
    scores = np.linspace(0.1, 0.9, 60)
    scores[7] = 0.99
    return write_report(scored(attacked_pool(), scores=scores), tmp_path_factory.mktemp("report") / "report.html")


def test_the_page_loads_nothing_and_runs_only_its_own_script(page):
    html = page.read_text(encoding="utf-8")
    head = html[: html.index("<body>")]
    assert not re.search(r"""<(?:link|script|img|iframe)[^>]+(?:src|href)\s*=\s*["']?(?!["']?data:)""", html)
    assert not re.search(r"url\(|@import", head)
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', head).group(1)
    assert policy.startswith("default-src 'none'")
    script = re.search(r"<script>(.*?)</script>", html, re.S).group(1)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}';" in policy.replace("&#39;", "'")


def test_what_rows_hold_is_text_everywhere(attacked_page):
    html = attacked_page.read_text(encoding="utf-8")
    assert html.count("<script") == 2 and html.count("</script>") == 2
    assert "<img" not in html and "<b>no markup" not in html and "&lt;b&gt;no markup" in html
    assert "{{ 7 * 7 }}" in html and "&lt;script&gt;window.attacked" in html
    sample = json.loads(re.search(r'id="sample">(.*?)</script>', html, re.S).group(1))
    assert any(row["turns"] and row["turns"][0]["text"] == ATTACK for row in sample)


def test_control_characters_and_surrogates_are_shown_as_signs(attacked_page):
    html = attacked_page.read_text(encoding="utf-8")
    assert "\x00" not in html and "\x1b" not in html
    sample = json.loads(attacked_page.with_suffix(".json").read_text())["sample"]
    text = next(row for row in sample if row["row"] == 8)["turns"][0]["text"]
    assert "\u2400\u241b[31m" in text


def test_the_json_beside_the_page_holds_the_same_facts(page):
    content = json.loads(page.with_suffix(".json").read_text())
    html = page.read_text(encoding="utf-8")
    assert content["summary"]["kept"] == 25 and "<strong>25</strong> of 256 rows kept" in html
    assert "loss with the instruction by its loss without it" in html
    assert "83.2 s" in html and "4 ms" in html
    assert [group["title"] for group in content["groups"]] == [
        "Highest scores",
        "Just above the cut",
        "Just below the cut",
        "Lowest scores",
        "Kept out by the rule",
    ]


def test_the_groups_are_the_ends_and_the_edges_of_the_ranking():
    rows = [{"instruction": f"q{i}", "output": f"a{i}"} for i in range(60)]
    scores = np.arange(60) / 55  # rows 56.. are above 1
    content = report_content(scored(open_pool(rows), 20, scores=scores))
    groups = {group["title"]: [row["row"] for row in group["rows"]] for group in content["groups"]}
    assert groups["Highest scores"] == list(range(55, 47, -1))
    assert groups["Just above the cut"] == list(range(43, 35, -1))
    assert groups["Just below the cut"] == list(range(35, 27, -1))
    assert groups["Lowest scores"] == list(range(8))
    assert groups["Kept out by the rule"] == [59, 58, 57, 56]
    shown = content["groups"][0]["rows"][0]
    assert shown["rank"] == 0 and shown["kept"] and shown["score"] == 1.0
    assert [turn["text"] for turn in shown["turns"]] == ["q55", "a55"]
    refused = content["groups"][-1]["rows"][0]
    assert refused["reason"] == "IFD above 1" and refused["rank"] is None and not refused["kept"]


def test_every_row_stands_in_one_bar_and_a_bar_begins_at_the_cut():
    rows = [{"instruction": f"q{i}", "output": f"a{i}"} for i in range(300)]
    selection = scored(open_pool(rows), "20%")
    histogram = report_content(selection)["histogram"]
    assert sum(histogram["kept"]) == 60 and sum(histogram["random"]) == 60
    assert sum(histogram["kept"]) + sum(histogram["dropped"]) + sum(histogram["refused"]) == 300
    assert not any(kept and dropped for kept, dropped in zip(histogram["kept"], histogram["dropped"], strict=True))
    assert histogram["cut"] == selection.scores[selection.indices[-1]]
    assert BARS <= len(histogram["kept"]) <= BARS + 2


def test_a_far_outlier_does_not_flatten_the_histogram():
    rows = [{"instruction": f"q{i}", "output": f"a{i}"} for i in range(400)]
    scores = np.random.default_rng(0).random(400)
    scores[3] = -1e9
    histogram = report_content(scored(open_pool(rows), 9, scores=scores))["histogram"]
    assert histogram["clipped_low"] and not histogram["clipped_high"] and histogram["start"] > -1
    assert sum(histogram["dropped"]) == 391


def test_many_long_rows_give_a_small_page(tmp_path):
    long = "\u4e2d<&" * 10_000
    rows = [
        {"instruction": long + str(i), "output": long + str(i), "source": f"source {i} " + "x" * 40}
        for i in range(1000)
    ]
    page = write_report(scored(open_pool(rows), per="source=equal", budget="50%"), tmp_path / "report.html")
    assert page.stat().st_size < 4_000_000
    content = json.loads(page.with_suffix(".json").read_text())
    assert len(content["sample"]) == SAMPLED and sum(row["kept"] for row in content["sample"]) == SAMPLED // 2
    row = content["groups"][0]["rows"][0]
    assert sum(len(turn["text"]) for turn in row["turns"]) == CHARACTERS_SHOWN
    assert [len(turn["text"]) for turn in row["turns"]] == [CHARACTERS_SHOWN // 2] * 2
    assert row["left_out"] > 50_000
    assert content["shares"]["source"][-1]["name"] == "984 other sources"


def test_a_long_prompt_does_not_hide_the_answer():
    rows = [{"instruction": "p" * 9000, "output": "the answer"}] * 3
    shown = report_content(scored(open_pool(rows), 1))["groups"][0]["rows"][0]
    assert shown["turns"][-1] == {"role": "assistant", "text": "the answer"}
    assert shown["left_out"] == 9000 - (CHARACTERS_SHOWN - len("the answer"))


@pytest.mark.parametrize(
    "case",
    [
        {"scores": [np.nan, np.nan, np.nan], "budget": 1},
        {"scores": [0.5, 0.5, 0.5], "budget": 1},
        {"scores": [0.5, 0.2, 0.1], "budget": "1.0"},
        {"scores": [1.5, 0.2, 0.1], "budget": 3},
        {"tokens": False, "budget": 1},
        {"largest": False, "budget": 2},
        {"timings": {}, "provenance": {}, "notes": [], "metrics": {}, "budget": 1},
        {"timings": {"forward": 0.0}, "budget": 1},
    ],
)
def test_odd_runs_have_a_page_too(tmp_path, case):
    pool = open_pool([{"instruction": "q", "output": text} for text in "xyz"])
    selection = scored(pool, **case)
    html = write_report(selection, tmp_path / "report.html").read_text(encoding="utf-8")
    assert f"<strong>{len(selection)}</strong> of 3 rows kept" in html
    assert ("Short of the budget" in html) == (selection.short_by > 0)


def test_a_page_gets_its_folder_and_is_not_named_json(tmp_path):
    selection = scored(open_pool([{"instruction": "q", "output": "a"}] * 3), 1)
    assert selection.report(tmp_path / "new" / "page.html").exists() and (tmp_path / "new" / "page.json").exists()
    with pytest.raises(UsageError, match="name the page .html"):
        selection.report(tmp_path / "page.json")


def test_rows_that_are_not_usable_are_shown_with_their_reason(attacked_page):
    html = attacked_page.read_text(encoding="utf-8")
    assert "1 rows without a score" in html and re.search(r"skipped: [^<]*9[^<]*empty", html)


@pytest.mark.parametrize(
    ("value", "text"), [(0.0, "0%"), (0.004, "0.4%"), (0.0999, "10.0%"), (0.25, "25%"), (1.0, "100%"), (None, "-")]
)
def test_shares_are_written_short(value, text):
    assert _percent(value) == text


def test_times_and_values_are_written_for_people():
    assert [_seconds(s) for s in (0.004, 12.34, 300.0, 9000.0)] == ["4 ms", "12.3 s", "5.0 min", "2.5 h"]
    assert _plain({"name": "tiny", "revision": None, "n": 3}) == "name: tiny, n: 3"


@pytest.mark.parametrize(("start", "stop"), [(0.0, 1.0), (-3.2, 917.0), (0.9471, 0.9493), (1e-9, 3e-9)])
def test_ticks_are_round_and_inside(start, stop):
    ticks = _ticks(start, stop)
    assert 2 <= len(ticks) <= 7 and all(start <= tick <= stop for tick in ticks)


# -- in a browser -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    webdriver = pytest.importorskip("selenium.webdriver")
    options = webdriver.ChromeOptions()
    flags = (
        "headless no-sandbox disable-gpu disable-quic no-first-run disable-background-networking "
        "disable-component-update disable-sync force-prefers-reduced-motion window-size=1280,1000"
    )
    for flag in [*flags.split(), "host-resolver-rules=MAP * ~NOTFOUND"]:
        options.add_argument(f"--{flag}")
    options.add_argument(f"--user-data-dir={tmp_path_factory.mktemp('chromium')}")
    options.binary_location = shutil.which("chromium")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
    yield driver
    driver.quit()


def opened(browser, page):
    """Open the page from disk; every request must be for the page itself, and the console must stay empty."""
    browser.get_log("browser"), browser.get_log("performance")
    browser.get(page.as_uri())
    entries = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    requests = [entry["params"] for entry in entries if entry["method"] == "Network.requestWillBeSent"]
    # The browser's own start page may still be loading; what counts is what this document asks for.
    asked = {request["request"]["url"] for request in requests if request["documentURL"] == page.as_uri()}
    assert {url for url in asked if not url.startswith("data:")} == {page.as_uri()}
    assert browser.get_log("browser") == []
    return browser


def visible(browser, selector):
    return [found for found in browser.find_elements("css selector", selector) if found.is_displayed()]


@pytest.mark.browser
def test_the_page_opens_and_draws_the_histogram(browser, page):
    opened(browser, page)
    assert browser.find_element("tag name", "h1").text == "25 of 256 rows kept"
    size = browser.find_element("id", "histogram").size
    assert size["width"] > 500 and size["height"] > 100
    heights = browser.execute_script(
        "return [...document.querySelectorAll('#histogram rect.kept')].map(r => r.getBoundingClientRect().height)"
    )
    assert heights and min(heights) > 0
    cut = browser.find_element("css selector", ".cut").rect["x"]
    first_kept = browser.execute_script(
        "const bars = [...document.querySelectorAll('#histogram rect.kept')];"
        "return Math.min(...bars.map(bar => bar.getBoundingClientRect().left))"
    )
    assert abs(cut - first_kept) < 4


@pytest.mark.browser
def test_filters_narrow_the_sample(browser, page):
    opened(browser, page)
    sample = json.loads(page.with_suffix(".json").read_text())["sample"]
    select = pytest.importorskip("selenium.webdriver.support.ui").Select

    def count():
        return int(browser.find_element("id", "count").text.split()[0])

    assert count() == len(sample)
    assert len(browser.find_elements("css selector", "#list .card")) == 20
    browser.find_element("id", "more").click()
    assert len(browser.find_elements("css selector", "#list .card")) == 40
    select(browser.find_element("id", "which")).select_by_value("kept")
    assert count() == sum(row["kept"] for row in sample)
    assert not browser.find_elements("css selector", "#list .card.dropped")
    select(browser.find_element("id", "which")).select_by_value("all")
    select(browser.find_element("id", "source")).select_by_value("=gsm8k_train")
    assert count() == sum(row["source"] == "gsm8k_train" for row in sample)
    select(browser.find_element("id", "source")).select_by_value("")
    select(browser.find_element("id", "order")).select_by_value("high")
    best = max(row["score"] for row in sample)
    assert float(browser.find_element("css selector", "#list .score").text) == pytest.approx(best, rel=1e-3)
    browser.find_element("id", "query").send_keys("the")
    words = [
        row
        for row in sample
        if "the" in json.dumps([row["turns"], row["id"], row["source"]], ensure_ascii=False).lower()
    ]
    assert 0 < count() <= len(words)
    browser.find_element("id", "query").send_keys(" zzzz")
    assert count() == 0 and browser.get_log("browser") == []


@pytest.mark.browser
def test_scripts_inside_rows_stay_text(browser, attacked_page):
    opened(browser, attacked_page)
    browser.find_element("id", "query").send_keys("window.attacked")
    assert visible(browser, "#list .text")[0].text == ATTACK
    for group in browser.find_elements("css selector", "details.group:not([open]) > summary"):
        group.click()
    assert visible(browser, ".group .text")[0].text == ATTACK
    assert browser.execute_script("return window.attacked") is None
    assert not browser.find_elements("tag name", "img")
    assert browser.get_log("browser") == []


@pytest.mark.browser
def test_long_texts_open_on_demand(browser, tmp_path):
    rows = [{"instruction": "short", "output": "\n".join(map(str, range(40)))}] * 3
    opened(browser, write_report(scored(open_pool(rows), 2), tmp_path / "report.html"))
    card = browser.find_element("css selector", ".group .card")
    button = card.find_element("tag name", "button")
    before = card.size["height"]
    button.click()
    assert card.size["height"] > before + 300 and button.text == "Show less"
    button.click()
    assert card.size["height"] == before


@pytest.mark.browser
def test_the_theme_changes_and_a_phone_needs_no_sideways_scrolling(browser, page):
    opened(browser, page)
    colour = "return getComputedStyle(document.body).backgroundColor"
    before = browser.execute_script(colour)
    browser.find_element("id", "theme").click()
    assert browser.execute_script(colour) != before
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": 380, "height": 800, "deviceScaleFactor": 1, "mobile": True}
    )
    try:
        wide = "return document.documentElement.scrollWidth"
        assert browser.execute_script(wide) <= 380
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
