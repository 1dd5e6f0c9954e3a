"""The report page: what it holds, what it hides, that records cannot bring markup in, and how it works in a browser."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import typer
from PIL import Image
from typer.testing import CliRunner

from ovbench.cli.report import report as command
from ovbench.errors import DataError
from ovbench.results import store
from ovbench.results.measured import of_record
from ovbench.results.record import metrics_from_areas
from ovbench.tables.pareto import Point
from ovbench.tables.report import charts, page
from ovbench.tables.report.entries import entries
from ovbench.tables.report.markup import Markup, element, raw
from ovbench.tables.report.pictures import embedded

EVIL = "<script>window.evil=1</script><img src=x onerror=window.evil=1>\"'&"
FORWARDS = "1x3x224x224, one forward; the first image takes 6"


def _latency(median):
    return {"median": median, "iqr": 1.0, "p95": median, "n": 1, "samples": (median,)}


def _efficiency(latency=11.0, gmacs=17.5, stages=("encode",)):
    return {
        "params_m": 149.6, "trainable_params_m": 0.0, "gmacs": gmacs, "gflops": 2 * gmacs, "input": FORWARDS,
        "forwards": 6, "image_gmacs": 6 * gmacs,
        "tool": "counter", "latency_ms": _latency(latency), "stages_ms": {name: _latency(latency / 2) for name in stages},
        "images_per_s": 80.0, "peak_memory_mib": 900.0, "peak_memory_kind": "process-rss",
    }  # fmt: skip


@pytest.fixture
def records(make_record, tmp_path):
    """Results on two benchmarks, a repeat, and one of each kind that is none; the first two have galleries."""
    made = [
        make_record(method="clip", intersect=(20, 5), efficiency=_efficiency(5.0, 16.0)),
        make_record(method="sc-clip", intersect=(50, 10), efficiency=_efficiency(9.0, 18.0)),
        make_record(method="naclip", intersect=(30, 10), efficiency=_efficiency(12.0, 17.0)),
        make_record(method="sc-clip", dataset="ade20k", intersect=(40, 10), efficiency=_efficiency()),
        make_record(method="clip", intersect=(21, 5), efficiency=_efficiency(5.5, 16.0)),  # newer than the first
        make_record(method="clip", intersect=(59, 39), spec={"weights": "builtin", "demo": True}, demo=True),
        make_record(method="sclip", intersect=(58, 39), spec={"weights": "random"}),
        make_record(method="kk", intersect=(57, 39), spec={"limit": 2}, partial=True, reason="limited to the first 2"),
        make_record(
            method="maskclip", metrics=None, efficiency=None, status="failed", partial=True, reason=f"memory {EVIL}"
        ),
    ]
    for record in made:
        store.write(record, tmp_path / "runs")
    noise = np.random.default_rng(0).integers(0, 255, (160, 900, 3), dtype=np.uint8)
    for record in made[1:3]:
        folder = store.record_path(record, tmp_path / "runs").with_suffix("")
        folder.mkdir()
        Image.fromarray(noise).save(folder / "gallery.png")
    return made


def _page(records, tmp_path, **options):
    return page(records, results=tmp_path / "runs", **options)


class _Outline(HTMLParser):
    """Elements with their attributes, and whether every element that is opened is closed."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.found, self.open, self.text = [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        if tag not in {"meta", "input", "img", "br", "link"}:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_elements_escape_whatever_is_no_element():
    assert element("p", "<b>", Markup("<i></i>"), None, class_='a"b', data_x="<", hidden=True, id=None) == (
        '<p class="a&quot;b" data-x="&lt;" hidden>&lt;b&gt;<i></i></p>'
    )
    assert element("input", type="search") == '<input type="search">'
    with pytest.raises(ValueError, match="ends the element"):
        raw("script", "'</SCRIPT>'")


