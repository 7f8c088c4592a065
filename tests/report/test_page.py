"""The HTML report in a real browser: headless Chromium, driven by Playwright, without a network."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from quantstudy import layout
from quantstudy.files import read_json, write_json
from quantstudy.params import load_params
from quantstudy.report.html import build_page
from stages import page as page_stage
from stages import report as report_stage
from tests.conftest import ROOT, TINY
from tests.report.fabricate_page import LAYERS, fabricate_page, sensitivity_rows

playwright = pytest.importorskip("playwright.sync_api", reason="no Playwright: pip install '.[dev]'")
playwright.expect.set_options(timeout=60_000)  # a busy machine starves the browser
axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="no axe: pip install '.[dev]'")

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-background-networking", "--disable-sync"]
LATENCY = ("size_mb", "latency_ms_b1", "latency_ms_b16")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium; `make browser` installs it where it can be"),
]

MOVED: dict[str, Any] = {
    "before": "main",
    "after": "workspace",
    "params": [("methods.fp16.dtype", "bfloat16", "float16")],
    "rows": [
        {"study": "tiny", "variant": variant, "p": p, "verdict": verdict}
        | {"before": None if before is None else {"top1": before} | dict.fromkeys(LATENCY, 2.0)}
        | {"after": {"top1": 90.0} | dict.fromkeys(LATENCY, 2.5)}
        for variant, before, p, verdict in (
            ("fp32", 90.0, 1.0, "same"),
            ("fp16", 80.0, 1e-5, "better"),
            ("bf16", None, None, "only after"),
        )
    ],
    "reading": "p: exact McNemar test.",
}
SEARCH: dict[str, Any] = {
    "sentence": "of 2 candidates int4 is the smallest that is shown to lose no more than 1 points of top-1",
    "variant": "int4",
    "figures": {"top1_drop": 0.4, "top1_drop_ci95": 0.3, "size_mb": 1.25, "compression": 7.5},
    "trials": [
        {"name": "int4", "group": "quick", "size_mb": 1.25, "divergence": 0.01, "latency_ms": None}
        | {"drop": 0.25, "images": 800, "verdict": "accepted"},
        {"name": "int3", "group": "quick", "size_mb": 1.0, "divergence": None, "latency_ms": None}
        | {"drop": None, "images": 0, "verdict": "cannot be made: too small"},
    ],
}
WIDE, NARROW = {"width": 1280, "height": 900}, {"width": 390, "height": 844}


@pytest.fixture(scope="module")
def html(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The report of two made-up studies; the first has sensitivity."""
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    params["run"], params["ship"] = ["tiny", "other"], ["tiny"]
    params["studies"] = {"tiny": TINY | {"goal": {"max_drop": 1.0}}, "other": TINY}
    root = tmp_path_factory.mktemp("report")
    (root / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        for study in ("tiny", "other"):
            fabricate_page(load_params(), study)
            if study == "tiny":
                write_json(layout.sensitivity(study, "json"), sensitivity_rows())
                write_json(layout.search(study), SEARCH)
            page_stage.main(["--study", study])
        report_stage.main([])
        (root / layout.REPORT.with_name("moved.html")).write_text(build_page([read_json(layout.page("tiny"))], MOVED))
    yield root / layout.REPORT


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield chromium
        chromium.close()


@pytest.fixture
def open_page(browser: Any, html: Path) -> Iterator[Any]:
    """Open the report at a size and in a theme; afterwards nothing was asked of a network and nothing complained."""
    complaints: list[str] = []
    contexts = []

    def call(viewport: dict[str, int] = WIDE, scheme: str = "light", file: str = layout.REPORT.name) -> Any:
        context = browser.new_context(viewport=viewport, color_scheme=scheme, offline=True)
        contexts.append(context)
        context.set_default_timeout(60_000)
        opened = context.new_page()
        opened.on("console", lambda message: complaints.append(message.text))
        opened.on("pageerror", lambda error: complaints.append(str(error)))
        opened.on("request", lambda request: request.url.startswith("http") and complaints.append(request.url))
        opened.goto(html.with_name(file).as_uri())
        opened.wait_for_selector("html[data-ready]")
        return opened

    yield call
    for context in contexts:
        context.close()
    assert complaints == []


def rows(page: Any) -> list[str]:
    return page.eval_on_selector_all("#variants tbody tr", "rows => rows.map(row => row.dataset.variant)")


def column(page: Any, key: str) -> list[float | None]:
    """Return a column of the table as numbers, in the order of its rows; None for a dash."""
    place = page.eval_on_selector_all("#variants thead button", "all => all.map(one => one.dataset.key)").index(key)
    cells = page.eval_on_selector_all("#variants tbody tr", f"rows => rows.map(row => row.cells[{place}].textContent)")
    return [None if cell == "–" else float(cell.split(" ")[0]) for cell in cells]  # noqa: RUF001


def expect(page: Any, selector: str) -> Any:
    """Return assertions that wait: charts are drawn, and links followed, after the click that asks for it."""
    return playwright.expect(page.locator(selector))


def expect_marks(page: Any, chart: str, count: int, kind: str = "symbol path") -> None:
    group, shape = kind.split()
    expect(page, f"#chart-{chart} svg .mark-{group}.role-mark {shape}").to_have_count(count)


def test_the_verdict_comes_first_and_the_facts_are_there(open_page: Any) -> None:
    page = open_page()
    assert page.inner_text("#verdict").startswith(page.get_attribute("tr.recommended", "data-variant"))
    assert page.inner_text("h1") == "tiny" and page.inner_text("#facts dd >> nth=0") == "mobilenet_v2"
    assert "No GPU latency" in page.inner_text("#remarks")
    assert rows(page) == load_params(ROOT / "params.yaml").variants
    before = page.inner_text("#verdict")
    page.press("#limit-size", "Home")
    assert page.inner_text("#verdict") != before
    page.press("#limit-drop", "Home")
    page.press("#limit-latency", "Home")
    assert page.locator("tr.recommended").count() == 0
    page.press("#limit-size", "End")
    page.press("#limit-drop", "End")
    assert page.locator("tr.recommended").count() == 1


def test_a_search_is_the_verdict_where_there_was_one_and_names_the_file(open_page: Any) -> None:
    page = open_page()
    said = page.inner_text("#shipped-verdict")
    assert said.startswith("Of") and SEARCH["sentence"][1:] in said
    assert "it loses 0.40 ± 0.30 points, in 1.25 MB" in said
    assert page.get_attribute("#shipped-verdict a", "href") == "../models/tiny/ship/model.onnx"
    page.click("#shipped summary")
    assert "cannot be made: too small" in page.inner_text("#trials") and page.locator("#trials tr.chosen").count() == 1
    page.click("nav a >> nth=1")
    expect(page, "h1").to_have_text("other")
    assert not page.is_visible("#shipped")


def test_the_verdict_names_its_file_and_the_limit_in_the_way(open_page: Any) -> None:
    page = open_page()
    pick = page.get_attribute("tr.recommended", "data-variant")
    link = page.get_attribute("#verdict a", "href")
    assert link in (f"../models/tiny/onnx/{pick}.onnx", f"../models/tiny/{pick}.pth")
    page.press("#limit-size", "Home")
    page.press("#limit-drop", "Home")
    page.press("#limit-latency", "Home")
    assert "in the way" in page.inner_text("#reason")


def test_all_of_a_row_chooses_it(open_page: Any) -> None:
    page = open_page()
    other = next(name for name in rows(page) if name != page.get_attribute("tr.chosen", "data-variant"))
    page.click(f"#variants tr[data-variant={other}] td >> nth=3")
    assert page.get_attribute("#variants tr.chosen", "data-variant") == other
    narrow = open_page(NARROW)
    cut = "all => all.filter(one => one.scrollWidth > one.clientWidth + 1).map(one => one.textContent)"
    assert narrow.eval_on_selector_all("#variants tbody th button", cut) == []


def test_speeds_within_the_spread_of_timings_are_equal_so_accuracy_decides(open_page: Any) -> None:
    rows = [
        {"variant": "nearly as fast", "speedup_b16": 6.0, "top1_drop": 0.0, "size_mb": 1.0, "simulated": False},
        {"variant": "fastest", "speedup_b16": 7.0, "top1_drop": 0.4, "size_mb": 1.0, "simulated": False},
    ]
    code = (ROOT / "quantstudy" / "report" / "page" / "recommend.js").read_text(encoding="utf-8")
    study, limits = "{variants, timing_spread: {16: spread}}", "{drop: 1, size: ANY, latency: ANY}"
    chosen = f"([variants, spread]) => {{ {code} return recommend({study}, {limits}, 16, 'speed').pick.variant; }}"
    page = open_page()
    assert page.evaluate(chosen, [rows, 0.2]) == "nearly as fast" and page.evaluate(chosen, [rows, 0.0]) == "fastest"
    rows[1]["top1_drop"] = 0.0
    assert page.evaluate(chosen, [rows, 0.2]) == "fastest"  # where all else is equal


def test_validation_images_choose_and_test_images_do_not(open_page: Any) -> None:
    alike = {"speedup_b16": 6.0, "size_mb": 1.0, "simulated": False, "validation_drop_ci95": 0.1}
    rows = [
        alike | {"variant": "validated", "top1_drop": 3.0, "validation_drop": 0.0},
        alike | {"variant": "lucky in the test", "top1_drop": -1.0, "validation_drop": 0.9},
        alike | {"variant": "beyond the limit", "top1_drop": -2.0, "validation_drop": 1.1, "speedup_b16": 9.0},
    ]
    code = (ROOT / "quantstudy" / "report" / "page" / "recommend.js").read_text(encoding="utf-8")
    study, limits = "{variants, timing_spread: {16: 0}}", "{drop: 1, size: ANY, latency: ANY}"
    found = f"(variants) => {{ {code} return recommend({study}, {limits}, 16, 'accuracy'); }}"
    page = open_page()
    assert page.evaluate(f"(variants) => ({found})(variants).pick.variant", rows) == "validated"
    assert len(page.evaluate(f"(variants) => ({found})(variants).meeting", rows)) == 2
    for row in rows:
        row["validation_drop"] = None
    assert page.evaluate(f"(variants) => ({found})(variants).pick.variant", rows) == "beyond the limit"


def test_a_preference_changes_the_recommendation_and_never_to_a_simulated_speed(open_page: Any) -> None:
    page = open_page()
    page.check("input[name=prefer][value=size]")
    sizes = [size for size, drop in zip(column(page, "size_mb"), column(page, "top1_drop"), strict=True) if drop <= 1]
    assert float(page.inner_text("tr.recommended td >> nth=5")) <= 1.01 * min(sizes)
    for batch in ("1", "16"):
        page.check(f"input[name=batch][value='{batch}']")
        page.check("input[name=prefer][value=speed]")
        assert "◌" not in page.inner_text("tr.recommended") and f"at batch {batch}" in page.inner_text("#verdict")


def test_a_sort_sorts_by_keyboard_and_puts_what_is_missing_last(open_page: Any) -> None:
    page = open_page()
    for key in ("size_mb", "speedup_b16", "top1_drop"):
        page.press(f"#variants thead button[data-key={key}]", "Enter")
        rising = column(page, key)
        known = [value for value in rising if value is not None]
        assert known == sorted(known) and rising[: len(known)] == known
        page.keyboard.press("Enter")
        falling = [value for value in column(page, key) if value is not None]
        assert falling == sorted(known, reverse=True) and len(falling) > 3
        assert None in column(page, "speedup_b16")
    simulated = page.locator("#variants tbody tr", has_text="◌ simulated")
    assert 0 < simulated.count() < len(rows(page))
    page.check("text=real kernels only")
    assert page.locator("#variants tbody tr", has_text="◌").count() == 0
    assert None not in column(page, "speedup_b1")


def test_charts_have_a_mark_for_each_row_and_confusion_the_images_that_changed(open_page: Any) -> None:
    page = open_page()
    page.uncheck("#zoom")
    everything = len(rows(page))
    for chart in ("size", "latency", "operations"):
        expect_marks(page, chart, everything)
    expect_marks(page, "scaling", 8)
    page.fill("#search", "int4")
    assert 0 < len(rows(page)) < everything and all("int4" in name for name in rows(page))
    for chart in ("size", "operations"):
        expect_marks(page, chart, len(rows(page)))
    page.fill("#search", "no such variant")
    assert rows(page) == []
    expect(page, "#chart-size").to_be_hidden()
    page.fill("#search", "")
    expect_marks(page, "size", everything)
    page.select_option("#choose-confusion", load_params(ROOT / "params.yaml").ptq[2])  # its fourth image is wrong
    assert "1 image wrong that fp32 gets right, and 0 the other way round" in page.inner_text("#agreement")
    assert page.locator("#galleries canvas").count() == 1
    assert len(set(page.eval_on_selector("canvas", "c => [...c.getContext('2d').getImageData(0, 0, 8, 8).data]"))) > 9


def test_a_click_on_a_mark_chooses_its_variant_everywhere(open_page: Any) -> None:
    page = open_page()
    page.fill("#search", "int8_weight_only")
    expect_marks(page, "size", 1)
    page.locator("#chart-size svg .mark-symbol.role-mark path").click()
    expect(page, "#variants tr.chosen th").to_have_text("int8_weight_only")
    expect(page, "span.chosen").to_have_text(["int8_weight_only"] * 2)
    page = open_page()
    reached = []
    for _ in range(60):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.id || document.activeElement.dataset.key || ''"))
    assert {"theme", "limit-drop", "limit-size", "limit-latency", "search", "size_mb"} <= set(reached)
    page.press("#variants tbody tr[data-variant=fp16] button", "Enter")
    expect(page, "span.chosen").to_have_text(["fp16"] * 2)
    assert page.evaluate("document.activeElement.textContent") == "fp16"


def test_layers_have_shares_sqnr_histogram_and_sensitivity(open_page: Any) -> None:
    page = open_page()
    page.click("#variants tbody tr[data-variant=int8_static] button")
    expect_marks(page, "shares", 2 * len(LAYERS), "rect path")
    expect_marks(page, "sqnr", len(LAYERS))
    expect_marks(page, "sensitivity", 2 * len(LAYERS), "rect path")
    expect_marks(page, "histogram", 2 * 4, "rule line")
    assert page.locator("#chart-histogram svg .mark-rect.role-mark path").count() > 30
    page.select_option("#layer", "features.3")
    assert "int8_static keeps -6 to 5.94" in page.inner_text("#chart-histogram-figure figcaption")
    page.click("section[aria-labelledby=layers-title] summary")
    assert "32.0" in page.inner_text("#layer-table") and "4 bits" in page.inner_text("#layer-table")
    page.click("text=other")
    expect(page, "h1").to_have_text("other")
    expect(page, "#not-taken").to_contain_text("sensitivity")
    expect(page, "#chart-sensitivity-figure").to_be_hidden()


def test_the_page_of_a_comparison_tells_what_moved(open_page: Any) -> None:
    assert open_page().locator("#comparison").is_hidden()
    page = open_page(NARROW, file="moved.html")
    assert "fp16 better" in page.inner_text("#comparison-verdict")
    cells = page.eval_on_selector_all("#comparison-table tbody tr", "rows => rows.map(row => row.innerText.trim())")
    assert [cell.split("\t") for cell in cells] == [
        ["fp16", "80.00 → 90.00", "+10.00", "<0.001", *["2.00 → 2.50"] * 3, "better"],
        ["bf16", "– → 90.00", "–", "–", *["– → 2.50"] * 3, "only after"],  # noqa: RUF001
    ]
    page.check("#comparison-all")
    assert page.locator("#comparison-table tbody tr").count() == 3
    assert page.evaluate("document.documentElement.scrollWidth") <= NARROW["width"]
    assert axe.Axe().run(page).response["violations"] == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("viewport", [WIDE, NARROW], ids=["wide", "narrow"])
def test_both_themes_and_widths_fit_and_are_accessible(open_page: Any, viewport: dict[str, int], scheme: str) -> None:
    page = open_page(viewport, scheme)
    page.click("section[aria-labelledby=layers-title] summary")
    assert page.evaluate("document.documentElement.scrollWidth") <= viewport["width"]
    paper, ink = page.evaluate("(style => [style.backgroundColor, style.color])(getComputedStyle(document.body))")
    assert (paper == "rgb(255, 255, 255)") == (scheme == "light") and paper != ink
    found = axe.Axe().run(page).response["violations"]
    assert [(rule["id"], [node["html"] for node in rule["nodes"]][:3]) for rule in found] == []
    page.click("#theme")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") != paper
    page.wait_for_selector("#chart-size svg .mark-symbol.role-mark path")
