"""Models that pair with the guides, shipped as `pyro_vi_ext.models`."""
from .negative_binomial import load_mites, negative_binomial
