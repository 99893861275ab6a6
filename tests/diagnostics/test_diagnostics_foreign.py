import json
import math
import random
from pathlib import Path

import pytest

from hkft.diagnostics.curve import Point
from hkft.diagnostics.foreign import LEARNING, NO_VALIDATION, READ, Foreign, read
from hkft.diagnostics.verdict import verdict
from hkft.errors import DataError, HkftError, UsageError

AVERAGED = "the training loss of an evaluation is the mean of those logged since the evaluation before it"
SPEED = {"eval_runtime": 0.0165, "eval_samples_per_second": 1933.889, "eval_steps_per_second": 241.736}
SUMMARY = {
    "epoch": 1.5,
    "step": 12,
    "total_flos": 9372672.0,
    "train_loss": 0.6814615428447723,
    "train_runtime": 0.8744,
    "train_samples_per_second": 109.788,
    "train_steps_per_second": 13.724,
}


def learned(step: int, loss: float | str | None) -> dict:
    return {"epoch": step / 8, "grad_norm": 0.22, "learning_rate": 0.009, "loss": loss, "step": step}


def evaluated(step: int, loss: float | None, **metrics: float) -> dict:
    named = {f"eval_{name}": value for name, value in metrics.items()}
    timing = {"eval_model_preparation_time": 0.0003, **SPEED}
    return {"epoch": step / 8, "eval_loss": loss, **named, **timing, "step": step}


# The log_history that transformers 5.24 wrote of 12 steps of a tiny BERT: `trainer.train()`, then `trainer.evaluate()`.
HISTORY = [
    learned(2, 0.6908591389656067),
    learned(4, 0.697645902633667),
    evaluated(4, 0.7113674879074097, accuracy=0.40625, f1=0.5),
    learned(6, 0.7070171236991882),
    learned(8, 0.6746376752853394),
    evaluated(8, 0.6841657757759094, accuracy=0.5625, f1=0.5),
    learned(10, 0.667687177658081),
    learned(12, 0.6509222388267517),
    evaluated(12, 0.673711895942688, accuracy=0.8125, f1=0.5),
    SUMMARY,
    evaluated(12, 0.673711895942688, accuracy=0.8125, f1=0.5),
]


def state(history: object) -> str:
    document = {
        "best_global_step": None,
        "best_metric": None,
        "best_model_checkpoint": None,
        "epoch": 1.5,
        "eval_steps": 4,
        "global_step": 12,
        "is_world_process_zero": True,
        "log_history": history,
        "logging_steps": 2,
        "max_steps": 12,
        "stateful_callbacks": {"TrainerControl": {"args": {"should_log": False}, "attributes": {}}},
        "train_batch_size": 8,
        "trial_name": None,
    }
    return json.dumps(document, indent=2, sort_keys=True)


def lines(*rows: object) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.fixture
def written(tmp_path: Path):
    def write(text: str | bytes, name: str = "trainer_state.json") -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


def losses(foreign: Foreign) -> list[tuple[int, float, float]]:
    return [(point.step, point.train_loss, point.validation_loss) for point in foreign.curve]


def as_text(foreign: Foreign) -> str:
    """`losses`, to be compared although NaN is not NaN."""
    return " ".join(map(str, losses(foreign)))


def refusal(path: Path, kind: type[HkftError] = DataError) -> str:
    with pytest.raises(kind) as caught:
        read(path)
    return str(caught.value).replace(str(path), "FILE")


