"""What comes from elsewhere is data: it is not run, leads nowhere else, and what is secret is written nowhere."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

import hkft as package
from hkft import api
from hkft.errors import HkftError, scrubbed
from hkft.events import Evaluated, Event

SECRETS = {
    "HF_TOKEN": "hf_" + "aB3" * 11 + "z",
    "WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567",
    "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY",
    "AWS_SESSION_TOKEN": "FwoGZXIvYXdzEBYaDHhBTEMPLESessionToken",
    "SOME_PASSWORD": "correct horse",
}
EVIL = "</script></pre><script>document.title='ran'</script><img src=x onerror=alert(1)>"


class Opened:
    """Leaves the folder `owned` behind where it is unpickled."""

    def __reduce__(self) -> Any:
        return os.mkdir, ("owned",)


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Secrets in the environment."""
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    return SECRETS


def written(folder: Path) -> Iterator[tuple[Path, str]]:
    for path in folder.rglob("*"):
        if path.is_file():
            yield path, path.read_bytes().decode("utf-8", "replace")


# --- secrets ----------------------------------------------------------------------------------------------------------


def test_no_secret_of_the_environment_is_in_a_run_or_on_the_screen(hkft, tiny, held):
    trained = hkft("train", "--recipe", tiny, "--output", "run", "--set", "train.max_steps=4", "--json")
    compared = hkft("compare", "run", "--output", "compared")
    assert (trained.code, compared.code) == (0, 0), trained.err + compared.err
    seen = [(Path(name), text) for ran in (trained, compared) for name, text in (("out", ran.out), ("err", ran.err))]
    seen += [*written(Path("run")), *written(Path("compared"))]
    names = {path.name for path, _ in seen}
    assert names >= {"environment.json", "summary.json", "report.html", "comparison.json", "metrics.jsonl"}
    assert [(path, name) for path, text in seen for name, value in held.items() if value in text] == []


SPELLED = [
    SECRETS["HF_TOKEN"],
    "https://me:correct-horse@example.com/rows.csv",
    "https://example.com/rows.csv?access_token=correct-horse",
    "s3://bucket/rows.csv?X-Amz-Signature=correct-horse",
    SECRETS["WANDB_API_KEY"],
]


@pytest.mark.parametrize("secret", SPELLED)
def test_a_recipe_with_a_secret_is_refused_before_it_is_copied(hkft, tiny, held, secret):
    """In a value, in a comment, in --set: the message names the place, and not the secret."""
    text = tiny.read_text(encoding="utf-8")
    for content in (text.replace("train: reviews.csv", f"train: '{secret}'"), f"{text}# {secret}\n"):
        tiny.write_text(content, encoding="utf-8")
        ran = hkft("train", "--recipe", tiny, "--output", "run", "--json")
        assert ran.code == 2
        assert re.match(r"error: this looks like a token or a password, .*\n  where    tiny.yaml:\d+:\d+\n", ran.err)
        assert secret not in ran.out + ran.err and "correct-horse" not in ran.out + ran.err
    tiny.write_text(text, encoding="utf-8")
    ran = hkft("train", "--recipe", tiny, "--output", "run", "--set", f"data.train={secret}")
    assert (ran.code, "where    --set data.train" in ran.err) == (2, True)
    assert secret not in ran.err and "correct-horse" not in ran.err
    assert not Path("run").exists()


def test_a_token_has_no_key_in_a_recipe(hkft, tiny):
    ran = hkft("check", "--recipe", tiny, "--set", "train.hub_token=x")
    assert ran.code == 2
    assert "a recipe holds no token: set HF_TOKEN in the environment" in ran.err


@pytest.mark.parametrize("secret", SPELLED)
def test_no_message_holds_a_secret(hkft, run, held, secret):
    for args in (
        ["eval", run, "--split", secret],
        ["eval", secret],
        ["diagnose", secret],
        ["predict", run, "--input", secret],
    ):
        for extra in ([], ["--json"]):
            ran = hkft(*args, *extra)
            assert ran.code in (2, 3, 4), ran.err
            assert secret not in ran.out + ran.err and "correct-horse" not in ran.out + ran.err


def test_scrubbing_leaves_what_is_no_secret(held):
    for text in (
        "hub:glue/sst2#train",
        "user/hf_my_model",
        "a:b@c",
        "https://example.com/a?b=c",
        "the token is long",
        "12:30",
    ):
        assert scrubbed(text) == text
    error = HkftError(f"a {held['HF_TOKEN']}", found=f"Authorization: Bearer {'x1' * 9}", hint=held["SOME_PASSWORD"])
    assert str(error) == "a ***\n  found: Authorization: ***\n  hint: ***"


# --- code -------------------------------------------------------------------------------------------------------------


