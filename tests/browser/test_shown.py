"""The page in a real browser: that it shows what is so, keeps up with it, and takes names for nothing but text."""

import json
from contextlib import AsyncExitStack
from dataclasses import replace

import pytest

from scaler.view.state import Move, Presence, State, Step
from tests.worlds import shown_state
from tests.worlds.browser import Browser, Tab
from tests.worlds.ports import free_port
from tests.worlds.shown_page import shown_page

pytestmark = pytest.mark.asyncio(loop_scope="module")

HOSTILE = (
    "<img src=x onerror=\"document.title='broken'\">",
    "</script><script>document.title='broken'</script>",
    "__proto__",
    "constructor",
    "javascript:document.title='broken'",
    "\u202egnp.exe",
    "data: x\n\nevent: state\ndata: {}",
    "x" * 300,
    "&lt;b&gt;",
)


async def shown(tab: Tab) -> None:
    """Waits until the first state is drawn."""
    await tab.until("document.querySelector('#teller').textContent !== ''")


async def nodes_in_view(tab: Tab) -> None:
    """Rows of nodes are filled where they can be seen, or nearly."""
    await tab.evaluate("document.querySelector('#nodes').scrollIntoView()")
    await tab.until("document.querySelector('#nodes-table .chip')")


async def row(tab: Tab, table: str, name: str) -> str:
    """The texts of a table's row, a line each, by the name at its head."""
    found = (
        f"[...document.querySelectorAll('#{table} tbody tr')].find(row => row.querySelector('th .name').textContent === {json.dumps(name)})"
    )
    return str(await tab.evaluate(f"[...{found}.querySelectorAll('.badge, td')].map(each => each.textContent).join('\\n')"))


async def test_what_is_so_is_shown(browser: Browser) -> None:
    state = shown_state.state(nodes=3, models=6)
    failing = replace(state.models[2], failure="the engine ended with exit code 3")
    stage, start = state.plan.under_way[0], Step("start", "model-0", None, "node-0", None, None, "its snapshot is there: 0.2 s", None)
    plan = replace(state.plan, under_way=(stage, start, start))
    state = replace(state, models=(*state.models[:2], failing, *state.models[3:]), plan=plan)
    async with shown_page(state) as page, browser.tab(page.url) as tab:
        await shown(tab)
        assert "serving" in await row(tab, "models-table", "model-0")
        assert "waking\n0 / 0\n3\n" in await row(tab, "models-table", "model-1")
        assert "last start failed: the engine ended with exit code 3" in await row(tab, "models-table", "model-2")
        assert await tab.evaluate("document.querySelectorAll('#nodes-table tbody tr').length") == 3
        await nodes_in_view(tab)
        await tab.until("document.querySelectorAll('#nodes-table .chip').length >= 12")
        assert "2 GPUs" in await row(tab, "nodes-table", "node-1")
        assert "model-2: disk → memory on node-0" in await tab.text("#moving-list")
        assert "3 requests wait for it" in await tab.text("#plan-table")
        assert "not for 12.5 s" in await tab.text("#plan-table")
        assert await tab.evaluate("document.querySelectorAll('#plan-table tbody tr').length") == 3
        assert "start × 2" in await tab.text("#plan-table"), "what is the same twice is one line"
        assert "zerowake-scaler-0" in await tab.text("#teller")
        assert tab.errors == []


async def test_a_start_is_a_waterfall_in_the_order_of_its_phases_and_what_is_unaccounted_is_one_of_them(browser: Browser) -> None:
    async with shown_page(shown_state.state()) as page, browser.tab(page.url) as tab:
        await shown(tab)
        await tab.until("document.querySelectorAll('#starts-list details[open] tbody tr').length === 8")
        names = await tab.evaluate("[...document.querySelectorAll('#starts-list details[open] tbody th')].map(each => each.textContent)")
        assert names == ["held", "pushed", "staged", "image", "weights", "health", "first byte", "unaccounted"]
        lanes = "[...document.querySelectorAll('#starts-list details[open] .lane i')]"
        boxes = await tab.evaluate(f"{lanes}.map(each => [each.offsetLeft, each.offsetLeft + each.offsetWidth])")
        image, weights = boxes[3], boxes[4]
        assert abs(image[0] - weights[0]) <= 1 and weights[1] < image[1], "both move at once"
        after = [begin for begin, _ in boxes[:4] + boxes[5:]]
        assert after == sorted(after)
        assert boxes[-1][0] >= boxes[-2][1] - 4, "what nobody accounts for is at the end"


async def test_restored_stands_beside_cold_of_the_same_model_to_one_scale(browser: Browser) -> None:
    starts = (shown_state.start("a", "chat", "restored", 2000.0), shown_state.start("b", "chat", "cold", 1000.0))
    state = replace(shown_state.state(), activations=(*starts, shown_state.start("c", "other", "cold", 500.0)))
    async with shown_page(state) as page, browser.tab(page.url) as tab:
        await shown(tab)
        assert await tab.evaluate("document.querySelectorAll('#compared-table tbody tr').length") == 1
        widths = await tab.evaluate(
            "[...document.querySelectorAll('#compared-table .phases')].map(each => each.getBoundingClientRect().width)"
        )
        restored, cold = (each.seconds for each in starts)
        assert widths[0] / widths[1] == pytest.approx(restored / cold, rel=0.1)
        assert f"{cold / restored:.0f} × sooner" in await tab.text("#compared-table")