class TestTrainerState:
    def test_a_real_one_whole(self, written):
        assert read(written(state(HISTORY))) == Foreign(
            curve=[
                Point(4, 0.6942525207996368, 0.7113674879074097, {"accuracy": 0.40625, "f1": 0.5}, eval_mode=False),
                Point(8, 0.6908273994922638, 0.6841657757759094, {"accuracy": 0.5625, "f1": 0.5}, eval_mode=False),
                Point(12, 0.6593047082424164, 0.673711895942688, {"accuracy": 0.8125, "f1": 0.5}, eval_mode=False),
            ],
            metric="accuracy",
            source="transformers' trainer_state.json",
            notes=(
                LEARNING,
                "1 evaluation after the end of training left out: the model may have been the best checkpoint again, "
                "and the rows others",
                AVERAGED,
            ),
        )

    def test_the_verdict_reads_the_curve(self, written):
        train, validation = [1.0, 0.7, 0.4, 0.2, 0.1, 0.05], [0.9, 0.7, 0.6, 0.8, 1.0, 1.3]
        pairs = zip(range(10, 70, 10), train, validation, strict=True)
        history = [entry for step, a, b in pairs for entry in (learned(step, a), evaluated(step, b))]
        foreign = read(written(state(history)))
        assert verdict(foreign.curve, metric=foreign.metric).text == (
            "Overfitting since step 30: validation loss rose from 0.600 to 1.300 while the training loss fell from "
            "0.400 to 0.050 (gap 1.250)."
        )

    def test_the_best_checkpoint_loaded_at_the_end_does_not_hide_the_turn(self, written):
        history = [learned(4, 0.5), evaluated(4, 0.4), learned(8, 0.1), evaluated(8, 0.9), SUMMARY, evaluated(8, 0.4)]
        assert losses(read(written(state(history)))) == [(4, 0.5, 0.4), (8, 0.1, 0.9)]

    def test_the_only_evaluation_may_come_after_the_end(self, written):
        foreign = read(written(state([learned(2, 0.5), learned(4, 0.25), SUMMARY, evaluated(4, 0.4)])))
        assert losses(foreign) == [(4, 0.375, 0.4)]
        assert foreign.notes == (LEARNING, AVERAGED)

    def test_the_summary_is_no_training_loss(self, written):
        text = refusal(written(state([evaluated(4, 0.4), SUMMARY])))
        assert text.startswith("FILE: no training loss is in this file\n  found: epoch, eval_loss, eval_model_prep")
        assert text.endswith(
            "  allowed: loss, train_loss, training_loss and the like\n"
            "  hint: log it at least as often as you evaluate: logging_steps in transformers"
        )

    def test_of_several_evaluation_sets_the_first_by_name(self, written):
        def of(name: str, step: int, loss: float, accuracy: float) -> dict:
            names = {"loss": loss, "accuracy": accuracy, "runtime": 0.2, "samples_per_second": 83.7}
            return {"epoch": step / 8, "step": step} | {f"eval_{name}_{key}": value for key, value in names.items()}

        history = [
            learned(2, 0.6),
            of("hard", 4, 0.8, 0.6),
            of("dev", 4, 0.7, 0.7),
            of("dev_short", 4, 0.1, 0.9),
            learned(6, 0.4),
            of("hard", 8, 0.9, 0.6),
            of("dev", 8, 0.6, 0.8),
            of("dev_short", 8, 0.1, 0.9),
        ]
        foreign = read(written(state(history)))
        assert foreign.curve == [
            Point(4, 0.6, 0.7, {"accuracy": 0.7}, eval_mode=False),
            Point(8, 0.4, 0.6, {"accuracy": 0.8}, eval_mode=False),
        ]
        assert foreign.notes == (
            LEARNING,
            "of several evaluation sets, eval_dev_loss is read; the others are eval_dev_short_loss, eval_hard_loss",
        )

    def test_eval_loss_goes_before_the_sets_with_names(self, written):
        history = [learned(2, 0.6), {"step": 2, "eval_dev_loss": 0.1}, evaluated(2, 0.5)]
        assert losses(read(written(state(history)))) == [(2, 0.6, 0.5)]

    def test_trl(self, written):
        sft = {"entropy": 1.1, "num_tokens": 61786.0, "mean_token_accuracy": 0.71}
        foreign = read(written(state([learned(2, 0.6) | sft, evaluated(2, 0.5, **sft)])))
        assert foreign.curve == [Point(2, 0.6, 0.5, {"entropy": 1.1, "mean_token_accuracy": 0.71}, eval_mode=False)]
        assert foreign.metric == "mean_token_accuracy"

        dpo = {"rewards/margins": 0.4, "rewards/accuracies": 0.75, "logps/chosen": -12.0}
        assert read(written(state([learned(2, 0.6), evaluated(2, 0.5, **dpo)]))).metric == "rewards/accuracies"

    def test_a_step_logged_twice_counts_with_its_last(self, written):
        history = [
            learned(2, 0.6),
            evaluated(2, 0.5, f1=0.1),
            learned(4, 9.0),
            learned(4, 0.4),
            evaluated(2, 0.3, f1=0.2),
        ]
        assert read(written(state(history))).curve == [Point(2, 0.6, 0.3, {"f1": 0.2}, eval_mode=False)]

    def test_evaluations_before_any_training_loss_are_left_out_and_counted(self, written):
        history = [evaluated(0, 0.9), evaluated(2, 0.8), learned(4, 0.6), evaluated(4, 0.5)]
        foreign = read(written(state(history)))
        assert losses(foreign) == [(4, 0.6, 0.5)]
        assert foreign.notes == (LEARNING, "2 evaluations before the first training loss left out")

    def test_where_evaluations_are_more_frequent_the_last_training_loss_stands(self, written):
        foreign = read(written(state([learned(4, 0.6), evaluated(4, 0.5), evaluated(6, 0.4), evaluated(8, 0.3)])))
        assert losses(foreign) == [(4, 0.6, 0.5), (6, 0.6, 0.4), (8, 0.6, 0.3)]
        assert foreign.notes == (
            LEARNING,
            "2 evaluations with no training loss logged since the one before: the last stands",
        )

    def test_losses_that_are_not_finite_stay_in_the_curve_and_are_counted(self, written):
        history = [learned(2, 0.6), evaluated(2, 0.5), learned(4, math.nan), evaluated(4, math.inf), evaluated(6, 0.7)]
        foreign = read(written(state(history)))
        assert as_text(foreign) == "(2, 0.6, 0.5) (4, nan, nan) (6, nan, 0.7)"
        assert foreign.notes[-1] == "2 losses are not finite, the first at step 4: training may have diverged there"

    def test_a_run_that_diverged_is_not_called_healthy(self, written):
        history = [entry for step in range(2, 10, 2) for entry in (learned(step, 1 / step), evaluated(step, 1 / step))]
        lost = [learned(10, math.nan), evaluated(10, math.nan, accuracy=0.5)]
        assert verdict(read(written(state(history))).curve).name == "healthy"
        curve = read(written(state(history + lost))).curve
        assert (curve[-1].step, verdict(curve).name) == (10, "unclear")

    def test_one_overflow_among_training_losses_is_no_divergence(self, written):
        history = [learned(2, 0.6), learned(4, math.inf), learned(6, 0.4), evaluated(6, 0.5)]
        assert losses(read(written(state(history)))) == [(6, 0.5, 0.5)]

    def test_a_diverged_point_without_metrics_does_not_hide_the_metric(self, written):
        history = [learned(2, 0.6), evaluated(2, 0.5, f1=0.5), evaluated(4, math.nan)]
        assert read(written(state(history))).metric == "f1"

    @pytest.mark.parametrize("junk", [None, [1.0], {"a": 1}, "high", True, "", "null"])
    def test_what_is_no_number_is_no_loss(self, written, junk):
        history = [learned(2, 0.6), learned(4, junk), evaluated(4, 0.5), evaluated(6, junk), junk]  # type: ignore
        assert losses(read(written(state(history)))) == [(4, 0.6, 0.5)]

    @pytest.mark.parametrize("huge", [10**400, "NaN", 1e300, "-inf"])
    def test_what_is_no_finite_number_is_a_loss_that_is_lost(self, written, huge):
        history = [learned(2, 0.6), evaluated(2, 0.5), learned(4, huge), evaluated(4, huge)]
        assert as_text(read(written(state(history)))) == "(2, 0.6, 0.5) (4, nan, nan)"

    def test_numbers_may_be_written_as_text(self, written):
        assert losses(read(written(state([{"step": "2", "loss": "0.5", "eval_loss": "4e-1"}])))) == [(2, 0.5, 0.4)]

    def test_the_history_alone_will_do(self, written):
        assert read(written(json.dumps(HISTORY), "history.json")).source == "rows of JSON"


