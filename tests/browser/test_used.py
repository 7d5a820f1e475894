"""The page as people use it: on a phone, with a keyboard, with a screen reader, in the dark; and with a thousand nodes."""

import json
from dataclasses import replace
from typing import Any

import pytest

from tests.worlds import shown_state
from tests.worlds.browser import AXE, Browser, Tab
from tests.worlds.shown_page import shown_page

pytestmark = pytest.mark.asyncio(loop_scope="module")

SHOWN = "document.querySelector('#teller').textContent !== ''"
FOCUS = "(() => { const at = document.activeElement; return at.id || at.textContent.trim() })()"


async def serious(tab: Tab) -> list[Any]:
    """What axe finds that is serious or critical."""
    await tab.evaluate(AXE.read_text() + "; 0")
    found = await tab.evaluate("axe.run(document, {resultTypes: ['violations']})")
    assert found["passes"], "it has looked"
    return [
        (each["id"], each["help"], [node["html"][:200] for node in each["nodes"]])
        for each in found["violations"]
        if each["impact"] in ("serious", "critical")
    ]


@pytest.mark.parametrize("width", [1280, 700, 360])
@pytest.mark.parametrize("scheme", ["light", "dark"])
async def test_axe_finds_nothing_serious(browser: Browser, width: int, scheme: str) -> None:
    state = shown_state.state()
    failing = replace(state.models[0], failure="it ended", unusable="another kernel", refused="no room")
    state = replace(state, missing="a peer", models=(failing, *state.models[1:]))
    async with shown_page(state) as page, browser.tab(page.url) as tab:
        await tab.looks(width=width, scheme=scheme, height=8000)
        await tab.until(SHOWN)
        await tab.until("document.querySelectorAll('#nodes-table .chip').length")
        await tab.evaluate("document.querySelectorAll('.opener').forEach(each => each.click())")
        assert await serious(tab) == []


async def test_axe_finds_nothing_serious_where_nothing_is(browser: Browser) -> None:
    state = shown_state.state()
    state = replace(state, models=(), nodes=(), replicas=(), activations=(), plan=replace(state.plan, under_way=(), put_off=()))
    async with shown_page(state) as page, browser.tab(page.url) as tab:
        await tab.until(SHOWN)
        assert "No model is declared yet." in await tab.text("main") and "No restore agent is connected" in await tab.text("main")
        assert await serious(tab) == []


@pytest.mark.parametrize("width", [320, 360, 768, 1280])
async def test_nothing_is_wider_than_the_screen(browser: Browser, width: int) -> None:
    state = shown_state.state(nodes=3, models=30, copies=20)
    long = shown_state.model("a-model-of-a-long-name/with-a-revision-and-" + "x" * 80, failure="/" + "y" * 200)
    state = replace(state, models=(long, *state.models))
    async with shown_page(state) as page, browser.tab(page.url) as tab:
        await tab.looks(width=width, height=8000)
        await tab.until(SHOWN)
        await tab.until("document.querySelectorAll('#nodes-table .chip').length")
        await tab.evaluate("document.querySelectorAll('.opener').forEach(each => each.click())")
        wide = (
            "[...document.querySelectorAll('main *')]"
            ".filter(each => each.getBoundingClientRect().right > innerWidth + 1 && !each.closest('.unseen, .chip, thead'))"
            ".map(each => each.outerHTML.slice(0, 120))"
        )
        assert await tab.evaluate(wide) == []
        assert await tab.evaluate("document.documentElement.scrollWidth") == width


async def test_all_of_it_is_reached_with_the_keyboard(browser: Browser) -> None:
    async with shown_page(shown_state.state(nodes=2, models=2)) as page, browser.tab(page.url) as tab:
        await tab.until(SHOWN)
        await tab.press("Tab")
        assert await tab.evaluate(FOCUS) == "Skip to the models"
        seen = []
        for _ in range(60):
            await tab.press("Tab")
            seen.append(await tab.evaluate(FOCUS))
            if seen[-1] == "node-1":
                break
        assert [each for each in seen if each in ("Models", "Starts", "Nodes", "Plan")] == ["Models", "Starts", "Nodes", "Plan"]
        assert "filter" in seen and "model-0" in seen and "node-0" in seen
        assert any(each.startswith("model-0restored") for each in seen), "a start can be opened"
        await tab.evaluate("[...document.querySelectorAll('#nodes-table .opener')].at(-1).focus()")
        await tab.press("Enter")
        await tab.until("[...document.querySelectorAll('#nodes-table .copies')].length === 1")
        assert await tab.evaluate("document.activeElement.getAttribute('aria-expanded')") == "true"
        await tab.press(" ", text=" ")
        await tab.until("document.querySelector('#nodes-table .opener[aria-expanded=true]') === null")


