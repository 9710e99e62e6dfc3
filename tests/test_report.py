"""The report: one page, complete, self-contained, and honest about what went wrong."""

import copy
import json
import re
import tempfile
from html import escape
from html.parser import HTMLParser
from pathlib import Path

from tests.demo_run import quick_demo
from timerome.demo import summary_rows
from timerome.report import write_report

VOID = {"meta", "img", "br"}


class Balance(HTMLParser):
    """Checks that every tag that is opened is closed, in order; collects attributes that fetch something."""

    def __init__(self):
        super().__init__()
        self.open, self.fetched = [], []

    def handle_starttag(self, tag, attrs):
        self.fetched += [value for name, value in attrs if name in ("src", "href", "srcset", "data", "poster")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def rendered(results, texts):
    heatmap = quick_demo()[0] / "tie_heatmap.png"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "page.html"
        write_report(path, results, texts, heatmap=heatmap, rows=summary_rows(results))
        return path.read_text()


def page_and_parts():
    out, results = quick_demo()
    texts = [json.loads(line) for line in (out / "texts.jsonl").read_text().splitlines()]
    return (out / "report.html").read_text(), copy.deepcopy(results), texts


def test_the_page_fetches_nothing():
    page, _, _ = page_and_parts()
    parser = Balance()
    parser.feed(page)
    assert parser.open == []
    assert [value[:22] for value in parser.fetched] == ["data:image/png;base64,"]
    assert not re.search(r"https?://|<script|<link|@import|url\(", page)


def test_every_placeholder_is_filled_and_the_numbers_are_there():
    page, results, texts = page_and_parts()
    assert not re.search(r"\$[a-z_]+", page)
    assert f"{results['forget']['delta_logprob_nats']:+.0f} nats" in page
    assert escape(results["protocol"]["likelihood"]) in page
    assert escape(results["protocol"]["decoding"]) in page
    assert "prefers-color-scheme: dark" in page
    assert page.count("<small>") == len([row for row in texts if row["set"] != "held_out_unknown"])


def test_texts_are_escaped():
    _, results, texts = page_and_parts()
    texts[0] |= {"before": "<script>alert(1)</script>", "shipped": "a & b $title"}
    page = rendered(results, texts)
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert "a &amp; b $title" in page


def test_what_went_wrong_is_said():
    _, results, texts = page_and_parts()
    results["retain"]["worst_delta_nats"] = -5.0
    results["forget"]["worst_delta_nats"] = -3.0
    page = rendered(results, texts)
    assert "One held-out fact lost 5.0 nats" in page
    assert "changed by only -3.0 nats" in page
    results["retain"]["worst_delta_nats"] = -1.0
    assert "One held-out fact lost" not in rendered(results, texts)