class TestFolders:
    def test_the_folder_s_own_state_goes_first(self, written, tmp_path):
        written(state(HISTORY))
        written(state(HISTORY[:3]), "checkpoint-40/trainer_state.json")
        foreign = read(str(tmp_path))
        assert len(foreign.curve) == 3
        assert foreign.notes[1] == "read from trainer_state.json"

    def test_else_the_last_checkpoint_s_by_number(self, written, tmp_path):
        written(state(HISTORY[:3]), "checkpoint-4/trainer_state.json")
        written(state(HISTORY[:9]), "checkpoint-12/trainer_state.json")
        written("", "checkpoint-100/model.safetensors")
        written("", "checkpoint-last/trainer_state.json")
        foreign = read(tmp_path)
        assert len(foreign.curve) == 3
        assert foreign.notes[1] == "read from checkpoint-12/trainer_state.json"
        assert len(read(tmp_path / "checkpoint-4").curve) == 1

    def test_else_llama_factory_s_log(self, written, tmp_path):
        written(lines({"current_steps": 5, "loss": 0.5, "eval_loss": 0.4}), "trainer_log.jsonl")
        assert read(tmp_path).source == "LLaMA-Factory's trainer_log.jsonl"

    def test_else_it_says_what_is_there(self, written, tmp_path):
        for number in range(14):
            written("", f"weights-{number:02}.bin")
        assert refusal(tmp_path) == (
            "FILE: no training curve is in this folder\n"
            f"  found: {', '.join(f'weights-{number:02}.bin' for number in range(12))}, ...\n"
            "  allowed: trainer_state.json, checkpoint-*/trainer_state.json or trainer_log.jsonl; any other file by "
            "its name"
        )

    def test_an_empty_folder(self, tmp_path):
        assert "\n  found: an empty folder\n" in refusal(tmp_path)


