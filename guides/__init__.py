"""Variational families, shipped as `pyro_vi_ext.guides`."""
