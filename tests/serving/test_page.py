"""The page of the server in Chromium, in front of a server with known answers."""

import contextlib
import json
import re
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlencode

import numpy as np
import pytest

from prelm_jax.serving.app import content_security_policy

PAGE = Path(__file__).parents[2] / "prelm_jax/serving/page.html"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
INFO = {
    "model": "my-model",
    "model_type": "bert",
    "verbs": ["embed", "similarity", "tokenize", "fill", "score"],
    "max_tokens": 30,
    "max_vector_tokens": 20,
    "num_layers": 2,
    "hidden_size": 4,
    "mask": "[MASK]",
    "exact": True,
    "pooling": {"modes": ["mean"], "layers": [-1], "dense": 0, "normalize": False, "width": 4},
}
GPT = INFO | {
    "verbs": ["embed", "similarity", "tokenize", "score", "complete"],
    "mask": None,
    "model_type": "openai-gpt",
}
TABS = {
    "bert": ["Fill", "Similarity", "Nearest lines", "A word in contexts", "Tokens"],
    "gpt": ["Continue", "Similarity", "Nearest lines", "A word in contexts", "Tokens"],
    "encoder": ["Similarity", "Nearest lines", "A word in contexts", "Tokens"],
}
MANY = "\n".join(f"Line {i} of many lines." for i in range(12))  # Their table is wider than a phone.
LINES = "A cat sat.\nThe dog ran.\nNo cat ran."
WORDS = {"word": "bank", "text": "Her bank is here.\n😀 A bank of sand.\nThe Bank!\nA banker."}

Answer = tuple[int, object]


def fill(body: dict) -> Answer:
    if "long" in body["texts"][0]:
        return 400, {"error": {"message": "texts[0] has 31 tokens, but the model takes 30"}}
    candidates = [("capital", 0.5), ("<b>bold</b>", 0.25), ("##s", 0.125)][: body["top_k"]]
    masks = [[{"token": token, "probability": p} for token, p in candidates]] * body["texts"][0].count("[MASK]")
    return 200, {"results": [{"masks": masks}]}


def similarity(body: dict) -> Answer:
    others = body.get("others", body["texts"])
    cosines = [[1.0 if a == b else len(set(a) & set(b)) / 30 for b in others] for a in body["texts"]]
    return 200, {"cosines": cosines, "truncated": [False] * len(body["texts"])}


def words(text: str) -> list[re.Match]:
    return list(re.finditer(r"\w+|[^\w\s]", text))


def tokenize(body: dict) -> Answer:
    found = words(body["texts"][0])
    ids, offsets = [7 + i for i in range(len(found))], [[word.start(), word.end()] for word in found]
    return 200, {"results": [{"ids": ids, "tokens": [word[0] for word in found], "offsets": offsets}]}


def score(body: dict) -> Answer:
    known = [-0.5 * (i + 1) for i, _ in enumerate(words(body["texts"][0]))]
    return 200, {"results": [{"log_probability": sum(known), "log_probabilities": known}]}


def embed(body: dict) -> Answer:
    results = []
    for i, text in enumerate(body["texts"]):
        found = words(text)
        offsets = [None, *([word.start(), word.end()] for word in found), None]
        vectors = [[[float(word[0].lower() == "bank"), i, -i * i, layer] for layer in body["layers"]] for word in found]
        edge = [[99.0] * 4] * len(body["layers"])
        results.append({"offsets": offsets, "vectors": [edge, *vectors, edge]})
    return 200, {"results": results}


class Server:
    """A server whose answers a test may change. `requests` are the paths and bodies that came."""

    def __init__(self) -> None:
        self.info: Answer = 200, INFO
        self.health: Answer = 200, {"status": "ready", "progress": 1}
        self.routes: dict[str, Callable[[dict], Answer]] = {
            **{"/fill": fill, "/similarity": similarity, "/tokenize": tokenize},
            **{"/score": score, "/embed": embed},
        }
        self.requests: list[tuple[str, dict]] = []
        self.events: list[object] = []
        self.go_on = threading.Event()  # Between the first event of a stream and the others.
        self.key = ""


