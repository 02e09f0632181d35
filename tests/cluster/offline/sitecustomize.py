"""SkyPilot believes that it is online while its own API server answers.

Before it trusts that a machine is gone, SkyPilot's job controller asks two public addresses whether
the network is up, and without internet it asks for ever: a killed allocation is never recovered.
Python imports this file at start where its folder is on PYTHONPATH. It changes those two addresses,
once that module is imported, and nothing else.
"""

import importlib.abc
import importlib.machinery
import os
import sys
from collections.abc import Sequence
from types import ModuleType

MODULE = "sky.backends.backend_utils"


class _Finder(importlib.abc.MetaPathFinder):
    """Finds that one module where Python would, and has it loaded with the other addresses."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != MODULE:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is None or spec.loader is None:
            return spec
        load = spec.loader.exec_module

        def load_and_change(module: ModuleType) -> None:
            load(module)
            if not hasattr(module, "_TEST_IP_LIST"):
                raise ImportError(f"{MODULE} has no _TEST_IP_LIST any more: mend {__file__}")
            port = os.environ.get("SKYPILOT_API_SERVER_LOCAL_PORT", "46580")
            vars(module)["_TEST_IP_LIST"] = [f"http://127.0.0.1:{port}/api/health"]

        spec.loader.exec_module = load_and_change  # type: ignore[method-assign]
        return spec


sys.meta_path.insert(0, _Finder())
