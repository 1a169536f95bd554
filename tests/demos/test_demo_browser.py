"""The workbench in a real browser: headless Chromium driven by Playwright, on the shapes world.

Skipped where either is missing: `pip install -e .[dev]` brings Playwright, Debian's package `chromium` the browser.
"""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import zipfile
from pathlib import Path

import pytest
from PIL import Image

playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
pytest.importorskip("gradio", reason="gradio is not installed")
CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), ""
)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not CHROMIUM, reason="no Chromium: install Debian's package chromium"),
]
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
FLAGS += ["--disable-component-update", "--disable-sync"]
PATIENCE = 1000 * int(os.environ.get("TEST_BROWSER_SECONDS", "240"))  # a busy machine is slow
SECRET = "nobody may read this"


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with a run, something secret beside it, and pictures to upload."""
    folder = tmp_path_factory.mktemp("demo")
    samples = folder / "runs" / "first" / "samples"
    samples.mkdir(parents=True)
    for name in ("before", "after"):
        Image.new("RGB", (64, 64), "grey").save(samples / f"{name}.png")
    lines = [{"step": k, "reward_mean": k / 10, "kl": k / 100, "peak_memory_bytes": 2**30} for k in range(5)]
    lines[3]["findings"] = ["warning: <b>all alike</b>"]
    (folder / "runs" / "first" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "secret.txt").write_text(SECRET)
    for name in ("red", "blue"):
        Image.new("RGB", (64, 64), name).save(folder / f"{name}.png")
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n and nothing more")
    return folder


@pytest.fixture(scope="module")
def address(place):
    """The workbench in a process of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-c", "from visalign.commands.cli import main; main()", "demo", "--port", str(port)]
    command += ["--runs", str(place / "runs"), "--out", str(place / "out")]
    with open(place / "log.txt", "w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, cwd=place)
    end = time.monotonic() + 4 * PATIENCE / 1000
    while "the workbench is at" not in (place / "log.txt").read_text():
        assert process.poll() is None and time.monotonic() < end, (place / "log.txt").read_text()[-2000:]
        time.sleep(0.2)
    yield f"http://127.0.0.1:{port}"
    process.terminate()
    process.wait(60)


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield started
        started.close()


@pytest.fixture
def visit(browser, address):
    """Opens the workbench in a context of its own; at the end no page may have had an error on its console."""
    contexts, errors = [], []

    def open_page(width=1280):
        context = browser.new_context(viewport={"width": width, "height": 900}, accept_downloads=True)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(PATIENCE)
        page.on("console", lambda said: errors.append(said.text) if said.type == "error" else None)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(address)
        page.wait_for_selector("#compare-rewards table")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert errors == []


def done(page, tab):
    """Wait until a tab's work is over; returns what it says."""
    page.wait_for_selector(f"#{tab}-stop:disabled")
    return page.inner_text(f"#{tab}-status")


def press(page, tab):
    page.click(f"#{tab}-go")
    page.wait_for_selector(f"#{tab}-stop:enabled")


def open_tab(page, name):
    page.get_by_role("tab", name=name, exact=True).click()


def test_the_first_pair_is_there_soon_and_both_sides_score_as_the_library_does(visit):
    page = visit()
    page.fill("#compare-prompt textarea", "a green star")
    press(page, "compare")
    assert done(page, "compare") == "Done."
    from visalign.commands.drawing import sample
    from visalign.pipeline.generator import Generator
    from visalign.rewards import make_reward, score
    from visalign.search import run
    from visalign.worlds import resolve_model

    generator = Generator.from_pretrained(resolve_model("shapes-flow"))
    reward = make_reward("clip_match")
    left = float(score(reward, sample(generator, ["a green star"], [0]), ["a green star"]).total[0])
    *_, last = run(generator, "a green star", reward, "best-of-n", budget=100, seed=0)
    shown = page.locator("#compare-rewards tbody tr").first.locator("td").all_inner_texts()
    assert [float(value) for value in shown] == pytest.approx([left, last.best.reward], abs=2e-4)
    pictures = page.locator("#compare-pictures img")
    assert pictures.count() == 2
    assert all("a green star" in pictures.nth(k).get_attribute("alt") for k in (0, 1))
    assert page.locator("#compare-pictures rect").count() >= 2  # the judge's boxes


def test_a_comparison_is_saved_with_its_facts(visit, place):
    page = visit()
    page.click("#compare-save")
    page.wait_for_selector("#compare-json", state="visible")
    with page.expect_download() as download:
        page.click("#compare-png")
    image = Image.open(download.value.path())
    assert image.text["prompt"] == "two red circles" and json.loads(image.text["visalign"])["seeds"] == [0]
    with page.expect_download() as download:
        page.click("#compare-json")
    facts = json.loads(Path(download.value.path()).read_text())
    assert facts["left"]["search"] == "none" and facts["right"]["search"] == "best-of-n"
    assert len(list((place / "out" / "comparisons").iterdir())) >= 1


def test_words_of_a_prompt_are_never_html_and_errors_are_sentences(visit):
    page = visit()
    page.evaluate("window.hacked = false")
    page.fill("#compare-prompt textarea", "<img src=x onerror='window.hacked = true'> & two <b>circles</b>")
    press(page, "compare")
    assert done(page, "compare") == "Done."
    assert page.evaluate("window.hacked") is False and page.locator("#compare-pictures b").count() == 0
    assert "<b>circles</b>" in page.inner_text("#compare-rewards")  # the judge says what it could not read
    page.fill("#compare-prompt textarea", " ")
    press(page, "compare")
    said = done(page, "compare")
    assert said.startswith("prompt: got 0 characters") and "Traceback" not in page.content()


def test_votes_by_keys_are_kept_exported_and_there_after_a_reload(visit, place):
    page = visit()
    open_tab(page, "Prefer")
    page.click("#prefer-go")
    for key, kept in (("a", "left is better"), ("b", "right is better"), ("t", "as good"), ("x", "both bad")):
        page.wait_for_selector("#vote-left:enabled")
        page.keyboard.press(key)
        page.wait_for_selector(f"#prefer-results >> text=Kept: {kept}")
    page.wait_for_selector("#vote-left:enabled")
    rows = [json.loads(line) for line in (place / "out" / "votes" / "metadata.jsonl").read_text().splitlines()]
    assert [row["label"] for row in rows[-4:]] == ["image_0", "image_1", "tie", "both_bad"]
    assert {row["model_0"] for row in rows} | {row["model_1"] for row in rows} == {
        "base",
        "base, best-of-n for clip_match, 60 calls",
    }
    page.click("#prefer-export")
    page.wait_for_selector("#prefer-zip", state="visible")
    with page.expect_download() as download:
        page.click("#prefer-zip")
    names = zipfile.ZipFile(download.value.path()).namelist()
    assert "preferences/metadata.jsonl" in names and sum(name.endswith(".png") for name in names) == 8
    page.reload()
    page.wait_for_selector("#compare-rewards table")
    open_tab(page, "Prefer")
    page.click("#prefer-board")
    page.wait_for_selector("#prefer-results table")
    assert "4 votes" in page.inner_text("#prefer-results") and "clip_match" in page.inner_text("#prefer-results")


def test_uploads_are_ranked_and_a_malformed_one_is_named(visit, place):
    page = visit()
    open_tab(page, "Score")
    page.set_input_files("#score-files input[type=file]", [place / f"{name}.png" for name in ("red", "blue", "broken")])
    page.wait_for_selector("#score-files >> text=broken")
    press(page, "score")
    assert done(page, "score") == "Done."
    said = page.inner_text("#score-results")
    assert "broken.png: is" in said and page.locator("#score-results tbody").first.locator("tr").count() == 2
    assert page.locator("#score-results img").count() == 2


def test_a_search_is_watched_looked_into_and_stopped_with_its_best_kept(visit, place):
    page = visit()
    open_tab(page, "Search")
    budget = page.locator("#search-budget input[type=number]")
    budget.fill("5000")
    budget.press("Enter")
    press(page, "search")
    page.wait_for_selector("#search-inside [data-node]")
    page.wait_for_selector("#search-curve img")
    page.click("#search-stop")
    said = done(page, "search")
    assert said.startswith("Stopped; the best is kept") and int(re.findall(r"\d+", said)[0]) < 5000
    page.locator("#search-inside [data-node]").first.click()
    page.wait_for_selector("#search-picked img")
    assert "value" in page.inner_text("#search-picked")
    page.click("#search-save")
    page.wait_for_selector("#search-png", state="visible")
    (saved,) = (place / "out" / "searches").iterdir()
    assert json.loads((saved / "search.json").read_text())["budget"] == 5000


def test_runs_show_curves_samples_and_findings_and_are_followed(visit, place):
    page = visit()
    open_tab(page, "Runs")
    page.click("#runs-again")
    page.wait_for_selector("#runs-curves img")
    alts = page.eval_on_selector_all("#runs-curves img", "all => all.map(image => image.alt)")
    assert any(alt.startswith("reward: reward_mean from 0 to 0.4") for alt in alts)
    assert "warning: <b>all alike</b>" in page.inner_text("#runs-curves")
    assert "before" in page.inner_text("#runs-grid")
    page.check("#runs-follow input")
    with open(place / "runs" / "first" / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "reward_mean": 0.9}\n')
    page.wait_for_selector("#runs-curves img[alt*='to 0.9']")
    page.uncheck("#runs-follow input")


def test_two_people_at_once_do_not_mix(visit):
    one, other = visit(), visit()
    for page, prompt in ((one, "three blue squares"), (other, "a yellow star")):
        page.fill("#compare-prompt textarea", prompt)
    press(one, "compare"), press(other, "compare")
    assert done(one, "compare") == "Done." == done(other, "compare")
    for page, prompt in ((one, "three blue squares"), (other, "a yellow star")):
        alts = page.eval_on_selector_all("#compare-pictures img", "all => all.map(image => image.alt)")
        assert len(alts) == 2 and all(prompt in alt for alt in alts)


def test_nothing_outside_can_be_read(address, place):
    secret = str(place / "secret.txt")
    for path in (
        secret,
        "/etc/passwd",
        f"../{secret}",
        f"{place}/runs/../secret.txt",
        f"{place}/runs/%2e%2e/secret.txt",
    ):
        for prefix in ("/gradio_api/file=", "/file=", "/gradio_api/file/"):
            try:
                with urllib.request.urlopen(address + prefix + path, timeout=60) as answer:
                    body = answer.read()
            except urllib.error.HTTPError as error:
                body = error.read()
                assert error.code in (400, 403, 404, 405)
            assert SECRET.encode() not in body and b"root:" not in body


def test_it_fits_a_phone(visit):
    page = visit(width=390)
    for name in ("Compare", "Prefer", "Score", "Search", "Runs"):
        if not page.get_by_role("tab", name=name, exact=True).is_visible():
            page.locator(".overflow-menu button").first.click()
            page.locator(".overflow-dropdown").get_by_text(name, exact=True).click()
        else:
            open_tab(page, name)
        page.wait_for_timeout(300)
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
