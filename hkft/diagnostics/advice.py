"""What to do about a verdict: at most three next steps, each with its reason and, for a run of hkft's, its command.

    healthy           merge it; look at the test rows, where there are any; else see whether it holds over seeds; where
                      the gap is wide, more dropout
    overfitting       keep the adapter of the best step; more dropout; stop early, or a lower rank
    loss-overfitting  choose by the metric; soften the labels; more dropout
    memorising        more dropout; a lower rank; fewer epochs
    underfitting      a higher learning rate; more epochs; less dropout; where training went up, a lower learning rate;
                      where the adapter hardly moved, a learning rate ten times as high
    unclear           more evaluations; more seeds; where rows are too few, more validation rows; where nothing carries
                      over to validation, more dropout, a lower rank; where training diverged, a lower learning rate

More dropout is HiddenKey where there is none, else twice the rate up to 0.4; a lower rank is half of it. A command
starts from the run's own recipe, so that nothing else changes, and writes beside the run, to a folder named by what
changes: whoever types it again is told that it is done.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path

from hkft.diagnostics.verdict import ENOUGH, Verdict
from hkft.recipe import Recipe

MOST = 3
HIGHEST_RATE = 0.4
Step = dict[str, str | None]  # why, command
Advisor = Callable[[Verdict, Recipe | None, str | None], Step | None]  # of a verdict, a recipe and a run


def next_steps(found: Verdict, recipe: Recipe | None = None, run: str | None = None) -> list[Step]:
    """The steps for a verdict. recipe and run: those of a run of hkft's; without them, reasons and no commands."""
    wanted = _CAUSES.get((found.name, found.cause), _STEPS[found.name])
    steps: list[Step | None] = [step(found, recipe, run) for step in wanted]
    return [step for step in steps if step is not None][:MOST]


def _keep_best(found: Verdict, recipe: Recipe | None, run: str | None) -> Step | None:
    if not found.since_step:  # it was best before training
        return None
    why = f"use the model as it was best, not as it ended (validation loss was lowest at step {found.since_step})"
    return _step(why, run and _merged(run))


def _merge(found: Verdict, recipe: Recipe | None, run: str | None) -> Step:
    return _step("merge the adapter, and use it", run and _merged(run))


def _test(found: Verdict, recipe: Recipe | None, run: str | None) -> Step | None:
    if recipe is None or run is None or recipe.data.test is None:
        return None
    why = "validation chose the best step, so it flatters: the test rows tell"
    return _step(why, f"hkft eval {shlex.quote(run)} --split test")


def _seeds(found: Verdict, recipe: Recipe | None, run: str | None) -> Step:
    why = "one seed is one draw: see whether it holds over seeds, and what the dropout is worth"
    if recipe is None or run is None:
        return _step("one run is one draw: repeat it with other seeds")
    name = recipe.dropout.method
    methods = "none,hiddenkey" if name in (None, "none", "custom") else f"none,{name}"
    return _step(why, f"hkft compare --recipe {_resolved(run)} --methods {methods} --seeds 3 {_beside(run, 'seeds')}")


def _more_dropout(found: Verdict, recipe: Recipe | None, run: str | None) -> Step | None:
    if recipe is None:
        return _step("more dropout, such as HiddenKey, holds back what is learned by heart")
    if not recipe.method.active:
        settings = ["dropout.method=hiddenkey", "dropout.rate=0.1"]
        return _again("train with dropout that holds back what is learned by heart", run, *settings)
    rates = {site.rate for site in recipe.method.sites}
    rate = recipe.dropout.rate if len(rates) == 1 else None
    if rate is None or rate >= HIGHEST_RATE or recipe.dropout.sites is not None:
        return None
    higher = min(2 * rate, HIGHEST_RATE)
    return _again(f"drop more: a rate of {higher:g} for {rate:g}", run, f"dropout.rate={higher:g}")


def _less_dropout(found: Verdict, recipe: Recipe | None, run: str | None) -> Step | None:
    if recipe is None:
        return _step("less dropout, if there is any")
    if not recipe.method.active or recipe.dropout.sites is not None:
        return None
    rate = recipe.dropout.rate / 2
    return _again(f"drop less: a rate of {rate:g}", run, f"dropout.rate={rate:g}")


def _lower_rank(found: Verdict, recipe: Recipe | None, run: str | None) -> Step | None:
    if recipe is None:
        return _step("a lower rank, or fewer target modules, leaves less room to learn by heart")
    rank = recipe.lora["r"]
    if rank < 2:
        return None
    settings = [f"lora.r={rank // 2}"]
    alpha = recipe.lora.get("lora_alpha")
    if isinstance(alpha, int | float):
        settings.append(f"lora.lora_alpha={alpha / 2:g}" if alpha % 2 else f"lora.lora_alpha={int(alpha // 2)}")
    return _again(f"a rank of {rank // 2} leaves less room to learn by heart", run, *settings)


def _stop_early(found: Verdict, recipe: Recipe | None, run: str | None) -> Step | None:
    if recipe is None:
        return _step("stop when validation has not improved for a few evaluations")
    if recipe.diagnostics.patience is not None:
        return _lower_rank(found, recipe, run)
    return _again("stop once validation has not improved three times", run, "diagnostics.patience=3")