class TestTables:
    def test_llama_factory(self, written):
        def row(step: int, **values: float) -> dict:
            times = {
                "elapsed_time": "0:00:21",
                "remaining_time": "0:01:24",
                "throughput": 1043.2,
                "total_tokens": 21504,
            }
            return {
                "current_steps": step,
                "total_steps": 20,
                **values,
                "epoch": step / 10,
                "percentage": 5.0 * step,
                **times,
            }

        text = lines(
            row(5, loss=0.9, lr=1e-4), row(10, loss=0.7, lr=5e-5), row(10, eval_loss=0.75), row(15, loss=0.5, lr=2e-5),
            row(20, loss=0.3, lr=0.0), row(20, eval_loss=0.8), row(20),
        )  # fmt: skip
        assert read(written(text, "trainer_log.jsonl")) == Foreign(
            curve=[Point(10, 0.8, 0.75, {}, eval_mode=False), Point(20, 0.4, 0.8, {}, eval_mode=False)],
            metric=None,
            source="LLaMA-Factory's trainer_log.jsonl",
            notes=(LEARNING, AVERAGED),
        )

    def test_lightning_s_csv_logger_with_blanks_in_alternating_rows(self, written):
        text = (
            "epoch,step,train_loss,val_acc,val_loss\r\n"
            "0,49,0.9,,\r\n0,99,0.7,,\r\n0,99,,0.6,0.75\r\n1,149,0.5,,\r\n1,199,0.3,,\r\n1,199,,0.7,0.8\r\n"
        )
        foreign = read(written(text, "metrics.csv"))
        assert losses(foreign) == [(99, 0.8, 0.75), (199, 0.4, 0.8)]
        assert foreign.metric == "acc"
        assert foreign.source == "a csv table"
        assert foreign.notes == (LEARNING, AVERAGED)

    def test_lightning_s_suffixes(self, written):
        text = "step,train_loss_step,train_loss_epoch,val_loss_epoch\n9,0.5,,\n9,,,0.6\n9,,0.55,\n"
        assert losses(read(written(text, "metrics.csv"))) == [(9, 0.5, 0.6)]

    def test_mlx_lm(self, written):
        text = lines(
            {"iteration": 0, "val_loss": 2.5, "val_time": 3.1},
            {
                "iteration": 9,
                "train_loss": 2.0,
                "iterations_per_second": 0.4,
                "tokens_per_second": 90,
                "peak_memory": 3.2,
            },
            {"iteration": 10, "val_loss": 1.9, "val_time": 3.1},
        )
        foreign = read(written(text, "log.jsonl"))
        assert foreign.curve == [Point(10, 2.0, 1.9, {}, eval_mode=False)]
        assert foreign.source == "rows of JSON"
        assert foreign.notes == (LEARNING, "1 evaluation before the first training loss left out")

    def test_torchtune_s_disk_logger(self, written):
        text = (
            "Step 1 | loss:0.9 lr:2e-05 tokens_per_second_per_gpu:97.1 \nStep 2 | loss:0.7 lr:4e-05 \n"
            "Step 2 | val_loss:0.8 \nsomething else\nStep 99999999999999999 | loss:1 \n"
        )
        foreign = read(written(text, "log_1717171717.txt"))
        assert losses(foreign) == [(2, 0.8, 0.8)]
        assert foreign.source == "torchtune's log"

    @pytest.mark.parametrize(
        "header",
        [
            "step,train_loss,eval_loss",
            "Global_Step\tTraining_Loss\tValidation_Loss",
            "iter;loss;val_loss",
            "trainer/global_step,train/loss,val/loss",
            "train/global_step,train/loss,eval/loss",
            " Step , Loss , Valid_Loss ",
            '"step","loss","test_loss"',
        ],
    )
    def test_the_usual_names_in_any_case(self, written, header):
        sign = next(sign for sign in "\t;," if sign in header)
        rows = [
            header,
            "1 0.5 0.6".replace(" ", sign),
            "2 NaN 0.5".replace(" ", sign),
            "3 0.3 nan".replace(" ", sign),
            "4",
        ]
        foreign = read(written("\n" + "\n".join(rows), "curve.csv"))
        assert losses(foreign) == [(1, 0.5, 0.6), (2, 0.5, 0.5)]
        assert foreign.source == ("a tsv table" if sign == "\t" else "a csv table")

    def test_a_byte_order_mark_is_no_part_of_a_name(self, written):
        assert losses(read(written("\ufeffstep,loss,eval_loss\n1,0.5,0.6\n", "curve.csv"))) == [(1, 0.5, 0.6)]

    def test_a_tsv_that_pandas_wrote_with_its_index(self, written):
        assert losses(read(written("\tstep\tloss\teval_loss\n0\t5\t0.5\t0.6\n", "curve.tsv"))) == [(5, 0.5, 0.6)]

    def test_a_history_as_a_table_keeps_its_summary_apart(self, written):
        text = "step,loss,eval_loss,train_runtime,train_loss\n2,0.6,,,\n2,,0.5,,\n2,,,9.1,0.77\n2,,0.1,,\n"
        assert losses(read(written(text, "history.csv"))) == [(2, 0.6, 0.5)]

    def test_a_test_loss_is_taken_for_want_of_another_and_told(self, written):
        foreign = read(written("step,loss,test_loss\n1,0.5,0.6\n", "curve.csv"))
        assert foreign.notes == (LEARNING, "test_loss is read as the validation loss: there is no other")

    def test_epochs_stand_in_for_steps(self, written):
        foreign = read(written("epoch,loss,val_loss\n0.5,0.9,\n1,0.7,0.8\n2,0.5,0.6\n", "curve.csv"))
        assert losses(foreign) == [(2, 0.8, 0.8), (3, 0.5, 0.6)]
        assert foreign.notes[1] == "there are no steps, only epochs: the steps are the epochs logged, numbered 1 to n"

    def test_steps_that_start_anew_at_each_epoch_do_not_overwrite_each_other(self, written):
        foreign = read(
            written("epoch,step,loss,val_loss\n1,50,0.9,\n1,100,0.7,0.8\n2,50,0.5,\n2,100,0.3,0.6\n", "c.csv")
        )
        assert losses(foreign) == [(2, 0.8, 0.8), (4, 0.4, 0.6)]
        assert foreign.notes[1] == "step starts anew at each epoch: the steps are numbered 1 to n"

    def test_a_resumed_run_overwrites_what_it_repeats(self, written):
        foreign = read(written("epoch,step,loss,val_loss\n1,50,9,9\n2,100,9,9\n1,50,0.5,0.6\n2,100,0.3,0.4\n", "c.csv"))
        assert losses(foreign) == [(50, 0.5, 0.6), (100, 0.3, 0.4)]

    @pytest.mark.parametrize(
        ("names", "metric"),
        [
            ("f1 accuracy", "accuracy"),
            ("mean_token_accuracy f1", "f1"),
            ("macro_f1", "macro_f1"),
            ("matthews_correlation", "matthews_correlation"),
            ("rougeL", "rougeL"),
            ("mse", "mse"),
            ("perplexity brier entropy wer", None),  # the loss again, or which way is better is not known
            ("runtime samples_per_second hard_loss", None),
        ],
    )
    def test_the_metric_it_is_best_told_by(self, written, names, metric):
        row = {"step": 1, "loss": 0.5, "eval_loss": 0.6} | {f"eval_{name}": 0.5 for name in names.split()}
        assert read(written(lines(row), "log.jsonl")).metric == metric

    def test_a_metric_that_a_point_lacks_does_not_tell_the_curve(self, written):
        rows = [
            {"step": 1, "loss": 1, "val_loss": 1, "val_accuracy": 1, "val_f1": 1},
            {"step": 2, "val_loss": 1, "val_f1": 1},
        ]
        assert read(written(lines(*rows), "log.jsonl")).metric == "f1"

    def test_large_losses_have_a_finite_mean(self, written):
        rows = [{"step": step, "loss": 1e100, "val_loss": 1e100} for step in range(5)]
        assert all(math.isfinite(point.train_loss) for point in read(written(lines(*rows), "log.jsonl")).curve)


