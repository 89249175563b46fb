"""All that only a GPU can show, in one run with a time limit: dinov3-ray bench gpu.

The command's process (:mod:`.supervisor`) divides the time (:mod:`.budget`), and writes down what it hears
(:mod:`.journal`). A worker process (:mod:`.worker_process`) has the GPU and measures, one part after the other. If a
part fails, or does not end in time, the next one gets a new worker.
"""
