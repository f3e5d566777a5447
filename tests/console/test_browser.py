"""The console in a real browser, over a real engine: what a person sees and does.

Skipped, with a word why, where there is no Chromium. TWINKLE_SCREENSHOTS=directory keeps pictures.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from tests.gateway.inprocess import serving
from twinkle_serve.config import Config
from twinkle_serve.testing.server import free_port

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        CHROMIUM is None or DRIVER is None,
        reason="needs chromium and chromedriver (on Debian: apt-get install chromium chromium-driver)",
    ),
    # Selenium leaves the sockets of its HTTP client to the garbage collector.
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]
KEYS = {"alice": "tml-alice", "bob": "tml-bob"}
WAIT_S = 30.0
MODEL = "Qwen/Tiny-MoE"


@pytest.fixture(scope="module")
def url(tiny_moe: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    tree = {
        "models": [{"name": MODEL, "path": str(tiny_moe), "num_threads": 1, "device": "cpu"}],
        "http": {"port": free_port()},
        "storage": {"root": str(tmp_path_factory.mktemp("store"))},
    }
    with serving(Config.model_validate(tree)) as url:
        yield url


class Trainer:
    """A program of alice's that trains a step whenever it is told to."""

    def __init__(self, url: str) -> None:
        import tinker

        self.service = tinker.ServiceClient(base_url=url, api_key=KEYS["alice"])
        self.client = self.service.create_lora_training_client(base_model=MODEL, rank=8).result()
        self.run_id = self.client.get_info().model_id
        self._url = url
        rng = np.random.default_rng(0)
        self._data = [self._datum(tinker, rng.integers(5, 300, 24).tolist()) for _ in range(4)]
        self._num_steps = 0

    def step(self, count: int = 1) -> None:
        from tinker import types

        for _ in range(count):
            self._num_steps += 1
            self.client.forward_backward(self._data, "cross_entropy").result()
            self.client.optim_step(types.AdamParams(learning_rate=5e-3)).result()
            body = {"step": self._num_steps, "metrics": {"reward": 1 - 0.9**self._num_steps}}
            headers = {"X-API-Key": KEYS["alice"]}
            url = f"{self._url}/api/v1/training_runs/{self.run_id}/metrics"
            httpx.post(url, json=body, headers=headers).raise_for_status()

    @staticmethod
    def _datum(tinker: Any, tokens: list[int]) -> Any:
        return tinker.types.Datum(
            model_input=tinker.types.ModelInput.from_ints(tokens[:-1]),
            loss_fn_inputs={"target_tokens": tokens[1:], "weights": [1.0] * (len(tokens) - 1)},
        )


@pytest.fixture(scope="module")
def trainer(url: str) -> Iterator[Trainer]:
    os.environ["TINKER_TELEMETRY"] = "0"
    trainer = Trainer(url)
    trainer.step(12)
    trainer.client.save_state("first").result()
    trainer.client.save_weights_for_sampler("final").result()
    yield trainer
    trainer.service.close("success").result()


