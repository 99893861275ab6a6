"""A run from recipe to folder, on a tiny random BERT and made sentences."""

from __future__ import annotations

import errno
import json
import os
import signal
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from hkft import api
from hkft.dropout import named
from hkft.errors import DivergedError, MethodError, RecipeError, Terminated, UsageError
from hkft.evaluation import saved
from hkft.events import Event, Stage, TrainStep
from hkft.folder import RunFolder, read_json, write_json, write_text
from hkft.recipe import load
from hkft.training import looks, run

FILES = {
    "recipe.yaml", "resolved.yaml", "environment.json", "metrics.jsonl", "splits.json", "predictions", "adapter",
    "checkpoints", "report.html", "README.md", "summary.json",
}  # fmt: skip


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, recipe_text: str) -> RunFolder:
    """A run of `recipe_file`'s recipe. To look at only."""
    recipe = tmp_path_factory.mktemp("finished") / "tiny.yaml"
    recipe.write_text(recipe_text, encoding="utf-8")
    return api.train(recipe, output=recipe.parent / "run")


def test_the_folder_is_what_the_contract_lists(finished, recipe_file):
    assert {path.name for path in finished.path.iterdir()} == FILES
    assert {path.name for path in (finished.path / "predictions").iterdir()} == {
        "history.jsonl",
        "train_probe.jsonl",
        "validation.jsonl",
    }
    assert finished.recipe.read_text(encoding="utf-8") == recipe_file.read_text(encoding="utf-8")
    assert load(finished.resolved) == load(recipe_file)
    summary = read_json(finished.summary)
    assert summary["status"] == "finished"
    assert summary["steps"] == summary["total_steps"] == 16
    assert set(summary["best"]) == set(summary["final"]) == {"train_probe", "validation"}
    assert {"loss", "accuracy", "f1", "matthews_correlation", "brier", "calibration_error"} == set(
        summary["best"]["validation"]
    )
    assert {"name", "since_step", "confidence", "text", "next", "cause"} == set(summary["verdict"])
    for key in ("train_runtime_s", "train_samples_per_s", "train_tokens_per_s", "peak_memory_bytes"):
        assert summary[key] > 0
    assert summary["trainable_parameters"] == 2 * 2 * 2 * 4 * 32 + 2 * 32 + 2  # layers, modules, A and B; the head
    assert read_json(finished.environment)["versions"]["torch"]
    assert "hkft" not in (finished.adapter / "adapter_config.json").read_text(encoding="utf-8")


def test_the_probe_is_a_fixed_part_of_train_with_validation_s_size_and_mix(finished):
    splits = read_json(finished.splits)
    assert set(splits["train_probe"]) < set(splits["train"])
    assert not set(splits["train"]) & set(splits["validation"])
    assert len(splits["train_probe"]) == len(splits["validation"]) == 40
    probe, validation = (lines(finished.predictions(name)) for name in ("train_probe", "validation"))
    assert Counter(row["label"] for row in probe) == Counter(row["label"] for row in validation)


def test_every_look_is_in_eval_mode_and_can_be_had_again(finished):
    summary = read_json(finished.summary)
    loaded = saved.load_saved(finished.path)
    for split, name in (("validation", "validation"),):
        again = saved.evaluate(loaded, split)
        assert again.metrics() == pytest.approx(summary["best"][name], rel=1e-9)
        assert again.ids == read_json(finished.splits)[split]
        kept = [
            {key: value for key, value in row.items() if key != "text"} for row in lines(finished.predictions(name))
        ]
        assert again.records(loaded.labels) == kept


def test_last_is_the_model_of_the_final_look(finished):
    summary = read_json(finished.summary)
    last = saved.evaluate(saved.load_saved(finished.path, checkpoint="last"))
    assert last.metrics()["loss"] == pytest.approx(summary["final"]["validation"]["loss"], rel=1e-6)


def test_gap_and_best_follow_from_the_looks(finished):
    curve = finished.records("eval")
    assert [seen["step"] for seen in curve] == [0, 4, 8, 12, 16]
    for seen in curve:
        assert seen["gap"]["loss"] == pytest.approx(seen["validation"]["loss"] - seen["train_probe"]["loss"])
        assert seen["gap"]["accuracy"] == pytest.approx(
            seen["train_probe"]["accuracy"] - seen["validation"]["accuracy"]
        )
    best = min(curve[1:], key=lambda seen: seen["validation"]["loss"])
    summary = read_json(finished.summary)
    assert summary["best_step"] == best["step"]
    assert summary["best"]["validation"]["loss"] == best["validation"]["loss"]