def events(server: Server) -> list[bytes]:
    """The parts of a stream; None stands for the end of the connection in its middle."""
    texts = [each if isinstance(each, str) else json.dumps(each) for each in server.events if each is not None]
    return [f"data: {text}\n\n".encode() for text in texts]


@pytest.fixture(scope="module")
def origin() -> Iterator[tuple[str, list[Server]]]:
    """The address, and a list whose last element answers."""
    servers = [Server()]

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *arguments: object) -> None:
            pass

        def answer(self, status: int, content: object, kind: str = "application/json", **headers: str) -> None:
            body = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(status)
            for name, value in {"content_type": kind, "content_length": str(len(body)), **headers}.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            self.wfile.write(body)

        def do_GET(self) -> None:
            if self.path == "/":
                page = PAGE.read_bytes()
                self.answer(200, page, "text/html", content_security_policy=content_security_policy(page))
            elif self.path == "/health":
                self.answer(*servers[-1].health)
            elif self.path == "/info" and servers[-1].key not in self.headers.get("authorization", ""):
                self.answer(401, {"error": {"message": "the key is wrong"}})
            else:
                self.answer(*servers[-1].info)

        def do_POST(self) -> None:
            server = servers[-1]
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            server.requests.append((self.path, body))
            if not body.get("stream"):
                return self.answer(*server.routes[self.path](body))
            self.send_response(200)
            self.send_header("content-type", "text/event-stream")
            self.send_header("content-length", "1000" if None in server.events else str(len(b"".join(events(server)))))
            self.end_headers()
            self.close_connection = True
            with contextlib.suppress(OSError):  # The page stopped the stream.
                for event in events(server):
                    self.wfile.write(event)
                    self.wfile.flush()
                    server.go_on.wait(20)

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{http.server_port}", servers
        http.shutdown()


@pytest.fixture
def server(origin) -> Server:
    origin[1].append(Server())
    return origin[1][-1]


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("Chromium is not installed")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture
def visit(browser, origin, server):
    """`visit(tab, values, ...)` is the page with a tab that has run. No test may leave messages or ask other hosts."""
    problems, contexts = [], []

    def visit(tab: str = "", values: Mapping = {}, **options: object):
        contexts.append(browser.new_context(**({"viewport": {"width": 1000, "height": 800}} | options)))
        page = contexts[-1].new_page()
        page.set_default_timeout(20_000)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("console", lambda message: problems.append(message.text) if is_own_message(message.text) else None)
        page.on("request", lambda request: problems.append(request.url) if not is_own(request.url) else None)
        page.goto(f"{origin[0]}/{f'#{tab}?{urlencode(values)}' if tab else ''}")
        return page

    def is_own_message(text: str) -> bool:
        return not text.startswith("Failed to load resource")  # Chromium's, for every refusal.

    def is_own(url: str) -> bool:
        return url.startswith((origin[0], "data:"))

    yield visit
    for context in contexts:
        context.close()
    assert problems == []


def expect(locator):
    """Playwright's assertions, which wait. (Its functions that wait evaluate text, which the page's policy forbids.)"""
    from playwright.sync_api import expect

    return expect(locator)


def test_the_file():
    """It fits into a few packets, names no other host, and never reads text as markup."""
    page = PAGE.read_text()
    assert len(page.encode()) < 60_000
    assert set(re.findall(r"https?://[^\s\"'`]+", page)) == {"http://www.w3.org/2000/svg"}
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|\sstyle=|\son[a-z]+=", page)


def test_the_policy_knows_the_page():
    policy = content_security_policy(PAGE.read_bytes())
    assert policy.count("'sha256-") == 2
    assert "default-src 'none'" in policy and "unsafe" not in policy


@pytest.mark.parametrize("kind", TABS)
def test_tabs_are_what_the_model_can_do(kind, server, visit):
    server.info = (
        200,
        {"bert": INFO, "gpt": GPT, "encoder": INFO | {"verbs": ["embed", "similarity", "tokenize"]}}[kind],
    )
    page = visit()
    page.wait_for_selector("[role=tab]")
    assert page.locator("[role=tab]").all_inner_texts() == TABS[kind]
    assert page.locator("h1").inner_text() == "my-model"
    assert page.locator("[role=tabpanel]:visible").count() == 1