def table(sign: str, comma: str) -> str:
    rows = [("step", "train_loss", "eval_loss"), *((10 * n, f"{1 / n:.3f}", f"{2 / n:.3f}") for n in range(1, 6))]
    return "\n".join(sign.join(str(cell).replace(".", comma) for cell in row) for row in rows)


class TestCommas:
    @pytest.mark.parametrize("sign", [";", "\t", ","])
    @pytest.mark.parametrize("comma", [".", ","])
    def test_a_spreadsheet_s_table_is_the_same_in_every_country(self, written, sign, comma):
        quote = '"' if sign == comma else ""
        text = table(f"{quote}{sign}{quote}", comma).replace("\n", f"{quote}\n{quote}")
        foreign = read(written(f"{quote}{text}{quote}\n", "curve.csv"))
        assert losses(foreign) == [(10 * n, round(1 / n, 3), round(2 / n, 3)) for n in range(1, 6)]
        commas = " with decimal commas" if comma == "," else ""
        assert foreign.source == ("a tsv table" if sign == "\t" else "a csv table") + commas

    def test_powers_of_ten_and_negatives(self, written):
        foreign = read(written("Step;Loss;Val Loss;Val R2\n10,0;1,5E-03;,5;-1,5\n", "curve.csv"))
        assert foreign.curve == [Point(10, 0.0015, 0.5, {"R2": -1.5}, eval_mode=False)]

    @pytest.mark.parametrize(
        ("sign", "row", "found"),
        [
            ("\t", ["1,000", "0.5", "0.6"], "1,000 under step"),
            (";", ["1.000", "0,5", "0,6"], "0,5 under train_loss"),
            (";", ["10", "1.234,5", "0.6"], "1.234,5 under train_loss"),
            (",", ["10", "0.5", '"1,234.5"'], "1,234.5 under eval_loss"),
        ],
    )
    def test_what_may_be_decimal_or_part_thousands_is_asked(self, written, sign, row, found):
        text = "\n".join(sign.join(each) for each in (["step", "train_loss", "eval_loss"], ["5", "1", "2"], row))
        assert refusal(written(text, "curve.csv")) == (
            "FILE:3: this comma may be a decimal comma, or part thousands: other numbers have a point\n"
            f"  found: {found}\n  hint: write every number with a decimal point, and nothing between thousands"
        )

    def test_thousands_in_a_column_that_is_not_read_do_not_matter(self, written):
        assert losses(read(written("step;loss;val_loss;tokens\n1;0.5;0.6;1,000\n", "c.csv"))) == [(1, 0.5, 0.6)]

    def test_decimal_commas_between_commas_are_not_read_as_cells(self, written):
        assert refusal(written("step,train_loss,eval_loss\n10,0,693,0,701\n", "curve.csv")) == (
            "FILE:2: this line has 5 cells, and the header 3\n  found: 10, 0, 693, 0, 701\n"
            "  hint: where numbers have decimal commas, part the cells by semicolons or tabs"
        )

    def test_blanks_at_the_end_of_a_line_are_no_cells(self, written):
        assert losses(read(written("step,loss,eval_loss\n1,0.5,0.6,,\n", "curve.csv"))) == [(1, 0.5, 0.6)]


