"""The page is closed: no text of an episode becomes markup, nothing is fetched, and all of its files travel with the
package.
"""

import base64
import hashlib
import json
import re
import shutil
import subprocess
import tomllib
from html.parser import HTMLParser
from importlib import resources
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hintsd_jax.tools.report import command as report
from hintsd_jax.tools.report import page
from hintsd_jax.tools.report.gather import Content
from tests.report_helpers import entries_of, overview_of, record, span, write_run

HOSTILE = (
    "</script><script>alert(1)</script><img src=x onerror=alert(1)><!--<script> {{SCRIPT}} ]]>"
    " & \u2028 \ud800 \U0001f600 \u202e \x00 \\"
)
FILES = resources.files("hintsd_jax.tools.report")


class Elements(HTMLParser):
    """All start tags of a page, as a browser would see them, scripts and styles skipped."""

    def __init__(self, text):
        super().__init__()
        self.found = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))


def script_of(text):
    return re.search("<script>(.*?)</script>", text, re.DOTALL)[1]


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """A page in which every text that a run or an episode brings is hostile."""
    bad = HOSTILE
    one = record(
        bad,
        targets=(1,),
        ended=bad,
        detail=bad,
        prompt_messages=[{"role": bad, "content": bad * 3000}],
        report={"summary": bad, "faults": [{"step": 1, "feedback": bad}]},
    )
    one["trained"] = [span(1) | {"pieces": [bad, "\n", ""], "teacher_best": [bad, "", "x"]}]
    for step in one["steps"]:
        step["text"] = step["observation"] = bad
    one["hindsight"] |= {"answer": bad, "problem": bad, "targets": [{"step": 1, "feedback": bad}]}
    folder = tmp_path_factory.mktemp("hostile") / 'x<script>"&'
    path = write_run(
        folder,
        {1: [one, record(success=True)]},
        rows=[{"step": 1, f"alarm/{bad}": 1, f"odd/{bad}": 2.0}],
        config={bad: {bad: bad}},
    )
    out = folder.parent / "r.html"
    report.report([path], out)
    return out.read_text(encoding="utf-8"), one


def test_no_hostile_text_becomes_markup(hostile, tmp_path):
    text, _ = hostile
    report.report([write_run(tmp_path / "tame", {1: [record(), record(success=True)]})], tmp_path / "r.html")
    tame = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert Elements(text).found == Elements(tame).found
    body = text.replace(script_of(text), "")
    assert "<img" not in body and "<!--" not in body and body.count("</script") == 3  # overview, script, one chunk
    assert {tag for tag, _ in Elements(text).found}.isdisjoint({"img", "link", "iframe", "base", "object"})


def test_hostile_text_arrives_whole(hostile):
    text, _ = hostile
    overview, entry = overview_of(text), entries_of(text)[0]
    assert overview["names"]["task"][0] == HOSTILE and overview["names"]["ended"][0] == HOSTILE
    assert overview["runs"][0]["config"] == {f"{HOSTILE}.{HOSTILE}": HOSTILE}
    assert entry["steps"][0]["text"] == entry["steps"][3]["observation"] == entry["hindsight"]["answer"] == HOSTILE
    assert entry["trained"][0]["pieces"] == [HOSTILE, "\n", ""]
    assert entry["prompt"][0]["content"].startswith(HOSTILE) and len(entry["prompt"][0]["content"]) < 21_000


def test_nothing_is_fetched(hostile):
    text, _ = hostile
    tags = Elements(text).found
    assert not [
        (tag, attrs) for tag, attrs in tags if {"src", "srcset", "data", "action", "background", "style"} & attrs.keys()
    ]
    assert all(attrs["href"].startswith("#") for tag, attrs in tags if "href" in attrs)
    shell = "".join(FILES.joinpath(name).read_text() for name in (*page.SCRIPTS, *page.STYLES, "page.html"))
    for word in (
        "http:",
        "https:",
        "//cdn",
        "url(",
        "@import",
        "fetch(",
        "XMLHttpRequest",
        "innerHTML",
        "outerHTML",
        "insertAdjacent",
        "eval(",
    ):
        assert word not in shell, word
    assert "document.write" not in shell and "import(" not in shell and 'src="' not in shell


