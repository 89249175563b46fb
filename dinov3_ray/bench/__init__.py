"""Measurements that anyone can repeat: this project, its peers on the same work in the same run, and the bound.

Notes, of what was seen on 2 CPUs with ray 2.60.0, one run each on a machine with little else to do:

- Four simulated accelerators (``dinov3-ray bench pool --batches 300``): the pool delivers 96% of the ideal, in each of
  three runs; ActorPool with NumPy 79%, with torch tensors 42%, a Serve handle 21%, Ray Data 11%. It was 81 to 83%
  before results were looked at and packed in a second thread, and before our own Ray freed results ten times a second:
  with Ray's period of a second the first 300 batches wrote to memory that no process had touched, at 72%.
- A batch costs about 13 ms of CPU time in all processes together (the replicas 6, the client 5, the raylet 2.5): two
  cores are full at about 150 batches a second, so that 16 such accelerators (400 a second) cannot be kept busy here.
- One result of 12.2 MiB after the other (``dinov3-ray bench transport``): 7.3 ms through the pool, 32.7 ms from a plain
  actor that returns the tensor: 4.5 times its rate, short of 5. One token: 1.83 ms, 1.8 times a bare call's 1.04 ms,
  short of 1.5: a request passes through six threads, each woken by the one before. Requests that wait in threads of the
  replica, where they waited in an event loop, took about 15% off.
- The choice of a replica (``dinov3-ray bench router``): 8.7 microseconds among 1,000, 9.9 among 10,000.

A training step of 300 ms over the same without a teacher (``dinov3-ray bench training``, an idle machine, medians of 3
passes of 40 steps; simulated student and replicas, the pool 1.5 times as fast as needed), with 2 and with 4 replicas:

- Ahead of the loop (prefetch) 1.00 and 1.00 from the first delivery on, 0.1% of it waiting. An epoch's first batch
  takes 0.46 and 0.90 s, of which its replica computes 0.4 and 0.8: 1.04 and 1.07 over 40 steps, 1.00 over 1,000
  (computed).
- A teacher in the loop that takes as long as the student 1.99; a batch submitted and waited for in its step, behind a
  third of it, 2.05 and 3.37.
- Before a client's first requests went to as many replicas (``pool/candidates.py``) it was 1.02 and 1.05 in single
  passes, 2% and 5% waiting: the second or third batch of an epoch stood behind the first one's.

A teacher on a CPU (ViT-B/16, random weights, 512 px, batch 4, 2 threads of an AMD EPYC with AVX512-BF16 and without
AMX): ``DinoV3Teacher.extract`` in each mode in turn, timed by a script in one process, best of four rounds. Others used
the machine: rounds of one mode differ by up to 50%, and a ratio within some per cent of 1 says nothing.

- float32 0.60 img/s, bfloat16 1.13: 1.9 times. With AVX512-BF16 alone a matrix product in bfloat16 runs at about 2.2
  times float32's rate (400 against 185 GFLOP/s), so that 3.3 times transformers' float32 is out of reach without AMX.
- torch's CPU attention is no faster in bfloat16 than in float32 without AMX (95 ms a block each). Head by head in
  oneDNN products the whole model runs at 1.07 times its speed. Not kept: on many cores, which were not measured, such
  small products may well be slower.
- Weights packed for oneDNN: 0.98; with the above: 1.15. Not kept: packing takes private operators of torch's.
- torch.compile of the blocks 0.98, with freezing 0.98: it does not pay on such a CPU.

Nothing of this has run on a GPU yet: ``dinov3-ray bench teacher --device cuda`` measures it.

``dinov3-ray bench dataset --images 192 --repeats 1`` (ViT-S/16, bfloat16): one short run after a warm-up, on a machine
that others may have used, so that none of it is a proof:

- Decoded images: the bare loop 21.9 img/s, extract 19.3 (88%, short of the 95% that it should reach; all 192 are one
  block there, and whether larger sets do better was not measured), plain map_batches with transformers in float32 7.1.
- JPEG files: the bare loop that decodes first 18.9, extract 19.2 (102%), plain map_batches 5.8.

A random row of 768, the store's time over a memory map's (the two readers of ``bench/reading.py`` in turn, by a script
in one torch thread, medians of 11 rounds of 1,000 ids): float32 1.43, float16 1.64, int8 0.83, which was 12. Both sides
of int8 widen values by their scales. Others used the machine heavily: rounds differ widely, the command's own code gave
1.44, 2.27 and 0.97 (medians of 5, two torch threads), the script's first run 1.52 and 1.33 for the floats. On such a
machine two threads that widen one row wait for one another: 2.7 ms, on both sides, against 0.2 with one.

- int8 is now mapped too (``datasets/pages.py``). It was slow since Arrow decoded a whole dictionary-encoded row group.
- A fixed-length byte array a row would be written and read at the speed of memory (0.6 ns a value instead of about 30,
  one run), but would not be a tensor to other readers: not taken. Writing int8 is as slow as it was.
"""