@contextmanager
def chromium(width: int = 1200, height: int = 900, dark: bool = False) -> Iterator[Any]:
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    switches = ["headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage", "hide-scrollbars"]
    for switch in [*switches, "lang=en", f"window-size={width},{height}"]:
        options.add_argument(f"--{switch}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    features = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    if width < 700:  # a window cannot be that narrow; a phone can
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": True}
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    try:
        yield driver
    finally:
        driver.quit()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as driver:
        yield driver


def until(driver: Any, condition: Callable[[Any], Any]) -> Any:
    from selenium.common.exceptions import StaleElementReferenceException
    from selenium.webdriver.support.ui import WebDriverWait

    return WebDriverWait(driver, WAIT_S, 0.1, [StaleElementReferenceException]).until(condition)


def find(driver: Any, css: str) -> Any:
    return until(driver, lambda d: next(iter(d.find_elements("css selector", css)), None))


def all_of(driver: Any, css: str) -> list[Any]:
    found: list[Any] = driver.find_elements("css selector", css)
    return found


def sign_in(driver: Any, url: str, who: str = "alice") -> None:
    driver.get(url + "/console/sign-in")
    driver.delete_all_cookies()
    find(driver, "#key").send_keys(KEYS[who])
    find(driver, "main button").click()
    until(driver, lambda d: d.current_url.endswith("/console/"))


def picture(driver: Any, name: str) -> None:
    directory = os.environ.get("TWINKLE_SCREENSHOTS")
    if directory:
        Path(directory).mkdir(parents=True, exist_ok=True)
        driver.save_screenshot(str(Path(directory) / f"{name}.png"))


def complaints(driver: Any) -> list[str]:
    """What the browser objects to: scripts that fail, files that are missing, what the policy forbids."""
    return [entry["message"] for entry in driver.get_log("browser") if entry["level"] == "SEVERE"]


def test_signing_in_with_a_key(browser: Any, url: str, trainer: Trainer) -> None:
    browser.get(url + "/console/checkpoints")
    assert "/sign-in" in browser.current_url
    picture(browser, "sign-in")
    assert find(browser, "#key").get_attribute("type") == "password"
    find(browser, "#key").send_keys(KEYS["alice"])
    find(browser, "main button").click()
    until(browser, lambda d: d.current_url.endswith("/console/checkpoints"))
    assert KEYS["alice"] not in browser.page_source
    assert browser.execute_script("return document.cookie") == "", "scripts can read the cookie"
    cookie = browser.get_cookie("twinkle_console")
    assert KEYS["alice"] not in cookie["value"]
    assert (cookie["httpOnly"], cookie["sameSite"]) == (True, "Strict")


def test_curves_grow_while_the_run_trains(browser: Any, url: str, trainer: Trainer) -> None:
    sign_in(browser, url)
    find(browser, f'a[href*="{trainer.run_id.partition(":")[0]}"]').click()
    for name in ("loss", "reward", "learning_rate", "tokens"):
        find(browser, f'.chart[data-name="{name}"] canvas')
    steps = int(find(browser, "#num-steps").text)
    first = float(find(browser, "#last-loss").text)
    trainer.step(8)
    until(browser, lambda d: find(d, "#num-steps").text == str(steps + 8))
    until(browser, lambda d: float(find(d, "#last-loss").text) < first)
    drawn = browser.execute_script(
        "const c = document.querySelector('.chart[data-name=loss] canvas');"
        "return c.getContext('2d').getImageData(0, 0, c.width, c.height).data.some((v) => v > 0)"
    )
    assert drawn, "the canvas is empty"
    picture(browser, "run")
    assert complaints(browser) == []


def test_the_list_of_runs_is_live(browser: Any, url: str, trainer: Trainer) -> None:
    sign_in(browser, url)
    cell = "td[data-label='Steps']"
    before = int(find(browser, cell).text)
    trainer.step()
    until(browser, lambda d: int(find(d, cell).text) == before + 1)
    picture(browser, "runs")


def test_checkpoints_are_published_kept_fetched_and_deleted(browser: Any, url: str, trainer: Trainer) -> None:
    trainer.client.save_state("doomed").result()
    sign_in(browser, url)
    browser.get(url + "/console/checkpoints")
    picture(browser, "checkpoints")

    def rows() -> list[Any]:
        return [row for row in all_of(browser, "tbody tr") if "/weights/doomed" in row.text]

    def row() -> Any:
        return until(browser, lambda _: next(iter(rows()), None))  # a page may be on its way

    def press(words: str) -> None:
        buttons = row().find_elements("css selector", "button, summary, a.button")
        next(b for b in buttons if b.text == words).click()

    def is_public() -> bool:
        return bool(row().find_elements("css selector", ".badge.public"))

    press("Publish")
    until(browser, lambda _: is_public())
    press("Make private")
    until(browser, lambda _: not is_public())
    press("Keep for")
    row().find_element("css selector", "option[value=week]").click()
    press("Keep")
    until(browser, lambda _: "never" not in row().text)
    link = row().find_element("css selector", "a[href*=download]").get_attribute("href")
    cookies = {cookie["name"]: cookie["value"] for cookie in browser.get_cookies()}
    tar = httpx.get(link, cookies=cookies, follow_redirects=True)
    assert b"adapter_model.safetensors" in tar.content
    press("Delete")
    press("Yes, delete for ever")
    until(browser, lambda d: all_of(d, "[role=status]") and not rows())
    assert "/weights/first" in find(browser, "main").text
    assert complaints(browser) == []


def test_base_and_checkpoint_answer_side_by_side(browser: Any, url: str, trainer: Trainer) -> None:
    sign_in(browser, url)
    browser.get(f"{url}/console/playground?checkpoint=tinker://{trainer.run_id}/sampler_weights/final")
    length = find(browser, "#max-tokens")
    length.clear()
    length.send_keys("12")
    find(browser, "#message").send_keys("Who are you?")
    find(browser, "#send").click()
    until(browser, lambda d: len(all_of(d, ".turns [data-done]")) == 2)
    questions = [element.text for element in all_of(browser, ".turns .mine")]
    assert questions == ["Who are you?"] * 2
    left, right = (find(browser, f"#{side} [data-done]").text for side in ("left", "right"))
    assert left
    assert right
    assert left != right, "the adapter makes no difference"
    picture(browser, "playground")
    # What is wrong is said, once the browser's own check is out of the way.
    browser.execute_script("document.getElementById('max-tokens').removeAttribute('min')")
    length.clear()
    length.send_keys("-5")
    find(browser, "#message").send_keys("And now?\n")
    until(browser, lambda d: len(all_of(d, ".turns .problem")) == 2)
    assert "max_tokens" in find(browser, ".turns .problem").text


def test_the_cluster_page_shows_who_is_where(browser: Any, url: str, trainer: Trainer) -> None:
    sign_in(browser, url)
    browser.get(url + "/console/cluster")
    assert len(all_of(browser, ".slots .taken")) == 1
    assert "100 %" in find(browser, "main").text
    assert trainer.run_id not in browser.page_source
    picture(browser, "cluster")


def test_another_tenant_sees_nothing(browser: Any, url: str, trainer: Trainer) -> None:
    sign_in(browser, url, "bob")
    session = trainer.run_id.partition(":")[0]
    for page in ("/", "/checkpoints", "/playground", f"/runs/{trainer.run_id}"):
        browser.get(f"{url}/console{page}")
        text = find(browser, "main").text
        assert session not in text.replace(browser.current_url, "")
        assert "final" not in text
    assert "not yours" in find(browser, "main").text
    body = {
        "model": f"tinker://{trainer.run_id}/sampler_weights/final",
        "messages": [{"role": "user", "content": "x"}],
    }
    cookies = {cookie["name"]: cookie["value"] for cookie in browser.get_cookies()}
    with closing(httpx.Client(base_url=url + "/console", cookies=cookies)) as client:
        assert client.post("/chat", json=body).status_code == 404
        path = f"tinker://{trainer.run_id}/weights/first"
        assert client.post("/checkpoints/delete", data={"path": path}).status_code == 404
        assert client.get("/download", params={"path": path}).status_code == 404


def test_the_keyboard_is_enough(browser: Any, url: str, trainer: Trainer) -> None:
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.keys import Keys

    browser.get(url + "/console/sign-in")
    browser.delete_all_cookies()
    browser.get(url + "/console/sign-in")
    ActionChains(browser).send_keys(KEYS["alice"], Keys.ENTER).perform()  # the field has the focus
    until(browser, lambda d: d.current_url.endswith("/console/"))
    focused: list[str] = []
    for _ in range(12):
        ActionChains(browser).send_keys(Keys.TAB).perform()
        element = browser.switch_to.active_element
        focused.append(element.text)
        outline = element.value_of_css_property("outline-style")
        assert outline == "solid", f"no visible focus on {element.text!r}"
        if trainer.run_id in element.text:
            break
    assert focused[0] == "Skip to content"
    assert trainer.run_id in focused[-1]
    ActionChains(browser).send_keys(Keys.ENTER).perform()
    until(browser, lambda d: "/runs/" in d.current_url)


def test_chinese(browser: Any, url: str, trainer: Trainer) -> None:
    sign_in(browser, url)
    find(browser, "a[lang=zh]").click()
    until(browser, lambda d: find(d, "h1").text == "训练任务")
    browser.get(f"{url}/console/runs/{trainer.run_id}")
    find(browser, ".chart[data-name=loss] canvas")
    assert "学习率" in find(browser, "#charts").text
    picture(browser, "run-chinese")
    browser.get(url + "/console/?language=en")


def test_nothing_is_asked_of_other_machines(browser: Any, url: str, trainer: Trainer) -> None:
    sign_in(browser, url)
    for log in ("performance", "browser"):
        browser.get_log(log)
    for page in ("/", "/checkpoints", "/playground", "/cluster", f"/runs/{trainer.run_id}"):
        browser.get(f"{url}/console{page}")
    browser.get(url + "/")
    find(browser, "h1")
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = {
        message["params"]["request"]["url"]
        for message in messages
        if message["method"] == "Network.requestWillBeSent"
    }
    assert len(asked) > 8
    assert [address for address in asked if not address.startswith(url)] == []
    assert complaints(browser) == []


@pytest.mark.parametrize("page", ["/", "/checkpoints", "/playground", "/cluster", "run"])
def test_a_phone_scrolls_down_and_never_sideways(phone: Any, url: str, trainer: Trainer, page: str) -> None:
    phone.get(url + "/console" + (f"/runs/{trainer.run_id}" if page == "run" else page))
    if page == "run":
        find(phone, ".chart[data-name=loss] canvas")
    width = phone.execute_script("return document.documentElement.scrollWidth")
    assert width <= 390
    small = phone.execute_script(
        "return [...document.querySelectorAll('button, a.button, summary')]"
        ".filter((e) => e.getClientRects().length && e.getBoundingClientRect().height < 34)"
        ".map((e) => e.textContent)"
    )
    assert small == [], "too small for a finger"
    background = phone.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert background == "rgb(18, 20, 27)", "not dark"
    picture(phone, "phone-" + page.strip("/"))


@pytest.fixture(scope="module")
def phone(url: str) -> Iterator[Any]:
    """A narrow window of somebody who likes it dark."""
    with chromium(390, 844, dark=True) as driver:
        sign_in(driver, url)
        yield driver