class TestUnread:
    def test_values_that_are_no_numbers_are_told_with_the_first_of_each_column(self, written):
        text = "step,loss,eval_loss,eval_f1\n1,0.5,0.6,0.1\n\n2,0.4,n/a,0.2\n3,,null,\n4,0.3,-,bad\n1.5,0.2,0.3,0\n"
        foreign = read(written(text, "curve.csv"))
        assert losses(foreign) == [(1, 0.5, 0.6)]
        assert foreign.notes == (
            LEARNING,
            "1 value of step could not be read, the first on line 7: '1.5'",
            "2 values of eval_loss could not be read, the first on line 4: 'n/a'",
            "1 value of eval_f1 could not be read, the first on line 6: 'bad'",
            "1 row with a loss but without a step left out",
        )

    @pytest.mark.parametrize("blank", ["", " ", "NaN", "null", "None"])
    def test_blanks_are_not_told(self, written, blank):
        assert read(written(f"step,loss,val_loss\n1,0.5,0.6\n2,0.4,{blank}\n", "c.csv")).notes == (LEARNING,)

    @pytest.mark.parametrize(("junk", "told"), [("high", "'high'"), (True, "True"), ({"f1": 1}, "no single value")])
    def test_in_json_too(self, written, junk, told):
        foreign = read(written(state([learned(2, 0.6), evaluated(2, 0.5), evaluated(4, junk)])))
        assert foreign.notes == (LEARNING, f"1 value of eval_loss could not be read, the first in entry 3: {told}")
        foreign = read(written("Step 1 | loss:0.9 val_loss:0.8\nStep 2 | loss:0.9 val_loss:oh\n", "log.txt"))
        assert foreign.notes[1] == "1 value of val_loss could not be read, the first on line 2: 'oh'"

    def test_a_loss_without_a_step_is_told(self, written):
        foreign = read(written("step,loss,val_loss\n1,0.5,0.6\n,0.4,0.5\n,,\n2,0.3,0.4\n", "c.csv"))
        assert losses(foreign) == [(1, 0.5, 0.6), (2, 0.3, 0.4)]
        assert foreign.notes == (LEARNING, "1 row with a loss but without a step left out")


class TestExports:
    def test_lightning_s_names_by_step_and_epoch(self, written):
        text = "epoch,step,train/loss_epoch,train/loss_step,val/acc,val/loss\n0,9,,0.5,,\n0,9,,,0.7,0.6\n0,9,0.55,,,\n"
        foreign = read(written(text, "metrics.csv"))
        assert foreign.curve == [Point(9, 0.5, 0.6, {"acc": 0.7}, eval_mode=False)]

    def test_w_and_b_s_names_have_the_run_before_them(self, written):
        names = [f"a - b-1 - {name}" for name in ("train/loss", "eval/loss", "eval/accuracy", "eval/accuracy__MIN")]
        header = ",".join(f'"{name}"' for name in ("Step", *names))
        foreign = read(written(f'{header}\n"5","0.5","","",""\n"6","","0.6","0.7","0.7"\n', "wandb.csv"))
        assert foreign.curve == [Point(6, 0.5, 0.6, {"accuracy": 0.7}, eval_mode=False)]

    def test_several_runs_of_w_and_b_s_are_not_mixed(self, written):
        text = "Step,red-1 - train/loss,blue-2 - eval/loss\n5,0.5,0.6\n"
        assert refusal(written(text, "wandb.csv")) == (
            "FILE: several runs are in this table\n  found: red-1, blue-2\n  hint: keep the columns of one run"
        )

    @pytest.mark.parametrize("header", ["Wall time,Step,Value", "x,Step,red-1 - eval/loss", "x,Step,red-1 - loss"])
    def test_a_curve_exported_alone(self, written, header):
        assert refusal(written(f"{header}\n1,5,0.5\n", "curve.csv")).endswith(
            "\n  hint: curves exported one by one, as TensorBoard and W&B do, go in one table: step, train_loss, "
            "eval_loss"
        )

    def test_what_a_trainer_prints(self, written):
        assert refusal(written("{'loss': 0.5, 'epoch': 1.0}\n", "out.log")).endswith(
            "\n  hint: JSON has double quotes; what a trainer prints is no JSON, but it writes the same to a "
            "trainer_state.json"
        )


