"""Everything a user can choose about a fit. Imports nothing heavy."""

from dataclasses import dataclass

DEFAULT_LAWS = ("power", "power-offset", "chinchilla")
EVALUATION_LAWS = ("power", "power-floor", "chinchilla")
ANNEALING, MULTI_POWER = "annealing", "multi-power"
DEFAULT_TARGETS = ("loss", "loss_last_scale", "error", "error_last_scale", "fid", "mind")


@dataclass(frozen=True)
class FitOptions:
    """What to fit, and how. The defaults suit the runs table of a sweep.

    Column names left at None mean the sweep's own (`params_total`, `train_flops`, `tokens_seen`, `budget_flops`,
    `loss`) where the table has them.
    """

    title: str = "Scaling laws"
    """Heading of the report."""
    params: str | None = None
    """Column with the number of parameters, N."""
    flops: str | None = None
    """Column with the training FLOPs, C."""
    tokens: str | None = None
    """Column with the training tokens (or images), D."""
    loss: str | None = None
    """Column with the loss; `target` names other columns."""
    budget: str | None = None
    """Column with the nominal budget that groups rows into IsoFLOP sets."""
    run_id: str | None = None
    """Column that names runs; a repeated name is an error unless `checkpoints` is set."""
    group: str | None = None
    """Column with the family, tokenizer or study a row belongs to: groups are fitted apart and compared."""
    seed_column: str | None = None
    """Column with the seed; rows alike in all but the seed are averaged for the frontier and give the seed noise."""
    units: tuple[str, ...] = ()
    """Units of columns, such as `params=M`, `flops=PFLOP`, `tokens=B images` or `loss=nats a token`; results are in
    parameters, FLOPs and tokens."""
    where: tuple[str, ...] = ()
    """Conditions that rows must meet, such as `loss < 5` (`tables.conditions` has the language)."""
    drop_highest: int = 0
    """Leaves out so many rows with the highest loss."""
    reduce: str = ""
    """What to take of rows alike in N, C, D and seed that differ in other columns: min, mean, median or last."""
    by: tuple[str, ...] = ()
    """Columns over which `reduce` takes it; those in which such rows differ, when empty."""
    tokens_from_flops: float | None = None
    """C = k·N·D with this k (6 for the usual count) gives the third of N, D and C; never done unasked."""
    checkpoints: bool = False
    """Rows are checkpoints of runs (several rows a run id): the frontier runs over curves, the bootstrap over runs."""
    frontier: str = ""
    """Fits laws of compute to the best of scattered runs: envelope, hull or bins (`grids.frontier` has the rules), or
    to all; when empty, to the envelope where most runs are clearly beaten by runs of less compute."""
    annealing_horizon: float | None = None
    """Over how many steps a fall of the learning rate takes effect, 1 / (1 - λ), in law `annealing`; 1,000 at None."""
    law: tuple[str, ...] = ()
    """Laws to fit; those that the columns allow when empty."""
    target: tuple[str, ...] = ()
    """Columns to fit; loss and token error, over all scales and the last, FID and MIND, when empty."""
    x: tuple[str, ...] = ()
    """What to fit against: flops, params, tokens, or any column; flops and params when empty."""
    objective: str = "huber"
    """huber, lad, lsq-log or lsq."""
    delta: float = 1e-3
    """Huber's δ."""
    offset: float | None = None
    """Pins the offset E at this value."""
    offset_source: str = ""
    """Where the pinned offset comes from; stated in the report."""
    predict: tuple[str, ...] = ()
    """Points to predict, such as `flops=1e21` or `params=1e9,tokens=2e10`."""
    allocate: tuple[float, ...] = ()
    """Budgets in FLOPs for which the best size and data are worked out."""
    compare: tuple[str, ...] = ()
    """Groups to compare, all if empty: up to four in pairs, of more the first with each other."""
    published: bool = False
    """Draws VAR's published laws beside ours."""
    holdout: bool = True
    """Refits with runs left out, and reports the errors."""
    holdout_where: str = ""
    """One more held-out check: the rows that meet this condition are predicted from the others."""
    bootstrap_draws: int = 1000
    """Draws of the bootstrap."""
    seed: int = 0
    """Seed of the bootstrap."""

    @property
    def of_rates(self) -> bool:
        """Whether a law is asked for that takes sums of learning rates along runs."""
        return ANNEALING in self.law or MULTI_POWER in self.law
