"""Which kernel runs a product, and why: Problem x Device -> Choice, at trace time, from tables."""

from .backends import BACKENDS as BACKENDS
from .backends import NAMES as NAMES
from .choose import Choice as Choice
from .choose import choose as choose
from .choose import load as load
from .choose import possible as possible
from .choose import use as use
from .explain import Explanation as Explanation
from .explain import explain_problem as explain_problem
from .explain import explain_rows as explain_rows
from .problem import Problem as Problem
from .routes import ROUTES as ROUTES
from .routes import Route as Route
