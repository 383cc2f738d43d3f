"""One self-contained HTML page about a run: what was kept, what was not, and what a random draw would have taken."""

from fastsel.report.figure import write_figure
from fastsel.report.page import write_report

__all__ = ["write_figure", "write_report"]
