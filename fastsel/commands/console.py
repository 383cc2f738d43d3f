"""What the command line says: messages on stderr, a full copy with times in run.log, results on stdout.

Library code logs to the logger "fastsel" and warns with FastselWarning; this module decides how that looks.
"""

import logging
import sys
import time
import warnings
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TextIO

from fastsel.errors import FastselWarning

if TYPE_CHECKING:
    from typing_extensions import Self

logger = logging.getLogger("fastsel")
kernels_logger = logging.getLogger("fastsel.kernels")


class _Line(logging.Formatter):
    """A message as it is; warnings and errors say what they are."""

    def format(self, record: logging.LogRecord) -> str:
        message = record.getMessage()
        return message if record.levelno in (logging.INFO, logging.DEBUG) else f"{record.levelname.lower()}: {message}"


class _KernelsOnce(logging.Filter):
    """Dispatch notes at every call which implementation ran; a run says it once for each, and to everybody."""

    def __init__(self) -> None:
        super().__init__()
        self._said: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        module = record.getMessage()
        if module in self._said:
            return False
        self._said.add(module)
        kernel, file = module.split(".")[-2:]
        record.msg, record.args = f"kernel: {kernel} runs {file}.py", ()
        record.levelno, record.levelname = logging.INFO, "INFO"
        return True


class _Stderr(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        text = self.format(record)
        tqdm = sys.modules.get("tqdm")
        if tqdm is not None:
            tqdm.tqdm.write(text, file=sys.stderr)  # above a bar that is being drawn, not through it
        else:
            sys.stderr.write(text + "\n")
        sys.stderr.flush()


class _Kept(logging.Handler):
    """Keeps what was said before the run's folder was known."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


class Console:
    """Shows the messages of one command; use it as a context manager, which puts everything back.

    Args of the constructor:
        verbosity: -1 for warnings and errors only, 0 for messages too, 1 for details and tracebacks.
    """

    def __init__(self, verbosity: int = 0) -> None:
        self.verbosity = verbosity
        self._kept = _Kept()
        self._kernels_once = _KernelsOnce()
        self._handlers: list[logging.Handler] = [self._kept]
        self._caught = warnings.catch_warnings()

    def write_log(self, path: Path) -> None:
        """From here on also write to this file, beginning with what was said so far."""
        handler = logging.FileHandler(path, mode="a", encoding="utf-8", errors="backslashreplace")
        formatter = logging.Formatter("%(asctime)sZ %(levelname)s %(message)s", "%Y-%m-%dT%H:%M:%S")
        formatter.converter = time.gmtime
        handler.setFormatter(formatter)
        for record in self._kept.records:
            handler.emit(record)
        self._kept.records.clear()
        logger.removeHandler(self._kept)
        self._add(handler)

    def _add(self, handler: logging.Handler) -> None:
        self._handlers.append(handler)
        logger.addHandler(handler)

    def __enter__(self) -> "Self":
        self._level, self._propagate = logger.level, logger.propagate
        logger.setLevel(logging.DEBUG)
        logger.propagate = False
        logger.addHandler(self._kept)
        kernels_logger.addFilter(self._kernels_once)
        stderr = _Stderr({-1: logging.WARNING, 0: logging.INFO, 1: logging.DEBUG}[self.verbosity])
        stderr.setFormatter(_Line())
        self._add(stderr)
        self._caught.__enter__()
        warnings.simplefilter("always", FastselWarning)
        self._show_other = warnings.showwarning
        warnings.showwarning = self._show
        return self

    def _show(
        self,
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        if issubclass(category, FastselWarning):
            logger.warning("%s", message)
        else:  # other libraries' deprecations are nothing a user can act on
            logger.debug("%s:%d: %s: %s", filename, lineno, category.__name__, message)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._caught.__exit__(kind, error, trace)
        for handler in self._handlers:
            logger.removeHandler(handler)
            handler.close()
        kernels_logger.removeFilter(self._kernels_once)
        logger.setLevel(self._level)
        logger.propagate = self._propagate


def table(rows: list[list[str]], headings: list[str], width: int) -> str:
    """Left-aligned columns that fit the width: the widest columns wrap their words.

    Args:
        rows: cells of each line.
        headings: one a column.
        width: of the terminal, in characters.
    """
    import textwrap

    columns = list(zip(headings, *rows, strict=True))
    widths = [max(len(cell) for cell in column) for column in columns]
    least = [max(len(word) for cell in column for word in cell.split() or [""]) for column in columns]
    gap = 2
    while sum(widths) + gap * (len(widths) - 1) > width and any(w > m for w, m in zip(widths, least, strict=True)):
        widest = max((i for i in range(len(widths)) if widths[i] > least[i]), key=lambda i: widths[i])
        widths[widest] -= 1
    lines = []
    for row in [headings, ["-" * w for w in widths], *rows]:
        wrapped: list[list[str]] = [textwrap.wrap(cell, w) or [""] for cell, w in zip(row, widths, strict=True)]
        for i in range(max(map(len, wrapped))):
            cells: list[Any] = [
                (cell[i] if i < len(cell) else "").ljust(w) for cell, w in zip(wrapped, widths, strict=True)
            ]
            lines.append((" " * gap).join(cells).rstrip())
    return "\n".join(lines)