def test_the_page_is_one_file_and_well_formed(records, tmp_path):
    text = _page(records, tmp_path)
    outline = _Outline(text)
    assert outline.open == []
    ids = [attrs["id"] for _, attrs in outline.found if "id" in attrs]
    assert len(ids) == len(set(ids))
    for tag, attrs in outline.found:
        for name in ("src", "href", "srcset", "action", "data", "poster"):
            address = attrs.get(name)
            if address is not None:
                assert address.startswith("data:image/") or address.removeprefix("#") in ids, (tag, address)
    assert not re.search(r"https?://|@import|url\(", text)
    [policy] = [attrs["content"] for tag, attrs in outline.found if "http-equiv" in attrs]
    assert policy.startswith("default-src 'none'; img-src data:;") and "script-src 'sha256-" in policy
    assert [attrs.get("scope") for tag, attrs in outline.found if tag == "th" and attrs.get("scope") is None] == []
    assert all(attrs.get("alt") for tag, attrs in outline.found if tag == "img")


def test_the_same_records_give_the_same_bytes(records, tmp_path):
    text = _page(records, tmp_path)
    assert _page(list(reversed(records)), tmp_path) == text
    assert str(tmp_path) not in text


def test_every_run_is_there_with_what_keeps_it_out(records, tmp_path):
    rows = [
        attrs for tag, attrs in _Outline(_page(records, tmp_path)).found
        if tag == "details" and attrs.get("id", "").startswith("run-")
    ]  # fmt: skip
    hiding = {attrs["id"].removeprefix("run-"): attrs["data-hiding"] for attrs in rows}
    found = [hiding[record.run_id] for record in records]
    assert found == ["older", "", "", "", "", "demo", "random-weights", "partial", "failed"]


def test_no_plot_mixes_results_with_anything_else(records, tmp_path):
    text = _page(records, tmp_path)
    figures = re.findall(r'<figure data-dataset="(\w+)" data-hiding="([^"]*)">(.*?)</figure>', text, re.DOTALL)
    assert [(dataset, kind) for dataset, kind, _ in figures] == [
        ("ade20k", ""),
        ("ade20k", ""),
        ("voc21", ""),
        ("voc21", ""),
        ("voc21", "demo"),
        ("voc21", "demo"),
        ("voc21", "partial"),
        ("voc21", "partial"),
        ("voc21", "random-weights"),
        ("voc21", "random-weights"),
    ]  # fmt: skip
    points = [re.findall(r'href="#run-([^"]+)"', body) for _, _, body in figures]
    results = {record.run_id for record in (records[1], records[2], records[4])}
    assert [set(found) for found in points[2:4]] == [results, results]  # neither the older run nor the failed one
    assert points[4] == [records[5].run_id]


def test_records_cannot_bring_markup_in(make_record, tmp_path):
    """Everything in a record that is free text: names of classes, methods, stages, machines, reasons, commands, ..."""
    names = (f"sky {EVIL}", "</style></title><b id=evil>")
    metrics = metrics_from_areas(names, (5, 5), (10, 10), (8, 8), (7, 7), images=1)
    record = make_record(
        method=f"mine{EVIL}",
        dataset=f"data{EVIL}",
        metrics=metrics,
        efficiency=_efficiency(stages=(f"stage{EVIL}",)) | {"tool": EVIL},
        spec={"arch": EVIL, "weights": f"w{EVIL}", "method_options": {EVIL: EVIL}, "protocol": "common"},
        environment_fields={"cpu": EVIL, "os": EVIL},
        provenance={"command": EVIL, "git_reason": EVIL, "package_versions": {EVIL: EVIL}},
        partial=True,
        reason=EVIL,
    )
    text = page([record], [of_record(record)], results=tmp_path)
    outline = _Outline(text)
    assert [tag for tag, _ in outline.found].count("script") == 1
    assert not any(
        "onerror" in attrs or attrs.get("id") == "evil" or attrs.get("src") == "x" for _, attrs in outline.found
    )
    assert html.escape(EVIL) in text or html.escape(EVIL, quote=False) in text
    assert f"sky {EVIL}" in "".join(outline.text)  # and yet the text is whole


