"""Makes ExecuTorch's exporter several times faster; every byte of the file stays the same.

Most of an export is Python that runs the model's operators on fake tensors (shapes without data) again and again: two
exports, three decompositions and some twenty passes do so. What is saved here is work whose result is known or that
nobody looks at. `tests/export/test_pte.py` holds the files against the untouched exporter's, and
`tests/benchmarks/export_time.py` measures the time. Written against executorch 1.4.1 and torch 2.13.
"""

import contextlib
import gc
from collections.abc import Hashable, Iterator
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing
from torch.fx.graph import PythonCode
from torch.fx.traceback import NodeSource

from llamaq.export.patches import replaced

_DECOMPOSED = torch._C.DispatchKey.CompositeImplicitAutograd  # what torchao registers its Python functions under
_PLAIN = (int, float, bool, str, torch.dtype, torch.device, torch.layout, torch.memory_format, type(None))


@contextlib.contextmanager
def quick_tracing() -> Iterator[None]:
    """Save more than half of the exporter's time while the context is open."""
    with (
        _shapes_of_quantizers(),
        _decomposed_once(),
        _graphs_as_they_are(),
        _results_remembered(),
        _code_when_called(),
        _sizes_not_traced(),
        _history_shared(),
        _little_garbage_collection(),
    ):
        yield


@contextlib.contextmanager
def _shapes_of_quantizers() -> Iterator[None]:
    """Answer torchao's quantizers on fake tensors with the shape and dtype of the result: a third of the time.

    They are Python functions of up to twenty operators. The exporter keeps them whole for XNNPACK and never needs the
    operators inside.
    """
    import torchao.quantization.quant_primitives  # noqa: F401  (registers the operators)

    ops = torch.ops.torchao
    answers = {
        ops.choose_qparams_affine.default: _fake_qparams,
        ops.quantize_affine.default: _fake_quantized,
        ops.dequantize_affine.default: _fake_dequantized,
    }

    def registered(op: Any, answer: Any) -> Any:
        def kernel(x: Tensor, *args: Any, **kwargs: Any) -> Any:
            if isinstance(x, FakeTensor):
                return answer(x, *args, **kwargs)
            return op._op_dk(_DECOMPOSED, x, *args, **kwargs)

        return kernel

    for op, answer in answers.items():
        op.py_impl(_DECOMPOSED)(registered(op, answer))
    try:
        yield
    finally:
        for op in answers:
            del op.py_kernels[_DECOMPOSED]
            op._dispatch_cache.clear()


