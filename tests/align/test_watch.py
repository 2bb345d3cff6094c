"""What a run tells while it runs."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import torch

from align.meter import Meter
from align.watch import DisplacementAlarm, MetricsFile, metric_name
from objectives import Mean, Output, Term

STATE = SimpleNamespace(is_world_process_zero=True, global_step=7)


def line(chosen: float, margin: float, logps: float = -50.0) -> dict[str, float]:
    return {"loss": 0.6, "displacement/chosen": chosen, "rewards/margins": margin, "logps/chosen": logps + chosen}


def alarms(*lines: dict[str, float]) -> list[str]:
    said: list[str] = []
    alarm = DisplacementAlarm(said.append)
    for entry in lines:
        alarm.on_log(None, STATE, None, logs=entry)
    return said


def test_alarm_when_chosen_falls_while_the_margin_rises():
    said = alarms(line(0.0, 0.0), line(-0.3, 0.1), line(-4.0, 0.5))
    assert len(said) == 1
    assert "Chosen responses lost 4.0 nats" in said[0]
    assert "add a likelihood term" in said[0]


def test_no_alarm_when_chosen_rises_or_the_margin_falls_or_little_happens():
    assert not alarms(line(0.0, 0.0), line(2.0, 0.5), line(4.0, 1.0))
    assert not alarms(line(0.0, 0.5), line(-4.0, 0.4), line(-8.0, 0.1))
    assert not alarms(line(0.0, 0.0), line(-0.2, 0.1), line(-0.3, 0.2))


def test_alarm_speaks_again_only_when_the_fall_has_doubled():
    assert len(alarms(line(0, 0), line(-4, 0.5), line(-5, 0.6), line(-6, 0.7), line(-9, 0.8), line(-10, 0.9))) == 2


def test_a_resumed_run_s_alarm_knows_what_was_said():
    lines = [line(0.0, 0.0), line(-4.0, 0.5)]
    said: list[str] = []
    alarm = DisplacementAlarm(said.append)
    alarm.replay(lines)
    alarm.on_log(None, STATE, None, logs=line(-5.0, 0.6))
    assert not said


def test_metrics_file_is_cut_back_to_the_checkpoint(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 3}\n{"step": 2, "loss": 2}\n{"step": 3, "loss": 1}\n{"step": 4, "lo')
    assert [entry["step"] for entry in MetricsFile(path).cut_after(2)] == [1, 2]
    assert [json.loads(text)["step"] for text in path.read_text().splitlines()] == [1, 2]


def test_names():
    assert metric_name("eval_ranking/accuracy") == "eval/ranking/accuracy"
    assert metric_name("rewards/margins") == "rewards/margins"


def output(total: float, metric: float, count: float) -> Output:
    return Output(
        terms={"likelihood": Term(values=torch.tensor(total), per="gold.token", coef=5.0)},
        metrics={"m": Mean(total=torch.tensor(metric), count=count)},
    )


def test_meter_adds_sums_and_counts_and_never_averages_means():
    """6 nats over 2 tokens and 1 over 8: 0.7 a token, where the mean of means would be 1.5625."""
    meter = Meter()
    meter.add(output(6.0, 1.0, 1.0), {"gold.token": 2.0})
    meter.add(output(1.0, 0.0, 3.0), {"gold.token": 8.0})
    assert meter.read() == {"loss/likelihood": 0.7, "m": 0.25}
    assert meter.read() == {}


def test_meter_survives_a_checkpoint_exactly():
    meter, again = Meter(), Meter()
    meter.add(output(0.1, 1 / 3, 1.0), {"gold.token": 7.0})
    again.load_state_dict(json.loads(json.dumps(meter.state_dict())))
    for each in (meter, again):
        each.add(output(0.2, 0.3, 1.0), {"gold.token": 3.0})
    assert again.read() == meter.read()


def test_meter_of_other_ranks_resumes_with_zeros_under_the_same_names():
    meter, other = Meter(), Meter()
    meter.add(output(1.0, 1.0, 1.0), {"gold.token": 1.0})
    other.load_state_dict(meter.state_dict(), first_rank=False)
    assert other.sums()[0] == meter.sums()[0]
    assert float(other.sums()[1].abs().sum()) == 0
