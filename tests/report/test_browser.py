"""The page in a headless browser, opened from disk."""

import re
import shutil

import pytest

from mil_anchor.report import write_report
from mil_anchor.results import read_runs, read_unfinished
from mil_anchor.tables import Cell, Column, ResultTable
from tests.report.run_folders import write_run

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

_BROWSERS = ("chromium", "chromium-browser", "google-chrome")
_FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
)
HOSTILE = "<img src=x onerror=alert(1)></script>"
# Not in the order of the numbers as text.
NUMBERS = {"none": 0.9, "anchor": 12.0, "aem": None, HOSTILE: 3.0}
ALL = {"musk1", "synthetic"}


@pytest.fixture(scope="module")
def browser():
    found = next(filter(None, map(shutil.which, _BROWSERS)), None)
    if found is None:
        pytest.skip(f"needs one of {', '.join(_BROWSERS)} on the PATH")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=list(_FLAGS))
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """A page of two data sets, two models and four plug-ins, one of them with a hostile name."""
    root = tmp_path_factory.mktemp("report")
    for data in sorted(ALL):
        for model in ("abmil", "transmil"):
            for number, plugin in enumerate(NUMBERS):
                for seed in (0, 1):
                    folder = write_run(
                        root, data=data, model=model, plugin=f"plugin_{number}", seed=seed
                    )
                    file = folder / "metrics.json"
                    file.write_text(file.read_text().replace(f"plugin_{number}", plugin))
    failed = write_run(root, plugin="failed")
    (failed / "metrics.json").unlink()
    (failed / "error.txt").write_text("ValueError: no luck\n")
    names = [Column(title, False) for title in ("data", "model", "plug-in")]
    rows = [
        [Cell(data), Cell("abmil"), Cell(plugin), Cell("-" if n is None else f"{n:.3g}±.1", n)]
        for data in sorted(ALL)
        for plugin, n in NUMBERS.items()
    ]
    wide = [
        [*row[:3], *(Cell("+0.123 [-0.045, +0.678]", 0.1),) * 5, Cell("words of a note")]
        for row in rows
    ]
    titles = [f"difference {index}" for index in range(5)]
    tables = [
        ResultTable("results", "Results", [*names, Column("F1", True)], rows, "A note."),
        ResultTable(
            "wide",
            "Wide",
            [*names, *(Column(title, True) for title in titles), Column("notes", False)],
            wide,
        ),
    ]
    file = root / "report.html"
    write_report(file, read_runs(root), unfinished=read_unfinished(root), tables=tables)
    return file


@pytest.fixture(scope="module")
def opened(browser, report):
    """Opens the page; at the end nothing was said on the console and nothing asked of a network."""
    contexts, said, asked = [], [], []

    def opened(width=1280, scheme="light"):
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(report.as_uri())
        return page

    yield opened
    for context in contexts:
        context.close()
    assert said == []
    assert {url.split(":")[0] for url in asked} <= {"file", "data"}


@pytest.fixture(scope="module")
def wide_page(opened):
    return opened()


@pytest.fixture
def page(wide_page):
    """The page in its usual look, with nothing filtered: opening it takes seconds."""
    _switch(wide_page, "light")
    wide_page.get_by_role("button", name="Show all").click()
    wide_page.evaluate("scrollTo(0, 0); document.activeElement.blur()")
    return wide_page


def _switch(page, scheme):
    """To light or dark, until the page has painted all of itself anew."""
    page.emulate_media(color_scheme=scheme)
    color = {"light": "#000000", "dark": "#F2F2F2"}[scheme]
    sync_api.expect(page.locator(".plugins line").first).to_have_attribute("stroke", color)


def _draw_all(page):
    """Scroll through the page: curves are drawn when they come near."""
    for plot in page.locator(".plot").all():
        plot.scroll_into_view_if_needed()
        plot.locator(".main-svg").first.wait_for()


def _column(page, place, *, table="results"):
    rows = page.locator(f"details:has(#table-{table}) tbody tr:visible")
    return [row.locator("td").nth(place).inner_text() for row in rows.all()]


def _head(page, name):
    return page.locator("details:has(#table-results) th", has_text=name)


def test_page__opened_from_disk__draws_every_part(page):
    _draw_all(page)

    # Attention, learning and reliability, of two models on two data sets each.
    assert page.locator(".plot .main-svg").count() >= 3 * 4
    lines = page.locator("#attention .plot").first.locator(".scatterlayer .trace")
    assert lines.count() == 4 * (2 + 1)  # two runs and their mean
    assert page.locator(".maps img").count() == 4
    assert page.locator("details.run").count() == 4 * 4 * 2 + 1
    widths = page.locator(".maps img").evaluate_all("all => all.map(one => one.naturalWidth)")
    assert widths == [5] * 4
    assert page.locator("img").count() == 4  # none of a hostile name


