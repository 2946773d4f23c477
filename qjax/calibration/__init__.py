"""Calibration: weights quantized by what enters their layers. `qjax.calibrate` does it, a recipe says how."""

from qjax.calibration.recipe import AWQ as AWQ
from qjax.calibration.recipe import GPTQ as GPTQ
from qjax.calibration.recipe import HQQ as HQQ
from qjax.calibration.recipe import MSE as MSE
from qjax.calibration.recipe import RECIPES as RECIPES
from qjax.calibration.recipe import Nearest as Nearest
from qjax.calibration.recipe import Recipe as Recipe
from qjax.calibration.recipe import SmoothQuant as SmoothQuant
from qjax.calibration.recipe import parse_recipe as parse_recipe
from qjax.calibration.text import windows as windows
