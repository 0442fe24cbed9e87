"""MLX's threads and device stay behind at a fork: a child that computes with them waits for ever."""

import os

_users: list[int] = []


def using_mlx() -> None:
    """Says that this process computes with MLX from now on.

    Raises:
        RuntimeError: If it was forked from one that had said so.
    """
    if not _users:
        _users.append(os.getpid())
    if _users[0] != os.getpid():
        raise RuntimeError(
            f"this process was forked from process {_users[0]} when that had used MLX, which cannot "
            'compute in both; fork before, or start processes by multiprocessing\'s method "spawn"'
        )
