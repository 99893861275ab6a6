"""A merged model -> a repository of the Hugging Face hub: private unless asked for, and only what a model consists of.

What the hub or its library says may hold the token, so no exception of theirs leaves this module: its text is scrubbed.
"""

from __future__ import annotations

import re
import shlex
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from glob import escape
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from hkft.errors import HkftError, SetupError, UsageError, scrubbed
from hkft.events import Listener, Notice, Stage, silent
from hkft.merging.place import RECORD

if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import ModelInfo

T = TypeVar("T")
WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
TOKENIZER = """tokenizer*.json special_tokens_map.json added_tokens.json *vocab*.json vocab.txt merges.txt
    normalizer.json tokenizer.model spiece.model spm*.model sentencepiece*.model *.tiktoken bpe.codes dict.txt
    chat_template.json chat_template.jinja additional_chat_templates/*.jinja"""
FILES = (*WEIGHTS, *TOKENIZER.split(), "config.json", "generation_config.json", "README.md", RECORD)
LOG_IN = "`hf auth login`, or set HF_TOKEN, with a token that may write"
ANSWERS = {  # HTTP status -> what it means here, what to do about it
    401: ("the hub does not accept the token", LOG_IN),
    402: ("the hub wants to be paid for this", "see the billing settings of the account"),
    403: ("the hub does not let this token write there", LOG_IN),
    404: ("the hub knows no such account or repository, or hides it from this token", "check the name before the /"),
    409: ("the hub says that something else changes the repository", "try again"),
    413: ("the hub finds the files too large", "merge with a smaller --dtype"),
    429: ("the hub has had too many requests from this account", "try again later"),
}
SECONDS = 30  # to wait for the hub's answer on what a repository is


def check(repository: str, *, private: bool = True) -> None:
    """Raise what `push` would, as far as it shows before there is a model: name, token, network, a public repository.

    The hub is asked, and nothing is written there. Whether the token may write shows only when it does.
    """

    def look(api: HfApi) -> None:
        from huggingface_hub.errors import HfHubHTTPError

        name = repository if "/" in repository else f"{api.whoami()['name']}/{repository}"
        try:
            _refuse_public(api.model_info(name, timeout=SECONDS), private)
        except HfHubHTTPError as error:
            if error.response.status_code != 404:  # 404: it is yet to be made
                raise

    _ask(repository, look, silent)


def push(folder: Path, repository: str, *, private: bool = True, tell: Listener) -> str:
    """Upload a merged model to `repository`, "user/name" or "name", which is made if need be -> its URL.

    private: one that is made is private, and one that is public is refused. A private one is never made public.
    Raises UsageError (the name, a public repository, no model in `folder`), SetupError (offline, no token, whatever the
    hub or the network says). `folder` stays as it is.
    """
    files = _files(folder, tell)
    command = f"hf upload {_scrubbed(repository)} {shlex.quote(str(folder))}{' --private' * private}"
    after = f"; the merged model is at {folder}, push it later with: {command}"

    def upload(api: HfApi) -> str:
        url = api.create_repo(repository, private=private, exist_ok=True)  # one that exists stays as it is
        there = api.model_info(url.repo_id, timeout=SECONDS)
        _refuse_public(there, private, after)
        if there.private and not private:
            tell(Notice(f"{there.id} is private, and stays so: its settings on the hub make it public", "warning"))
        older = {sibling.rfilename for sibling in there.siblings or ()}.difference(files)
        if older := sorted(name for name in older if _any(name, WEIGHTS)):
            text = f"{there.id} has older weights too, which transformers may open instead: delete {', '.join(older)}"
            tell(Notice(text, "warning"))
        allowed, message = [escape(name) for name in files], "Upload a model merged by hkft"
        api.upload_folder(repo_id=url.repo_id, folder_path=folder, allow_patterns=allowed, commit_message=message)
        return f"{url}"

    tell(Stage("pushing to the hub"))
    return _ask(repository, upload, tell, after)


