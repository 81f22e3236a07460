"""Whether what was asked for can be met: options are checked before any work, and points to predict are read."""

import math
from dataclasses import replace

from analysis.errors import TableError
from analysis.fitting.laws.registry import LAWS
from analysis.fitting.newton import OBJECTIVES
from analysis.grids.frontier import ALL_RUNS, FRONTIERS
from analysis.options import ANNEALING, FitOptions
from analysis.tables.repeats import REDUCTIONS
from analysis.tables.roles import ROLES, column
from analysis.tables.table import RunsTable

MOST_DRAWS = 100_000
LARGEST_SEED = 2**32 - 1
DELTAS = 1e-9, 1e6
BOUNDS = {"--budget": (1e-30, 1e60), "--tokens-from-flops": (1e-6, 1e12)}
"""Beyond these a law's numbers overflow; 6 is usual for the latter, or 6 times the tokens of an image."""


def check_options(options: FitOptions) -> None:
    """Refuses choices that no table could meet.

    Raises:
        TableError: naming the flag and what would be right.
    """
    for law in options.law:
        if law not in LAWS:
            raise TableError(f"unknown law {law!r}; the laws are {', '.join(LAWS)}")
    if options.compare and options.group is None:
        raise TableError(f"--compare {options.compare[0]} needs --group COLUMN, which names the groups")
    if len(options.compare) == 1:
        raise TableError(f"--compare {options.compare[0]} names one group; give it for two or more")
    if options.offset_source and options.offset is None:
        raise TableError("--offset-source says where a pinned offset comes from; it needs --offset")
    if options.delta != FitOptions.delta and options.objective != "huber":
        raise TableError(
            f"--delta {options.delta:g} is Huber's, and has no effect with --objective {options.objective}"
        )
    if options.objective not in OBJECTIVES:
        raise TableError(f"unknown objective {options.objective!r}; the objectives are {', '.join(OBJECTIVES)}")
    if options.reduce and options.reduce not in REDUCTIONS:
        raise TableError(f"unknown --reduce {options.reduce!r}; it takes {', '.join(REDUCTIONS)}")
    if options.by and not options.reduce:
        raise TableError(f"--by {options.by[0]} needs --reduce min, mean, median or last")
    if options.frontier and options.frontier not in (rules := (*FRONTIERS, ALL_RUNS)):
        raise TableError(f"unknown --frontier {options.frontier!r}; the rules are {', '.join(rules)}")
    if options.holdout_where and not options.holdout:
        raise TableError("--holdout-where and --no-holdout contradict each other; leave one of them away")
    if options.annealing_horizon is not None and not (
        ANNEALING in options.law and 1 < options.annealing_horizon < math.inf
    ):
        raise TableError("--annealing-horizon goes with --law annealing, and is a number of steps above 1")
    if not DELTAS[0] <= options.delta <= DELTAS[1]:
        raise TableError(f"--delta must lie between {DELTAS[0]:g} and {DELTAS[1]:g}, not at {options.delta:g}")
    if options.drop_highest < 0:
        raise TableError(f"--drop-highest counts rows, so it can't be {options.drop_highest}")
    if not 0 <= options.seed <= LARGEST_SEED:
        raise TableError(f"--seed must be a whole number from 0 to {LARGEST_SEED}, not {str(options.seed)[:24]}")
    if options.bootstrap_draws < 50:
        raise TableError(f"--bootstrap-draws {options.bootstrap_draws} is too few for an interval; at least 50")
    if options.bootstrap_draws > MOST_DRAWS:
        raise TableError(f"--bootstrap-draws must be at most {MOST_DRAWS:,}, not {str(options.bootstrap_draws)[:24]}")
    if options.offset is not None:
        if not 0 < options.offset < math.inf:
            raise TableError(f"--offset must be positive and finite, not {options.offset:g}; law power has none")
        if options.law and not any(LAWS[law].has_offset for law in options.law):
            named = ", ".join(options.law)
            raise TableError(f"--offset {options.offset:g} has no effect: of {named} none has an offset")
    for flag, values in (("--budget", options.allocate), ("--tokens-from-flops", (options.tokens_from_flops,))):
        least, most = BOUNDS[flag]
        for value in values:
            if value is not None and not 0 < value < math.inf:
                raise TableError(f"{flag} must be positive and finite, not {value:g}")
            if value is not None and not least <= value <= most:
                raise TableError(f"{flag} must lie between {least:g} and {most:g}, not at {value:g}")
    for text in options.predict:
        parse_point(text)


def check_offset(table: RunsTable, options: FitOptions) -> None:
    """Refuses an offset that no law could be pinned at.

    Raises:
        TableError: it isn't below the lowest value of any target.
    """
    lowest = {target: float(table.frame[target].min()) for target in table.targets}
    if options.offset is not None and all(options.offset >= value for value in lowest.values()):
        values = ", ".join(f"{value:.4g} of {target}" for target, value in lowest.items())
        raise TableError(f"--offset {options.offset:g} must be below the lowest value that is fitted ({values})")


def parse_point(text: str) -> dict[str, float]:
    """A point to predict, such as `flops=1e21`, by column.

    Raises:
        TableError: the text is no list of column=number.
    """
    point = {}
    for part in text.split(","):
        name, equals, value = part.rpartition("=")
        try:
            number = float(value)
        except ValueError:
            number = float("nan")
        if not equals or not 0 < number < math.inf:
            raise TableError(f"--predict {text!r}: write column=number, such as flops=1e21 or params=1e9,tokens=2e10")
        point[name.strip()] = number
    return point


def points_by_role(table: RunsTable, options: FitOptions) -> FitOptions:
    """The options with the points to predict named by role, such as `flops`, where they name a column of the table.

    Raises:
        TableError: no column has the name, or laws of several inputs don't take it.
    """
    roles = {source: role for role, source in table.columns.items()}
    points = []
    for text in options.predict:
        point = {roles.get(name, name): value for name, value in parse_point(text).items()}
        for name, above, below in {each for law in options.law for each in LAWS[law].ratios}:
            if {above, below} <= set(point) and name not in point:
                point[name] = point[above] / point.pop(below)
        taken = {name for law in options.law for name in LAWS[law].inputs if not LAWS[law].is_curve}
        for name in set(point) - {*ROLES, *taken}:
            column(table.frame, name)
            if len(point) > 1:
                more = [f" and {name}" for name in sorted(taken - {*ROLES})] or [
                    f", or {name} with --law {law.name}"
                    for law in LAWS.values()
                    for name in law.inputs
                    if not law.is_curve and name not in ROLES
                ]
                of = f"params, tokens and flops{''.join(more)}"
                raise TableError(f"--predict {text!r}: points of several columns are of {of}")
        points.append(",".join(f"{name}={value!r}" for name, value in point.items()))
    return replace(options, predict=tuple(points))