def test_fill(server, visit):
    page = visit("fill", {"text": "Paris is the [MASK] of [MASK].", "top_k": 3})
    page.wait_for_selector(".bars")
    assert page.locator(".bars").nth(1).locator(".candidate").all_inner_texts() == ["capital", "<b>bold</b>", "##s"]
    assert page.locator(".bars b").count() == 0
    assert page.locator(".bars").first.locator(".number").all_inner_texts() == ["50.0 %", "25.0 %", "12.5 %"]
    page.locator(".bars").nth(1).locator(".candidate").first.click()
    expect(page.locator(".bars")).to_have_count(1)
    assert page.locator("#fill-text").input_value() == "Paris is the [MASK] of capital."
    page.locator(".candidate", has_text="##s").click()
    assert page.locator("#fill-text").input_value() == "Paris is thes of capital."


def test_classify(server, visit):
    probabilities = {"negative": 0.25, "positive": 0.75}
    server.info = 200, INFO | {"verbs": ["classify"], "labels": list(probabilities)}
    found = {"label": "positive", "probabilities": probabilities}
    server.routes["/classify"] = lambda body: (200, {"results": [found]})
    page = visit("classify", {"text": "A fine film.", "second": ""})
    expect(page.locator("h2")).to_have_text("positive")
    expect(page.locator(".bars tr")).to_have_text(["positive75.0 %", "negative25.0 %"])
    assert server.requests == [("/classify", {"texts": ["A fine film."]})]
    server.routes["/classify"] = lambda body: (200, {"results": [{"label": 3.5, "probabilities": []}]})
    page.fill("#classify-second", "A film.")
    page.keyboard.press("Control+Enter")
    expect(page.locator("h2")).to_have_text("3.5")
    assert server.requests[-1] == ("/classify", {"texts": [["A fine film.", "A film."]]})


def test_tag_and_answer(server, visit):
    server.info = 200, INFO | {"verbs": ["tag", "answer"]}
    tagged = {"words": ["Al", "ran"], "tags": ["PER", "O"], "probabilities": [0.5, 0.875]}
    server.routes["/tag"] = lambda body: (200, {"results": [tagged]})
    page = visit("tag", {"text": "Al ran"})
    expect(page.locator(".tokens li")).to_have_text(["AlPER50.0 %", "ranO87.5 %"])
    best = [{"answer": "Mary", "probability": 0.5}, {"answer": "", "probability": 0.25}]
    server.routes["/answer"] = lambda body: (200, {"results": [{"answer": "Mary", "candidates": best}]})
    page = visit("answer", {"question": "Who?", "passage": "Mary."})
    expect(page.locator("h2")).to_have_text("Mary")
    expect(page.locator(".bars .name")).to_have_text(["Mary", "no answer"])
    assert server.requests[-1] == ("/answer", {"questions": [["Who?", "Mary."]]})


def test_similarity(server, visit):
    page = visit("similarity", {"text": LINES})
    page.wait_for_selector(".matrix")
    cells = page.locator(".matrix tbody tr").nth(0).locator("td").all_inner_texts()
    expected = similarity({"texts": LINES.split("\n")})[1]["cosines"][0]
    assert cells == [f"{x:.2f}" for x in expected]
    page.locator(".matrix tbody td").first.focus()
    pairs = {"ArrowRight": f"{expected[1]:.4f}: “A cat sat.” and “The dog ran.”", "ArrowDown": "1.0000: “The dog ran.”"}
    for key, pair in pairs.items():
        page.keyboard.press(key)
        assert page.locator(".result [aria-live]").inner_text().startswith(pair)


def test_a_wide_table_keeps_the_numbers_of_its_lines(server, visit):
    page = visit("similarity", {"text": MANY}, viewport={"width": 320, "height": 640})
    page.locator(".matrix tbody tr").first.locator("td").last.focus()
    assert page.locator(".scroll").evaluate("(each) => each.scrollLeft") > 100
    header, table = page.locator(".matrix th[scope=row]").first, page.locator(".scroll")
    assert header.bounding_box()["x"] >= table.bounding_box()["x"]