def test_objective_task_loss_and_consistency_are_told_apart(finished):
    steps = finished.records("train")
    assert len(steps) == 16
    for step in steps:
        assert step["consistency"] is not None
        assert step["objective"] == pytest.approx(step["task_loss"] + 0.5 * step["consistency"], abs=1e-6)


def test_the_same_seed_is_the_same_run_and_another_is_not(recipe_file, tmp_path):
    first, second, other = (
        run.train(load(recipe_file, [f"seed={seed}", "train.max_steps=4"]), tmp_path / name).records("eval")
        for name, seed in (("a", 3), ("b", 3), ("c", 4))
    )
    losses = [[seen["validation"]["loss"] for seen in curve] for curve in (first, second, other)]
    assert len(losses[0]) == 2
    assert losses[0] == losses[1]
    assert losses[0] != losses[2]


def test_methods_start_from_the_same_weights_on_the_same_rows(recipe_file, tmp_path):
    runs = [
        run.train(load(recipe_file, [f"dropout.method={name}", "train.max_steps=4"]), tmp_path / name)
        for name in ("none", "dropattention", "lora-dropout")
    ]
    assert len({json.dumps(read_json(one.splits)) for one in runs}) == 1
    assert len({one.records("eval")[0]["validation"]["loss"] for one in runs}) == 1
    assert len({one.records("eval")[-1]["validation"]["loss"] for one in runs}) == 3
    [site] = read_json(runs[2].summary)["sites"]
    assert site["calls"] == 2 * 2 * 4  # layers, adapted modules, steps
    assert 'lora_dropout": 0.0' in (runs[2].adapter / "adapter_config.json").read_text(encoding="utf-8")


def test_a_regression_on_pairs(recipe_file, tmp_path):
    settings = ["task=regression", "data.label=stars", "data.text=[text, other]", "train.num_train_epochs=12"]
    settings += ["diagnostics.evals_per_epoch=1", "lora.target_modules=all-linear", "dropout.method=none"]
    summary = read_json(api.train(recipe_file, settings, output=tmp_path / "run").summary)
    assert summary["metric"] == "pearson"
    assert set(summary["best"]["validation"]) == {"loss", "pearson", "spearman", "mse"}
    assert summary["best"]["validation"]["loss"] < summary["best"]["validation"]["mse"] + 1e-6
    first = RunFolder(tmp_path / "run").records("eval")[0]
    assert summary["best"]["train_probe"]["loss"] < 0.7 * first["train_probe"]["loss"]


def test_the_criterion_may_be_a_metric(recipe_file, tmp_path):
    done = run.train(load(recipe_file, ["diagnostics.metric=accuracy"]), tmp_path / "run")
    curve = done.records("eval")[1:]
    best = max(curve, key=lambda seen: (seen["validation"]["accuracy"], -seen["validation"]["loss"]))
    assert read_json(done.summary)["best_step"] == best["step"]


def test_patience_stops_early(recipe_file, tmp_path):
    settings = ["diagnostics.patience=2", "train.learning_rate=0.3", "train.num_train_epochs=40"]
    summary = read_json(run.train(load(recipe_file, settings), tmp_path / "run").summary)
    assert summary["status"] == "finished"
    assert summary["steps"] == summary["best_step"] + 8 < summary["total_steps"]


def test_divergence_says_so_and_leaves_the_best_so_far(recipe_file, tmp_path):
    with pytest.raises(DivergedError) as caught:
        api.train(recipe_file, ["train.learning_rate=1e12", "train.max_grad_norm=0"], output=tmp_path / "run")
    assert caught.value.exit_code == 6
    summary = read_json(tmp_path / "run" / "summary.json")
    assert summary["status"] == "failed"
    assert summary["error"] == str(caught.value)
    assert (tmp_path / "run" / "report.html").exists()


def test_a_finished_run_is_never_overwritten(finished, recipe_file):
    before = finished.summary.read_bytes()
    with pytest.raises(UsageError, match="there is a finished run in this folder already"):
        api.train(recipe_file, output=finished.path)
    with pytest.raises(UsageError, match="this run is finished"):
        api.train(recipe_file, output=finished.path, resume=True)
    assert finished.summary.read_bytes() == before


def test_the_tokenizer_is_kept_as_it_came(recipe_file, tiny_bert, tmp_path):
    cut = ["data.max_length=8", "train.max_steps=1"]  # many rows
    folder = run.train(load(recipe_file, cut), tmp_path / "run")
    assert (folder.adapter / "tokenizer.json").read_bytes() == (tiny_bert / "tokenizer.json").read_bytes()