def test_numbers_are_rounded_in_display_only(records, tmp_path):
    text = _page(records, tmp_path)
    miou = records[1].metrics.miou
    assert f'data-value="{miou!r}">{miou:.2f}</td>' in text
    assert 'title="the run ended before it was measured">–</td>' in text


def test_bars_have_the_length_of_the_figure(records, tmp_path):
    text = _page([records[1]], tmp_path)
    for score in records[1].metrics.classes:
        assert f'<span style="width:{score.iou:.4g}%"></span>' in text


def test_a_class_in_no_image_has_no_bar_and_says_so(make_record, tmp_path):
    metrics = metrics_from_areas(("a", "ghost"), (5, 0), (10, 0), (8, 0), (7, 0), images=1)
    text = page([make_record(metrics=metrics)], results=tmp_path)
    assert "1 of them in no image and left out of the mean" in text
    assert 'title="neither predicted nor labelled in any image">–</td>' in text


def test_galleries_are_embedded_and_small(records, tmp_path):
    text = _page(records, tmp_path, gallery_bytes=20_000)
    addresses = re.findall(r'src="data:image/jpeg;base64,([^"]+)"', text)
    assert len(addresses) == 2
    assert all(len(address) * 3 / 4 <= 20_003 for address in addresses)
    assert "data:image" not in _page(records, tmp_path, gallery_bytes=0)
    path = store.record_path(records[1], tmp_path / "runs").with_suffix("") / "gallery.png"
    large, small = embedded(path, 10**7), embedded(path, 1)
    assert (large.width, large.height) == (900, 160)
    assert small.width == 320 and small.height == 57
    path.write_bytes(b"no picture")
    said = []
    assert len(re.findall("data:image/jpeg", _page(records, tmp_path, on_problem=said.append))) == 1
    assert "Cannot read the gallery" in said[0]


def test_published_numbers_stand_beside_ours(make_record, tmp_path):
    record = make_record(method="sc-clip", dataset="voc21", spec={"arch": "ViT-B-16"})
    [entry] = entries([record], [None])
    text = page([record], results=tmp_path)
    assert entry.published is not None
    assert f'data-value="{entry.published}">{entry.published}</td>' in text
    assert entry.difference == record.metrics.miou - float(entry.published)


def test_profiles_have_a_table(make_record, tmp_path):
    record = make_record(method="naclip")
    text = page([], [of_record(record)], results=tmp_path)
    assert "No record was found" in text and '<section id="profiles">' in text and "counter; input 1x3x224x224" in text


def test_axes_have_round_ticks_inside():
    linear = charts.axis([40.3, 47.9], 0, 100)
    assert linear.ticks == (40.0, 42.0, 44.0, 46.0, 48.0) and not linear.log
    wide = charts.axis([3.0, 200.0], 0, 100, cost=True)
    assert wide.log and set(wide.ticks) == {5.0, 10.0, 20.0, 50.0, 100.0, 200.0}
    for scale in (linear, wide):
        places = [scale.place(tick) for tick in scale.ticks]
        assert places == sorted(places) and places[0] >= 0 and places[-1] <= 100
    single = charts.axis([50.0], 0, 100)
    assert single.place(50.0) == 50.0


def test_labels_meet_neither_each_other_nor_points():
    rng = np.random.default_rng(1)
    points = [Point(f"r{i}", f"method-{i}", float(c), float(m)) for i, (c, m) in enumerate(rng.uniform(1, 9, (14, 2)))]
    x, y = charts.axis([p.cost for p in points], 46, 368), charts.axis([p.miou for p in points], 246, 12)
    drawn = charts._labels(points, {"r0"}, x, y)
    assert len(drawn) >= 8
    boxes = []
    for text in drawn:
        place, base = (float(re.search(rf' {name}="([\d.]+)"', text)[1]) for name in ("x", "y"))
        width = charts._LETTER * len(re.search(r">(.*)<", text)[1])
        left = {"start": place, "end": place - width, "middle": place - width / 2}[
            re.search(r'anchor="(\w+)"', text)[1]
        ]
        boxes.append((left, base - 10, left + width, base + charts._LINE - 10))
    for i, one in enumerate(boxes):
        for two in boxes[i + 1 :]:
            apart = (
                one[2] <= two[0] + 0.02 or two[2] <= one[0] + 0.02 or one[3] <= two[1] + 0.02 or two[3] <= one[1] + 0.02
            )
            assert apart


