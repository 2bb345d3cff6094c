"""The report in a real browser: what it shows, finds and opens, what it does not run, and that it fits a phone."""

from __future__ import annotations

import json
import re
import time
from xml.etree import ElementTree

import pytest

from evals.comparison_report import write_comparison
from evals.generations_file import Generation, write_generations
from evals.pair_rows import PairRow, write_pairs
from evals.report import write_report
from tests.evals.chromium import CHROMIUM, MISSING, browsing
from tests.evals.example_evaluation import make_evaluated
from tests.evals.example_run import make_run

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason=MISSING)
ROWS = "document.querySelectorAll('#rows > li').length"
HITS = r"of \d+ found among 250"
FOUND = "document.getElementById('found').textContent"
OPENED = "document.querySelector('#rows li.open')"
NARROW, WIDE = 390, 1280


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with browsing(tmp_path_factory.mktemp("profile")) as open_:
        yield open_


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    return write_report(make_evaluated(tmp_path_factory.mktemp("runs") / "dpo"))


def typed(page, selector, text, then):
    """Types, and waits for what is found to change."""
    before = page.run(FOUND)
    page.type(selector, text)
    page.wait(f"{FOUND} !== {json.dumps(before)}")
    assert re.search(then, page.run(FOUND))


@pytest.mark.slow
def test_it_opens_without_a_complaint_and_without_a_request(browser, report):
    page = browser(report.as_uri())
    assert page.complaints == []
    assert page.requests == [report.as_uri()]
    found = page.run("[...document.querySelectorAll('section[id]')].map(s => s.id)")
    wanted = ["curves", "ranking", "ches", "wins", "pass-at-k", "lengths", "results", "prompts", "doctor"]
    assert [name for name in wanted if name not in found] == []
    assert page.run("[...document.querySelectorAll('#contents a')].length") == len(found)
    assert "0.6" in page.run("document.querySelector('#ches figure p').textContent")
    assert "▲" in page.run("document.querySelector('#wins').textContent")
    drawings = page.run("[...document.querySelectorAll('figure > svg')].map(s => s.outerHTML)")
    assert len(drawings) > 14
    for drawing in drawings:
        root = ElementTree.fromstring(drawing)
        names = [e.text for e in root.iter() if e.get("class") == "axis-name"]
        assert root.get("aria-label")
        assert next(iter(root)).tag.endswith("title")
        assert len(names) >= 2, "an axis without a name"


@pytest.mark.slow
@pytest.mark.parametrize(("width", "dark"), [(WIDE, False), (WIDE, True), (NARROW, False), (NARROW, True)])
def test_it_fits_and_follows_the_reader_s_mode(browser, report, width, dark):
    page = browser(report.as_uri(), width=width, height=844, dark=dark)
    assert page.run("document.documentElement.scrollWidth") <= width
    paper = page.run("getComputedStyle(document.body).backgroundColor")
    ink = page.run("getComputedStyle(document.body).color")
    light = [sum(map(int, colour[4:-1].split(","))) for colour in (paper, ink)]
    assert light[0] < 150 < 600 < light[1] if dark else light[1] < 150 < 600 < light[0]
    page.run("document.querySelectorAll('details').forEach(d => { d.open = true; })")
    assert page.run("document.documentElement.scrollWidth") <= width
    # Nothing but what scrolls by itself is wider than the page.
    apart = "'.scroll, pre, .text, svg, .hidden, select'"
    wide = f"!e.closest({apart}) && e.getBoundingClientRect().right > {width} + 1"
    elements = "[...document.querySelectorAll('main *')]"
    assert page.run(f"{elements}.filter(e => {wide}).map(e => e.outerHTML.slice(0, 90))") == []
    # What is drawn can be read: letters of every drawing are at least 8 pixels tall.
    texts = "[...document.querySelectorAll('figure > svg text')]"
    assert page.run(f"{texts}.filter(t => t.getBoundingClientRect().height < 8).map(t => t.outerHTML)") == []


@pytest.mark.slow
def test_words_and_phrases_are_found(browser, report):
    page = browser(report.as_uri())
    assert page.run(FOUND) == "1 to 20 of 250"
    assert page.run(ROWS) == 20
    typed(page, "#f-text", "bicycle JUMPER", "Nothing found")
    page.run("document.querySelector('#filters button[type=reset]').click()")
    page.wait(f"{FOUND} === '1 to 20 of 250'")
    typed(page, "#f-text", "BICYCLE", HITS)
    snippets = page.run("[...document.querySelectorAll('#rows .snippet')].map(s => s.textContent)")
    assert snippets
    assert all("bicycle" in text for text in snippets)
    assert page.run(f"{OPENED}.querySelector('.turn mark').textContent") == "bicycle"
    page.run("document.getElementById('f-text').value = ''")
    typed(page, "#f-text", '"keep tomato plants in good"', HITS)
    assert page.run("[...document.querySelectorAll('#rows .snippet')].every(s => s.textContent.includes('tomato'))")