@pytest.mark.slow
def test_page__policy__lets_nothing_out(browser, report):
    context = browser.new_context()
    page = context.new_page()
    page.goto(report.as_uri())

    refused = page.evaluate(
        """async () => {
            const refused = [];
            document.addEventListener("securitypolicyviolation", (event) =>
                refused.push(event.effectiveDirective));
            await fetch("https://example.org").catch(() => null);
            await new Promise((done) => Object.assign(
                new Image(), { onerror: done, src: "https://example.org" }));
            const script = document.createElement("script");
            script.text = "window.evil = 1";
            document.body.append(script);
            await new Promise((done) => setTimeout(done));
            return refused;
        }"""
    )

    assert sorted(refused) == ["connect-src", "img-src", "script-src-elem"]
    assert page.evaluate("window.evil") is None
    context.close()


def test_table__heading_clicked__sorts_by_number_and_then_in_reverse(page):
    head = _head(page, "F1")
    ascending = ["0.9±.1", "0.9±.1", "3±.1", "3±.1", "12±.1", "12±.1"]

    _head(page, "model").locator("button").click()
    assert head.get_attribute("aria-sort") == "none"
    head.locator("button").click()
    assert head.get_attribute("aria-sort") == "ascending"
    assert _column(page, 3) == [*ascending, "-", "-"]
    head.locator("button").click()
    assert head.get_attribute("aria-sort") == "descending"
    assert _column(page, 3) == [*reversed(ascending), "-", "-"]


def test_table__heading_by_keyboard__sorts_by_text(page):
    _head(page, "F1").locator("button").click()
    _head(page, "plug-in").locator("button").focus()
    page.keyboard.press("Enter")

    assert _column(page, 2) == [plugin for plugin in sorted(NUMBERS) for _ in ALL]
    page.keyboard.press("Space")
    assert _column(page, 2)[0] == "none"
    assert _head(page, "F1").get_attribute("aria-sort") == "none"


def test_filters__text__hides_rows_of_tables(page):
    page.get_by_label("rows with").fill("SYNTH  anchor")

    assert _column(page, 0) == ["synthetic"]
    assert _column(page, 2) == ["anchor"]
    assert "14 of 16 table rows are hidden" in page.locator("#hidden-rows").inner_text()
    page.get_by_label("rows with").fill("nothing has this")
    assert page.locator("details.table .none:visible").count() == 2
    page.get_by_role("button", name="Show all").click()
    assert page.locator("#hidden-rows").inner_text() == ""
    assert len(_column(page, 0)) == 8


def test_filters__drop_downs__choose_rows_curves_maps_and_runs(page):
    page.locator("#filters").get_by_label("data set").select_option("synthetic")
    page.locator("#filters").get_by_label("model").select_option("abmil")
    page.locator("#filters").get_by_label("plug-in").select_option(HOSTILE)

    assert _column(page, 0) == ["synthetic"]
    assert page.locator("#attention figcaption").all_inner_texts() == ["abmil on synthetic"]
    assert page.locator("details.run:visible").count() == 2
    assert page.locator(".maps figcaption b").all_inner_texts() == [HOSTILE]
    slides = page.locator("#slides select").first.locator("option").all_inner_texts()
    assert slides == [f"synthetic, abmil, seed {seed}, fold 0: slide_a" for seed in (0, 1)]
    _draw_all(page)


@pytest.mark.slow
def test_curves__plugin_switched_off__leaves_all_charts(page):
    _draw_all(page)
    box = page.locator("#learning").get_by_label("anchor", exact=True)
    box.focus()
    page.keyboard.press("Space")
    _draw_all(page)

    for section in ("attention", "learning"):
        lines = page.locator(f"#{section} .plot").first.locator(".scatterlayer .trace")
        assert lines.count() == 3 * (2 + 1)
    assert not page.locator("#attention").get_by_label("anchor", exact=True).is_checked()
    assert page.locator(".maps figure").count() == 4
    box.check()


def test_curves__another_measure__is_drawn_on_its_own_axis(page):
    plot = page.locator("#attention .plot").first
    plot.scroll_into_view_if_needed()
    plot.locator(".main-svg").first.wait_for()
    assert plot.evaluate("plot => plot.layout.yaxis.type") == "log"
    page.locator("#attention").get_by_label("measure").select_option(label="entropy / ln N")

    plot.locator(".main-svg").first.wait_for()
    assert plot.evaluate("plot => plot.layout.yaxis.type") != "log"
    assert plot.evaluate("plot => plot.data.at(-1).y") == [0.9] * 4
    assert "entropy / ln N by epoch, abmil on musk1" in plot.get_attribute("aria-label")


def test_slides__slider_by_keyboard__shows_other_epochs(page):
    slider = page.get_by_role("slider", name="epoch")
    image = page.locator(".maps img").first
    seen = [image.get_attribute("src")]
    slider.focus()
    for _ in range(3):
        page.keyboard.press("ArrowRight")
        seen.append(image.get_attribute("src"))

    assert len(set(seen)) == 4
    assert slider.get_attribute("aria-valuetext") == "epoch 3"
    assert image.get_attribute("alt").endswith("on slide_a in epoch 3")
    page.keyboard.press("Home")
    assert image.get_attribute("src") == seen[0]


