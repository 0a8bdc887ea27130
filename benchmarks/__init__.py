"""PixArt at its published size, on random weights, on this machine: `python -m benchmarks --help`.

speed      `make bench`: seconds and peak memory     settings  OpenVINO's options, compared
memory     the limit that each task runs within      notebook  the tutorial, run from nothing
report     reads a speed report: tables, plots       docs      tables of docs/performance.md

Below them: cases (the tables of cases, engines and sizes), checkpoints (random weights, and IRs
made from them), engines (one engine, timed), images (whole images with it), loaders (torch's
modules), layers (where one step's time goes), limits (memory limits that the kernel enforces),
probes (the tasks that run within them), stored (the notebook as it is committed) and machine.
"""