def test_nearest_lines(server, visit):
    page = visit("nearest", {"query": "No cat ran.", "text": LINES})
    page.wait_for_selector(".bars")
    assert page.locator(".bars .name").all_inner_texts()[0] == "No cat ran."
    numbers = [float(text) for text in page.locator(".bars .number").all_inner_texts()]
    assert numbers == sorted(numbers, reverse=True)


def test_a_word_in_contexts(server, visit):
    """The vectors of the word alone are compared, whole words only, with characters outside of the basic plane."""
    page = visit("word", WORDS | {"layer": 1})
    page.wait_for_selector("svg")
    assert server.requests[-1][1] == {"texts": WORDS["text"].split("\n")[:3], "pooling": "none", "layers": [1]}
    assert page.locator("mark").all_inner_texts() == ["bank", "bank", "Bank"]
    assert page.locator("svg circle").count() == 3
    assert page.locator("h2").inner_text() == "Layer 1 of 2"
    page.locator("#word-layer").focus()
    page.keyboard.press("ArrowLeft")
    expect(page.locator("h2")).to_have_text("Layer 0 of 2")
    expect(page.get_by_text("Layer 0 of 2")).to_have_count(2)  # The other is the label of the slider.


def test_principal_components(server, visit):
    """Against NumPy's singular values."""
    page = visit()
    page.wait_for_selector("[role=tab]")
    vectors_ND = np.random.default_rng(0).normal(size=(7, 5)) * [5, 3, 1, 1, 0.5] + 2
    points, parts = page.evaluate("(vectors) => principal(vectors)", vectors_ND.tolist())
    u, s, _ = np.linalg.svd(vectors_ND - vectors_ND.mean(0), full_matrices=False)
    np.testing.assert_allclose(np.abs(points), np.abs(u * s)[:, :2], atol=1e-6)
    np.testing.assert_allclose(parts, (s**2 / (s**2).sum())[:2], atol=1e-9)


def test_tokens(server, visit):
    page = visit("tokens", {"text": "A cat, no?"})
    expect(page.locator(".tokens li").nth(1)).to_have_text("cat836.8 %")
    expect(page.locator(".result:visible [role=status]")).to_contain_text("7.5 nats")
    page.fill("#tokens-text", "word " * 30)
    page.keyboard.press("Control+Enter")
    expect(page.locator(".tokens li").last).to_contain_text("< 0.01 %")  # Not 0: exp(-15).


def chunk(text: str) -> dict:
    return {"choices": [{"text": text, "index": 0}]}


def complete(body: dict) -> Answer:
    top = {"cat</w>": float(np.log(0.75)), "do": float(np.log(0.125))}
    return 200, {"choices": [{"text": " cat", "logprobs": {"top_logprobs": [top]}}]}


def test_continuation(server, visit):
    server.info, server.routes["/v1/completions"] = (200, GPT), complete
    server.events = [chunk(" cat sat."), chunk(" It"), "[DONE]"]
    server.go_on.set()
    page = visit("complete", {"prompt": "The", "max_tokens": 5, "temperature": 0.5, "top_p": 0.9, "seed": 3})
    expect(page.locator(".output")).to_have_text("The cat sat. It")
    sent = {"model": "my-model", "prompt": "The", "max_tokens": 5, "temperature": 0.5, "top_p": 0.9, "seed": 3}
    assert server.requests[-1] == ("/v1/completions", sent | {"stream": True})
    assert page.locator(".bars .number").all_inner_texts() == ["75.0 %", "12.5 %"]
    assert page.locator(".candidate").all_inner_texts() == ["cat", "do…"]
    whole, sixth = (page.locator(".bar").nth(i).bounding_box()["width"] for i in range(2))
    assert sixth == pytest.approx(whole / 6, abs=1)
    expect(page.locator("[role=log]")).to_have_text("cat sat. It")
    page.locator(".candidate").first.click()
    expect(page.locator("#complete-prompt")).to_have_value("The cat ")