def test_slides__colours_and_outlines__can_be_chosen(page):
    before = page.locator(".maps img").first.get_attribute("src")
    page.locator("#slides").get_by_label("colours").select_option("log")

    assert page.locator(".maps img").first.get_attribute("src") != before
    assert "attention times N, log" in page.locator("#slides .legend").inner_text()
    assert page.locator(".maps svg:visible").count() == 4
    page.get_by_label("outlines of lesions").uncheck()
    assert page.locator(".maps svg:visible").count() == 0


@pytest.mark.slow
def test_page__tab_key__reaches_every_control_and_shows_where_it_is(opened):
    page = opened()
    controls = page.evaluate(
        """() => {
            const all = [...document.querySelectorAll(
                "a, button, select, input, summary, [tabindex='0']")];
            all.forEach((control, index) => (control.dataset.place = index));
            return all.filter((control) => control.checkVisibility()).map((c) => c.dataset.place);
        }"""
    )
    reached, outlined = [], []
    for _ in controls:
        page.keyboard.press("Tab")
        place, style = page.evaluate(
            "() => [document.activeElement.dataset.place ?? null,"
            " getComputedStyle(document.activeElement).outlineStyle]"
        )
        reached.append(place)
        outlined.append(style)

    assert reached == controls
    assert set(outlined) == {"solid"}


@pytest.mark.slow
def test_page__skip_link__goes_to_the_results(opened):
    page = opened()
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")

    assert page.evaluate("document.activeElement.id") == "main"


_CONTRASTS = """() => {
    const channels = (color) => color.match(/[\\d.]+/g).map(Number);
    const light = (color) => {
        const [r, g, b] = channels(color).map((value) => {
            const share = value / 255;
            return share <= 0.04045 ? share / 12.92 : ((share + 0.055) / 1.055) ** 2.4;
        });
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const ground = (node) => {
        for (let own = node; own; own = own.parentElement) {
            const color = getComputedStyle(own).backgroundColor;
            if ((channels(color)[3] ?? 1) > 0) return color;
        }
    };
    const found = [];
    const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    while (texts.nextNode()) {
        const text = texts.currentNode;
        const node = text.parentElement;
        if (!text.data.trim() || !node.checkVisibility()) continue;
        const style = getComputedStyle(node);
        const ink = node instanceof SVGElement ? style.fill : style.color;
        const [low, high] = [light(ink), light(ground(node))].sort((a, b) => a - b);
        found.push([(high + 0.05) / (low + 0.05), text.data.trim()]);
    }
    return found;
}"""


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_page__text__stands_out_from_its_ground(page, scheme):
    _switch(page, scheme)
    _draw_all(page)
    page.locator("details.run").first.evaluate("run => (run.open = true)")

    contrasts = page.evaluate(_CONTRASTS)

    assert len(contrasts) > 100
    assert [text for contrast, text in contrasts if contrast < 4.5] == []


@pytest.mark.slow
def test_page__dark_mode__changes_page_and_curves_without_loading_anew(page):
    _draw_all(page)
    look = """() => {
        const plot = document.querySelector(".plot");
        const style = getComputedStyle(document.body);
        return [style.backgroundColor, style.color, plot.layout.font.color,
            plot.data.at(-1).line.color,
            document.querySelector(".plugins line").getAttribute("stroke")];
    }"""
    light = page.evaluate(look)
    _switch(page, "dark")
    page.evaluate("scrollTo(0, 0)")
    _draw_all(page)
    dark = page.evaluate(look)

    assert all(one != other for one, other in zip(light, dark, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("width", [400, 1280])
def test_page__any_width__needs_no_scrolling_sideways(opened, width):
    page = opened(width)
    _draw_all(page)
    page.locator("details.run").evaluate_all("all => all.forEach((run) => (run.open = true))")

    over = page.evaluate(
        """() => [...document.querySelectorAll("body *")].filter((node) =>
            node.checkVisibility()
            && !node.closest(".skip, .plot svg, .picture, noscript, #js-plotly-tester")
            && (node.getBoundingClientRect().right > innerWidth + 0.5
                || node.getBoundingClientRect().left < -0.5)
        ).map((node) => node.outerHTML.slice(0, 80))"""
    )
    assert over == []
    assert page.evaluate("document.documentElement.scrollWidth") == width
    scrolled = page.locator(".scroll").evaluate_all(
        "all => all.map((one) => one.scrollWidth - one.clientWidth)"
    )
    assert scrolled == [0, 0]
    # Every panel has the room that was made for it, and is inside.
    assert page.locator(".plot").evaluate_all(
        "all => all.every((one) => one.querySelector('.main-svg').clientWidth <= one.clientWidth)"
    )


@pytest.mark.slow
def test_page__narrow_screen__shows_rows_as_cards_with_their_headings(opened):
    page = opened(400)
    cell = page.locator("details:has(#table-results) td").nth(3)

    assert re.match('"F1"', cell.evaluate("td => getComputedStyle(td, '::before').content"))
    assert page.get_by_role("table", name="Results").get_by_role("row").count() == 9
    page.locator("th button", has_text="F1").first.click()
    assert _column(page, 3)[0].endswith("0.9±.1")
    page.get_by_label("rows with").fill("synth anchor")
    assert len(_column(page, 3)) == 1
