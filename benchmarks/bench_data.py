"""The share of a training step spent waiting for data, in whole Lightning runs on token stores."""

import statistics

from benchmarks.measuring import Goal, Options, Report
from benchmarks.studies import Size, experiment_130, make_inputs, rings, size_of, trunk_of
from benchmarks.trainings import sweep_run

GOAL = 0.02
STEPS = {"rings": 300, "130 tokens": 60}


def run(options: Options) -> Report:
    report = Report(
        "data",
        "Waiting for data: the time in the calls for the next batch, in a run as a sweep does it",
        ("study", "size", "batch", "steps", "images/s", "milliseconds a step", "microseconds waiting", "share"),
    )
    size = Size(8, 64, 8)
    studies = {"rings": (rings(), 12), "130 tokens": (experiment_130(size), size.depth)}
    for study, (experiment, depth) in studies.items():
        trunk = trunk_of(experiment, depth)
        images = 256 if options.quick else 8192
        inputs = make_inputs(options.folder / f"data {study}", experiment, options.execution(), images)
        steps = 6 if options.quick else STEPS[study]
        rows = [sweep_run(trunk, inputs, steps, options.folder) for _ in range(options.rounds(3))]
        share = statistics.median(float(row["data_wait_share"]) for row in rows)
        speed = statistics.median(float(row["images_per_second"]) for row in rows)
        step_seconds = trunk.batch_size / speed
        title = size_of(trunk).title
        waiting = share * step_seconds * 1e6
        report.rows.append((study, title, trunk.batch_size, steps, speed, step_seconds * 1e3, waiting, share))
        goal = f"{study}, {title}: at most {GOAL:.0%} of a step spent waiting for data"
        report.goals.append(Goal(goal, f"{share:.2%}", share <= GOAL))
    return report
