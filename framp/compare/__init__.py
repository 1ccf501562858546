"""Methods side by side: the runs of a comparison, its tests, tables and figures.

==================  ==========================================================================================
``plan.py``         which runs, with which settings, where; which of them are finished
``runner.py``       runs as processes of their own, so many at a time
``tuning.py``       the learning-rate grid, chosen on validation data of a seed of its own
``harness.py``      all of it in order
``results.py``      what finished runs say, read from their folders
``statistics.py``   paired tests, Holm's correction, bootstrap intervals
``tables.py``       tables for the terminal and for Markdown
``figures.py``      figures over methods
``report.py``       comparison.md, comparison.json, comparison.csv
==================  ==========================================================================================
"""

from framp.compare.harness import compare_methods
from framp.compare.plan import Comparison, find_preset, parse_list
from framp.compare.tuning import TuningPlan

__all__ = ["Comparison", "TuningPlan", "compare_methods", "find_preset", "parse_list"]