async def test_it_keeps_up_with_what_changes_and_leaves_the_rest_as_it_is(browser: Browser) -> None:
    async with shown_page(shown_state.state(nodes=3, models=6)) as page, browser.tab(page.url) as tab:
        await shown(tab)
        await nodes_in_view(tab)
        await tab.evaluate(
            "window.kept = [...document.querySelectorAll('#models-table tbody tr, #nodes-table tbody tr')];"
            "document.querySelector('#models-table .opener').focus()"
        )
        before = await tab.evaluate("document.querySelector('#moving-list progress').value")

        def change(state: State) -> State:
            models = tuple(replace(each, held=7) if each.name == "model-1" else each for each in state.models)
            move = Move("default/model-5", "remote", "disk", 1 << 30, 1 << 32, state.at)
            nodes = (*state.nodes[:2], replace(state.nodes[2], moves=(move,), presence=Presence.SILENT))
            return shown_state.moved(replace(state, models=models, nodes=nodes, activations=state.activations[1:]), 4.0)

        page.change(change)
        await tab.until("document.querySelector('#moving-list').children.length === 2")
        assert "7" in await row(tab, "models-table", "model-1")
        assert "silent" in await row(tab, "nodes-table", "node-2")
        assert await tab.evaluate("document.querySelector('#moving-list progress').value") > before
        assert await tab.evaluate("kept.every(each => each.isConnected)"), "rows are changed and not made anew"
        assert await tab.evaluate("document.activeElement.className") == "opener", "the focus stays"
        page.change(lambda state: replace(state, models=state.models[:2], missing="nothing was heard of its peers"))
        await tab.until("document.querySelectorAll('#models-table tbody tr').length === 2")
        assert "nothing was heard of its peers" in await tab.text("#missing")
        assert tab.errors == []


async def test_names_are_text(browser: Browser) -> None:
    state = shown_state.state(nodes=1, models=1)
    models = tuple(shown_state.model(name, failure=name) for name in HOSTILE)
    copies = tuple(shown_state.copy(f"default/{name}", "memory", 1 << 30) for name in HOSTILE)
    moves = tuple(Move(f"default/{name}", "disk", "memory", 1, 2, state.at) for name in HOSTILE)
    nodes = tuple(shown_state.node(name, copies, moves) for name in HOSTILE)
    starts = tuple(replace(shown_state.start(f"{n}", name, "cold", n), reason=name) for n, name in enumerate(HOSTILE))
    steps = tuple(replace(state.plan.under_way[0], model=name, node=name, why=name) for name in HOSTILE)
    state = replace(
        state,
        models=models,
        nodes=nodes,
        activations=starts,
        missing=HOSTILE[0],
        instance=HOSTILE[1],
        plan=replace(state.plan, under_way=steps),
    )
    async with shown_page(state) as page, browser.tab(page.url) as tab:
        await shown(tab)
        await tab.evaluate("document.querySelectorAll('.opener').forEach(each => each.click())")
        await tab.until(f"document.querySelectorAll('#models-table tbody tr').length === {len(HOSTILE)}")
        names = await tab.evaluate("[...document.querySelectorAll('#models-table th .name')].map(each => each.textContent)")
        assert sorted(names) == sorted(HOSTILE)
        assert await tab.evaluate("document.title") == "zerowake"
        made = "document.querySelectorAll('main img, main script, main b, main a[href^=javascript]').length"
        assert await tab.evaluate(made) == 0
        assert await tab.evaluate("document.documentElement.scrollWidth <= innerWidth"), "a long one is broken"
        assert tab.errors == []


async def test_scripts_may_not_make_elements_of_text(browser: Browser) -> None:
    async with shown_page(shown_state.state()) as page, browser.tab(page.url) as tab:
        await shown(tab)
        refused = "(() => { try { document.body.innerHTML = '<b>x</b>'; return 'done' } catch (error) { return error.name } })()"
        assert await tab.evaluate(refused) == "TypeError"


async def test_a_connection_that_is_lost_is_said_and_made_again(browser: Browser) -> None:
    state, port = shown_state.state(), free_port()
    async with AsyncExitStack() as first:
        page = await first.enter_async_context(shown_page(state, port))
        async with browser.tab(page.url) as tab:
            await shown(tab)
            assert await tab.text("#connection") == "Live"
            await first.aclose()
            await tab.until("document.querySelector('#connection').textContent.startsWith('Connection lost')")
            async with shown_page(replace(state, missing="changed meanwhile"), port):
                await tab.until("document.querySelector('#missing').textContent.includes('changed meanwhile')")
                assert await tab.text("#connection") == "Live"
