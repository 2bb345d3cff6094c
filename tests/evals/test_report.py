"""The report: what it shows, what it leaves out, and that a browser runs and fetches nothing."""

import base64
import hashlib
import html
import json
import math
import re
import subprocess
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from xml.etree import ElementTree

import pytest

from evals.curves import MOST_POINTS, Series, panel, show_number, ticks
from evals.report import write_report
from tests.evals.chromium import CHROMIUM, MISSING
from tests.evals.example_run import CHECKS, make_run

TOKEN = "hf_" + "aB3dE6gH9j" * 3


def log(path, *lines):
    path.mkdir(exist_ok=True)
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def text_of(page):
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", page)).split())


def test_shows_what_the_run_left(tmp_path):
    page = write_report(make_run(tmp_path / "run")).read_text()
    text = text_of(page)
    for expected in (
        "DPO on acme/stories-260k",
        "acme/helpful-pairs",
        "95 % interval",
        "Held-out ranking accuracy",
        "Likelihood displacement",
        "chosen equals rejected 217",
        "prompt leaves fewer than 16 response tokens 611",
        "5 of 5 passed",
        CHECKS[0]["detail"],
        "label_smoothing",
        "Wrap it in cloth",
        "sha256:5a1e77c0b3",
        "2.13.0",
    ):
        assert expected in text, expected
    assert text.count("chosen equals rejected") == 51  # the reason once, and the first 50 of 75 rows
    assert not re.search(r"(?:src|href)=|url\(|@import", page)


def test_the_policy_of_the_page_names_its_one_script_and_forbids_the_rest(tmp_path):
    page = write_report(make_run(tmp_path / "run")).read_text()
    (script,) = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; base-uri 'none'" in page
    assert page.count("<script") == 1


def test_every_drawing_is_well_formed(tmp_path):
    page = write_report(make_run(tmp_path / "run")).read_text()
    drawings = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    assert len(drawings) > 8
    for drawing in drawings:
        assert (
            "nan" not in " ".join(v for e in ElementTree.fromstring(drawing).iter() for v in e.attrib.values()).lower()
        )


