"""The networks: the two architectures of DINOv3 as torch modules, and other vision models of transformers.

The modules of DINOv3 have the tensor names of its checkpoints, and their results equal those of transformers bit for
bit. transformers has both architectures as well. To import its modules takes seconds of CPU time in each process that
computes, since they bring text generation, quantizers and distributed tensors with them. Here the same operations
stand in the same order; ``tests/model/test_model.py`` holds the results against those of transformers, bit for bit.
"""
