"""A recipe on the terminal: where every value came from, what the run would be, a method's section."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from hkft.dropout.method import Method
from hkft.view.console import output, say
from hkft.view.tables import table
from hkft.view.words import duration, memory

if TYPE_CHECKING:
    from hkft.recipe import Recipe


def show_provenance(recipe: Recipe) -> None:
    """Every value of the recipe, and where it came from."""
    table(["key", "value", "from"], [list(entry) for entry in recipe.listed()], recipe.name)


def show_plan(plan: Mapping[str, Any]) -> None:
    """What `hkft check` found out."""
    tokens, parameters = plan["tokens"], plan["parameters"]
    passes = "1 forward pass" if plan["passes_per_step"] == 1 else f"{plan['passes_per_step']} forward passes"
    table(
        ["plan", ""],
        [
            ["method", f"{plan['method']}, {passes} a step"],
            ["rows", _sets(plan["rows"])],
            ["prompts", _sets(plan["prompts"])] if plan["prompts"] else ["labels", _labels(plan)],
            ["in both sets", f"{plan['duplicates']:,} validation rows"],
            ["steps", f"{plan['steps']:,} ({plan['steps_per_epoch']:,} an epoch)"],
            [
                "evaluations",
                f"{plan['evaluations']}, roughly {plan['evaluations_share_estimate']:.0%} of the time "
                "(diagnostics.evals_per_epoch, probe_size)",
            ],
            ["tokens", f"{tokens['mean']:.1f} a row, {tokens['longest']} at most, {tokens['trained']:,} trained on"],
            [
                "parameters",
                f"{parameters['trainable']:,} of {parameters['total']:,} trained ({parameters['share']:.2%})",
            ],
            ["peak memory", _memory(plan["memory_bytes"], plan["probe"])],
            ["time", _time(plan["probe"])],
            ["run folder", plan["output"]],
        ],
        plan["recipe"],
    )


def _sets(counts: Mapping[str, int]) -> str:
    return f"{counts['train']:,} to train on, {counts['validation']:,} to validate, {counts['train_probe']:,} probed"


def _labels(plan: Mapping[str, Any]) -> str:
    return ", ".join(plan["labels"]) if plan["labels"] else "a number"


def _memory(sizes: Mapping[str, int | None], probe: Mapping[str, Any] | None) -> str:
    parts = ", ".join(f"{name} {memory(size)}" for name, size in sizes.items() if size and name != "peak")
    if probe:
        return f"{memory(probe['peak_memory_bytes'])} measured in {probe['steps_made']} steps; forecast: {parts}"
    peak = sizes["peak"]
    roughly = "at least" if sizes["libraries"] else "about"  # a process's allocator gives back less than it is given
    return f"{roughly} {memory(peak)}: {parts}" if peak else f"{parts}, and more: --probe measures it"


def _time(probe: Mapping[str, Any] | None) -> str:
    if not probe:
        return "--probe takes a few steps, and says"
    seconds = probe["seconds"]
    return f"about {duration(seconds['total'])}, of it {duration(seconds['looking'])} for evaluations"


def show_method(method: Method) -> None:
    """One method: in words, and as the `dropout` section of a recipe that says it in full."""
    import yaml

    record = {key: value for key, value in method.as_dict().items() if key != "name"}
    section = {"dropout": {"rate": 0.1, **{key: value for key, value in record.items() if value is not None}}}
    for site in section["dropout"]["sites"]:
        site.pop("rate")
    text = yaml.safe_dump(section, sort_keys=False)
    console = output()
    say(console, f"{method.name}: {method.summary}\n")
    say(console, f"dropout: {{method: {method.name}, rate: 0.1}}\n\nor, in full:\n\n{text}")
