"""qswin where torch cannot be imported: python -m tests.without_torch COMMAND ..."""

import importlib.abc
import sys


class Blocker(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] == "torch":
            raise ImportError(f"{name} is blocked")


sys.meta_path.insert(0, Blocker())

if __name__ == "__main__":
    from qswin.cli import main

    main()
