"""The console in a real browser: ranks, shows factors, is worked by keyboard, and takes nobody's text for markup."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.engine.conftest import adapter_dirs, tiny_dir  # noqa: F401
from tests.serve.test_process import _started

pytest.importorskip("uvicorn")
httpx = pytest.importorskip("httpx")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
RANK, ADMIN = "rank-secret-0123456789", "admin-secret-0123456789"
SURFACE = """{"name": "example", "redact": [],
 "facts": [{"name": "rate", "field": "rate", "curve": {"points": [[40, 1], [100, 0]]}, "missing": 0.5, "domain": [0, 1000], "weight": 2}],
 "reads": [{"name": "skills", "probe": "Answer {labels}: do the skills match?"}]}"""
PEOPLE = (
    '{"id": "a", "text": "<img src=x onerror=alert(1)> Rust", "facts": {"rate": 50}}\n{"id": "b", "text": "A nurse."}'
)


@pytest.fixture(scope="module")
def address(
    tiny_dir: Path,  # noqa: F811
    adapter_dirs: dict[str, Path],  # noqa: F811
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[str]:
    keys = tmp_path_factory.mktemp("console") / "keys"
    keys.write_text(f"shop rank {RANK}\noperator admin {ADMIN}\n")
    root = adapter_dirs["alpha"].parent
    with _started(tiny_dir, "--keys", str(keys), "--adapter-root", str(root)) as (_, address):
        yield address


@contextlib.contextmanager
def _page(scheme: str = "light") -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("Chromium is not installed")
    flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=[*flags, "--disable-sync", "--no-first-run"])
        page = browser.new_page(color_scheme=scheme, viewport={"width": 1200, "height": 900})
        page.said = []
        page.on("console", lambda message: page.said.append(message.text))
        page.on("dialog", lambda dialog: (page.said.append("a dialog"), dialog.dismiss()))
        page.on("pageerror", lambda error: page.said.append(str(error)))
        yield page
        browser.close()


def _wait(page: Any, selector: str, text: str) -> None:
    """Until the element has the text. (Playwright's `wait_for_function` needs `eval`, which the page forbids.)"""
    page.locator(selector).filter(has_text=text).wait_for(timeout=20_000)


def _shot(page: Any, name: str, tmp_path: Path) -> None:
    page.screenshot(path=Path(os.environ.get("UMA_SCREENSHOTS", tmp_path)) / f"{name}.png", full_page=True)


def test_the_files_are_open_and_strict(address: str) -> None:
    for path in ("/", "/console.css", "/console.js"):
        answer = httpx.get(f"{address}{path}")
        assert answer.status_code == 200
        assert "script-src 'self'" in answer.headers["content-security-policy"]
    page = httpx.get(address).text
    assert "http://" not in page
    assert "https://" not in page
    assert "innerHTML" not in httpx.get(f"{address}/console.js").text
    assert "/console.js" not in httpx.get(f"{address}/openapi.json").json()["paths"]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_ranks_and_shows_the_factors(address: str, scheme: str, tmp_path: Path) -> None:
    with _page(scheme) as page:
        page.goto(address)
        _wait(page, "#error", "key")
        page.fill("#key", RANK)
        page.press("#key", "Tab")
        _wait(page, "#base", "tiny")
        assert page.locator("#error").is_hidden()
        page.said.clear()  # the refusal without a key
        page.fill("#candidates", PEOPLE)
        page.click("summary")
        page.fill("#surface", SURFACE)
        page.click("#go")
        page.wait_for_selector("ol.results > li")
        results = page.locator("ol.results > li")
        assert results.count() == 2
        assert "<img src=x" in results.nth(0).inner_text()
        assert page.locator("ol.results img").count() == 0
        asked = {
            "query": page.input_value("#job"),
            "candidates": [json.loads(line) for line in PEOPLE.splitlines()],
            "surface": json.loads(SURFACE),
        }
        headers = {"authorization": f"Bearer {RANK}"}
        expected = httpx.post(f"{address}/v1/rank", json=asked, headers=headers).json()
        shown = [float(text) for text in page.locator("ol.results .score").all_inner_texts()]
        assert shown == [round(r["score"], 4) for r in expected["results"]]
        factors = page.locator("ol.results > li").nth(0).locator(".factors").inner_text()
        assert "rate" in factors
        assert "skills" in factors
        assert "(missing)" in page.locator("ol.results").inner_text()
        widths = page.eval_on_selector_all(".bar", "bars => bars.map(b => b.getBoundingClientRect().width)")
        assert max(widths) > 50
        _shot(page, f"console-rank-{scheme}", tmp_path)
        page.fill("#surface", "{")
        page.click("#go")
        _wait(page, "#error", "Surface")
        assert page.said == []


def test_views_by_keyboard_and_what_an_operator_does(address: str, tmp_path: Path) -> None:
    with _page() as page:
        page.goto(address)
        page.fill("#key", ADMIN)
        page.focus("#tab-rank")
        page.keyboard.press("ArrowRight")
        page.wait_for_selector(".tile")
        assert page.evaluate("document.activeElement.id") == "tab-load"
        assert page.locator("#paths tr").count() >= 1
        _shot(page, "console-load", tmp_path)
        page.keyboard.press("ArrowRight")
        _wait(page, "#status", "generation")
        page.fill("#load-name", "alpha")
        page.fill("#load-path", "alpha")
        page.press("#load-path", "Enter")
        page.wait_for_selector("#adapters button")
        assert "alpha" in page.locator("#adapters").inner_text()
        _shot(page, "console-models", tmp_path)
        page.fill("#swap-model", "/nowhere")
        page.press("#swap-model", "Enter")
        _wait(page, "#status", "failed")
        page.click("#adapters button")
        _wait(page, "#adapters", "none")
        assert page.locator("#rollback").is_disabled()