def numbers(page, name):
    """Of the rows on the page, opened one after the other."""
    return page.run(
        "[...document.querySelectorAll('#rows > li')].map(li => Number(li.dataset.order)).map(order => {"
        "document.querySelector(`#rows li[data-order=\"${order}\"]`).classList.contains('open') || "
        'document.querySelector(`#rows li[data-order="${order}"] .line`).click();'
        f"return [...{OPENED}.querySelectorAll('.measured dt')].filter(t => t.textContent === {json.dumps(name)})"
        ".map(t => Number(t.nextSibling.textContent.replace('−', '-'))); })"
    )


@pytest.mark.slow
def test_filters_and_sorting(browser, report):
    page = browser(report.as_uri())
    page.choose("#f-model", "1")
    assert "of 40 found" in page.run(FOUND)
    page.choose("#f-model", "")
    page.choose("#f-end", "length")
    assert re.search(HITS, page.run(FOUND))
    ended = page.run(f"[...{OPENED}.querySelectorAll('.model header')].map(h => h.textContent)")
    assert any(text.endswith("length") for text in ended)
    page.choose("#f-end", "")
    page.choose("#f-outcome", "gained")
    assert re.search(HITS, page.run(FOUND))
    badges = page.run(f"[...{OPENED}.querySelectorAll('.outcome')].map(b => b.textContent)")
    assert "wrong → right" in badges
    page.choose("#f-outcome", "")
    page.choose("#f-number", "n:ln_ches")
    typed(page, "#f-low", "0.2", HITS)
    assert all(max(values) >= 0.2 for values in numbers(page, "LN-CHES"))
    page.choose("#f-sort", "n:ln_ches")
    page.choose("#f-order", "-1")
    best = [max(values) for values in numbers(page, "LN-CHES")]
    assert best == sorted(best, reverse=True)
    assert len(best) > 3
    page.run("document.querySelector('#filters button[type=reset]').click()")
    page.wait(f"{FOUND} === '1 to 20 of 250'")
    typed(page, "#f-long", "130", HITS)
    lengths = page.run(f"[...{OPENED}.querySelectorAll('.response .text')].map(t => t.textContent.length)")
    assert min(lengths) <= 130
    assert page.complaints == []


@pytest.mark.slow
def test_a_link_opens_its_prompt_and_all_answers_stand_side_by_side(browser, report):
    page = browser(report.as_uri() + "#prompt-p00031")
    assert page.run(f"{OPENED}.querySelector('.link').getAttribute('href')") == "#prompt-p00031"
    heads = page.run(f"[...{OPENED}.querySelectorAll('.response header b')].map(b => b.textContent)")
    assert sorted(set(heads)) == ["acme/bigger-chat", "acme/sft", "chosen", "dpo", "rejected"]
    tops = page.run(f"[...{OPENED}.querySelectorAll('.model')].map(b => b.getBoundingClientRect().top)")
    assert len(tops) == 3
    assert len(set(tops)) == 1
    page.run("location.hash = '#prompt-p00200'")
    page.wait(f"{OPENED} && {OPENED}.querySelector('.link').getAttribute('href') === '#prompt-p00200'")
    assert page.run(
        f"[0, innerHeight].includes({OPENED}.getBoundingClientRect().top) || "
        f"{OPENED}.getBoundingClientRect().top < innerHeight"
    )
    page.run("location.hash = '#prompt-%E0%A4%A'")  # no such prompt, and no such text
    page.run("document.getElementById('later').click()")
    assert page.run(ROWS) > 0
    assert page.complaints == []


@pytest.mark.slow
def test_pairs_of_the_drawing_open_by_mouse_and_by_keyboard(browser, report):
    page = browser(report.as_uri())
    page.run("document.querySelector('svg.pick').scrollIntoView({block: 'center'})")
    where = page.run(
        "(() => { const c = [...document.querySelectorAll('svg.pick .pair')][100].getBoundingClientRect();"
        "return [c.x + c.width / 2, c.y + c.height / 2]; })()"
    )
    page.click(*where)
    told = page.run("document.querySelector('.picked').textContent")
    assert "acme/helpful-pairs, row" in told
    row = told.partition("LN-CHES")[0]
    assert any(
        row in text for text in page.run(f"[...{OPENED}.querySelectorAll('.measured .soft')].map(s => s.textContent)")
    )
    first = page.run("location.hash")
    assert first.startswith("#prompt-p")
    page.run("document.querySelector('svg.pick').focus({preventScroll: true})")
    for _ in range(7):
        page.press("ArrowRight")
    page.press("Enter")
    assert page.run("location.hash") != first
    assert page.complaints == []


