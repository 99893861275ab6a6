"""What arrives at a hub, what is refused before anything does, and that no text holds the token: against a stub."""

from __future__ import annotations

import base64
import json
import logging
import re
import threading
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants
from huggingface_hub.utils import are_progress_bars_disabled, close_session, disable_progress_bars, enable_progress_bars

from hkft.errors import HkftError, SetupError, UsageError
from hkft.events import Event, Notice, Stage, silent
from hkft.merging import push as module
from hkft.merging.push import check, push

TOKEN = "hf_" + "aB3" * 11 + "z"
MODEL = {
    "config.json": b'{"model_type": "bert"}',
    "model-00001-of-00002.safetensors": b"\x00one",
    "model-00002-of-00002.safetensors": b"\x00two",
    "model.safetensors.index.json": b"{}",
    "tokenizer.json": b"{}",
    "tokenizer_config.json": b"{}",
    "vocab.txt": b"the\n",
    "spiece.model": b"\x01",
    "generation_config.json": b"{}",
    "chat_template.jinja": b"{{ messages }}",
    "additional_chat_templates/tools.jinja": b"{{ tools }}",
    "README.md": b"# out\n",
    "merge.json": b"{}",
}
OTHER = [
    "pytorch_model.bin",
    "optimizer.pt",
    "tokenizer.pkl",
    "notes.txt",
    "runs/config.json",
    "runs/model.safetensors",
]
HIDDEN = [".env", ".cache/config.json", ".model.safetensors"]