class TestRefusals:
    def test_no_such_path(self, tmp_path):
        assert refusal(tmp_path / "gone.json", UsageError) == (
            f"FILE: there is no such file or folder\n  allowed: {READ}"
        )

    @pytest.mark.parametrize("path", ["a\0b", "a" * 5000])
    def test_a_path_that_cannot_be(self, path):
        with pytest.raises(UsageError, match="the path cannot be looked at"):
            read(path)

    def test_no_ordinary_file(self):
        with pytest.raises(DataError, match="/dev/null: this is no ordinary file"):
            read("/dev/null")

    @pytest.mark.parametrize(
        ("text", "found"),
        [
            ('"', "nothing that has a name"),
            ("name,price\ntea,3\n", "name, price"),
            ('{"model_type": "llama", "hidden_size": 64}', "model_type, hidden_size"),
            ('{"text": "a"}\n{"text": "b", "label": 1}\n', "text, label"),
            ("Dear reader,\nno curve here.\n", "Dear reader"),
            ("[1, 2, [3]]", "nothing that has a name"),
            ("{}", "nothing that has a name"),
            ("null", "null"),
            ('{"\\u001b[31m\\ud800": 1}', "?[31m?"),
        ],
    )
    def test_a_file_that_is_no_curve(self, written, text, found):
        expected = f"FILE: no training curve is in this file\n  found: {found}\n  allowed: {READ}"
        assert refusal(written(text, "some.file")) == expected

    def test_no_evaluation(self, written):
        assert refusal(written(state([learned(2, 0.5), SUMMARY]))) == (
            "FILE: no evaluation is in this file\n"
            "  found: epoch, grad_norm, learning_rate, loss, step\n"
            "  allowed: eval_loss, val_loss, validation_loss and the like\n"
            f"  hint: {NO_VALIDATION}"
        )
        assert 'eval_strategy="steps" and an eval dataset' in NO_VALIDATION

    def test_an_evaluation_that_never_is_finite_diverged_and_is_not_missing(self, written):
        assert as_text(read(written(state([learned(2, 0.5), evaluated(2, math.nan)])))) == "(2, 0.5, nan)"
        blank = refusal(written("step,train_loss,val_loss\n1,0.5,nan\n", "curve.csv"))
        assert "no evaluation is in this file\n  found: val_loss is there, but never a finite number\n" in blank

    def test_an_evaluation_that_never_is_a_number(self, written):
        text = refusal(written("step,train_loss,val_loss\n1,0.5,n/a\n", "curve.csv"))
        assert "\n  found: val_loss is there, but never a finite number: on line 2: 'n/a'\n" in text

    def test_no_finite_training_loss(self, written):
        text = refusal(written("step,train_loss,val_loss\n1,nan,0.5\n", "curve.csv"))
        assert "no training loss is in this file\n  found: train_loss is there, but never a finite number\n" in text

    def test_only_a_header(self, written):
        assert "found: val_loss is there, but never a finite number" in refusal(
            written("step,loss,val_loss\n", "c.csv")
        )

    def test_no_steps(self, written):
        assert refusal(written("loss,val_loss\n0.5,0.6\n", "c.csv")) == (
            "FILE: no steps are in this file\n  found: loss, val_loss\n"
            "  allowed: step, global_step, current_steps, current_step, iter, iteration, trainer_global_step, "
            "train_global_step, _step, or at least epoch"
        )

    def test_training_losses_only_after_the_evaluations(self, written):
        assert refusal(written(state([evaluated(2, 0.5), evaluated(4, 0.5), learned(6, 0.4)]))) == (
            "FILE: no evaluation in this file follows a training loss\n"
            "  found: training losses at step 6, evaluations at steps 2 to 4\n"
            "  hint: log the training loss at least as often as you evaluate: logging_steps in transformers"
        )

    def test_broken_json_has_its_line(self, written):
        whole = state(HISTORY)
        cut = whole[: whole.index('"eval_accuracy"') + 20]
        text = refusal(written(cut))
        assert text.startswith(f"FILE:{cut.count(chr(10)) + 1}:")
        assert text.split(": ", 1)[1] == (
            "this is broken JSON: Expecting ',' delimiter\n"
            "  found: the end of the line\n"
            "  hint: the file may be cut short, as while it is being written"
        )

    def test_broken_json_lines_have_theirs(self, written):
        assert refusal(written('{"step": 1}\n\n{"step": oh}\n', "log.jsonl")) == (
            "FILE:3:10: this is broken JSON: Expecting value\n"
            "  found: oh}\n"
            "  hint: the file may be cut short, as while it is being written"
        )
        assert refusal(written('{"step": \n{"step": 1}\n', "log.jsonl")).startswith("FILE:1:10: this is broken JSON")

    @pytest.mark.parametrize(
        "text", ["[" * 100_000, '{"step": ' + "1" * 5000 + "}", '{"a": 1}\n{"b": ' + "1" * 5000 + "}"]
    )
    def test_json_that_python_does_not_read(self, written, text):
        assert "this JSON cannot be read" in refusal(written(text, "log.jsonl"))

    def test_a_history_that_is_none(self, written):
        assert refusal(written(state({"step": 1}))) == (
            "FILE: log_history is no list\n  found: {'step': 1}\n  allowed: what transformers writes"
        )
        assert refusal(written(state([]))).startswith(
            "FILE: nothing was logged\n  found: an empty log_history\n  hint: "
        )

    @pytest.mark.parametrize("content", ["", " \n\t\r\n", "\ufeff"])
    def test_an_empty_file(self, written, content):
        assert refusal(written(content)) == f"FILE: the file is empty\n  allowed: {READ}"

    def test_a_binary_file(self, written):
        content = b"\x08\0\0\0\0\0\0\0{}" + bytes(20_000)
        assert refusal(written(content)) == f"FILE: this is binary, not text\n  found: a zero byte\n  allowed: {READ}"

    def test_text_that_is_not_utf8(self, written):
        assert refusal(written(b"step\n\xe9", "c.csv")) == (
            "FILE:2: this is not UTF-8 text\n  found: byte 0xe9\n  hint: save the file as UTF-8"
        )
        assert "found: UTF-16" in refusal(written("step".encode("utf-16"), "c.csv"))

    def test_a_table_with_a_cell_without_end(self, written):
        text = refusal(written('step,loss\n1,"' + "x" * 200_000, "c.csv"))
        assert text.startswith("FILE:2: this table cannot be read\n  found: field larger than field limit")