def test_escape_stops_a_continuation(server, visit):
    server.info, server.routes["/v1/completions"] = (200, GPT), complete
    server.events = [chunk(" cat"), chunk(" sat")]
    page = visit("complete", {"prompt": "The"})
    expect(page.locator(".output")).to_have_text("The cat")
    page.keyboard.press("Escape")
    page.wait_for_selector("text=Stopped.")
    server.go_on.set()
    assert page.locator(".output").inner_text() == "The cat"
    assert page.get_by_role("button", name="Stop").count() == 0


def test_escape_stops_what_is_computed(server, visit):
    def wait(body: dict) -> Answer:
        server.go_on.wait(20)
        return fill(body)

    server.routes["/fill"] = wait
    page = visit("fill", {"text": "A [MASK]."})
    expect(page.locator(".result:visible")).to_have_text("Computing …")
    assert page.locator("[role=tabpanel]:visible").get_attribute("aria-busy") == "true"
    page.get_by_role("button", name="Stop").click()
    expect(page.locator(".result:visible")).to_have_text("Stopped.")
    server.go_on.set()
    page.locator("#fill-text").press("Control+Enter")
    expect(page.locator(".bars")).to_have_count(1)


def test_a_stream_that_breaks_off(server, visit):
    server.info, server.routes["/v1/completions"] = (200, GPT), complete
    server.events = [chunk(" cat"), None]
    server.go_on.set()
    page = visit("complete", {"prompt": "The"})
    expect(page.locator(".result .error")).to_have_text("The server stopped in the middle of its answer.")


def test_an_error_in_a_stream(server, visit):
    server.info, server.routes["/v1/completions"] = (200, GPT), complete
    server.events = [chunk(" cat"), {"error": {"message": "the model failed"}}]
    server.go_on.set()
    page = visit("complete", {"prompt": "The"})
    page.wait_for_selector(".error >> text=the model failed")


def test_the_keyboard(server, visit):
    page = visit()
    page.wait_for_selector("[role=tab]")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Fill"
    for key, label in (("ArrowLeft", "Tokens"), ("Home", "Fill"), ("End", "Tokens"), ("ArrowRight", "Fill")):
        page.keyboard.press(key)
        assert page.evaluate("document.activeElement.textContent") == label
        assert page.locator("[role=tab][aria-selected=true]").inner_text() == label
    page.keyboard.press("Tab")
    page.keyboard.type("A [MASK].")
    page.keyboard.press("Control+Enter")
    page.wait_for_selector(".bars")
    assert "#fill?text=A+%5BMASK%5D." in page.url


def test_loading(server, visit):
    server.health = 503, {"status": "loading", "progress": 0.4}
    page = visit()
    page.wait_for_selector("progress")
    assert "40 %" in page.locator("#about").inner_text()
    assert page.locator("progress").evaluate("(bar) => bar.value") == 0.4
    server.health = 200, {"status": "ready", "progress": 1}
    page.wait_for_selector("[role=tab]")
    assert not page.locator("progress").is_visible()


def test_a_server_that_starts_again(server, visit):
    server.health = 503, "torn"  # As a proxy may answer while there is no server.
    page = visit()
    expect(page.locator("#trouble")).to_be_visible()
    assert page.locator("#about").inner_text() == ""
    server.health = 503, {"status": "loading", "progress": 0.5}
    expect(page.locator("#about")).to_contain_text("50 %")
    assert not page.locator("#trouble").is_visible()
    server.health = 200, {"status": "ready", "progress": 1}
    page.wait_for_selector("[role=tab]")


def test_the_key(server, visit):
    server.key = "secret"
    page = visit()
    page.fill("#key", "wrong")
    page.keyboard.press("Enter")
    page.wait_for_selector("#trouble >> text=the key is wrong")
    page.fill("#key", "secret")
    page.keyboard.press("Enter")
    page.wait_for_selector("[role=tab]")
    assert not page.locator("#key").is_visible()


