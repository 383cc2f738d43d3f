"""What the command line runs, behind cli.py: one call of the Python API, its folder, and words for people.

run.py does `select` and `score`; demo.py, doctor.py (with kernel_check.py) and estimate.py (--dry-run) are the others.
catalogue.py lists the methods, options.py the flags; arguments.py and config.py resolve flags, --set and YAML.
"""
