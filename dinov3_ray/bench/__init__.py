"""Measurements that anyone can repeat: this project, its peers on the same work in the same run, and the bound.

Notes, of what was seen on 2 CPUs with ray 2.60.0, one run each on a machine with little else to do:

- Four simulated accelerators (``dinov3-ray bench pool --batches 300``, three runs each): the pool delivers 96% of the
  ideal in each; ActorPool with NumPy 80%, with torch tensors 42%, a Serve handle 35% (15% and 21% on other days), Ray
  Data 12%. With ``--batches 600`` 96.9%, and by a script of 1,000 batches 97.2% (two of three runs): the first batch's
  way in and the last one's way out count less. A sleep of 40 ms alone takes 40.17 here, and a shorter switch interval
  of the interpreter in the replicas (0.5 and 0.1 ms) made no difference; not kept. It was 81 to 83% before results
  were looked at and packed in a second thread, and before our own Ray freed results ten times a second: with Ray's
  period of a second the first 300 batches wrote to memory that no process had touched, at 72%.
- A batch costs about 13 ms of CPU time in all processes together (the replicas 6, the client 5, the raylet 2.5): two
  cores are full at about 150 batches a second, so that 16 such accelerators (400 a second) cannot be kept busy here.
- One result of 12.2 MiB after the other (``dinov3-ray bench transport``): 5.2, 6.0 and 6.2 times the rate of a plain
  actor that returns the tensor (5.0 to 6.0 ms against 31), of which Ray's own way of an array that an actor returns
  takes 2.6. With 3 results to warm up in place of 40, which touch each page of the store for the first time, it was 4.5
  to 6.5 in nine runs. One token: 1.9 to 2.4 times a bare call's 0.8 ms, where 1.5 was asked for: Ray's part alone, with
  arguments and a result and in threads, takes 1.1 ms, and a request passes through six threads, each woken by the one
  before. Requests that wait in threads of the replica, where they waited in an event loop, took about 15% off.
- OpenMP's threads sleep while they wait in a replica (OMP_WAIT_POLICY), where they spun: batches of one image of 160 px
  with 2 replicas, which Ray believed to have 2 CPUs each, take 3.4 to 4.6 ms in place of 11 to 15 (a script, machine in
  use). ViT-S at 224 px, 2 threads, nothing else at work: 1.05 times the speed, medians of four processes each.
  With the four accelerators above, by a script of 300 batches, 92 to 96% of the ideal with and without. Not kept,
  since no difference showed, in these or in tokens: a condition of its own for the thread that packs, and packing on
  the device's thread where nothing waits.
- The choice of a replica (``dinov3-ray bench router``): 8.7 microseconds among 1,000, 9.9 among 10,000.

Costs as work grows (``dinov3-ray bench scaling --seconds 2``, one run of 3.5 minutes; whether the machine was
otherwise idle all the time was not watched). Costs, from one replica without delay and batches of 1 (maps 14 x 14) and
32 (28 x 28): 9.2 ms of CPU a batch and 0.34 ms a MiB, of these 3.6 and 0.07 in the client. Predicted over measured:

- 1, 2, 4 replicas 1.10, 1.10, 1.06 (the wall: accelerators); 8, 16, 32: 1.21, 1.54, 1.25 (CPU: 1.8 to 1.9 of 2 cores
  busy). With many processes on two cores a batch costs more than it does with one, which the model does not know.
- 4 replicas, batches of 1, 4, 16, 64, 256: 1.18, 1.34, 1.03, 1.02, 0.96 (CPU up to 16). Maps of 7, 14, 28, 40:
  1.06, 1.05, 0.92, 0.88 (CPU from 28 on). Clients 1, 2, 4, 8, 16: 1.03, 1.09, 1.05, 1.05, 1.40, the last one with the
  slowest at 0.45 of the fastest's rate within two seconds, and 1.9 cores busy, where the model sees no wall yet.
- Allowed by itself, in accelerators of 40 ms with maps 14 x 14: this node's CPU 5.4, one client's process 8.5, this
  node's memory 12 (30 in another run), 25 Gbit/s 7.1 (the last one is calculated).
- ``--quick`` (43 s; up to 4 replicas and 2 clients), another run: 0.97 to 1.03 in all nine points, with a batch of 1
  at 281 img/s in place of 180 and 7.2 ms of CPU a batch: runs differ by more than the model errs.
- CPU time read for the whole machine, while others used it: 15.6 ms a batch, and predictions off by up to 1.6. It is
  that of the bench's own processes since.

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

The same by ``dinov3-ray bench teacher --repeats 3`` (medians): transformers float32 0.64 img/s and eager 0.44, its
bfloat16 1.22; here float32 0.66, bfloat16 1.12, compiled 1.22. Against transformers' float32 that is 1.7 times, 1.9
compiled, where 3.3 was asked for of a CPU with AMX. Tried in turn with the code as it is, 3 rounds on a machine in use,
so that 5% says little (ratios of speed, medians):

- transformers' own model in bfloat16 1.05 to 1.08 (0.98 to 1.21 in single rounds), and run by this package's loop 1.01:
  the same operations on weights laid out alike; the 9% of the bench's single run are not explained.
- Attention in float32 within bfloat16 1.05 (0.92 to 1.10); inference_mode in place of no_grad 0.91 (0.74 to 1.10);
  images as float32 in place of uint8 0.99; one thread in place of two 0.61. Nothing of it was kept.
- The whole preprocessing takes 15 ms and the patch convolution 20 ms of 4,200, so that neither can matter;
  channels-last makes that convolution no faster (0.85). A ConvNeXt-T at 224 px, 9 rounds: channels-last
  1.03 in float32 and 0.98 in bfloat16. Not kept.
- ``dtype="auto"``, which is bfloat16 here, over float32 at 224 px: ConvNeXt-T 2.15, ViT-S 1.7 with one image and 1.9
  with four.

Nothing of this has run on a GPU yet: ``dinov3-ray bench teacher --device cuda`` measures it.

``dinov3-ray bench dataset --images 256`` (ViT-S/16, bfloat16; medians of 3 runs after one to warm up, nothing else at
work):

- Decoded images: the bare loop 25.9 img/s, extract 26.2 (101%), plain map_batches with transformers in float32 7.7.
- JPEG files: the bare loop that decodes first 24.1, extract 23.7 (98%), plain map_batches 8.1.
- A day later: decoded 25.2, 25.7 (101.8%) and 7.8; JPEG 23.5, 23.7 (100.8%) and 14.2, of 64 images, 5.7 with its start.
  Reading 256 rows: float32 1.58, float16 1.08, int8 0.98.
- It was 89% and 88% with blocks of 128 MiB: the last one is written when nothing is left to compute, and an actor's
  first one took 1.5 s, most of it for memory that the machine had not touched before. Blocks of 32 MiB take a quarter
  of that, and all but the last are written beside other blocks' passes.
- Two passes of one thread each are as fast as one pass of two threads (29.0 and 29.1 img/s, medians of 4 in turn).
- OpenMP's threads asleep in the extraction's actors made no difference that shows; not kept.

A random row of 768, the store's time over a memory map's (the two readers of ``bench/reading.py`` in turn, by a script
in one torch thread, medians of 11 rounds of 1,000 ids): float32 1.43, float16 1.64, int8 0.83, which was 12. Both sides
of int8 widen values by their scales. Others used the machine heavily: rounds differ widely, the command's own code gave
1.44, 2.27 and 0.97 (medians of 5, two torch threads), and with nothing else at work 1.34, 1.47 and 1.03 (256 rows,
medians of 3), the script's first run 1.52 and 1.33 for the floats. On a busy machine two threads that widen one row
wait for one another: 2.7 ms, on both sides, against 0.2 with one.

- int8 is now mapped too (``datasets/pages.py``). It was slow since Arrow decoded a whole dictionary-encoded row group.
- A fixed-length byte array a row would be written and read at the speed of memory (0.6 ns a value instead of about 30,
  one run), but would not be a tensor to other readers: not taken. Writing int8 is as slow as it was.
"""
