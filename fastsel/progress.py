"""How far a long step has come, on stderr only: a bar, plain lines, JSON lines, or nothing.

Standard output stays free for results. A bar is drawn only on a terminal; in a log file a bar would be thousands of
carriage returns, so "auto" writes a line now and then instead.
"""

import json
import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, TextIO

from fastsel.errors import UsageError

if TYPE_CHECKING:
    from typing_extensions import Self

Mode = Literal["auto", "bar", "plain", "json", "none"]
MODES: tuple[Mode, ...] = ("auto", "bar", "plain", "json", "none")
SECONDS_BETWEEN_LINES = 10.0


class Progress:
    """A step that shows nothing; the other modes draw over it. Use it as a context manager.

    Attributes:
        done: units finished so far.
        total: units in all, or None when that is not known.
    """

    def __init__(self, total: int | None, unit: str, description: str, stream: TextIO, clock: Callable[[], float]):
        self.total = total
        self.unit = unit
        self.description = description
        self.done = 0
        self._done_before = 0
        self._stream = stream
        self._clock = clock
        self._started = clock()

    def update(self, n: int) -> None:
        """Count n more units as finished."""
        self.done += n
        self._draw()

    def skip(self, n: int) -> None:
        """Count n units that an earlier run finished: they are done, but say nothing about the speed."""
        self.done += n
        self._done_before += n

    def close(self) -> None:
        """Stop drawing; called on leaving the `with` block."""

    def _draw(self) -> None:
        pass

    def __enter__(self) -> "Self":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _Bar(Progress):
    def __init__(self, *args: Any):
        super().__init__(*args)
        from tqdm import tqdm  # 70 ms, and only a terminal needs it

        self._bar = tqdm(
            total=self.total,
            unit=f" {self.unit}",
            unit_scale=True,
            desc=self.description,
            file=self._stream,
            dynamic_ncols=True,
            leave=False,
        )

    def update(self, n: int) -> None:
        self.done += n
        self._bar.update(n)

    def skip(self, n: int) -> None:
        super().skip(n)
        self._bar.initial += n  # tqdm leaves it out of the rate
        self._bar.n += n
        self._bar.refresh()

    def close(self) -> None:
        self._bar.close()


class _Lines(Progress):
    """At most one line in ten seconds, and one at the end of a step that was long enough to have had any."""

    def __init__(self, *args: Any):
        super().__init__(*args)
        self._last_line = self._started
        self._last_shown = -1

    def _draw(self) -> None:
        now = self._clock()
        if now - self._last_line >= SECONDS_BETWEEN_LINES:
            self._last_line, self._last_shown = now, self.done
            self._write(now - self._started)

    def close(self) -> None:
        if self._last_shown not in (-1, self.done):
            self._write(self._clock() - self._started)

    def _write(self, elapsed: float) -> None:
        rate = (self.done - self._done_before) / max(elapsed, 1e-9)
        speed = f"{rate:,.{0 if rate >= 10 else 1}f} {self.unit}/s"
        line = f"{self.description}: {self.done:,}"
        if self.total:
            left = (self.total - self.done) / max(rate, 1e-9)
            line += f" of {self.total:,} {self.unit} ({self.done / self.total:.0%})"
            line += f", {speed}, {format_seconds(left)} left"
        else:
            line += f" {self.unit}, {speed}"
        print(line, file=self._stream, flush=True)


class _JsonLines(Progress):
    """One object a line, for a program that watches: at the start, once a second, and at the end."""

    def __init__(self, *args: Any):
        super().__init__(*args)
        self._last_line = self._started
        self._write(0.0)

    def _draw(self) -> None:
        now = self._clock()
        if now - self._last_line >= 1.0:
            self._last_line = now
            self._write(now - self._started)

    def close(self) -> None:
        self._write(self._clock() - self._started)

    def _write(self, elapsed: float) -> None:
        record = {
            "event": "progress",
            "step": self.description,
            "done": self.done,
            "total": self.total,
            "unit": self.unit,
            "elapsed_s": round(elapsed, 3),
        }
        print(json.dumps(record), file=self._stream, flush=True)


_DRAWN_AS: dict[str, type[Progress]] = {"bar": _Bar, "plain": _Lines, "json": _JsonLines, "none": Progress}


def progress_bar(
    total: int | None,
    unit: str = "tok",
    *,
    mode: str = "auto",
    description: str = "working",
    stream: TextIO | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Progress:
    """A context manager with update(n) that shows how far a step has come.

    Args:
        total: units in all; None when that is not known.
        unit: what is counted; tokens are honest for a model's forward, rows are not.
        mode: "bar", "plain" (a line every ten seconds), "json" (an object a line), "none", or "auto": a bar on a
            terminal and plain lines elsewhere.
        description: the step's name.
        stream: where to draw; stderr by default.
        clock: seconds; tests set their own.

    Raises:
        UsageError: the mode is not one of these.
    """
    stream = stream or sys.stderr
    if mode == "auto":
        mode = "bar" if stream.isatty() else "plain"
    if mode not in _DRAWN_AS:
        raise UsageError(f"progress={mode!r} is not known; it is one of: {', '.join(MODES)}")
    return _DRAWN_AS[mode](total, unit, description, stream, clock)


def format_seconds(seconds: float) -> str:
    """A duration as people read it: "8.4 s", "12 min 3 s", "2 h 5 min"."""
    if seconds < 59.95:  # else one decimal would read 60.0
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
