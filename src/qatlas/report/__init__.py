"""The report of a run: one HTML file that needs nothing else, and its figures. It sees records only.

    report(record, "out/report.html")              # or a list of records: one page, compared at its top
    figure(record, "training")                     # a matplotlib Figure
    save_figures(record, "docs/figures")           # the same as PNG
    compared(trials, "out")                        # of several papers: table, figure and page
"""

from .compared import compared
from .figures import drawable, figure, save_figures
from .page import report

__all__ = ["compared", "drawable", "figure", "report", "save_figures"]
