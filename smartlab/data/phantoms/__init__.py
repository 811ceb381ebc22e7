"""The embedded phantoms: a painted chest and abdomen CT, and a mammogram. Public face: `data/phantom.py`."""
