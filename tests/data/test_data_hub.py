"""The real load_dataset, offline, on hub caches laid out here; HF_HOME is read at import, so in another process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import json, sys
from hkft.data.sources import read
from hkft.errors import HkftError
for reference in sys.argv[1:]:
    try:
        rows = read(reference, lambda event: None)
        names = getattr(rows.features["label"], "names", None)
        print(json.dumps({"rows": rows.to_dict(), "names": names}))
    except HkftError as error:
        print(json.dumps({"error": str(error), "code": error.exit_code}))
"""

CARD = """---
configs:
- config_name: sst2
  data_files: [{split: train, path: sst2/train.jsonl}, {split: test, path: sst2/test.jsonl}]
- config_name: rte
  data_files: [{split: train, path: rte/train.jsonl}]
dataset_info:
- config_name: sst2
  features:
  - {name: sentence, dtype: string}
  - {name: label, dtype: {class_label: {names: {'0': negative, '1': positive}}}}
- config_name: rte
  features:
  - {name: sentence, dtype: string}
  - {name: label, dtype: int64}
---
"""

TWO = """---
configs:
- {config_name: one, data_files: one.jsonl}
- {config_name: two, data_files: two/train.jsonl}
---
"""


def lay_out(home: Path, dataset: str, files: dict[str, str]) -> None:
    """A dataset in the hub's cache, as `hf download --repo-type dataset` leaves it."""
    folder = home / "hub" / f"datasets--{dataset.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("0123abcd")
    for name, content in files.items():
        path = folder / "snapshots" / "0123abcd" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)


def offline(home: Path, *references: str) -> list[dict]:
    environment = {**os.environ, "HF_HOME": str(home), "HF_HUB_OFFLINE": "1"}
    for name in ("HF_DATASETS_CACHE", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HUB_DISABLE_PROGRESS_BARS"):
        environment.pop(name, None)
    command = [sys.executable, "-W", "error", "-c", PROGRAM, *references]
    # The folder "named" in the working directory must not be taken for the dataset of that name.
    done = subprocess.run(command, env=environment, cwd=home, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    home = tmp_path_factory.mktemp("home")
    rows = {
        "README.md": CARD,
        "sst2/train.jsonl": '{"sentence": "good", "label": 1}\n{"sentence": "bad", "label": 0}\n',
        "sst2/test.jsonl": '{"sentence": "hidden", "label": -1}\n',
        "rte/train.jsonl": '{"sentence": "so", "label": 1}\n',
    }
    lay_out(home, "nyu-mll/glue", rows)
    lay_out(home, "some/thing", {"train.csv": "sentence,label\na,1\n"})
    lay_out(home, "named", {"README.md": TWO, "one.jsonl": "{}", "two/train.jsonl": '{"sentence": "x", "label": 1}'})
    lay_out(home, "part/there", {"README.md": TWO, "two/train.jsonl": '{"sentence": "x", "label": 1}'})
    lay_out(home, "a/script", {"script.py": "raise SystemExit('ran')"})
    (home / "named").mkdir()
    (home / "named" / "train.csv").write_text("sentence,label\nwrong,1\n")
    return home


def test_a_dataset_on_disk_is_read_offline(home):
    sst2, same, hidden, rte, thing = offline(
        home,
        "hub:glue/sst2#train",
        "hub:nyu-mll/glue/sst2#train",
        "hub:glue/sst2#test",
        "hub:glue/rte#train",
        "hub:some/thing#train",
    )
    assert sst2 == {"rows": {"sentence": ["good", "bad"], "label": [1, 0]}, "names": ["negative", "positive"]}
    assert same == sst2
    assert hidden["rows"] == {"sentence": ["hidden"], "label": [-1]}
    assert rte["rows"] == {"sentence": ["so"], "label": [1]}
    assert thing["rows"] == {"sentence": ["a"], "label": [1]}


def test_what_is_not_there_is_one_message(home):
    miss, config, split, none, script, part = offline(
        home,
        "hub:no/where#train",
        "hub:glue/sts2#train",
        "hub:glue/sst2#trian",
        "hub:glue#train",
        "hub:a/script#train",
        "hub:part/there/one#train",
    )
    assert miss["error"] == (
        "hub:no/where#train: the dataset is not on this machine, and the hub is not asked: HF_HUB_OFFLINE is set\n"
        "  found: tried no/where, no (config where)\n"
        "  hint: unset HF_HUB_OFFLINE"
    )
    assert miss["code"] == 4
    assert config["error"].startswith("hub:glue/sts2#train: the dataset cannot be read\n  found: ")
    assert "['sst2', 'rte']" in config["error"]
    assert "['train', 'test']" in split["error"]
    assert "sst2" in none["error"]
    assert script["error"].startswith("hub:a/script#train: the dataset cannot be read\n  found: ")
    assert {answer["code"] for answer in (config, split, none, script, part)} == {3}
    assert "one.jsonl" in part["error"]
    assert len(part["error"]) < 400
    assert all("Traceback" not in answer["error"] for answer in (miss, config, split, none, script))


def test_an_old_name_with_a_config_and_no_owner(home):
    (named,) = offline(home, "hub:named/two#train")
    assert named["rows"] == {"sentence": ["x"], "label": [1]}