@pytest.mark.slow
def test_a_drawing_is_saved_in_colours_for_paper(browser, report, tmp_path):
    page = browser(report.as_uri(), dark=True, downloads=tmp_path)
    page.run("document.querySelector('#pass-at-k .save').click()")
    end = time.monotonic() + 30
    while not (files := list(tmp_path.glob("*.svg"))) and time.monotonic() < end:
        time.sleep(0.05)
    (file,) = files
    root = ElementTree.fromstring(file.read_text())
    assert file.name == "pass-at-k-acme-sums-test.svg"
    assert not [e for e in root.iter() if e.get("class")]
    strokes = {e.get("stroke") for e in root.iter() if e.tag.endswith("polyline")}
    assert "rgb(10, 92, 158)" in strokes, "the first colour of the light page"
    assert page.run("document.documentElement.dataset.mode === undefined")


@pytest.mark.slow
def test_paper_is_white_whatever_the_reader_s_mode(browser, report):
    page = browser(report.as_uri(), dark=True)
    dark = {"name": "prefers-color-scheme", "value": "dark"}
    page.send("Emulation.setEmulatedMedia", media="print", features=[dark])
    assert page.run("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert page.run("getComputedStyle(document.body).color") == "rgb(29, 31, 35)"
    hidden = "['.save', '#filters', '#contents'].map(s => getComputedStyle(document.querySelector(s)).display)"
    assert page.run(hidden) == ["none", "none", "none"]


EVIL = [
    "<script>alert(1)</script>",
    "</script><script>alert(2)</script>",
    "<!--<script>",
    "<img src=x onerror=alert(3)>",
    '"><svg onload=alert(4)>',
    "[here](javascript:alert(5)) javascript:alert(6)",
    "<a href='http://127.0.0.1:9/'>x</a><link rel=stylesheet href=http://127.0.0.1:9/c>",
    "evil \u202etxt.exe\u202c \u2066x\u2069",
    "nul \x00 and bell \x07",
    "half \ud83d of a pair, and \ud83d\ude00",
    "lines \u2028 and \u2029 end",
    "{{ 7 * 7 }} {% raw %} ${alert(7)} `",
    "x" * 100_000,
    "👩‍👩‍👧‍👦 עברית العربية",
]


MADE = {"li", "button", "span", "bdi", "i", "b", "div", "header", "article", "dl", "dt", "dd", "a"}
"""Kinds of elements that rows are made of."""


@pytest.mark.slow
def test_texts_are_only_ever_text(browser, tmp_path):
    """No dialog, no request, no element of theirs; and every one of them can be read."""
    run = make_run(tmp_path / "run")
    everything = " ".join(text for text in EVIL if len(text) < 1000)
    answers = [
        Generation(
            dataset=everything,
            split=text[:200],
            step=1,
            model=f"{text[:200]} {i}",
            prompt_id=text[:200],
            prompt=[{"role": text[:200], "content": text}],
            sample=0,
            text=text,
            finish_reason=text[:200],
            tokens=1,
            scores={text[:200]: 1.0},
        )
        for i, text in enumerate(EVIL)
    ]
    pairs = [
        PairRow(
            dataset="acme/pairs",
            split="test",
            step=1,
            row=f"{text[:200]} row {i}",
            prompt_id=f"pair {text[:200]}",
            prompt=text,
            chosen=text,
            rejected=everything,
            numbers={"policy_chosen": -1.0 - i, "ref_chosen": -2.0, "ln_ches": 0.1 * i},
        )
        for i, text in enumerate(EVIL)
    ]
    # Written as a tool with other ideas of text might have: half a surrogate pair stands in the file as an escape.
    write_generations(run, [])
    lines = [json.dumps({"version": 1, **{k: getattr(a, k) for k in a.__slots__}}) for a in answers]
    (run / "generations.jsonl").write_text("\n".join(lines) + "\n")
    write_pairs(run, pairs, dataset="acme/pairs", split="test", step=1)
    findings = [{"check": t, "verdict": t[:50], "text": t, "key": t, "examples": [t, {t[:50]: t}]} for t in EVIL[:-2]]
    edges = {text: {"edges": [0, 1], "counts": [3]} for text in EVIL[:-2]}
    doctor = {"version": 1, "dataset": everything, "findings": findings, "distributions": edges}
    (run / "doctor.json").write_text(json.dumps(doctor))
    path = write_report(run)
    # With the policy of the page, and without: escaping alone has to hold.
    bare = tmp_path / "bare.html"
    source = path.read_text()
    policy = source[source.index("<meta http-equiv") : source.index('<meta name="viewport"')]
    bare.write_text(source.replace(policy, ""))
    for each in (path, bare):
        page = browser(each.as_uri())
        assert page.run("document.querySelectorAll('script').length") == 2
        shown_texts = []
        for order in range(2 * len(EVIL)):
            line = f"document.querySelector('#rows li[data-order=\"{order}\"]:not(.open) .line')"
            opened = f"document.querySelector('#rows li.open[data-order=\"{order}\"]')"
            if not page.run(f"Boolean({line} || {opened})"):
                page.run("document.getElementById('later').click()")
            page.run(f"{opened} || {line}.click()")
            shown_texts.append(page.run(f"{OPENED}.textContent"))
            # The rows hold what the page makes, and nothing that a text might make.
            kinds = page.run("[...new Set([...document.querySelectorAll('#rows *')].map(e => e.localName))]")
            assert set(kinds) <= MADE
            assert page.run("document.querySelectorAll('#rows a:not(.link)').length") == 0
        for i, text in enumerate(EVIL[:4]):
            assert text in shown_texts[i]
        assert "⟨U+202E⟩txt.exe" in shown_texts[7]
        assert "nul ⟨U+0000⟩ and bell ⟨U+0007⟩" in shown_texts[8] or "nul \ufffd and bell \ufffd" in shown_texts[8]
        assert "half \ufffd of a pair, and 😀" in shown_texts[9]
        assert "Show all 100\u202f000 characters" in shown_texts[12]
        assert len(shown_texts[12]) < 20_000
        assert page.run("document.querySelectorAll('iframe, img, link, main script').length") == 0
        assert page.run("[...document.links].every(a => a.getAttribute('href').startsWith('#'))")
        assert page.complaints == []
        assert page.requests == [each.as_uri()]


@pytest.mark.slow
def test_ten_thousand_pairs_stay_usable(browser, tmp_path):
    """A page of rows in the document, whatever is searched; the drawing has hexagons, not ten thousand dots."""
    path = write_report(make_evaluated(tmp_path / "large", pairs=10_000, prompts=300))
    page = browser(path.as_uri())
    assert page.run(FOUND) == "1 to 20 of 5\u202f000"
    assert page.run(ROWS) == 20
    assert page.run("document.querySelectorAll('*').length") < 8_000
    assert page.run("document.querySelectorAll('.hexagon').length") > 50
    assert page.run("document.querySelectorAll('.pair').length") == 0
    start = time.monotonic()
    typed(page, "#f-text", "jumper patience", "of .* found among 5\u202f000")
    took = time.monotonic() - start
    assert page.run(ROWS) == 20
    page.choose("#f-sort", "n:chosen_change")
    page.run("document.getElementById('later').click()")
    assert page.run(ROWS) == 20
    loaded = page.run("performance.timing.loadEventEnd - performance.timing.navigationStart")
    print(f"loaded in {loaded} ms, searched in {1000 * took:.0f} ms with the pause after typing")
    assert page.complaints == []


@pytest.mark.slow
def test_several_runs_are_compared(browser, tmp_path):
    runs = [make_evaluated(tmp_path / "dpo"), make_evaluated(tmp_path / "ipo", seed=11, gain=0.0)]
    path = write_comparison(runs, tmp_path / "both.html")
    page = browser(path.as_uri(), width=NARROW, height=844)
    assert page.complaints == []
    assert page.run("document.documentElement.scrollWidth") <= NARROW
    found = page.run("[...document.querySelectorAll('section[id]')].map(s => s.id)")
    assert found == ["verdicts", "results", "wins", "pass-at-k", "curves", "lengths", "prompts", "identity"]
    assert "dpo is better than ipo on ranking/accuracy" in page.run("document.querySelector('#verdicts').textContent")
    names = page.run("[...document.querySelectorAll('#wins thead th')].map(t => t.textContent)")
    assert names == ["beats", "dpo", "ipo", "acme/sft", "acme/bigger-chat"]
    assert page.run("document.querySelectorAll('#wins td.fitted').length") == 4
    heads = page.run(f"[...{OPENED}.querySelectorAll('.model header b')].map(b => b.textContent)")
    assert sorted(heads) == ["acme/bigger-chat", "acme/sft", "dpo", "ipo"]
