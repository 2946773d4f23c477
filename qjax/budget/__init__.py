"""Budget: which layer gets which scheme so that a model costs so many bytes and loses least. `qjax.search` finds it."""

from qjax.budget.mixture import Mixture as Mixture
from qjax.budget.mixture import Option as Option
from qjax.budget.mixture import Sensitivity as Sensitivity
from qjax.budget.search import CANDIDATES as CANDIDATES
from qjax.budget.search import INTEGERS as INTEGERS
