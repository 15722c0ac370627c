"""Extension of griffe: the function `prefill_router.prefill` is documented next to the package of the same name.

Griffe replaces the function by the package. The extension keeps the function under the name `prefill_function`.
"""

from typing import Any

from griffe import Extension, Function, Module


class PublicPrefill(Extension):
    """Keeps the function `prefill` of the package's `__init__.py`."""

    def __init__(self) -> None:
        super().__init__()
        self.function: Function | None = None

    def on_function_instance(self, *, func: Function, **kwargs: Any) -> None:
        if func.path == "prefill_router.prefill":
            self.function = func

    def on_package(self, *, pkg: Module, **kwargs: Any) -> None:
        if self.function is not None:
            pkg.members["prefill_function"] = self.function
