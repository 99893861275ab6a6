"""What answers at once: help, the version, a command that does not exist. None of it may load torch."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

COMMANDS = [
    "train",
    "eval",
    "merge",
    "compare",
    "diagnose",
    "predict",
    "check",
    "methods",
    "noise",
    "recipes",
    "doctor",
]
HEAVY = ["torch", "transformers", "datasets", "peft", "bitsandbytes", "accelerate", "sklearn", "scipy"]
LOADED = f"""
import sys
from hkft.cli.main import main
sys.argv[0] = "hkft"
try:
    main()
finally:
    print(sorted(set({HEAVY}) & sys.modules.keys()), file=sys.stderr)
"""


def watched(*args: str, code: str = LOADED) -> subprocess.CompletedProcess[str]:
    """`hkft ...` in a process whose last line on stderr names the heavy packages that it has loaded."""
    return subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, timeout=60)


def test_help_names_every_command_and_where_to_start(shell):
    ran = shell("--help", COLUMNS="100")
    assert (ran.code, ran.err) == (0, "")
    words = re.sub(r"[^\w.,:-]+", " ", ran.out)
    assert "Fine-tune language models with LoRA, hold overfitting back with the HiddenKey family of dropouts" in words
    assert re.findall(r"^\W*(\w+)  +[A-Z]\w+.*", ran.out.partition("Commands")[2], re.MULTILINE) == COMMANDS
    assert ran.out.rstrip().endswith("Start with: hkft train --recipe quickstart")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_json_and_debug_and_loads_nothing_for_it(command):
    ran = watched(command, "--help")
    assert (ran.returncode, ran.stderr) == (0, "[]\n")
    assert f" {command} [OPTIONS]" in ran.stdout
    for option in ("--json", "--debug", "--help"):
        assert option in ran.stdout


def test_no_arguments_and_a_short_option_are_help_too(shell):
    expected = shell("--help").out
    assert shell("-h").out == expected
    bare = shell()
    assert (bare.out + bare.err).strip() == expected.strip()  # Click has changed its mind on the stream and the code


def test_compare_s_usage_has_no_brackets_in_brackets(shell):
    assert "[[" not in shell("compare", "--help").out


def test_the_version_is_the_package_s_however_it_is_called(shell):
    script = shutil.which("hkft", path=str(Path(sys.executable).parent))
    assert script, "hkft is not installed beside this Python"
    called = subprocess.run([script, "--version"], capture_output=True, text=True, timeout=60)
    as_module = shell("--version")
    assert (called.returncode, as_module.code) == (0, 0)
    assert called.stdout == as_module.out == f"hkft {version('hkft')}\n"


def test_an_unknown_command_is_a_usage_error(shell):
    ran = shell("trian")
    assert (ran.code, ran.out) == (2, "")
    assert "No such command 'trian'" in ran.err
    assert "Traceback" not in ran.err


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("train",), "Missing option '--recipe'"),
        (("merge", "run"), "Missing option '--output'"),
        (("eval", "run", "--splitt", "test"), "No such option: --splitt"),
        (("compare", "--recipe", "quickstart", "--seeds", "0"), "the grid is empty\n  where    --seeds"),
        (("compare", "--recipe", "quickstart", "--seeds", "two"), "not a number of seeds, nor a list of them"),
        (("compare", "--recipe", "quickstart", "--fail-if", "gap > 1"), "not a condition\n  where    --fail-if"),
        (("compare", "--recipe", "quickstart", "--grid", "lora.r"), "not an axis\n  where    --grid"),
    ],
)
def test_a_wrong_option_is_a_usage_error(hkft, args, said):
    ran = hkft(*args)
    assert (ran.code, ran.out) == (2, "")
    assert said in ran.err


@pytest.mark.parametrize(
    "args",
    [
        ["--help"],
        ["--version"],
        ["methods"],
        ["methods", "hiddenkey", "--json"],
        ["methods", "hidenkey"],
        ["recipes"],
        ["recipes", "quickstart"],
        ["train", "--recipe", "quickstrat"],
        ["trian"],
    ],
    ids=" ".join,
)
def test_nothing_heavy_is_loaded_to_answer(args):
    assert watched(*args).stderr.splitlines()[-1] == "[]"


def test_a_second_check_of_what_has_not_changed_loads_nothing_heavy(hkft, tiny):
    hkft("check", "--recipe", tiny)  # in this process the libraries add to the environment that others inherit
    first = hkft("check", "--recipe", tiny)
    ran = watched("check", "--recipe", str(tiny))
    assert (ran.returncode, ran.stdout) == (first.code, first.out)
    assert ran.stderr.splitlines()[-1] == "[]"
    assert ran.stderr.startswith("as at an earlier check, since which nothing has changed that a plan hangs on\n")


def test_the_check_above_would_see_it():
    assert watched(code=LOADED.replace("main()\n", "import scipy\n", 1)).stderr.splitlines()[-1] == "['scipy']"
