"""`make bench`: PixArt at its real size, on random weights, on the machine at hand.

`cases` says what is measured, `checkpoints` builds the models, `engines` runs them, each in a
process of its own (`workers`), `layers` looks inside one step, `bench` puts it all together. What
came out is read by `assets/bench/report.py`, which the tutorial uses, too.
"""