@dataclass
class Hub:
    """What a stub of the hub holds, is told to answer, and was asked."""

    url: str = ""
    private: dict[str, bool] = field(default_factory=dict)  # the repositories
    siblings: list[str] = field(default_factory=list)
    fails: dict[str, tuple[int, str]] = field(default_factory=dict)  # a part of a path -> status, body
    warns: list[str] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)
    agents: set[str] = field(default_factory=set)
    created: list[dict[str, Any]] = field(default_factory=list)
    files: dict[str, bytes] = field(default_factory=dict)  # of the last commit
    stored: dict[str, bytes] = field(default_factory=dict)  # sha256 -> an LFS upload
    shown: list[bool] = field(default_factory=list)  # whether bars were, at each request

    def answer(self, path: str, body: bytes) -> tuple[int, Any]:
        """Status and JSON of a request; the method follows from the path."""
        if path == "/api/whoami-v2":
            return 200, {"name": "someone", "type": "user"}
        if path == "/api/repos/create":
            wanted = json.loads(body)
            self.created.append(wanted)
            name = f"{wanted['organization'] or 'someone'}/{wanted['name']}"
            known = name in self.private
            self.private.setdefault(name, wanted.get("private", wanted.get("visibility") == "private"))
            return (409 if known else 200), {"url": f"{self.url}/{name}"}
        if path == "/api/validate-yaml":
            return 200, {"warnings": [{"message": text} for text in self.warns], "errors": []}
        if path.endswith("/preupload/main"):
            large = (".safetensors", ".model")
            modes = [(file["path"], file["path"].endswith(large)) for file in json.loads(body)["files"]]
            return 200, {
                "files": [
                    {"path": path, "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False}
                    for path, lfs in modes
                ]
            }
        if path.endswith("/info/lfs/objects/batch"):
            wanted = json.loads(body)["objects"]
            href = f"{self.url}/put/"
            return 200, {"objects": [{**one, "actions": {"upload": {"href": href + one["oid"]}}} for one in wanted]}
        if path.startswith("/put/"):
            self.stored[path[5:]] = body
            return 200, {}
        if path.endswith("/commit/main"):
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    self.files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    self.files[value["path"]] = self.stored[value["oid"]]
            return 200, {"commitUrl": f"{self.url}/someone/out/commit/1", "commitOid": "1"}
        name = path.removeprefix("/api/models/")
        if name in self.private:
            siblings = [{"rfilename": one} for one in self.siblings]
            return 200, {"id": name, "private": self.private[name], "siblings": siblings}
        return 404, {"error": "Repository not found"}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """A hub on this machine that the library takes for the real one, a token, and nothing of the user's own."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            path = self.path.partition("?")[0]
            hub.asked.append(f"{self.command} {path}")
            hub.agents.add(self.headers["User-Agent"])
            hub.shown.append(not are_progress_bars_disabled())
            failing = next((answer for part, answer in hub.fails.items() if part in path), None)
            if failing:
                status, text = failing[0], failing[1].replace("{echo}", self.headers.get("Authorization") or "")
            elif not path.startswith("/put/") and self.headers.get("Authorization") != f"Bearer {TOKEN}":
                status, text = 401, json.dumps({"error": "Invalid credentials in Authorization header"})
            else:
                status, answer = hub.answer(path, body)
                text = json.dumps(answer)
            self.send_response(status)
            self.send_header("Content-Type", "application/json" if text.startswith("{") else "text/plain")
            self.send_header("Content-Length", str(len(text.encode())))
            self.end_headers()
            self.wfile.write(text.encode())

        do_GET = do_PUT = do_POST  # noqa: N815

        def log_message(self, format: str, *args: Any) -> None:
            pass

    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # where nobody listens
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "127.0.0.1")
    for name in ("HF_OIDC_RESOURCE", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    constant = {
        "ENDPOINT": hub.url,
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,  # which has a protocol of its own
        "HF_TOKEN_PATH": str(tmp_path / "no-token"),
        "HF_STORED_TOKENS_PATH": str(tmp_path / "no-tokens"),
    }
    for name, value in constant.items():
        monkeypatch.setattr(constants, name, value)
    close_session()  # a client made before knows other proxies
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield hub
    close_session()
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder as `merge` leaves it, the weights in two files."""
    return fill(tmp_path / "my out", MODEL)


def fill(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def texts(error: BaseException | None) -> str:
    """All that a traceback, or a tool that follows the chain of errors, could show."""
    shown = "".join(traceback.format_exception(error)) if error else ""
    while error is not None:
        shown += f"{error!r} {error} {vars(error)} {getattr(error, 'problems', '')}"
        error = error.__cause__ or error.__context__
    return shown


def test_what_arrives(hub: Hub, folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    told: list[Event] = []
    assert push(folder, "someone/out", tell=told.append) == f"{hub.url}/someone/out"
    assert hub.files == MODEL
    assert len(hub.stored) == 3  # two shards and a tokenizer
    assert hub.private == {"someone/out": True}
    assert told == [Stage("pushing to the hub")]
    assert capfd.readouterr() == ("", "")


def test_private_unless_asked_for(hub: Hub, folder: Path) -> None:
    push(folder, "someone/hidden", tell=silent)
    push(folder, "someone/shown", private=False, tell=silent)
    assert hub.private == {"someone/hidden": True, "someone/shown": False}


def test_a_bare_name_is_in_the_account_of_the_token(hub: Hub, folder: Path) -> None:
    hub.private["out"] = False  # one of the hub's old names without an owner, and not meant
    check("out")
    assert push(folder, "out", tell=silent) == f"{hub.url}/someone/out"
    assert hub.files == MODEL
    assert any(request.endswith("/someone/out/commit/main") for request in hub.asked)


def test_only_a_model_is_uploaded(hub: Hub, folder: Path) -> None:
    fill(folder, dict.fromkeys([*OTHER, *HIDDEN, ".git/config"], b"no"))
    told: list[Event] = []
    push(folder, "someone/out", tell=told.append)
    assert hub.files == MODEL
    (notice,) = (event for event in told if isinstance(event, Notice))
    assert notice.text == f"not pushed, being no part of a model: {', '.join(sorted(OTHER))}"


def test_names_are_taken_literally(hub: Hub, folder: Path) -> None:
    fill(folder, {"model[1]*.safetensors": b"odd", "model1x.safetensors": b"plain"})
    push(folder, "someone/out", tell=silent)
    assert hub.files.keys() - MODEL.keys() == {"model[1]*.safetensors", "model1x.safetensors"}


@pytest.mark.parametrize("missing", ["config.json", "weights", "all"])
def test_a_folder_without_a_model(hub: Hub, folder: Path, missing: str) -> None:
    for path in folder.glob("*.safetensors" if missing == "weights" else "config.json"):
        path.rename(path.with_suffix(".txt"))
    with pytest.raises(UsageError, match="there is no merged model"):
        push(folder.with_name("nowhere") if missing == "all" else folder, "someone/out", tell=silent)
    assert hub.asked == []


def test_a_public_repository_is_refused_before_anything_is_uploaded(hub: Hub, folder: Path) -> None:
    hub.private["someone/out"] = False
    with pytest.raises(UsageError, match="the repository is public") as caught:
        check("someone/out")
    assert caught.value.problems[0].where == "--push-to-hub someone/out"
    assert caught.value.problems[0].hint == "--public, or another name"
    with pytest.raises(UsageError, match="the repository is public") as caught:
        push(folder, "someone/out", tell=silent)
    hint = caught.value.problems[0].hint or ""
    assert hint.startswith("--public, or another name; the merged model is at ") and str(folder) in hint
    assert hub.files == hub.stored == {}
    assert hub.private == {"someone/out": False}
    check("someone/out", private=False)
    push(folder, "someone/out", private=False, tell=silent)
    assert hub.files == MODEL


def test_a_private_repository_stays_private(hub: Hub, folder: Path) -> None:
    hub.private["someone/out"] = True
    told: list[Event] = []
    check("someone/out", private=False)
    push(folder, "someone/out", private=False, tell=told.append)
    assert hub.private == {"someone/out": True}
    assert hub.files == MODEL
    assert "someone/out is private, and stays so" in str(told[-1])


def test_weights_that_would_be_opened_instead_are_told_of(hub: Hub, folder: Path) -> None:
    hub.private["someone/out"] = True
    hub.siblings = ["model.safetensors", "model-00001-of-00002.safetensors", "README.md", ".gitattributes"]
    told: list[Event] = []
    push(folder, "someone/out", tell=told.append)
    (notice,) = (event for event in told if isinstance(event, Notice))
    assert notice.text.endswith("transformers may open instead: delete model.safetensors")


def test_check_asks_and_writes_nothing(hub: Hub) -> None:
    check("someone/out")
    check("out")
    assert {request.split()[0] for request in hub.asked} == {"GET"}
    assert hub.private == {}


@pytest.mark.parametrize(
    "name", ["a/b/c", "", "a b", "../out", "out.git", "a--b", "https://huggingface.co/a/b", TOKEN + "/"]
)
def test_names_that_cannot_be(hub: Hub, folder: Path, name: str) -> None:
    for call in (lambda: check(name), lambda: push(folder, name, tell=silent)):
        with pytest.raises(UsageError) as caught:
            call()
        assert str(caught.value).startswith("--push-to-hub")
        assert "`user/name`, or `name` for your own account" in (caught.value.problems[0].hint or "")
        assert TOKEN not in texts(caught.value)
    assert hub.asked == []


def test_no_token(hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    for call in (lambda: check("someone/out"), lambda: push(folder, "someone/out", tell=silent)):
        with pytest.raises(SetupError, match="there is no token") as caught:
            call()
        assert "`hf auth login`, or set HF_TOKEN" in (caught.value.problems[0].hint or "")
    assert hub.asked == []


def test_the_token_of_a_login_is_found(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    Path(constants.HF_TOKEN_PATH).write_text(TOKEN)
    check("someone/out")
    assert hub.asked == ["GET /api/models/someone/out"]


def test_a_token_that_is_no_good_shows_before_the_merge(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", wrong := "hf_" + "x" * 34)
    for name in ("someone/out", "out"):
        with pytest.raises(SetupError, match="the hub does not accept the token") as caught:
            check(name)
        assert wrong not in texts(caught.value)


def test_a_token_that_no_header_can_hold(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    for odd in ("plain secret\x01word", "plain-secret-é"):
        monkeypatch.setenv("HF_TOKEN", odd)
        with pytest.raises(SetupError) as caught:
            check("someone/out")
        assert "secret" not in texts(caught.value)


def test_offline(hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for call in (lambda: check("someone/out"), lambda: push(folder, "someone/out", tell=silent)):
        with pytest.raises(SetupError, match="HF_HUB_OFFLINE is set") as caught:
            call()
        assert (caught.value.problems[0].hint or "").startswith("unset HF_HUB_OFFLINE")
    assert hub.asked == []


def test_out_of_reach(hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(SetupError, match="the hub cannot be reached") as caught:
        check("someone/out")
    assert caught.value.problems[0].hint == "try again with a network"
    with pytest.raises(SetupError, match="the hub cannot be reached"):
        push(folder, "someone/out", tell=silent)


STATUS = {
    400: "the hub refuses",
    401: "does not accept the token",
    403: "does not let this token write there",
    404: "knows no such account or repository",
    409: "something else changes the repository",
    413: "finds the files too large",
    501: "has a fault of its own",
}


CREATE, COMMIT = "/api/repos/create", "/commit/"
CASES = [
    (part, status) for part in (CREATE, COMMIT) for status in STATUS if (part, status) != (CREATE, 409)
]  # it exists
CASES += [("/preupload/", 403), ("/objects/batch", 403), ("/put/", 403), ("/put/", 501)]


@pytest.mark.parametrize(("where", "status"), CASES)
def test_each_refusal_says_what_and_where_the_model_is(hub: Hub, folder: Path, status: int, where: str) -> None:
    """The answer holds the token, once as it came and once alone."""
    hub.fails[where] = (status, json.dumps({"error": f"who is {{echo}}?\n\x1b[31m{TOKEN} said so"}))
    told: list[Event] = []
    with pytest.raises(SetupError) as caught:
        push(folder, "someone/out", tell=told.append)
    (problem,) = caught.value.problems
    assert caught.value.exit_code == 4
    assert STATUS[status] in problem.message
    assert problem.where == "--push-to-hub someone/out"
    assert f"; the merged model is at {folder}, push it later with: " in (problem.hint or "")
    assert (problem.hint or "").endswith(f"hf upload someone/out '{folder}' --private")
    assert "***" in (problem.found or "") and str(status) in (problem.found or "")
    assert "\n" not in (problem.found or "") and "\x1b" not in (problem.found or "")
    assert TOKEN not in texts(caught.value) + str(told)
    assert {name for name in MODEL if (folder / name).read_bytes() == MODEL[name]} == MODEL.keys()
    assert hub.files == {}


def test_a_refusal_by_way_of_xet(hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """hf_xet, which the library uses where it is installed, has neither its errors nor its ways of asking."""
    pytest.importorskip("hf_xet")
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    hub.fails["/xet-write-token/"] = (403, "{echo}")
    with pytest.raises(SetupError, match="does not let this token write there") as caught:
        push(folder, "someone/out", tell=silent)
    assert "the merged model is at" in (caught.value.problems[0].hint or "")
    assert TOKEN not in texts(caught.value)


def test_the_command_for_later_is_public_where_that_was_asked_for(hub: Hub, folder: Path) -> None:
    hub.fails["/commit/"] = (403, "{}")
    with pytest.raises(SetupError) as caught:
        push(folder, "someone/out", private=False, tell=silent)
    assert (caught.value.problems[0].hint or "").endswith(f"hf upload someone/out '{folder}'")


@pytest.mark.parametrize("body", ["<html>{echo}</html>", "{echo}", '{"files": "{echo}"}', "[]"])
def test_an_answer_that_makes_no_sense(hub: Hub, folder: Path, body: str) -> None:
    parts = ["/api/repos/create", "/api/models/", "/objects/batch", "/commit/"]
    for part in [*parts, "/api/validate-yaml"] if body[0] != "{" or body == "{echo}" else parts:
        hub.fails = {part: (200, body)}
        with pytest.raises(SetupError) as caught:
            push(folder, "someone/out", tell=silent)
        assert "the merged model is at" in (caught.value.problems[0].hint or ""), part
        assert TOKEN not in texts(caught.value)


def test_what_looks_like_a_secret_is_scrubbed_unasked() -> None:
    other, signed = "hf_" + "k" * 34, "https://s3.example/put?X-Amz-Credential=abc&X-Amz-Signature=def"
    text = f"{other} Bearer abc.def eyJhbGciOiJIUzI1NiJ9.eyJzdWIi {signed} user/hf_my_own_model_of_long_name"
    assert module._scrubbed(text) == "*** *** *** https://s3.example/put?*** user/hf_my_own_model_of_long_name"
    assert len(module._scrubbed("word " * 1000)) <= 300
    assert module._scrubbed("x" * 290 + TOKEN, TOKEN) == "x" * 290 + "***"  # scrubbed first, cut later


def test_warnings_of_the_hub_are_told(hub: Hub, folder: Path) -> None:
    hub.warns = [f"no license, {TOKEN}"]
    told: list[Event] = []
    push(folder, "someone/out", tell=told.append)
    (text,) = {event.text for event in told if isinstance(event, Notice)}
    assert text == "the hub says: Warnings while validating metadata in README.md: - no license, ***"


@pytest.mark.parametrize("shown", [True, False])
def test_bars_are_hidden_and_come_back(hub: Hub, folder: Path, shown: bool) -> None:
    before = are_progress_bars_disabled()
    (enable_progress_bars if shown else disable_progress_bars)()
    try:
        push(folder, "someone/out", tell=silent)
        hub.fails["/commit/"] = (403, "{}")
        with pytest.raises(HkftError):
            push(folder, "someone/out", tell=silent)
        assert are_progress_bars_disabled() != shown
        assert not any(hub.shown)
    finally:
        (disable_progress_bars if before else enable_progress_bars)()


def test_no_telemetry(hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", False)
    push(folder, "someone/out", tell=silent)
    assert constants.HF_HUB_DISABLE_TELEMETRY is False
    assert not any("torch" in agent or "agent/" in agent for agent in hub.agents)
    known = r"(GET|POST|PUT) /(api/repos/create|api/models/|api/validate-yaml|someone/out.git/info/lfs|put/)"
    assert all(re.match(known, request) for request in hub.asked), hub.asked


def test_log_lines_hold_no_token(hub: Hub, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("huggingface_hub")
    logger.addHandler(caplog.handler)
    try:
        with caplog.at_level(logging.DEBUG, "huggingface_hub"):
            push(folder, "someone/out", tell=silent)
    finally:
        logger.removeHandler(caplog.handler)
    assert "Request" in caplog.text
    assert TOKEN not in caplog.text
