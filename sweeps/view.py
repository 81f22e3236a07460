"""What a person sees while a sweep runs: stages with estimates, then a live table of depth × budget."""

import time
from collections import defaultdict
from collections.abc import Sequence

from rich.box import SIMPLE
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from sweeps.executors.base import Listener
from sweeps.jobs.base import Job
from sweeps.pace import Pace
from sweeps.study import Study
from varscale.training.cells import Cell

_STAGES = {
    "tokenizer": "training the tokenizer",
    "tokens": "encoding images into tokens",
    "execution": "measuring whether to compile",
    "reference": "measuring the reference images",
    "drawing": "drawing images",
}
_LINE_SECONDS, _DRAWING_SECONDS = 15.0, 0.25
"""Between lines of a log, and between drawings of the table: many jobs may end within a second."""


class SweepView(Listener):
    """Draws on a terminal; elsewhere (a log, CI) prints a line now and then."""

    def __init__(self, console: Console, *, patient: bool = False) -> None:
        """Begin; a `patient` view prints the first line, too, only after a while."""
        self._console, self._patient = console, patient
        self._live: Live | None = None
        self._study: Study | None = None
        self._pace = Pace()
        # images trained, by FLOPs of an image (the size) and job; what of them an earlier call did; what is to be done
        self._done: dict[tuple[int, str], int] = {}
        self._before: dict[tuple[int, str], int] = {}
        self._total: dict[int, int] = {}
        self._reported: dict[str, float] = {}
        self._states: dict[str, str] = {}
        self._losses: dict[str, float | None] = {}
        self._open: set[str] = set()  # keys of jobs that have not ended: cells without a result
        self._evaluations: dict[str, bool] = {}  # whether each is over
        self._training = False
        self._stage_started: dict[str, float] = {}
        self._stage_first: dict[str, tuple[float, int]] = {}
        self._printed = time.monotonic() if patient else 0.0
        self._began = time.monotonic()

    def stage(self, stage: str, done: int | None, total: int | None) -> None:
        """A stage before training is at `done` of `total` images, or just still going on."""
        now = time.monotonic()
        text = _stage_text(stage)
        self._stage_started.setdefault(stage, now)
        if done is not None and total is not None:
            first_time, first_done = self._stage_first.setdefault(stage, (now, done))
            rate = (done - first_done) / (now - first_time) if now > first_time else 0.0
            left = f", {_duration((total - done) / rate)} left" if rate > 0 else ""
            self._say(f"{text}: {done:,} of {total:,} images ({done / total:.0%}{left})")
        elif stage not in self._stage_first:
            self._say(f"{text} … {_duration(now - self._stage_started[stage])}")

    def stage_done(self, stage: str, *, well: bool = True) -> None:
        """A stage is over."""
        seconds = time.monotonic() - self._stage_started.get(stage, time.monotonic())
        self.clear()
        if seconds > 1:
            mark = "[green]✓[/green]" if well else "[red]✗[/red]"
            self._console.print(f"{mark} {_stage_text(stage)}, {_duration(seconds)}")
        self._printed = time.monotonic() if self._patient else 0.0

    def note(self, text: str) -> None:
        """Something worth a line of its own."""
        self._console.print(Text(text, style="yellow"))

    def begin(self, study: Study, jobs: Sequence[Job]) -> None:
        """A graph of jobs starts."""
        self._study = study
        self._total = defaultdict(int)
        for job in jobs:
            first, last = job.images
            self._total[job.flops_per_image] += last - first
        self._open = missing = {job.key for job in jobs}
        self._evaluations = {key: False for key in missing if key.startswith("evaluation")}
        trunks = {f"trunk {cell.trunk.label}" for cell in study.cells}
        self._states = dict.fromkeys(trunks - missing, "done")

    def started(self, job: Job) -> None:
        """A job begins."""
        if not job.flops_per_image:
            if not self._training:  # what goes on beside training has no place in its table
                self.stage(job.key, None, None)
            return
        if not self._training:
            self._training, self._began = True, time.monotonic()
            self.clear()
            if self._console.is_terminal and self._study is not None:
                self._live = Live(self._render(), console=self._console, refresh_per_second=4)
                self._live.start()
        self._states[job.key] = "0%"

    def progress(self, job: Job, done: int, total: int) -> None:
        """A job is at `done` of `total` images of its run."""
        if not job.flops_per_image or self._study is None:
            if not self._training:
                self.stage(job.key if not job.flops_per_image else job.title, done, total)
            return
        (first, last), now = job.images, time.monotonic()
        reached = min(max(done, first), last) - first
        key = (job.flops_per_image, job.key)
        if key in self._done:
            self._pace.add(job.flops_per_image, reached - self._done[key], now - self._reported[job.key])
        self._before.setdefault(key, reached)  # an interrupted run went on from here
        self._done[key], self._reported[job.key] = reached, now
        self._states[job.key] = f"{reached / max(1, last - first):.0%}"

    def ended(self, job: Job, state: str) -> None:
        """A job is over, well or in another `state`."""
        self._open.discard(job.key)
        if not job.flops_per_image or self._study is None:
            if not self._training:
                self.stage_done(job.key if not job.flops_per_image else job.title, well=state == "done")
            self._evaluations |= {key: True for key in self._evaluations if key == job.key}
            if state == "done" and (outcome := job.outcome()):
                self._console.print(Text(outcome))
            return
        first, last = job.images
        self._done[job.flops_per_image, job.key] = last - first
        self._states[job.key] = state

    def refresh(self) -> None:
        """Draw anew, now and then."""
        between = _LINE_SECONDS if self._live is None else _DRAWING_SECONDS
        if not self._training or self._study is None or time.monotonic() - self._printed <= between:
            return
        self._printed = time.monotonic()
        if self._live is not None:
            self._live.update(self._render())
        else:
            self._console.print(self._summary())

    def end(self) -> None:
        """Training is over: leave the finished table on the screen."""
        self._open.clear()
        if not self._training:
            self.clear()
            return
        if self._live is not None:
            self._live.update(self._render())
            self._live.stop()
            self._live = None
        else:
            self._console.print(self._render())

    def _render(self) -> Group:
        assert self._study is not None
        cells = self._study.cells
        budgets = sorted({cell.budget_flops for cell in cells})
        name, unit = self._study.experiment.name, cells[0].trunk.model.loss_unit
        title = f"{name}: loss of each cell ({unit}) by budget (training FLOPs)"
        table = Table(title=title, title_justify="left", box=SIMPLE, padding=(0, 1, 0, 0))
        table.add_column("model", no_wrap=True)
        table.add_column("trunk", justify="right")
        for budget in budgets:
            table.add_column(f"{budget:.3g}".replace("e+", "e"), justify="right", no_wrap=True)
        rows: dict[str, dict[float, Cell]] = {}
        for cell in cells:
            rows.setdefault(cell.trunk.label, {})[cell.budget_flops] = cell
        for name, row in rows.items():
            trunk_state = self._states.get(f"trunk {name}", "")
            texts = [self._cell_text(row[budget]) if budget in row else Text("") for budget in budgets]
            table.add_row(name, trunk_state, *texts)
        return Group(table, Text(self._summary()))

    def _cell_text(self, cell: Cell) -> Text:
        if not self._has_result(cell):
            return Text(self._states.get(cell.label, "·"), style="cyan" if cell.label in self._states else "dim")
        loss = self._losses[cell.label]
        return Text("diverged", style="red") if loss is None else Text(f"{loss:.4f}", style="green")

    def _has_result(self, cell: Cell) -> bool:
        """Look for a cell's result when its job has ended; it is read once, since it never changes."""
        assert self._study is not None
        unread = cell.label not in self._losses and cell.label not in self._open
        if unread and (result := self._study.result(cell)) is not None:
            self._losses[cell.label] = result.metrics.get("loss")
        return cell.label in self._losses

    def _summary(self) -> str:
        assert self._study is not None
        seconds = time.monotonic() - self._began
        flops = sum(size * images for size, images in self._total.items())
        share = sum(size * images for (size, _), images in self._done.items()) / max(flops, 1)
        finished = sum(map(self._has_result, self._study.cells))
        text = f"{finished} of {len(self._study.cells)} cells, {share:.0%} of training FLOPs"
        if self._evaluations:
            text += f", {sum(self._evaluations.values())} of {len(self._evaluations)} evaluations"
        text += f", {_duration(seconds)} passed"
        done, before = (
            sum(self._pace.seconds(size) * images for (size, _), images in counts.items())
            for counts in (self._done, self._before)
        )
        total = sum(self._pace.seconds(size) * images for size, images in self._total.items())
        if done - before > 0.02 * total:
            text += f", {_duration(seconds * (total - done) / (done - before))} left"
        return text

    def _say(self, text: str) -> None:
        if self._console.is_terminal:
            if self._live is None:
                self._live = Live(Text(text), console=self._console, transient=True, refresh_per_second=4)
                self._live.start()
            self._live.update(Text(text))
        elif time.monotonic() - self._printed > _LINE_SECONDS:
            self._printed = time.monotonic()
            self._console.print(text)

    def clear(self) -> None:
        """Leave the terminal as it was."""
        if self._live is not None:
            self._live.stop()
            self._live = None


class SearchView(SweepView):
    """Of a search's trials, which are no grid: how far they are, in a line."""

    def __init__(self, console: Console, said: set[str]) -> None:
        """Begin; notes that are among `said` are not repeated by the next sweep of the same search."""
        super().__init__(console, patient=True)
        self._said = said

    def note(self, text: str) -> None:
        """Something worth a line of its own, once."""
        if text not in self._said:
            super().note(text)
        self._said.add(text)

    def _render(self) -> Group:
        return Group(Text(self._summary()))

    def end(self) -> None:
        """Training is over; the search says what came of it."""
        self.clear()


def _stage_text(stage: str) -> str:
    verb = "measuring" if stage.startswith("evaluation") else "training"
    return _STAGES.get(stage, f"{verb} {stage.removeprefix('evaluation ')}")


def _duration(seconds: float) -> str:
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