def _cli(*arguments):
    app = typer.Typer()
    app.command()(command)
    done = CliRunner().invoke(app, list(arguments))
    if done.exception is not None:
        raise done.exception
    return done.stdout


def test_the_command_writes_the_page(records, tmp_path):
    out = tmp_path / "deep" / "report.html"
    assert _cli("--results", str(tmp_path / "runs"), "--out", str(out)).strip() == str(out)
    assert out.read_bytes().decode() == page(store.load_all(tmp_path / "runs"), results=tmp_path / "runs")
    with pytest.raises(DataError, match="There is no folder"):
        _cli("--results", str(tmp_path / "runs"), "--profiles", str(tmp_path / "nothing"))
    with pytest.raises(DataError, match="No record in"):
        _cli("--results", str(tmp_path / "nothing"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="No record in"):
        _cli("--results", str(tmp_path / "empty"))


# --- in a browser ---

# Runs in a page of its own, with the report in a frame of any width: a window cannot be narrower than 500 pixels.
HARNESS = """<!doctype html><meta charset=utf-8><iframe id=f style="border:0;height:900px"></iframe><pre id=result></pre><script>
const frame = document.querySelector("#f"), out = {errors: []};
const load = (width, hash) => new Promise((done) => {
  frame.style.width = width + "px";
  frame.onload = () => done(frame.contentWindow);
  frame.src = "about:blank";
  frame.onload = () => { frame.onload = () => done(frame.contentWindow); frame.src = "report.html" + (hash || ""); };
});
const wait = (ms) => new Promise((done) => setTimeout(done, ms));
(async () => {
  const overflow = {};
  for (const width of [320, 390, 768, 1280]) {
    const w = await load(width), d = w.document;
    for (const box of d.querySelectorAll("input[name=kind]")) box.click();
    for (const block of d.querySelectorAll("details")) block.open = true;
    await wait(50);
    overflow[width] = d.documentElement.scrollWidth - d.documentElement.clientWidth;
  }
  out.overflow = overflow;
  const w = await load(390), d = w.document;
  const rows = () => [...d.querySelectorAll("#runs-table tbody tr")].filter((row) => row.getClientRects().length);
  const ids = () => rows().map((row) => row.querySelector("a").hash.slice(5));
  const input = (node, value) => { node.value = value; node.dispatchEvent(new w.Event("input", {bubbles: true})); };
  const box = (kind) => d.querySelector(`input[value="${kind}"]`);
  out.start = ids();
  out.shown = d.querySelector("#shown").textContent;
  out.figures = [...d.querySelectorAll(".plots figure")].filter((f) => !f.hidden).map((f) => f.dataset.hiding);
  box("demo").click(); out.demo = ids(); box("demo").click();
  input(d.querySelector("#search"), "naclip  VOC21"); out.search = ids();
  out.dimmed = d.querySelectorAll(".plots figure:not([hidden]) .mark.off").length;
  input(d.querySelector("#search"), "no such thing"); out.none = ids();
  out.empty = d.querySelector("#empty").getClientRects().length > 0 && d.querySelector("#empty").textContent;
  input(d.querySelector("#search"), "");
  input(d.querySelector("#dataset"), "ade20k"); out.dataset = ids(); input(d.querySelector("#dataset"), "");
  box("failed").click();
  const heads = [...d.querySelectorAll("#runs-table thead th")];
  const miou = heads.find((th) => th.textContent.startsWith("mIoU"));
  miou.querySelector("button").click(); out.down = ids(); out.sort = miou.getAttribute("aria-sort");
  miou.querySelector("button").click(); out.up = ids();
  const method = heads.find((th) => th.textContent.startsWith("method"));
  method.querySelector("button").click(); out.byName = rows().map((row) => row.dataset.method);
  box("failed").click();
  const mark = d.querySelector(".plots figure:not([hidden]) .mark");
  w.focus(); mark.focus(); await wait(20);
  const tip = d.querySelector("#tip"), place = tip.getBoundingClientRect();
  out.tip = tip.hidden ? null : tip.textContent;
  out.tipInside = place.left >= 0 && place.right <= 390;
  out.pictures = [...d.images].map((image) => image.naturalWidth);
  out.evil = w.evil === undefined;
  out.loaded = w.performance.getEntriesByType("resource").map((entry) => entry.name).filter((name) => !name.startsWith("data:"));
  const failed = [...d.querySelectorAll("details[data-hiding=failed]")][0].id;
  const v = await load(390, "#" + failed);
  await wait(50);
  const block = v.document.getElementById(failed);
  out.revealed = block.open && !block.hidden && Math.abs(block.getBoundingClientRect().top) < 900;
})().catch((error) => out.errors.push(String(error && error.stack || error))).finally(() => {
  document.querySelector("#result").textContent = "RESULT" + JSON.stringify(out) + "END";
});
</script>"""


@pytest.fixture(scope="module")
def chromium():
    for name in ("chromium", "chromium-browser", "google-chrome"):
        path = shutil.which(name)
        if path:
            return path
    pytest.skip("no chromium, chromium-browser or google-chrome on the PATH")


def _browse(chromium, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [
            chromium, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
            "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage",
            "--allow-file-access-from-files", "--enable-logging=stderr", f"--user-data-dir={folder / 'profile'}", *arguments,
        ],
        capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_in_a_browser(records, tmp_path, chromium):
    folder = tmp_path / "page"
    folder.mkdir()
    (folder / "report.html").write_text(_page(records, tmp_path), encoding="utf-8")
    (folder / "harness.html").write_text(HARNESS, encoding="utf-8")
    done = _browse(chromium, folder, "--virtual-time-budget=20000", "--dump-dom", (folder / "harness.html").as_uri())
    found = re.search(r"RESULT(\{.*\})END</pre>", done.stdout, re.DOTALL)
    assert found, done.stderr[-2000:]
    result = json.loads(html.unescape(found[1]))
    assert result["errors"] == []
    assert [line for line in done.stderr.splitlines() if "CONSOLE" in line] == []
    assert result["overflow"] == {"320": 0, "390": 0, "768": 0, "1280": 0}

    _, sc, na, ade, newer, demo, _, _, failed = (record.run_id for record in records)
    assert result["start"] == [ade, sc, na, newer]
    assert result["shown"] == f"4 of {len(records)} runs shown."
    assert result["figures"] == ["", "", "", ""]
    assert set(result["demo"]) == {ade, sc, na, newer, demo}
    assert result["search"] == [na] and result["dimmed"] == 6
    assert result["none"] == [] and "No run fits" in result["empty"]
    assert result["dataset"] == [ade]
    assert result["down"] == [sc, ade, na, newer, failed] and result["sort"] == "descending"
    assert result["up"] == [newer, na, ade, sc, failed]  # what has no mIoU stays last
    assert result["byName"] == ["clip", "maskclip", "naclip", "sc-clip", "sc-clip"]
    assert re.search(r"sc-clip: [\d.]+ % mIoU, [\d.]+ ms", result["tip"]) and result["tipInside"]
    assert len(result["pictures"]) == 2 and all(width > 0 for width in result["pictures"])
    assert result["evil"] and result["loaded"] == []
    assert result["revealed"]


def test_without_a_script_everything_is_readable(records, tmp_path):
    """The script hides and sorts; what the file itself hides are only two places for messages."""
    outline = _Outline(_page(records, tmp_path))
    assert [attrs["id"] for _, attrs in outline.found if "hidden" in attrs] == ["empty", "tip"]