def test_code_of_a_model_s_own_is_not_run(hkft, tiny, tiny_bert):
    """Not the model's, not the tokenizer's, where transformers knows the kind and where it does not."""
    shutil.copytree(tiny_bert, "bert")
    Path("bert/own.py").write_text("import os\nos.mkdir('owned')\n")
    maps = {"AutoConfig": "own.C", "AutoModelForSequenceClassification": "own.M", "AutoTokenizer": ["own.T", None]}
    for name in ("config.json", "tokenizer_config.json"):
        content = json.loads(Path("bert", name).read_text())
        Path("bert", name).write_text(json.dumps({**content, "auto_map": maps}))
    ran = hkft("train", "--recipe", tiny, "--output", "run", "--set", "model.name=bert", "--set", "train.max_steps=2")
    assert ran.code in (0, 4)
    content = json.loads(Path("bert/config.json").read_text())
    Path("bert/config.json").write_text(json.dumps({**content, "model_type": "own"}))
    ran = hkft("train", "--recipe", tiny, "--output", "other", "--set", "model.name=bert")
    assert ran.code == 4
    assert "it needs code of its own" in ran.err
    assert not Path("owned").exists()


def test_nothing_of_hkft_trusts_remote_code():
    sources = {path: path.read_text(encoding="utf-8") for path in Path(package.__file__).parent.rglob("*.py")}
    loads = r"\b(trust_remote_code\s*=\s*(?!False\b)\w+|\"trust_remote_code\": (?!False\b)\w+)"
    assert [path for path, text in sources.items() if re.search(loads, text)] == []
    unsafe = r"\b(pickle|dill|joblib|marshal)\.loads?\(|torch\.load\((?!.*weights_only=True)|yaml\.(unsafe_|full_)?load\(|\beval\(|\bexec\(|shell=True|os\.system"
    found = {path.name for path, text in sources.items() if re.search(unsafe, text.replace(".eval(", ""))}
    assert found == set()


def test_a_pickle_in_a_checkpoint_is_not_run(hkft, tiny):
    """A checkpoint's optimizer and its like are of torch's own format, which is read as numbers alone."""

    def interrupt(event: Event) -> None:
        if isinstance(event, Evaluated) and event.step:
            os.kill(os.getpid(), signal.SIGINT)

    tiny.write_text(tiny.read_text(encoding="utf-8").replace("epochs: 2", "epochs: 1"), encoding="utf-8")
    with pytest.raises(KeyboardInterrupt):
        api.train(tiny, output="run", tell=interrupt)
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"):
        shutil.copytree("run", name)
        (checkpoint,) = Path(name, "checkpoints").iterdir()
        (checkpoint / name).write_bytes(pickle.dumps(Opened()))
        with suppress(Exception):  # whatever torch says of it
            hkft("train", "--recipe", tiny, "--output", name, "--resume")
        assert not Path("owned").exists()


# --- text of a data set -----------------------------------------------------------------------------------------------


def test_text_of_a_data_set_is_inert_in_a_report(hkft, tiny):
    """In texts and in labels, of a run and of a comparison: shown as it is, and never a tag."""
    rows = Path("reviews.csv").read_text(encoding="utf-8").replace("positive", EVIL)
    Path("reviews.csv").write_text(re.sub(r"\b(film|good|bad)\b", EVIL, rows), encoding="utf-8")
    for seed in (1, 2):
        ran = hkft(
            "train", "--recipe", tiny, "--output", f"run{seed}", "--set", f"seed={seed}", "--set", "train.max_steps=4"
        )
        assert ran.code == 0, ran.err
    assert hkft("compare", "run1", "run2", "--output", "compared").code == 0
    for page in (Path("run1/report.html"), Path("compared/report.html")):
        text = page.read_text(encoding="utf-8")
        assert "<script" not in text and "<img" not in text
        assert re.search(r'<meta http-equiv="Content-Security-Policy" content="default-src \'none\'', text)
    assert "&lt;/script&gt;" in Path("run1/report.html").read_text(encoding="utf-8")


def test_control_codes_of_a_file_do_nothing_to_the_terminal(hkft, tiny):
    Path("odd.csv").write_text("\x1b]0;title\x07text\x9b2J,label\na,b\n", encoding="utf-8")
    ran = hkft("check", "--recipe", tiny, "--set", "data.train=odd.csv")
    assert ran.code == 3
    assert "found    \\x1b]0;title\\x07text\\x9b2J, label\n" in ran.err
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", ran.err)


# --- the network ------------------------------------------------------------------------------------------------------

ALONE = """
import socket, sys

def connected(self, address, *args):
    asked.append(address)
    raise OSError("no network here")

def looked_up(host, *args, **kwargs):
    asked.append(host)
    raise OSError("no network here")

asked = []
socket.socket.connect = socket.socket.connect_ex = connected
socket.getaddrinfo = looked_up
from hkft.cli.main import app
for command in sys.argv[1:]:
    assert app(command.split(), standalone_mode=False) in (None, 0), command
assert not asked, asked
"""


def test_commands_on_local_files_ask_no_network_for_anything(tiny):
    """No telemetry, of hkft or of a library below, even where the network may be used."""
    train = f"train --recipe {tiny} --output run --set train.max_steps=2"
    done = subprocess.run(
        [sys.executable, "-c", ALONE, train, "eval run", "merge run --output merged"],
        capture_output=True,
        text=True,
        timeout=200,
        env={**os.environ, "HF_HUB_OFFLINE": "0"},
    )
    assert done.returncode == 0, done.stderr
    assert Path("merged/model.safetensors").exists()
