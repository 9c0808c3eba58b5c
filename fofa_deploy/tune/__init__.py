"""Per target: search the recipes for the fastest that is inside the budgets, and say why.

evidence.py   what artifacts are held to, and the parts of the plan that decide a target
workbench.py  one recipe: build it, prove its precision, hold it to PyTorch
search.py     many recipes: which are worth building, in what order, and when to stop
tuner.py      one target: search, race what is left, choose, measure the chosen one fully
rows.py       what each of them found, as rows of the report
"""

from fofa_deploy.tune.evidence import Evidence, Settings
from fofa_deploy.tune.rows import timings, with_threads
from fofa_deploy.tune.tuner import Tuner
from fofa_deploy.tune.workbench import sensitivity

__all__ = ["Evidence", "Settings", "Tuner", "sensitivity", "timings", "with_threads"]