def test_the_policy_allows_exactly_this_style_and_this_script(hostile):
    text, _ = hostile
    policy = dict(
        part.split(" ", 1)
        for part in next(a["content"] for _, a in Elements(text).found if "http-equiv" in a).split("; ")
    )
    digest = lambda inner: "'sha256-" + base64.b64encode(hashlib.sha256(inner.encode()).digest()).decode() + "'"
    assert policy == {
        "default-src": "'none'",
        "style-src": digest(re.search("<style>(.*?)</style>", text, re.DOTALL)[1]),
        "script-src": digest(script_of(text)),
        "base-uri": "'none'",
        "form-action": "'none'",
    }
    assert text.index("Content-Security-Policy") < text.index("<style>")


def test_the_files_of_the_page_travel_with_the_package():
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())
    patterns = project["tool"]["setuptools"]["package-data"]["hintsd_jax.tools.report"]
    there = {file.name for file in FILES.iterdir() if file.is_file() and not file.name.endswith(".py")}
    assert there == {*page.SCRIPTS, *page.STYLES, "page.html"}
    assert all(any(Path(name).match(pattern) for pattern in patterns) for name in there)


def test_every_metric_that_the_page_draws_is_one_that_a_run_writes():
    """docs/metrics.md has all of them: tests/test_docs.py."""
    drawn = re.findall(
        r'"((?:rollout|train|hindsight|time|memory)/\w+)"',
        FILES.joinpath("curves.js").read_text() + FILES.joinpath("overview.js").read_text(),
    )
    known = (Path(__file__).parents[1] / "docs" / "metrics.md").read_text()
    assert "`time/<phase>`" in known and len(drawn) > 10
    assert [name for name in drawn if f"`{name.removeprefix('time/')}`" not in known] == []


def test_scripts_cannot_end_their_element_early():
    for name in page.SCRIPTS:
        text = FILES.joinpath(name).read_text()
        assert "</script" not in text.lower() and "<!--" not in text, name
    assert not any("</style" in FILES.joinpath(name).read_text().lower() for name in page.STYLES)


VALUES = st.recursive(
    st.text(max_size=9) | st.integers() | st.none(),
    lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=9), x),
    max_leaves=5,
)


@settings(max_examples=50, deadline=None)
@given(VALUES)
def test_embedded_json_is_the_value_and_harmless(value):
    text = page.embed(value)
    assert json.loads(text) == value and text.isascii() and not set("<>&") & set(text)


def test_a_page_without_episodes_has_no_chunks():
    text = page.render(Content({"runs": [], "episodes": {}, "names": {}, "chunk": 32}, []))
    assert "chunk-0" not in text and "{{" not in text


