"""Studies: several settings, a comparison of methods in each, one page over all.

=============  ============================================================================================
``plan.py``    a study file, checked, as comparisons
``harness.py`` the settings one after the other, then the page
``claims.py``  what holds across sizes: where the reference is first, and whether the smallest size is enough
``report.py``  study.md, and its export without paths of this machine
=============  ============================================================================================
"""

from framp.study.harness import run_study
from framp.study.plan import Study, read_study
from framp.study.report import export_study

__all__ = ["Study", "export_study", "read_study", "run_study"]
