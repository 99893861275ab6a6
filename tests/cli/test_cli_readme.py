"""README.md is executable: its Python runs, its recipes load, its commands parse."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from typer.main import get_group

from hkft.cli.main import app
from hkft.recipe import load
from hkft.recipe.catalogue import shipped

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def blocks(language: str) -> list[str]:
    return [text for kind, text in FENCED.findall(README) if kind == language]


def commands() -> list[list[str]]:
    """The arguments of every `hkft ...` in a shell block, without comments."""
    parts = [part for block in blocks("sh") for line in block.splitlines() for part in line.split("&&")]
    words = [shlex.split(part, comments=True) for part in parts]
    return [args for name, *args in filter(None, words) if name == "hkft"]


def mentioned() -> list[list[str]]:
    """The arguments of every `hkft ...` within a sentence: those may be cut short."""
    return [shlex.split(text)[1:] for text in re.findall(r"`(hkft [^`\n]+)`", FENCED.sub("", README))]


def test_every_fence_is_a_language_that_is_tested():
    assert {kind for kind, _ in FENCED.findall(README)} == {"sh", "yaml", "python"}
    assert README.count("```") == 2 * len(FENCED.findall(README))


@pytest.mark.parametrize("block", blocks("python"), ids=lambda text: text.splitlines()[-1].strip()[:40])
def test_its_python_runs(block):
    exec(compile(block, "README.md", "exec"), {"__name__": "__main__"})


@pytest.mark.parametrize("block", blocks("yaml"), ids=lambda text: text.splitlines()[0][:40])
def test_its_recipes_load(block):
    Path("readme.yaml").write_text(block, encoding="utf-8")
    recipe = load("readme.yaml")
    assert recipe.method.active


@pytest.mark.parametrize("args", commands(), ids=" ".join)
def test_its_commands_parse(args):
    group = get_group(app)
    with group.make_context("hkft", list(args)) as context:
        name, command, rest = group.resolve_command(context, args)
        assert command is not None
        with command.make_context(name, rest, parent=context) as parsed:
            recipe, settings = parsed.params.get("recipe"), parsed.params.get("set") or ()
    if recipe:
        assert recipe in shipped()
        load(recipe, settings)


@pytest.mark.parametrize("args", mentioned(), ids=" ".join)
def test_the_commands_in_its_sentences_exist(args):
    group = get_group(app)
    command = group.commands[args[0]]
    options = {option for parameter in command.params for option in parameter.opts}
    assert {word for word in args if word.startswith("-")} <= options


def test_the_readme_shows_every_command():
    assert {args[0] for args in commands()} == set(get_group(app).commands)
