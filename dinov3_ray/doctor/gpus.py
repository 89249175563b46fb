"""This machine's GPUs, as PyTorch sees them."""

from __future__ import annotations

import torch

from dinov3_ray.doctor.finding import Finding, fine, problem

__all__ = ["check_gpus"]


def check_gpus(wanted: int) -> Finding:
    """Args: wanted: GPUs that this machine is to have; 0 asks for none."""
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    if len(names) < wanted:
        built = f"PyTorch was built for CUDA {torch.version.cuda}" if torch.version.cuda else "PyTorch has no CUDA"
        return problem(
            "GPUs",
            f"{wanted} asked for with --gpus, {len(names)} there; {built}",
            "look at nvidia-smi: without it the driver is missing (in a container: --gpus all); if it shows them, look "
            "at CUDA_VISIBLE_DEVICES, and install PyTorch for CUDA; or ask for fewer with --gpus",
        )
    return fine("GPUs", ", ".join(names) or "none; replicas compute on CPUs")