def test_a_folder_with_other_things_in_it_is_left_alone(recipe_file, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    with pytest.raises(UsageError, match="the output folder is not empty"):
        api.train(recipe_file, output=tmp_path / "mine")


@pytest.mark.parametrize(
    ("setting", "error", "text"),
    [
        ("data.text=nothing", Exception, "there is no column 'nothing'"),
        ("lora.target_modules=[qery]", RecipeError, "did you mean 'query'?"),
        ("diagnostics.metric=acuracy", RecipeError, "did you mean 'accuracy'?"),
        ("dropout.sites=[{position: hidden, layers: [7]}]", MethodError, "allowed: 0 to 1"),
        ("train.lr_scheduler_type=liner", RecipeError, "transformers refuses the train section"),
        ("train.report_to=carrier-pigeon", RecipeError, "carrier-pigeon is not supported"),
        ("train.adam_beta1=5", RecipeError, "Invalid beta parameter"),
    ],
)
def test_what_is_wrong_before_training_leaves_nothing_behind(recipe_file, tmp_path, setting, error, text):
    with pytest.raises(error) as caught:
        api.train(recipe_file, [setting], output=tmp_path / "run")
    assert text in str(caught.value)
    assert not (tmp_path / "run").exists()


# before the first look, and within an epoch
@pytest.mark.parametrize(("at", "sent"), [(2, "SIGINT"), (6, "SIGTERM")])
def test_an_interrupted_run_resumes_to_the_same_end(finished, recipe_file, tmp_path, at, sent):
    def interrupt(event: Event) -> None:
        if isinstance(event, TrainStep) and event.step == at:
            os.kill(os.getpid(), getattr(signal, sent))

    with pytest.raises(KeyboardInterrupt) as caught:
        api.train(recipe_file, output=tmp_path / "cut", tell=interrupt)
    assert caught.type is (Terminated if sent == "SIGTERM" else KeyboardInterrupt)
    cut = RunFolder(tmp_path / "cut")
    assert cut.status == "interrupted"
    assert cut.report.exists()
    with pytest.raises(UsageError, match="an unfinished run"):
        api.train(recipe_file, output=cut.path)
    with pytest.raises(UsageError, match="was started with another recipe"):
        api.train(recipe_file, ["seed=9"], output=cut.path, resume=True)
    api.train(recipe_file, output=cut.path, resume=True)
    assert cut.status == "finished"
    curves = [[(seen["step"], seen["validation"]["loss"]) for seen in one.records("eval")] for one in (finished, cut)]
    assert [step for step, _ in curves[1]] == [0, 4, 8, 12, 16]
    assert [loss for _, loss in curves[1]] == pytest.approx([loss for _, loss in curves[0]], rel=1e-5)
    steps = [{seen["step"]: seen["objective"] for seen in one.records("train")} for one in (finished, cut)]
    assert steps[1] == pytest.approx(steps[0], rel=1e-5)


@pytest.mark.parametrize("method", named.METHODS)
def test_every_named_method_trains(recipe_file, tmp_path, method):
    text = recipe_file.read_text().replace("method: hiddenkey, rate: 0.1, weight: 0.5", f"method: {method}")
    recipe_file.write_text(text)
    folder = api.train(recipe_file, ["train.max_steps=3", "diagnostics.evals_per_epoch=1"], output=tmp_path / "run")
    assert read_json(folder.summary)["status"] == "finished"
    assert len(folder.records("train")) == 3


def test_rate_zero_says_that_the_consistency_is_left_out(recipe_file, tmp_path):
    heard: list[Event] = []
    run.train(load(recipe_file, ["dropout.rate=0", "train.max_steps=2"]), tmp_path / "run", tell=heard.append)
    assert any("every dropout rate is 0" in getattr(event, "text", "") for event in heard)
    assert all(event.consistency is None for event in heard if isinstance(event, TrainStep))


@pytest.mark.parametrize(
    ("total", "per_epoch", "evals", "expected"),
    [
        (16, 8, 2, [4, 8, 12, 16]),
        (10, 3, 1, [3, 6, 9, 10]),
        (5, 10, 4, [3, 5]),
        (3, 1, 4, [1, 2, 3]),
        (7, 7, 3, [3, 5, 7]),
    ],
)
def test_looks_are_spread_evenly_and_the_last_step_is_one(total, per_epoch, evals, expected):
    assert looks.steps(total, per_epoch, evals) == expected


# --- the self-check, and what Trainer and the model bring of their own -------------------------------------------------


def notices(folder: RunFolder) -> list[str]:
    return [record["text"] for record in folder.records("notice")]


def test_every_run_begins_with_a_self_check(finished):
    summary = read_json(finished.summary)
    assert summary["self_check"]["rows"] == 8
    assert any(text.startswith("the method was checked on 8 rows in ") for text in notices(finished))
    assert [site["cost"] > 0 for site in summary["sites"]] == [True, True]
    assert summary["sites"][0]["protected"] is not None
    assert summary["sites"][1]["protected"] is None


def test_the_self_check_changes_nothing_of_the_training(finished, recipe_file, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "_self_check", lambda begun: {})
    unchecked = api.train(recipe_file, output=tmp_path / "unchecked")
    one, two = ([r["objective"] for r in folder.records("train")] for folder in (finished, unchecked))
    assert one == two


def test_a_method_that_fails_the_self_check_is_not_trained(recipe_file, tmp_path, monkeypatch):
    from hkft.dropout import dropper

    monkeypatch.setattr(dropper, "hiddencut", lambda x, keep, rate, rescale: x)
    with pytest.raises(MethodError, match="two training passes under different masks of hidden gave the same"):
        api.train(recipe_file, ["dropout.method=hiddencut"], output=tmp_path / "run")
    assert read_json(tmp_path / "run" / "summary.json")["status"] == "failed"


def test_plain_training_has_no_method_to_check(recipe_file, tmp_path):
    folder = api.train(recipe_file, ["dropout.method=none", "train.max_steps=1"], output=tmp_path / "run")
    assert "self_check" not in read_json(folder.summary)


def test_neftune_is_trainers_own_and_never_seen_by_a_look(recipe_file, tmp_path):
    """Another path of training, the same first look, and what is saved gives the numbers of the looks."""
    short = ["dropout.method=none", "train.max_steps=4"]
    plain, noisy = (
        api.train(recipe_file, [*short, f"train.neftune_noise_alpha={alpha}"], output=tmp_path / alpha)
        for alpha in ("null", "15")
    )
    one, two = (folder.records("eval") for folder in (plain, noisy))
    assert one[0]["validation"] == two[0]["validation"]
    assert one[-1]["validation"]["loss"] != two[-1]["validation"]["loss"]
    first, second = (next(iter(folder.records("train")))["task_loss"] for folder in (plain, noisy))
    assert first != second  # already the first batch, on equal weights
    again = saved.evaluate(saved.load_saved(noisy.path)).metrics()
    assert again == pytest.approx(read_json(noisy.summary)["best"]["validation"], rel=1e-6)


R_DROP = ["train.max_steps=2", "dropout.sites=[]", "dropout.consistency={kind: kl, gradient: both}"]


def test_r_drop_takes_the_models_own_dropout_or_says_that_there_is_none(recipe_file, tmp_path):
    text = recipe_file.read_text(encoding="utf-8").replace("method: hiddenkey, ", "")
    recipe_file.write_text(text, encoding="utf-8")
    folder = api.train(recipe_file, [*R_DROP, "model.native_dropout=0.2"], output=tmp_path / "with")
    assert all(record["consistency"] > 0 for record in folder.records("train"))
    folder = api.train(recipe_file, R_DROP, output=tmp_path / "without")
    assert all(record["consistency"] is None for record in folder.records("train"))
    assert "every dropout rate is 0, so the consistency loss is exactly 0: left out" in notices(folder)


def test_the_named_r_drop_trains_through_both_passes(recipe_file):
    recipe = load(recipe_file, ["dropout.method=r-drop"])
    assert recipe.method.consistency is not None
    assert (recipe.method.consistency.gradient, recipe.method.consistency.weight) == ("both", 0.5)
    one = load(recipe_file, ["dropout.method=r-drop", "dropout.gradient=one"]).method.consistency
    assert one is not None
    assert one.gradient == "one"


def test_a_metric_that_stands_still_leaves_the_choice_to_the_loss():
    seen = [
        {"loss": 2.0, "bleu": 0.0},
        {"loss": 1.0, "bleu": 0.0},
        {"loss": 1.5, "bleu": 0.0},
        {"loss": 1.5, "bleu": 0.1},
    ]
    watcher = looks.Looks(
        look=None, keep=None, tell=print, at=[], criterion="bleu", patience=None, counters=lambda: (0, 0)  # type: ignore[arg-type]
    )  # fmt: skip
    chosen = []
    for step, validation in enumerate(seen):
        best = watcher._improves(validation)
        chosen.append(best)
        watcher.curve.append(looks.Evaluated(step, 0.0, {}, validation, {}, best, 0.0))
    assert chosen == [True, True, False, True]


def test_a_decoder_s_run_says_a_thing_once_and_shows_what_is_learned(generation_file, tmp_path):
    from hkft.events import Notice, Sample

    heard: list[Event] = []
    asked = ["diagnostics.generate=2", "generation.metrics=[meteor, rouge_l]"]
    done = api.train(generation_file, asked, output=tmp_path / "run", tell=heard.append)
    texts = [event.text for event in heard if isinstance(event, Notice)]
    assert len(texts) == len(set(texts))
    assert len(notices(done)) == len(set(notices(done)))
    (sample,) = [event for event in heard if isinstance(event, Sample)]
    (prompt, unlearned), (completion, learned) = sample.pieces
    assert (unlearned, learned) == (False, True)
    assert prompt.endswith(" ->")
    assert completion.endswith("</s>")


def test_text_as_a_criterion_needs_text_to_be_written(generation_file, tmp_path):
    with pytest.raises(RecipeError, match="generation has no metric 'bleu'") as caught:
        api.train(generation_file, ["diagnostics.metric=bleu"], output=tmp_path / "run")
    assert caught.value.problems[0].hint == "set diagnostics.generate: text is written at the looks"


def test_an_interrupted_run_of_rows_end_to_end_resumes_to_the_same_end(generation_file, tmp_path):
    settings = ["data.padding_free=true", "train.num_train_epochs=2", "generation.max_new_tokens=4"]
    whole = api.train(generation_file, settings, output=tmp_path / "whole")

    def stop(event: Event) -> None:
        if isinstance(event, TrainStep) and event.step == 4:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        api.train(generation_file, settings, output=tmp_path / "cut", tell=stop)
    resumed = api.train(generation_file, settings, output=tmp_path / "cut", resume=True)
    one, two = read_json(whole.summary), read_json(resumed.summary)
    assert one["steps"] == two["steps"]
    assert two["final"]["validation"]["loss"] == pytest.approx(one["final"]["validation"]["loss"], rel=1e-6)


def test_more_steps_than_anybody_trains_are_refused(recipe_file, tmp_path):
    with pytest.raises(RecipeError, match="no run makes so many steps") as caught:
        api.train(recipe_file, ["train.num_train_epochs=1e12"], output=tmp_path / "run")
    assert caught.value.problems[0].allowed == "up to 10,000,000"
    assert not (tmp_path / "run").exists()


def test_a_run_is_written_by_one_process(recipe_file, tmp_path):
    seen = []

    def listen(event: Event) -> None:
        if isinstance(event, TrainStep) and not seen:
            seen.append(RunFolder(tmp_path / "run").busy)
            with (
                pytest.raises(UsageError, match="another process is writing this run"),
                RunFolder(tmp_path / "run").held(),
            ):
                pass

    done = api.train(recipe_file, ["train.max_steps=2"], output=tmp_path / "run", tell=listen)
    assert seen == [True]
    assert not done.busy
    assert not (done.path / ".lock").exists()
    (done.path / ".lock").touch()  # as a process that was killed leaves it
    assert not done.busy


def test_a_file_system_without_locks_is_written_all_the_same(recipe_file, tmp_path, monkeypatch):
    def without(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", without)
    done = api.train(recipe_file, ["train.max_steps=2"], output=tmp_path / "run")
    (done.path / ".lock").touch()
    assert (done.status, done.busy) == ("finished", False)


@pytest.mark.parametrize("state", ["runs", "finished"])
def test_a_run_that_was_faster_is_left_as_it_is(recipe_file, tmp_path, state):
    """It began while this one loaded its model, in a folder that was not there before."""
    theirs, held = RunFolder(tmp_path / "run"), ExitStack()

    def listen(event: Event) -> None:
        if isinstance(event, Stage) and event.text.startswith("loading"):
            held.enter_context(theirs.held())
            write_text(theirs.resolved, "theirs")
            if state == "finished":
                write_json(theirs.summary, {"status": "finished"})
                held.close()

    told = {"runs": "another process is writing this run", "finished": "there is a finished run in this folder already"}
    with held, pytest.raises(UsageError, match=told[state]) as raised:
        api.train(recipe_file, output=theirs.path, tell=listen)
    assert raised.value.problems[0].where == str(theirs.path)
    assert theirs.resolved.read_text() == "theirs"
    assert not theirs.recipe.exists()


def test_a_lock_that_a_killed_process_left_is_no_content(recipe_file, tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    folder.lock.touch()
    assert api.train(recipe_file, ["train.max_steps=1"], output=folder.path).status == "finished"