NAMES = [
    "step",
    "epoch",
    "loss",
    "eval_loss",
    "eval_f1",
    "eval_a_loss",
    "train_runtime",
    "train_loss",
    "test_loss",
    "",
    "é",
]
VALUES = [
    None,
    True,
    0,
    1,
    2,
    -1,
    0.5,
    "3",
    "x",
    "",
    "1e999",
    math.nan,
    math.inf,
    10**400,
    1e308,
    [1],
    {"a": [None]},
    "1_0",
]


@pytest.mark.parametrize("seed", range(300))
def test_whatever_the_content_there_is_a_curve_or_an_error_of_ours(written, seed):
    chance = random.Random(seed)

    sane = chance.random()  # from junk alone to numbers alone

    def row() -> object:
        names = chance.choices(NAMES, k=chance.randrange(9))
        full = {name: chance.randrange(9) if chance.random() < sane else chance.choice(VALUES) for name in names}
        return full if chance.random() < 0.5 + sane else chance.choice(VALUES)

    rows = [row() for _ in range(chance.randrange(12))]
    table = "\n".join(chance.choice(",;\t").join(str(chance.choice(VALUES + NAMES)) for _ in range(5)) for _ in rows)
    texts = [state(rows), lines(*rows), json.dumps(rows), f"step,loss,eval_loss,epoch\n{table}", table]
    text = chance.choice(texts)
    if chance.random() < 0.2 and text:
        place = chance.randrange(len(text))
        text = text[:place] + chance.choice(["", '"', "{", "\n", "\r", "\ud7ff", "NaN", ","]) + text[place + 1 :]
    try:
        foreign = read(written(text, "some.file"))
    except HkftError:
        return
    steps = [point.step for point in foreign.curve]
    assert steps == sorted(set(steps)) and steps
    for point in foreign.curve:
        assert all(map(math.isfinite, point.metrics.values()))
        assert not any(map(math.isinf, (point.train_loss, point.validation_loss)))
        assert not point.eval_mode
    verdict(foreign.curve, metric=foreign.metric)
