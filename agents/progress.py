"""`ProgressBar`: how a training goes, in one line that a terminal redraws."""

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn


class ProgressBar:
    """Shows steps, rate, time left, and the goodput in training and on development seeds.

    Args:
        steps: At which training ends ...
        time_s: ... or after so long.
    """

    def __init__(self, steps: int, time_s: float | None) -> None:
        self._steps, self._time_s = steps, time_s
        self._console = Console(stderr=True)
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.percentage:>3.0f} %"),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"),
            TextColumn("{task.fields[found]}"),
            console=self._console,
        )
        self._task = self._bar.add_task(
            "preparing (the first time compiles for a minute)", total=1.0, left="", found=""
        )
        self._began: tuple[float, int] | None = None
        self._dev = ""

    def update(self, step: int, scalars: dict[str, float]) -> None:
        """Show the step reached and the latest scalars."""
        now = time.monotonic()
        if self._began is None:
            self._began = (now, step)
        since, first = self._began
        rate = (step - first) / (now - since) if now > since else 0.0
        share = step / self._steps
        if self._time_s is not None:
            share = max(share, (now - since) / self._time_s)
        left_s = (self._steps - step) / rate if rate else 0.0
        if self._time_s is not None:
            left_s = min(left_s or self._time_s, self._time_s - (now - since))
        if "eval/goodput" in scalars:
            self._dev = f"dev goodput {scalars['eval/goodput']:.3f}"
            if "eval/champion_goodput" in scalars:
                self._dev += f" (the rule it builds on {scalars['eval/champion_goodput']:.3f})"
            if not self._console.is_terminal:
                self._console.print(f"{step} steps: {self._dev}")
        goodput = scalars.get("serving/goodput")
        found = f"goodput {goodput:.3f} in training" if goodput is not None else ""
        self._bar.update(
            self._task,
            completed=min(1.0, share),
            description=f"{step / 1e6:.2f}M steps, {rate / 1e3:.1f}k/s" if rate else "collecting",
            left=f"{_minutes(left_s)} left" if rate else "",
            found=", ".join(text for text in (found, self._dev) if text),
        )

    def __enter__(self) -> "ProgressBar":
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._bar.stop()


def _minutes(seconds: float) -> str:
    whole = max(0, round(seconds))
    return f"{whole // 60}:{whole % 60:02d}"