def _fake_qparams(
    x: Tensor,
    mapping_type: str,
    block_size: list[int],
    target_dtype: torch.dtype,
    quant_min: float | None = None,
    quant_max: float | None = None,
    eps: float | None = None,
    scale_dtype: torch.dtype | None = None,
    zero_point_dtype: torch.dtype | None = None,
    keepdim: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return a scale and a zero point for each block; a dimension that one block covers is dropped unless `keepdim`."""
    sizes = zip(x.shape, block_size, strict=True)
    shape = [size if block == 1 else size // block for size, block in sizes if keepdim or block == 1 or block != size]
    zero_points = torch.int32 if mapping_type == "ASYMMETRIC" else x.dtype
    return x.new_empty(shape, dtype=scale_dtype or x.dtype), x.new_empty(shape, dtype=zero_point_dtype or zero_points)


def _fake_quantized(
    x: Tensor,
    block_size: list[int],
    scale: Tensor,
    zero_point: Tensor | None,
    output_dtype: torch.dtype,
    quant_min: float | None = None,
    quant_max: float | None = None,
) -> Tensor:
    return torch.empty_like(x, dtype=output_dtype)


def _fake_dequantized(
    x: Tensor,
    block_size: list[int],
    scale: Tensor,
    zero_point: Tensor | None,
    input_dtype: torch.dtype,
    quant_min: float | None = None,
    quant_max: float | None = None,
    output_dtype: torch.dtype = torch.float32,
) -> Tensor:
    return torch.empty_like(x, dtype=output_dtype)


@contextlib.contextmanager
def _decomposed_once() -> Iterator[None]:
    """Leave out the decomposition between the exporter's two exports: the second one's makes it superfluous."""
    from executorch.extension.llm.export.builder import LLMEdgeManager
    from torch.export import ExportedProgram

    theirs = LLMEdgeManager._export

    def export(self: Any, module: Any = None) -> Any:
        if module is not None:
            return theirs(self, module)
        with replaced(ExportedProgram, "run_decompositions", lambda program, table: program):
            return theirs(self)

    with replaced(LLMEdgeManager, "_export", export):
        yield


@contextlib.contextmanager
def _graphs_as_they_are() -> Iterator[None]:
    """Do not read bytecode (`strict`) in the second export, whose module is already a graph."""
    from executorch.extension.llm.export import builder

    theirs = builder.export

    def export(module: Any, *args: Any, strict: bool, **kwargs: Any) -> Any:
        return theirs(module, *args, strict=strict and not isinstance(module, fx.GraphModule), **kwargs)

    with replaced(builder, "export", export):
        yield


class _Remembering(fx.Interpreter):
    """Runs a function once for the same fake tensors and returns the same result again."""

    def __init__(self, other: fx.Interpreter, results: dict[Hashable, Any]):
        super().__init__(other.module)
        self.results = results

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        schema = getattr(target, "_schema", None)
        if schema is None or schema.is_mutable:
            return super().call_function(target, args, kwargs)
        try:
            key = (target, _key(args), *((name, _key(a)) for name, a in kwargs.items()))
        except TypeError:
            return super().call_function(target, args, kwargs)
        if key not in self.results:  # with the arguments, which keeps their ids theirs
            self.results[key] = super().call_function(target, args, kwargs), args, kwargs
        return self.results[key][0]


def _key(argument: Any) -> Hashable:
    """Return what two arguments have in common if they are the same to an operator.

    Raises:
        TypeError: this cannot be told.
    """
    if isinstance(argument, FakeTensor):
        return FakeTensor, id(argument)
    if isinstance(argument, torch.SymInt):
        return torch.SymInt, argument.node._expr, id(argument.node.shape_env)
    if isinstance(argument, list | tuple):
        return type(argument), *map(_key, argument)
    if isinstance(argument, _PLAIN):
        return type(argument), argument  # the type, since 1 == 1.0 == True
    raise TypeError(type(argument))


@contextlib.contextmanager
def _results_remembered() -> Iterator[None]:
    """Share results between passes: each runs all nodes again to know their shapes, and most changes hardly any."""
    from executorch.exir.pass_base import _ExportPassBase

    theirs = _ExportPassBase._fx
    results: dict[Hashable, Any] = {}

    def run(self: Any, *args: Any) -> Any:
        if type(self.interpreter) is fx.Interpreter:
            self.interpreter = _Remembering(self.interpreter, results)
        return theirs(self, *args)

    with replaced(_ExportPassBase, "_fx", run):
        yield


@contextlib.contextmanager
def _code_when_called() -> Iterator[None]:
    """Write and compile a graph's Python code when it is called: graphs that passes make are only looked at.

    Before the model is lowered, torch.export calls and inspects graphs; there everything stays as it is.
    """
    from executorch.exir.program._program import EdgeProgramManager
    from executorch.extension.llm.export import builder

    compile_now = fx.GraphModule.recompile
    no_code = PythonCode("def forward(self): ...", {}, {}, 0)

    def recompile(self: Any) -> None:
        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            compile_now(self)
            return type(self).forward(self, *args, **kwargs)

        with replaced(fx.Graph, "python_code", lambda *args, **kwargs: no_code):
            compile_now(self)
        type(self).forward = forward

    def lazily(theirs: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            with replaced(fx.GraphModule, "recompile", recompile):
                return theirs(*args, **kwargs)

        return call

    with (
        replaced(builder, "to_edge_transform_and_lower", lazily(builder.to_edge_transform_and_lower)),
        replaced(EdgeProgramManager, "to_executorch", lazily(EdgeProgramManager.to_executorch)),
    ):
        yield


@contextlib.contextmanager
def _sizes_not_traced() -> Iterator[None]:
    """Keep the arithmetic on symbolic sizes that makes a functional tensor out of the graph, which drops it anyway."""
    theirs = FunctionalTensor.__new__

    def new(cls: Any, *args: Any) -> Any:
        with disable_proxy_modes_tracing():
            return theirs(cls, *args)

    with replaced(FunctionalTensor, "__new__", new):
        yield


@contextlib.contextmanager
def _history_shared() -> Iterator[None]:
    """Share a node's history, which torch.fx deep-copies at each of some 25,000 times that a node is traced again."""
    NodeSource.__deepcopy__ = lambda self, memo: self  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        del NodeSource.__deepcopy__  # pyright: ignore[reportAttributeAccessIssue]


@contextlib.contextmanager
def _little_garbage_collection() -> Iterator[None]:
    """Collect garbage less often: what is allocated here lives long."""
    threshold = gc.get_threshold()
    gc.set_threshold(100_000, *threshold[1:])
    try:
        yield
    finally:
        gc.set_threshold(*threshold)