def test_errors_and_nothing_to_do(server, visit):
    page = visit("fill", {"text": "too long [MASK]"})
    expect(page.locator(".result [role=alert]")).to_have_text("The text has 31 tokens, but the model takes 30")
    page.fill("#fill-text", "no mask")
    page.keyboard.press("Control+Enter")
    page.wait_for_selector("[role=status] >> text=[MASK]")
    assert page.locator(".result [role=alert]").count() == 0
    server.routes["/embed"] = lambda body: (400, {"error": {"message": "texts[2] has 31 tokens"}})
    page.goto(f"{page.url.partition('#')[0]}#word?{urlencode(WORDS)}")
    expect(page.locator(".result:visible [role=alert]")).to_have_text("Text 3 has 31 tokens")


def test_an_empty_form_says_what_to_write(server, visit):
    page = visit()
    page.wait_for_selector("[role=tab]")
    for label, hint, field in (("Fill", "[MASK]", "fill-text"), ("A word in contexts", "word", "word-word")):
        page.get_by_role("tab", name=label).click()
        result = page.locator(".result:visible")
        expect(result).to_contain_text(hint)
        page.get_by_role("button", name="Run").click()
        expect(result.locator("[role=status]")).to_contain_text(hint)
        assert page.evaluate("document.activeElement.id") == field
    assert page.locator("#word-text").get_attribute("placeholder") and not server.requests


@pytest.mark.parametrize("tab", ["similarity", "word", "tokens"])
def test_phones_and_names(tab, server, visit):
    """At 320 pixels nothing sticks out, all tabs are in view, and each control has a name."""
    values = {"similarity": {"text": MANY}, "word": WORDS, "tokens": {"text": "A cat."}}[tab]
    page = visit(tab, values, viewport={"width": 320, "height": 640}, color_scheme="dark")
    page.wait_for_selector(".result table, .result svg, .result .tokens")
    assert page.evaluate("document.documentElement.scrollWidth") <= 320
    boxes = [each.bounding_box() for each in page.locator("[role=tab]").all()]
    assert all(box["x"] >= 0 and box["x"] + box["width"] <= 320 for box in boxes)
    unnamed = (
        "[...document.querySelectorAll('input,textarea,button')].filter(e => !(e.labels?.length || e.textContent))"
    )
    assert page.evaluate(f"{unnamed}.length") == 0


def test_the_command_for_a_terminal(server, visit, origin):
    page = visit("fill", {"text": "It's a [MASK].", "top_k": 2})
    page.wait_for_selector(".bars")
    page.locator("[role=tabpanel]:visible summary").click()
    body = """{"texts":["It'\\''s a [MASK]."],"top_k":2}"""
    expected = f"curl {origin[0]}/fill -H 'content-type: application/json' -d '{body}'"
    expect(page.locator("pre:visible")).to_have_text(expected)


@pytest.fixture
def look(browser):
    """`look(client, tab, values)` is the page of a real server; no test may leave messages."""
    problems, contexts = [], []

    def look(client, tab: str, values: Mapping):
        contexts.append(browser.new_context())
        page = contexts[-1].new_page()
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("console", lambda message: problems.append(message.text))
        page.goto(f"http://127.0.0.1:{client.port}/#{tab}?{urlencode(values)}")
        return page

    yield look
    for context in contexts:
        context.close()
    assert problems == []


def test_a_real_bert(bert, look):
    text = "the [MASK] sees a dog"
    page = look(bert, "fill", {"text": text, "top_k": 3})
    expect(page.locator(".candidate")).to_have_text([token for token, _ in bert.model.fill(text, 3)[0]])
    lines = ["the cat sees a dog", "the dog sees a cat", "a house on the river"]
    page = look(bert, "similarity", {"text": "\n".join(lines)})
    expect(page.locator(".matrix tbody td").first).to_have_text("1.00")
    page = look(bert, "word", {"word": "the", "text": "\n".join(["the cat", "the dog", "in the house"]), "layer": 1})
    expect(page.locator("circle")).to_have_count(3)
    page = look(bert, "tokens", {"text": "the cat"})
    expect(page.locator(".result:visible [role=status]")).to_contain_text("nats")


def test_a_real_gpt(gpt, look):
    page = look(gpt, "complete", {"prompt": "the cat", "max_tokens": 4, "temperature": 0, "seed": 1})
    expect(page.locator(".output")).to_have_text(gpt.model.generate("the cat", 4, temperature=0, seed=1).strip())
    expect(page.locator(".candidate")).to_have_count(5)
