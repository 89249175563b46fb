"""Finds out within seconds why a Ray cannot be joined: unreachable, wrong token, or TLS. Ray itself tries for minutes.

It makes the call that every client of Ray makes first. That call is part of Ray's own protocol, which may change, so
only a clear refusal counts.
"""

from __future__ import annotations

import socket
from dataclasses import dataclass

import grpc
import ray
from ray._private.grpc_utils import init_grpc_channel  # private, seen in Ray 2.60.0: a channel with token and TLS

from dinov3_ray.pool.address import Address

__all__ = ["Obstacle", "answers", "find_obstacle"]

_PATIENCE = 10.0
_QUESTION = "/ray.rpc.NodeInfoGcsService/GetClusterId"


@dataclass(frozen=True, slots=True)
class Obstacle:
    """Why a cluster cannot be joined, and what to do about it; ``lacks_token`` if this process has shown none."""

    message: str
    remedy: str
    lacks_token: bool = False


def find_obstacle(address: Address) -> Obstacle | None:
    """Why this process cannot join the head at ``address``; None if no reason was found."""
    try:
        socket.create_connection((address.host, address.port), timeout=_PATIENCE).close()
    except OSError as error:
        return Obstacle(
            f"no Ray answers at address {address}: {error}",
            "start its head (deploy/ray/head.sh), and look at the address and at firewalls between here and there",
        )
    try:
        # With this process's token and certificates, as Ray would.
        with init_grpc_channel(str(address)) as channel:
            channel.unary_unary(_QUESTION)(b"", timeout=_PATIENCE)
    except ray.exceptions.AuthenticationError as error:
        reason = str(error).split(". ")[0]
        return Obstacle(
            f"this process has no token to show to the Ray at {address}: {reason}",
            "copy the cluster's token to that file, or name the one that has it in RAY_AUTH_TOKEN_PATH",
        )
    except grpc.RpcError as error:
        code = error.code() if isinstance(error, grpc.Call) else None
        if code is grpc.StatusCode.UNAUTHENTICATED:
            return Obstacle(
                f"the Ray at {address} refuses this process's token, or its lack",
                "set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH to a file with the cluster's token",
                lacks_token=True,
            )
        if code is grpc.StatusCode.UNAVAILABLE:
            return Obstacle(
                f"the Ray at {address} does not speak with this process: one of them encrypts, and the other does not "
                "or has another authority's certificates",
                "set RAY_USE_TLS=1 and RAY_TLS_* if the cluster's nodes do, or unset them",
            )
    return None


def answers(address: Address) -> bool:
    """Whether this process can connect to ``address``."""
    try:
        socket.create_connection((address.host, address.port), timeout=_PATIENCE).close()
    except OSError:
        return False
    return True