async def test_a_slash_leads_to_the_filter_and_escape_empties_it(browser: Browser) -> None:
    async with shown_page(shown_state.state(nodes=3, models=12)) as page, browser.tab(page.url) as tab:
        await tab.until(SHOWN)
        await tab.press("/", text="/")
        await tab.type("model-11")
        await tab.until("document.querySelectorAll('#models-table tbody tr').length === 1")
        assert await tab.evaluate("document.querySelector('#filter').value") == "model-11"
        await tab.press("Escape")
        await tab.until("document.querySelectorAll('#models-table tbody tr').length === 12")


async def test_models_are_chosen_by_how_they_stand(browser: Browser) -> None:
    async with shown_page(shown_state.state(nodes=1, models=30)) as page, browser.tab(page.url) as tab:
        await tab.until(SHOWN)
        assert await tab.evaluate("document.querySelectorAll('#models-table tbody tr').length") == 15
        await tab.evaluate("document.querySelector('#models-more').click()")
        assert await tab.evaluate("document.querySelectorAll('#models-table tbody tr').length") == 30
        await tab.evaluate("document.querySelector('#standings .is-serving').click()")
        standings = await tab.evaluate("[...new Set([...document.querySelectorAll('#models-table .badge')].map(each => each.textContent))]")
        assert standings == ["serving"]
        assert await tab.evaluate("document.querySelector('#standings .is-serving').getAttribute('aria-pressed')") == "true"


async def test_to_a_screen_reader_tables_are_tables_and_little_is_read_out_unasked(browser: Browser) -> None:
    async with shown_page(shown_state.state(nodes=2, models=2)) as page, browser.tab(page.url) as tab:
        await tab.looks(width=360, height=8000)
        await tab.until(SHOWN)
        await tab.until("document.querySelectorAll('#nodes-table .chip').length")
        nodes = (await tab.call("Accessibility.getFullAXTree"))["nodes"]
        roles: dict[str, list[str]] = {}
        for each in nodes:
            if not each.get("ignored"):
                roles.setdefault(each["role"]["value"], []).append(each.get("name", {}).get("value", ""))
        assert {name.split(" ")[0] for name in roles["table"]} >= {"Models", "Nodes", "Plan", "Restored", "Phases"}
        assert len(roles["rowheader"]) >= 4 + 8 and len(roles["columnheader"]) >= 9 + 6
        assert "cell" in roles and "row" in roles
        assert roles["heading"][:3] == ["zerowake", "Models 2", "Starts from zero the last 100"]
        assert (
            any("disk → memory on node-0" in name for name in roles["progressbar"])
            if "progressbar" in roles
            else roles["ProgressIndicator"]
        )
        assert await tab.evaluate("[...document.querySelectorAll('[aria-live], [role=status], [role=alert]')].map(each => each.id)") == [
            "connection",
            "missing",
        ]


async def test_dark_and_light_are_what_the_person_prefers(browser: Browser) -> None:
    paper = "getComputedStyle(document.body).backgroundColor"
    async with shown_page(shown_state.state()) as page, browser.tab(page.url) as tab:
        light = await tab.evaluate(paper)
        await tab.looks(scheme="dark")
        dark = await tab.evaluate(paper)
    brightness = [sum(json.loads(each.replace("rgb(", "[").replace(")", "]"))) for each in (light, dark)]
    assert brightness[0] > 600 and brightness[1] < 150


async def test_nothing_glides_or_blinks(browser: Browser) -> None:
    async with shown_page(shown_state.state()) as page, browser.tab(page.url) as tab:
        await tab.looks(height=4000)
        await tab.until("document.querySelector('.chip[data-moving=yes]')")
        full = "document.querySelector('.chip[data-moving=yes]').style.getPropertyValue('--full')"
        before = await tab.evaluate(full)
        await tab.evaluate(f"window.moved = 0; document.addEventListener('transitionrun', () => moved += 1); window.before = {before}")
        page.change(lambda state: shown_state.moved(state, 4.0))
        await tab.until(f"{full} > before")
        assert await tab.evaluate("moved + document.getAnimations().length") == 0


async def test_of_a_thousand_nodes_a_few_are_shown_until_all_are_asked_for_and_found_by_name(browser: Browser) -> None:
    async with shown_page(shown_state.state(nodes=1000, models=200, copies=20)) as page, browser.tab(page.url) as tab:
        await tab.until(SHOWN)
        rows = "document.querySelectorAll('#nodes-table tbody tr').length"
        assert await tab.evaluate(rows) == 20
        assert "2000 GPUs" in (await tab.text("#fleet")).replace(",", "")
        await tab.evaluate("document.querySelector('#nodes-more').click()")
        assert await tab.evaluate(rows) == 1000
        filled = await tab.evaluate("document.querySelectorAll('#nodes-table tbody tr td').length")
        assert filled < 1000, "rows far from the screen are not filled"
        await tab.evaluate("document.querySelector('#nodes-table tbody tr:last-child').scrollIntoView()")
        await tab.until("document.querySelector('#nodes-table tbody tr:last-child td .chip')")
        await tab.evaluate("document.querySelector('#filter').focus()")
        await tab.type("node-777")
        await tab.until(f"{rows} === 1")
        assert tab.errors == []
