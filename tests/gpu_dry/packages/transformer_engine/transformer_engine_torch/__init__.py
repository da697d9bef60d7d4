"""Stand-in of transformer_engine_torch."""

import sys

from gpu_dry.stand_ins import stand_in

__version__ = "2.9.0"
stand_in(sys.modules[__name__])
