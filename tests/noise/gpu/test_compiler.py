"""What Triton's compiler is told, and makes of it."""

import itertools
import re
import sys

import pytest
import torch

from shardes.errors import UserError
from shardes.noise import Region
from shardes.noise.definition import BLOCK, LANES, MAX_ELEMENTS
from tests.noise.gpu.checks import ADDRESS, SIZE, UPDATE, check_accumulate, compiled, import_apart

pytest.importorskip("triton")


def test_a_call_number_fits_into_one_word():
    assert MAX_ELEMENTS // BLOCK * LANES <= 2**32


def test_no_argument_makes_triton_compile_a_kernel_again():
    """Of its arguments Triton computes a key; kernels are compiled once a key. Formats may change it."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    backend = make_backend(GPUTarget("cuda", 90, 32))
    small = [0, 1, 2, 16, 17, 2**31 - 1]
    integers = {"i32": small, "u32": [*small, 2**32 - 1], "i64": [*small, 2**31, 2**33, 2**34 - 1]}
    memory = torch.zeros(64)
    modules = compiled()
    for kernel in (
        modules.gpu._perturb,
        modules.gpu._accumulate,
        modules.gpu._add,
        modules.parts_gpu._shift,
        modules.parts_gpu._perturb,
        modules.parts_gpu._restore,
        modules.parts_gpu._accumulate,
        modules.digest_gpu._digest,
    ):
        key = create_function_from_signature(kernel.signature, kernel.params, backend)
        seen = set()
        for n, offset in itertools.product(range(9), range(5)):
            arguments = {}
            for parameter in kernel.params:
                if parameter.is_constexpr:
                    arguments[parameter.name] = 64
                elif parameter.annotation_type:
                    choices = integers[parameter.annotation_type]
                    arguments[parameter.name] = choices[n % len(choices)]
                else:
                    arguments[parameter.name] = memory[offset:]
            seen.add(str(key(**arguments)[1]))
        assert len(seen) == 1, seen


def test_the_compiler_neither_fuses_nor_flushes_nor_approximates(tmp_path, monkeypatch):
    """The code for an H200, which can be made without one."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    class Recorder(dict):
        def __getitem__(self, grid):
            return lambda *arguments, **options: self.update(options)

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    gpu, options, nothing = compiled().gpu, Recorder(), (torch.zeros(1), torch.zeros(1))
    fill = vars(compiled().gaussian_gpu.FILL)
    gpu.launch(options, fill["size"], fill["calls"], nothing, Region(0, 1, 0, 1), ())
    constants = fill | {name: options.pop(name) for name in ("size", "calls", "strided")}
    parts = compiled().parts_gpu
    of_parts = constants | {"chunk": fill["part_chunk"], "calls": fill["part_chunk"] // 4}
    pointers = {"source": "*fp32", "target": "*fp16", "master": "*fp16", "table": "*i32", "delta": "*fp32"}
    pointers["shifts"] = "*i32"
    kernels = (gpu._perturb, gpu._accumulate, gpu._add)
    for kernel in (*kernels, parts._perturb, parts._restore, parts._accumulate):
        known = constants if kernel in kernels else of_parts
        types = {p.name: p.annotation_type or pointers.get(p.name, "constexpr") for p in kernel.params}
        places = {(p.num,): known[p.name] for p in kernel.params if p.is_constexpr}
        source = ASTSource(kernel, types, places, {})
        code = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=dict(options)).asm["ptx"]
        # Triton 3.4 has a square root that flushes subnormals, which its argument never is.
        code = code.replace("sqrt.rn.ftz", "sqrt.rn")
        operations = set(re.findall(r"^\s*(?:@!?%p\d+ )?([a-z][\w.]*\.f(?:16|32))\s", code, re.M))
        exact = ("mov", "selp", "setp", "ld", "st", "neg", "abs")
        assert {name for name in operations if not name.startswith(exact)} <= {
            *("add.rn.f32", "sub.rn.f32", "mul.rn.f32", "sqrt.rn.f32"),
            *("cvt.rn.f32.s32", "cvt.rn.f32.u32", "cvt.f32.f16", "cvt.rn.f16.f32", "cvt.rzi.s32.f32"),
        }
        made_of = {"add.rn.f32", "mul.rn.f32"} | ({"sqrt.rn.f32"} if kernel is not gpu._add else set())
        assert kernel is parts._restore or made_of <= operations
        assert not re.search(r"\bfma|ftz|approx", code)


def test_triton_missing_is_a_message_with_a_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(UserError, match=r"triton is not installed.*pip install triton"):
        import_apart(interpret=False)


def test_an_update_copies_its_coefficients_once_for_all_parameters(kernels):
    kernels.gpu.copy_table.cache_clear()
    for param_id in range(3):
        region = Region(param_id, SIZE, 0, 10)
        check_accumulate(kernels, torch.zeros(10), region=region, **UPDATE, **ADDRESS)
    assert kernels.gpu.copy_table.cache_info().misses == 1
    check_accumulate(kernels, torch.zeros(10), region=region, **ADDRESS, directions=[0], coefficients=[-0.0])
    check_accumulate(kernels, torch.zeros(10), region=region, **ADDRESS, directions=[0], coefficients=[0.0])
    assert kernels.gpu.copy_table.cache_info().misses == 3