def test_metrics_alone_are_enough(tmp_path):
    page = write_report(log(tmp_path, {"step": 1, "loss": 0.693147})).read_text()
    assert "Loss" in text_of(page)
    assert "Recipe" not in text_of(page)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "has no metrics.jsonl and no results.json"),
        ({"metrics.jsonl": '{"step": 1}', "doctor.json": '{"version": 2}'}, "doctor.json has version 2"),
        ({"metrics.jsonl": "\n"}, "has no line with a step"),
        ({"metrics.jsonl": '{"step": 1}', "checks.json": "{}"}, "holds a dict, not a list"),
        ({"metrics.jsonl": '{"step": 1}', "data_report.json": "{"}, "is not JSON"),
        ({"metrics.jsonl": '{"step": 1}', "recipe.yaml": "a: [1"}, "is not YAML"),
        ({"metrics.jsonl": '{"step": 1}', "results.json": "{}"}, "has version None"),
    ],
)
def test_errors_are_one_sentence(tmp_path, files, message):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        write_report(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_resumed_and_killed_log(tmp_path):
    """Steps logged twice count once, with the later value; a torn last line is left out and mentioned."""
    log(tmp_path, *({"step": s, "loss": v} for s, v in [(1, 0.9), (2, 0.8), (3, 0.1), (2, 0.7), (3, 0.6)]))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    page = write_report(tmp_path).read_text()
    assert "step 3: 0.6" in page
    assert "step 3: 0.1" not in page
    assert "1 unreadable line" in text_of(page)


def test_a_loss_that_is_not_finite_is_said(tmp_path):
    page = write_report(
        log(tmp_path, {"step": 1, "loss": 0.7}, {"step": 2, "loss": math.nan}, {"step": 3, "loss": 0.6})
    )
    assert "The loss was not finite at step 2." in text_of(page.read_text())
    assert 'class="broken"' in page.read_text()


def test_headline_without_results_comes_from_the_log(tmp_path):
    lines = [
        {"step": s, "eval/ranking/accuracy": v, "eval/ranking/accuracy_low": v - 0.1} for s, v in [(0, 0.4), (9, 0.6)]
    ]
    assert "40.0 % → 60.0 %" in text_of(write_report(log(tmp_path, *lines)).read_text())


def test_a_failed_check_is_a_warning(tmp_path):
    log(tmp_path, {"step": 1, "loss": 1.0})
    (tmp_path / "checks.json").write_text(
        json.dumps([{"check": "policy equals reference", "passed": False, "detail": "x"}])
    )
    assert "checks that did not pass: policy equals reference" in text_of(write_report(tmp_path).read_text())


def test_no_credentials_and_no_paths(tmp_path):
    run = make_run(tmp_path / "run", name="/home/me/data/pairs.jsonl", model="/home/me/models/tiny")
    with (run / "recipe.yaml").open("a") as file:
        file.write(f"hub:\n  hub_token: {TOKEN}\n  password: abc123\n")
    (run / "example.txt").write_text(f"my token is {TOKEN}")
    page = write_report(run).read_text()
    assert TOKEN not in page
    assert "abc123" not in page
    assert "/home/me" not in page
    assert "DPO on tiny" in text_of(page)


@pytest.mark.slow
def test_long_logs_stay_small(tmp_path):
    page = write_report(log(tmp_path, *({"step": s, "loss": 1 / (s + 1), "grad_norm": 1.0} for s in range(20_000))))
    assert page.stat().st_size < 80_000


def test_thinning_keeps_a_spike():
    values = [0.0] * 5000
    values[3217] = 100.0
    drawing = panel([Series(label="loss", steps=list(range(5000)), values=values)], title="Loss")
    line = re.search(r'class="raw c0" points="([^"]+)"', drawing)
    assert line is not None
    heights = [float(point.split(",")[1]) for point in line[1].split()]
    assert len(heights) <= MOST_POINTS + 2
    assert min(heights) < 40 < 150 < max(heights)


@pytest.mark.parametrize(("low", "high"), [(0, 1), (-3e-7, 5e-7), (0.69, 0.7), (-1e6, 3), (5, 5.0001)])
def test_ticks_are_few_and_inside(low, high):
    found = ticks(low, high)
    assert 2 <= len(found) <= 7
    assert all(low - 1e-9 * abs(low) <= t <= high + 1e-9 * abs(high) for t in found)


def test_numbers():
    assert [show_number(v) for v in (-38.2211, 12040, 5e-7, 0.0, 1204411, math.nan, 1.0)] == [
        "−38.22",
        "12\u202f040",
        "5e−7",
        "0",
        "1\u202f204\u202f411",
        "not finite",
        "1",
    ]


EVIL = [
    '<script>document.title="pwned"</script>',
    '"><img src="http://127.0.0.1:{port}/img" onerror="document.title=\'pwned\'">',
    "</style><script src=http://127.0.0.1:{port}/js></script>",
    "</pre><iframe src=http://127.0.0.1:{port}/frame></iframe>",
    "</title><link rel=stylesheet href=http://127.0.0.1:{port}/css>",
    "{{ 7 * 7 }}{% raw %}",
    "]]>--><svg onload=document.title='pwned'>",
]


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason=MISSING)
def test_a_browser_runs_and_fetches_nothing(tmp_path):
    """Markup in every string that data or recipe could hold stays text: title unchanged, no request made."""
    seen = []

    class Listener(BaseHTTPRequestHandler):
        def do_GET(self):
            seen.append(self.path)
            self.send_response(200)
            self.end_headers()

        def log_message(self, format, *args):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Listener) as listener:
        threading.Thread(target=listener.serve_forever, daemon=True).start()
        evil = [text.replace("{port}", str(listener.server_address[1])) for text in EVIL]
        everything = " ".join(evil)
        run = make_run(tmp_path / "run", name=everything, model=everything)
        rows = {"read": 9, "kept": 2}
        report = {
            "rows": rows,
            "dropped": dict.fromkeys(evil, 1),
            "dropped_rows": [{"source": text, "index": text, "reason": text} for text in evil],
            "truncated": dict.fromkeys(evil, 1),
            "tokens": {},
            "dataset_hash": everything,
        }
        (run / "data_report.json").write_text(json.dumps(report))
        (run / "checks.json").write_text(json.dumps([{"check": t, "passed": False, "detail": t} for t in evil]))
        (run / "example.txt").write_text(everything)
        lines = (run / "metrics.jsonl").read_text()
        odd = {"step": 1, **{f"loss/{text}": 0.5 for text in evil}}
        (run / "metrics.jsonl").write_text(lines + json.dumps(odd) + "\n")
        page = write_report(run)
        title = re.search(r"<title>(.*?)</title>", page.read_text(), re.DOTALL)
        # The page carries a Content-Security-Policy too; without it, escaping alone has to hold.
        bare = tmp_path / "bare.html"
        bare.write_text(re.sub(r"<meta http-equiv[^>]*>", "", page.read_text()))
        for path in (page, bare):
            done = _dump(path, tmp_path / f"profile-{path.stem}")
            shown = re.search(r"<title>(.*?)</title>", done, re.DOTALL)
            assert shown is not None
            assert title is not None
            assert html.unescape(shown[1]) == html.unescape(title[1])
            assert not re.search(r"<(?:iframe|img|link)\b", done)
            assert done.count("<script") == 1  # the page's own
            assert "{{ 7 * 7 }}" in html.unescape(done)
        listener.shutdown()
    assert seen == []


def _dump(path, profile):
    assert CHROMIUM is not None
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", f"--user-data-dir={profile}"]
    done = subprocess.run(
        [*command, "--virtual-time-budget=2000", "--dump-dom", path.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return done.stdout
