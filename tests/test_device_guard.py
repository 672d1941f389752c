"""Every GPU kernel is launched with its tensors' device current, whichever was before. Read off the sources, since two
GPUs are rarely at hand; tests/test_gpu.py runs it where they are."""

import ast
import re
from pathlib import Path

import pytest

from wsss_kernels import ops

ROOT = Path(__file__).parents[1]
BINDINGS = "\n".join(path.read_text() for path in sorted((ROOT / "csrc").glob("bindings*.cpp")))
LAUNCHERS = sorted(set(re.findall(r'm\.def\("(\w+_cuda)",', BINDINGS)))


@pytest.mark.parametrize("name", LAUNCHERS)
def test_cuda_launchers_enter_a_guard(name):
    definition = re.search(rf"\b{name}\(([^)]*)\) \{{\n(.*)", BINDINGS)
    assert definition, f"{name} is not defined where it is bound"
    parameters, first_statement = definition.groups()
    assert "int device" in parameters
    assert re.search(r"CudaDevice \w+\(device\);", first_statement)


def enters_guard(function: ast.FunctionDef) -> bool:
    guards = ("torch.cuda.device", "torch.cuda.device_of")
    contexts = (item.context_expr for node in ast.walk(function) if isinstance(node, ast.With) for item in node.items)
    return any(isinstance(call, ast.Call) and ast.unparse(call.func) in guards for call in contexts)


@pytest.mark.parametrize("op", ops.__all__)
def test_triton_launchers_enter_a_guard(op):
    path = ROOT / "wsss_kernels" / "triton" / f"{op}.py"
    if not path.exists():
        pytest.skip("no Triton kernel")
    functions = {node.name: node for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)}
    for name in (op, f"{op}_backward"):
        assert name not in functions or enters_guard(functions[name]), name
    assert op in functions


def test_there_is_something_to_look_at():
    assert LAUNCHERS
