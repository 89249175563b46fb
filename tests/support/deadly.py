"""A file system one of whose files ends the process that opens it, and another of which raises what no other does."""

from __future__ import annotations

import os

from pyarrow import fs as pafs


class Deadly(pafs.FileSystemHandler):
    """The local file system, but one path ends the process that opens it, as a fault in a C library would."""

    def __init__(self) -> None:
        self.local = pafs.LocalFileSystem()

    def open_input_file(self, path: str) -> object:
        if path.endswith("0007.png"):
            os._exit(139)
        if path.endswith("0014.webp"):
            raise ValueError("nobody foresaw this")
        return self.local.open_input_file(path)

    def get_file_info(self, paths: list[str]) -> object:
        return self.local.get_file_info(paths)

    def get_file_info_selector(self, selector: object) -> object:
        return self.local.get_file_info(selector)

    def get_type_name(self) -> str:
        return "deadly"

    def normalize_path(self, path: str) -> str:
        return path


for _name in Deadly.__abstractmethods__:  # those that reading does not need
    setattr(Deadly, _name, None)
Deadly.__abstractmethods__ = frozenset()
