"""Distil a student backbone on images without labels, through a pool: what ``dinov3-ray distill`` does.

::

    job.py           the whole of it: what was asked for, the pool, evaluation, training, the weights
    training_run.py  the loop and its state; killed at any moment, it goes on with the same bits
    run_folder.py    the run's files, and how each is written whole or not at all
    students.py      the student, by its name
    student_backbone.py  images in, maps out, whatever network is inside
    frameworks.py    timm, transformers, Ultralytics and a module of one's own: made, and written
    view_order.py    which augmented view of which image is which step's
    augmentation.py  crop, mirror, recolour
    evaluation.py    how well the student's features tell classes apart: nearest neighbours and a linear probe
    display.py       progress on standard error
"""