@pytest.mark.skipif(shutil.which("node") is None, reason="needs node")
def test_numbers_and_texts_of_the_page():
    checks = r"""
    const assert = require("assert");
    assert.deepStrictEqual([0, 0.03125, 4.5678, 128.25, 12345, 1.2e6, -3e9, 0.00002, null, NaN].map(short),
      ["0", "0.0313", "4.57", "128.3", "12,345", "1.2M", "\u22123B", "2.0e\u22125", "\u2013", "\u2013"]);
    assert.deepStrictEqual([0.3225, 0.3235, 0.741, 1, -0.12, 0].map((v) => percent(v)),
      ["32.2", "32.4", "74.1", "100.0", "\u221212.0", "0.0"]);
    assert.deepStrictEqual([0.5, 8.04, 119, 3600, 9000].map(seconds),
      ["500 ms", "8 s", "119 s", "60 min", "2 h 30 min"]);
    assert.deepStrictEqual(ticks(0, 12, 3), [0, 5, 10]);
    assert.deepStrictEqual(ticks(0.06, 0.08, 2), [0.06, 0.07, 0.08]);
    assert.deepStrictEqual(ticks(3, 3, 4), [3]);
    assert.deepStrictEqual(actionParts('Take it.\n<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'),
      [{ say: "Take it." }, { call: { name: "f", args: { a: 1 } } }]);
    assert.deepStrictEqual(actionParts("<think>\nhm\n</think><think></think><tool_call>{broken</tool_call>"),
      [{ think: "hm" }, { say: "<tool_call>{broken</tool_call>" }]);
    const odd = actionParts('<tool_call>{"name": 3}</tool_call><tool_call>null</tool_call>');
    assert.deepStrictEqual(odd.map((p) => Object.keys(p)[0]), ["say", "say"]);
    assert.deepStrictEqual(observationParts("Ok.\nuser: Go on.\nuser: Now."),
      { tool: "Ok.", user: "Go on.\nuser: Now." });
    assert.deepStrictEqual(observationParts("user: Go."), { tool: "", user: "Go." });
    assert.deepStrictEqual(observationParts("a superuser: x"), { tool: "a superuser: x", user: "" });
    """
    done = subprocess.run(
        ["node", "-e", FILES.joinpath("text.js").read_text() + checks], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(shutil.which("node") is None, reason="needs node")
def test_axes_tables_and_links_of_the_page():
    checks = r"""
    const assert = require("assert");
    const texts = (y, unit, count = 4) => named(y, unit, count).map((tick) => tick.text);
    // a series that never changes has its own value named, above 0
    assert.deepStrictEqual(span([0.25, 0.25], {}), { low: 0, high: 0.3125, flat: 0.25 });
    assert.deepStrictEqual(texts(span([0.5, 0.5], {}), TIME), ["0 ms", "500 ms"]);
    assert.deepStrictEqual(span([0, 0], { zero: true }), { low: 0, high: 1, flat: 0 });
    assert.deepStrictEqual(span([-2, -2], {}), { low: -2.5, high: 0, flat: -2 });
    assert.deepStrictEqual(span([0.1 + 0.2, 0.3], {}).flat.toFixed(3), "0.300"); // but for rounding
    assert.deepStrictEqual(span([0, 0.2], { one: true }), { low: 0, high: 0.2, flat: false });
    assert.deepStrictEqual(span([-1, 1], { one: true }), { low: -1.12, high: 1.12, flat: false }); // no share after all
    assert.deepStrictEqual(span([2, 5], { zero: true }).low, 0);
    // no name twice, and each in the unit of its axis
    for (const [high, unit] of [[0.004, TIME], [7, TIME], [400, TIME], [90000, TIME], [0.03, PERCENT],
      [3e10, GIBIBYTES]]) {
      const found = texts({ low: 0, high, flat: false }, unit);
      assert(found.length >= 3 && new Set(found).size === found.length, found.join());
    }
    assert.deepStrictEqual(texts({ low: 0, high: 400, flat: false }, TIME), ["0 min", "2 min", "4 min", "6 min"]);
    const counted = ["time/step", "train/logprob", "rollout/tokens", "train/lr"].map((name) => unitOf(name).label);
    assert.deepStrictEqual(counted,
      [undefined, "nats", undefined, undefined]);
    // cells: quotes, line breaks, and what a spreadsheet would run
    assert.deepStrictEqual(csvText(["a", "b"], [["x,y", 'say "no" to'], ["=1+1", -2], ["two\nlines", null]]),
      '\ufeffa,b\r\n"x,y","say ""no"" to"\r\n\'=1+1,-2\r\n"two\nlines",\r\n');
    // state: what is at its default is not in the link
    location.hash = "#episodes?q=a%3Db&hide=x&hide=y";
    const said = [link.path, link.get("q"), link.get("none"), link.values.getAll("hide")];
    assert.deepStrictEqual(said, ["episodes", "a=b", "", ["x", "y"]]);
    assert.deepStrictEqual(link.to("overview", { q: "", hide: ["z"], x: "wall" }), "#overview?hide=z&x=wall");
    assert.deepStrictEqual([range("5"), range("5-12"), range("x"), range("")], [[5, 5], [5, 12], null, null]);
    """
    files = "".join(FILES.joinpath(f"{name}.js").read_text() for name in ("text", "link", "csv", "marks", "axes"))
    browser = "const location = { hash: '' }; const document = { createElement: () => ({ getContext: () => null }) };"
    done = subprocess.run(["node", "-e", browser + files + checks], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(shutil.which("node") is None, reason="needs node")
def test_the_script_as_a_whole_is_one_program(hostile, tmp_path):
    text, _ = hostile
    (tmp_path / "page.js").write_text(script_of(text))
    done = subprocess.run(["node", "--check", tmp_path / "page.js"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
