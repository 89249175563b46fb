"""Distil a student backbone on images without labels, through a pool: what ``dinov3-ray distill`` does.

::

    distill.py       the run: what was asked for, the pool, evaluation, training, the weights
    training_run.py  the loop and its state; killed at any moment, it goes on with the same bits
    run_folder.py    the run's files, and how each is written whole or not at all
    backbones.py     the student: opened by its name, and written in its own framework's format
    frameworks.py    timm, transformers and Ultralytics
    views.py         which augmented view of which image is which step's
    augmentation.py  crop, mirror, recolour
    evaluation.py    how well the student's features tell classes apart: nearest neighbours and a linear probe
    display.py       progress on standard error
"""
