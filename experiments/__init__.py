"""Experiments: the settings of the papers, and small ones; `prelm experiments` lists them."""
