"""Measurements that anyone can repeat: this project, its peers on the same work in the same run, and the bound.

Notes, of what was seen on 2 CPUs with ray 2.60.0 (``dinov3-ray bench pool`` and ``bench transport``, an idle machine):

- Four simulated accelerators: the pool delivers 83% of the ideal, ActorPool with NumPy 69%, with torch tensors 36%.
- One result of 12.2 MiB after the other: 20.6 ms through the pool, 40.4 ms from a plain actor that returns the tensor.
  Most of the pool's time is Ray's: the same call takes 18 ms when its answer is awaited with ``ref.future()``, and 9 ms
  when a thread blocks in ``ray.get``. Fetching large answers in the caller's thread is the next thing to try.
"""
