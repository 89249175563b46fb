"""The two architectures of DINOv3 as torch modules, with the tensor names of its checkpoints, and transformers' bits;
and any other vision model of transformers, as that has it.

transformers has those two as well. To import its modules takes seconds of CPU time in each process that computes, since
they bring text generation, quantizers and distributed tensors with them. Here the same operations stand in the same
order; ``tests/model/test_model.py`` holds the results against those of transformers, bit for bit.
"""