def _files(folder: Path, tell: Listener) -> list[str]:
    """What is uploaded, as paths in the folder: never a pickle. The rest is told, hidden files aside."""
    every = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    seen = {name for name in every if not any(part.startswith(".") for part in name.split("/"))}
    files = sorted(name for name in seen if _any(name, FILES))
    if "config.json" not in files or not any(name.endswith(".safetensors") for name in files):
        raise UsageError("there is no merged model", where=str(folder), allowed="config.json and *.safetensors")
    if left := sorted(seen.difference(files)):
        tell(Notice(f"not pushed, being no part of a model: {', '.join(left)}", "warning"))
    return files


def _any(name: str, patterns: tuple[str, ...]) -> bool:
    """As a shell would match it: a * stays in its folder."""
    return any(fnmatchcase(name, pattern) and name.count("/") == pattern.count("/") for pattern in patterns)


def _refuse_public(there: ModelInfo, private: bool, after: str = "") -> None:
    if private and not there.private:
        hint = f"--public, or another name{after}"
        raise UsageError("the repository is public", where=f"--push-to-hub {there.id}", hint=hint)


def _ask(repository: str, work: Callable[[HfApi], T], tell: Listener, after: str = "") -> T:
    """work(api), the library's warnings told, its failures as errors of hkft's own with `after` in the hint."""
    from huggingface_hub import HfApi, get_token, is_offline_mode
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    token, kind, found = None, SetupError, None
    try:
        validate_repo_id(repository)
        if is_offline_mode():
            message, hint = "the hub is not asked: HF_HUB_OFFLINE is set", "unset HF_HUB_OFFLINE"
        elif (token := get_token()) is None:
            message, hint = "the hub takes models from accounts only, and there is no token", LOG_IN
        else:
            with _silence() as caught:
                done = work(HfApi(token=token))
            for text in (_scrubbed(str(warning.message), token) for warning in caught):
                tell(Notice(f"the hub says: {text}", "warning"))
            return done
    except HkftError:
        raise
    except HFValidationError as error:
        kind, message, hint = UsageError, _scrubbed(str(error)), "`user/name`, or `name` for your own account"
    except Exception as error:  # the border to a foreign library: whatever it raises is about the hub
        message, found, hint = _meaning(error, token)
    # Raised out here, the error does not drag the library's own along, which holds the token.
    raise kind(message, where=f"--push-to-hub {_scrubbed(repository)}", found=found, hint=hint + after)


def _meaning(error: BaseException, token: str | None) -> tuple[str, str, str]:
    """What happened, what the library says of it, and what to do now."""
    from huggingface_hub.errors import HfHubHTTPError

    text = _scrubbed(str(error), token)
    stated = re.search(r"HTTP status \w+ error \((\d{3})", text)  # as hf_xet puts it
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else int(stated[1]) if stated else None
    if status is not None:
        other = ("the hub has a fault of its own", "try again later") if status >= 500 else ("the hub refuses", LOG_IN)
        message, hint = ANSWERS.get(status, other)
        return message, f"HTTP {status}, {text}", hint
    if isinstance(error, ConnectionError) or type(error).__module__.startswith("httpx"):
        return "the hub cannot be reached", text, "try again with a network"
    if error.__cause__ is not None:  # a thread of the upload tells only that it failed
        return _meaning(error.__cause__, token)
    return "the push to the hub failed", f"{type(error).__name__}, {text}", "try again"


@contextmanager
def _silence() -> Iterator[list[warnings.WarningMessage]]:
    """No bars and no telemetry of huggingface_hub, and its warnings kept for later."""
    from huggingface_hub import constants
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    hidden, telemetry = are_progress_bars_disabled(), constants.HF_HUB_DISABLE_TELEMETRY
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("ignore")  # httpx has some of its own, and -W error must not end an upload
        disable_progress_bars()
        warnings.simplefilter("always", UserWarning)
        constants.HF_HUB_DISABLE_TELEMETRY = True
        try:
            yield caught
        finally:
            constants.HF_HUB_DISABLE_TELEMETRY = telemetry
            if not hidden:
                enable_progress_bars()


def _scrubbed(text: str, token: str | None = None) -> str:
    """One line of at most 300 printable characters, without the token or what looks like one."""
    text = scrubbed(text.replace(token, "***") if token else text)
    return " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())[:300]
