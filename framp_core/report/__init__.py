"""What a run says about itself: summary, tables, figures and the HTML report, from the files of its folder alone."""

from framp_core.report.html import write_report
from framp_core.report.summary import finish, summary_of_run
from framp_core.report.tables import plain_lines, results_table

__all__ = ["finish", "plain_lines", "results_table", "summary_of_run", "write_report"]
