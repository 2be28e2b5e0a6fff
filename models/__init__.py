"""Models that pair with the guides, shipped as `pyro_vi_ext.models`: one module each."""