def _choose_by_metric(found: Verdict, recipe: Recipe | None, run: str | None) -> Step | None:
    if recipe is None:
        return _step("choose the checkpoint by the metric, and do not read its probabilities as they are")
    metric = {"classification": "accuracy", "regression": "pearson"}.get(recipe.task, "token_accuracy")
    if recipe.diagnostics.metric not in (None, "loss"):
        return None
    return _again("keep the adapter of the best metric, not of the best loss", run, f"diagnostics.metric={metric}")


def _soften(found: Verdict, recipe: Recipe | None, run: str | None) -> Step | None:
    if recipe is not None and (recipe.task == "regression" or recipe.train.get("label_smoothing_factor")):
        return None
    return _again("soften the labels, so that it is less sure of itself", run, "train.label_smoothing_factor=0.1")


def _fewer_epochs(found: Verdict, recipe: Recipe | None, run: str | None) -> Step | None:
    return _epochs("train for half as long", 0.5, recipe, run)


def _more_epochs(found: Verdict, recipe: Recipe | None, run: str | None) -> Step | None:
    return _epochs("train for twice as long", 2.0, recipe, run)


def _epochs(why: str, times: float, recipe: Recipe | None, run: str | None) -> Step | None:
    if recipe is None:
        return _step(why)
    if (steps := recipe.train.get("max_steps")) and steps > 0:
        wanted = max(1, round(times * steps))
        return None if wanted == steps else _again(why, run, f"train.max_steps={wanted}")
    return _again(why, run, f"train.num_train_epochs={times * recipe.train['num_train_epochs']:g}")


def _higher_rate(found: Verdict, recipe: Recipe | None, run: str | None) -> Step | None:
    return _rate("a learning rate three times as high", 3.0, recipe, run)


def _much_higher_rate(found: Verdict, recipe: Recipe | None, run: str | None) -> Step | None:
    return _rate("the adapter hardly moved: a learning rate ten times as high", 10.0, recipe, run)


def _lower_rate(found: Verdict, recipe: Recipe | None, run: str | None) -> Step | None:
    return _rate("a learning rate a tenth as high", 0.1, recipe, run)


def _rate(why: str, times: float, recipe: Recipe | None, run: str | None) -> Step:
    if recipe is None:
        return _step(why)
    return _again(why, run, f"train.learning_rate={times * float(recipe.train['learning_rate']):.3g}")


def _more_rows(found: Verdict, recipe: Recipe | None, run: str | None) -> Step | None:
    why = "more validation rows: these are too few to tell"
    if recipe is None:
        return _step(why)
    if isinstance(recipe.data.validation, float):
        return _again(why, run, f"data.validation={min(2 * recipe.data.validation, 0.5):g}")
    if recipe.data.validation_rows:
        return _again(why, run, f"data.validation_rows={2 * recipe.data.validation_rows}")
    return None


def _more_evaluations(found: Verdict, recipe: Recipe | None, run: str | None) -> Step | None:
    why = "look more often: a trend takes evaluations"
    if recipe is None:
        return _step(why)
    times = max(2 * recipe.diagnostics.evals_per_epoch, 2 * ENOUGH)
    return _again(why, run, f"diagnostics.evals_per_epoch={times}")


def _again(why: str, run: str | None, *settings: str) -> Step:
    if run is None:
        return _step(why)
    told = " ".join(f"--set {shlex.quote(setting)}" for setting in settings)
    changed = settings[0].partition(".")[2]
    return _step(why, f"hkft train --recipe {_resolved(run)} {told} {_beside(run, changed.replace('=', '-'))}")


def _resolved(run: str) -> str:
    return shlex.quote(f"{run}/resolved.yaml")


def _merged(run: str) -> str:
    return f"hkft merge {shlex.quote(run)} {_beside(run, 'merged')}"


def _beside(run: str, what: str) -> str:
    """The option for a folder beside the run. A run that is named `.` or `..` has its name from its place."""
    place = Path(run) if Path(run).name not in ("", "..") else Path(run).resolve()
    return f"--output {shlex.quote(f'{place}-{what}')}"


def _step(why: str, command: str | None = None) -> Step:
    return {"why": why, "command": command}


_STEPS: dict[str, list[Advisor]] = {
    "healthy": [_merge, _test, _seeds],
    "overfitting": [_keep_best, _more_dropout, _stop_early],
    "loss-overfitting": [_choose_by_metric, _soften, _more_dropout],
    "memorising": [_more_dropout, _lower_rank, _fewer_epochs],
    "underfitting": [_higher_rate, _more_epochs, _less_dropout],
    "unclear": [_more_evaluations, _seeds],
}
_CAUSES: dict[tuple[str, str | None], list[Advisor]] = {
    ("healthy", "gap"): [_merge, _more_dropout, _seeds],
    ("underfitting", "rate"): [_lower_rate, _seeds],
    ("underfitting", "still"): [_much_higher_rate],
    ("unclear", "rate"): [_lower_rate],
    ("unclear", "rows"): [_more_rows, _seeds],
    ("unclear", "nothing"): [_more_dropout, _lower_rank, _seeds],
}
