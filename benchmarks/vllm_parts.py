"""Files of vLLM 0.26 that run as they are, on a CPU and without its compiled parts, and what stands for the rest.

    pip download --no-deps vllm==0.26.0; unzip vllm-0.26.0-*.whl '*.py' -d FOLDER

vllm_heads.py and vllm_eagle3.py say which of the files run. What they need of others is in MEMBERS: one process instead
of a tensor-parallel group, `torch.nn.functional.linear` for the choice of products, and for the default weight loader a
copy that insists on the shape. All other names of vLLM are there to be imported, and raise an error when they are used.
"""

from __future__ import annotations

import importlib
import logging
import sys
import types
from collections.abc import Iterable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_file_location
from pathlib import Path
from typing import Any

from torch import Tensor, nn


class _Unused(type):
    """A name of vLLM that nothing may use."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        raise RuntimeError(f"{cls.__module__}.{cls.__name__} of vLLM is called, and nothing stands for it")


def copy_weight(param: Tensor, weight: Tensor) -> None:
    """Stands for vLLM's default_weight_loader."""
    assert param.shape == weight.shape, (param.shape, weight.shape)
    param.data.copy_(weight)


def divide(a: int, b: int) -> int:
    assert a % b == 0
    return a // b


def undecorated(*_: Any, **__: Any) -> Any:
    """Stands for decorators with arguments that change nothing of what is computed."""
    return lambda decorated: decorated


def init_logger(name: str) -> logging.Logger:
    """Stands for vLLM's, whose loggers have more methods."""
    logger = logging.getLogger(name)
    logger.setLevel("ERROR")
    for level in ("debug", "info", "warning"):
        setattr(logger, f"{level}_once", getattr(logger, level))
    return logger


PLATFORM = {
    "use_all_gather": True,
    "is_cpu": False,
    "is_cuda": False,
    "is_cuda_alike": False,
    "is_rocm": False,
    "is_xpu": False,
    "is_pin_memory_available": False,
    "use_sync_weight_loader": False,
}
COMPILATION = types.SimpleNamespace(
    custom_ops=["none"], enabled_custom_ops=set(), disabled_custom_ops=set(), mode="none"
)
"""No operation has a kernel: each runs as `forward_native` of its class has it."""
MEMBERS: dict[str, dict[str, Any]] = {
    "config": {
        "get_cached_compilation_config": lambda: COMPILATION,
        "get_current_vllm_config": lambda: types.SimpleNamespace(model_config=None),
    },
    "config.compilation": {"CompilationMode": types.SimpleNamespace(NONE="none")},
    "distributed": {
        "divide": divide,
        "get_pp_group": lambda: types.SimpleNamespace(
            is_first_rank=True, is_last_rank=True, rank_in_group=0, world_size=1
        ),
        "get_tensor_model_parallel_rank": lambda: 0,
        "get_tensor_model_parallel_world_size": lambda: 1,
        "tensor_model_parallel_all_gather": lambda tensor: tensor,
        "tensor_model_parallel_all_reduce": lambda tensor: tensor,
        "tensor_model_parallel_gather": lambda tensor: tensor,
    },
    "logger": {"init_logger": init_logger},
    "model_executor.layers.utils": {
        "dispatch_unquantized_gemm": lambda: lambda _, x, weight, bias: nn.functional.linear(x, weight, bias)
    },
    "model_executor.model_loader.reload": {"support_quantized_model_reload_from_hp_weights": lambda loader: loader},
    "model_executor.model_loader.weight_utils": {"default_weight_loader": copy_weight},
    "platforms": {
        "current_platform": types.SimpleNamespace(
            simple_compile_backend="eager", **{name: lambda value=value: value for name, value in PLATFORM.items()}
        )
    },
    "utils.torch_utils": {
        "PIN_MEMORY": False,
        "direct_register_custom_op": lambda *_, **__: None,
        "is_torch_equal_or_newer": lambda _: True,
    },
}


class _Finder(MetaPathFinder, Loader):
    """Finds every module below `vllm`: some are files, of which the rest take the place."""

    def __init__(self, folder: Path, files: Iterable[str], members: dict[str, dict[str, Any]]) -> None:
        self.folder, self.files, self.members = folder, frozenset(files), members

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: Any = None) -> ModuleSpec | None:
        name = fullname.removeprefix("vllm").removeprefix(".")
        if fullname != "vllm" and not fullname.startswith("vllm."):
            return None
        at = self.folder / fullname.replace(".", "/")
        if name not in self.files:
            return ModuleSpec(fullname, self, is_package=True)
        if at.is_dir():
            return spec_from_file_location(fullname, at / "__init__.py", submodule_search_locations=[str(at)])
        return spec_from_file_location(fullname, at.with_suffix(".py"))

    def create_module(self, spec: ModuleSpec) -> None:
        return None

    def exec_module(self, module: types.ModuleType) -> None:
        at = self.folder / module.__name__.replace(".", "/")

        def find(name: str) -> Any:
            if name.startswith("__"):
                raise AttributeError(name)
            if (at / name).is_dir() or (at / f"{name}.py").is_file():
                return importlib.import_module(f"{module.__name__}.{name}")
            found = _Unused(name, (), {"__module__": module.__name__})
            setattr(module, name, found)
            return found

        vars(module).update(self.members.get(module.__name__.removeprefix("vllm."), {}))
        module.__getattr__ = find  # type: ignore[method-assign]


def install(folder: Path, files: Iterable[str], members: dict[str, dict[str, Any]]) -> None:
    """Make `import vllm…` give files of an unpacked wheel.

    Args:
        folder: of the wheel.
        files: the modules that run, without `vllm.`; a package runs its `__init__`.
        members: what stands in modules that do not run, beside MEMBERS.
    """
    joined = {name: MEMBERS.get(name, {}) | members.get(name, {}) for name in MEMBERS.keys() | members.keys()}
    sys.meta_path.insert(0, _Finder(folder, files, joined))


def version(folder: Path) -> str:
    """`vllm-0.26.0`, as the wheel says."""
    return next(folder.glob("vllm-*.dist-info"), Path("unknown")).name.removesuffix(".dist-info")
