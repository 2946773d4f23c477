"""Quality: how far a quantized model is from its base, by token and by layer. `qjax.compare` measures it."""

from qjax.quality.comparison import Comparison as Comparison
from qjax.quality.comparison import LayerComparison as LayerComparison
from qjax.quality.page import page as page
