"""Every Triton kernel compiles for Hopper (sm_90) as its launcher launches it, without spilling a
register and within the shared memory of a multiprocessor. No GPU is needed: Triton compiles for an
explicit target and its wheel brings the assembler and `cuobjdump`. Says nothing about speed.

    python -m tests.test_hopper    registers, spills and shared memory on older and newer GPUs too
"""

import re
import subprocess
import tempfile
from pathlib import Path

import pytest

triton = pytest.importorskip("triton", reason="Triton is not installed: nothing to compile")
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from kernels import dispatch, gradient_triton, linear_triton, rows_triton  # noqa: E402

# {architecture: bytes of shared memory that one block may use}: Turing; A100; H100, H200; B200
SHARED_LIMITS = {75: 64 << 10, 80: 163 << 10, 90: 227 << 10, 100: 227 << 10}
SHARED_LIMIT = SHARED_LIMITS[90]
NOT_LAUNCHED = {(80, "fused linear, entropy")}  # see dispatch.fused_forward
REGISTERS = 65536  # of a multiprocessor
BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
POINTERS = {"fp32": "*fp32", "fp64": "*fp64", "bf16": "*bf16", "i64": "*i64"}


def resources(kernel, arguments, num_warps, num_stages=3, tmp_path=None, architecture=90):
    """arguments: name -> one of POINTERS, "i32" an integer divisible by 16 ("odd i32": not), None,
    or a constexpr's value. -> registers, stack, local and shared bytes; the stages of the compiled
    code by name."""
    signature, constants, attributes = {}, {}, {}
    for place, name in enumerate(kernel.arg_names):
        value = arguments[name]
        if value is None or not isinstance(value, str):
            signature[name], constants[name] = "constexpr", value
        else:
            signature[name] = POINTERS.get(value, value.removeprefix("odd "))
            if not value.startswith("odd"):
                attributes[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature=signature, constexprs=constants, attrs=attributes)
    compiled = triton.compile(
        source,
        target=GPUTarget("cuda", architecture, 32),
        options=dict(num_warps=num_warps, num_stages=num_stages),
    )
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    text = subprocess.run(
        [BIN / "cuobjdump", "--dump-resource-usage", cubin],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    usage = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    return usage | {"SHARED": compiled.metadata.shared}, compiled.asm


V, N, D = 50304, 8192, 768  # GPT-2's vocabulary as it is padded
R, B = rows_triton.tile_shape(V)
SHORT_R, SHORT_B = rows_triton.tile_shape(512)  # a toy vocabulary: many rows in a tile
ROW = dict(rows_ptr=None, scale_ptr="fp32", n="i32", V="i32", R=R, B=B)
STATS = ROW | dict(stats_ptr="fp32", unit_ptr=None, stats_stride="i32", unit_stride="i32")
STATS |= dict(p_stride="i32", q_stride="i32", ENTROPY=False, REVERSE=True)
LOGPROB = STATS | dict(targets_ptr="i64", q_ptr=None)
KL = STATS | dict(targets_ptr=None)
GRADIENT = ROW | dict(logits_stride="i32", ref_stride="i32", out_ptr="bf16", out_stride="i32")
GRADIENT |= dict(m_ptr="fp32", a_ptr="fp32") | dict.fromkeys(
    "ref_ptr column_ptr ref_m_ptr b_ptr c_ptr d_ptr".split()
)
TARGET = dict(column_ptr="i64", c_ptr="fp32")
REFERENCE = dict(ref_ptr="bf16", ref_m_ptr="fp32")
UNIT_R, UNIT_B = rows_triton.tile_shape(V, rows_triton.UNIT_TILE)
SHORT_UNIT_R, _ = rows_triton.tile_shape(512, rows_triton.UNIT_TILE)
UNIT = dict(unit_ptr="bf16", R=UNIT_R, B=UNIT_B)
FP32_KL = KL | dict(p_ptr="fp32", q_ptr="fp32", unit_ptr="bf16")
LOGPROB_CASES = {
    "statistics of bf16 logits": dict(p_ptr="bf16"),
    "statistics of bf16 logits, V odd": dict(p_ptr="bf16", V="odd i32"),
    "statistics of chosen rows": dict(p_ptr="bf16", rows_ptr="i64"),
    "statistics, short rows": dict(p_ptr="bf16", R=SHORT_R, B=SHORT_B),
    # Triton compiles an argument that equals 1 as a constant
    "statistics of one row": dict(p_ptr="bf16", n=1, stats_stride=1),
    "statistics of a vocabulary of one": dict(p_ptr="fp32", V=1, p_stride=1, R=512, B=16),
    "statistics with entropy": dict(p_ptr="fp32", ENTROPY=True),
    "unit gradient": UNIT | dict(p_ptr="fp32"),
    "unit gradient, short rows": UNIT | dict(p_ptr="fp32", R=SHORT_UNIT_R, B=SHORT_B),
    "unit gradient in place": UNIT | dict(p_ptr="fp32", unit_ptr="fp32"),
}
KL_CASES = {
    "KL of bf16 logits": KL | dict(p_ptr="bf16", q_ptr="bf16"),
    "unit gradient of the reverse KL": FP32_KL,
    "unit gradient of the forward KL": FP32_KL | dict(REVERSE=False),
}
GRADIENT_CASES = {
    "gradient of one row": TARGET | dict(logits_ptr="fp32", n=1),
    "gradient of log-probs": TARGET | dict(logits_ptr="bf16"),
    "gradient of bf16 logits, V odd": TARGET | dict(logits_ptr="bf16", V="odd i32"),
    "gradient of log-probs, fp32 logits": TARGET | dict(logits_ptr="fp32"),
    "gradient with entropy": TARGET | dict(logits_ptr="fp32", b_ptr="fp32"),
    "gradient of the reverse KL": REFERENCE | dict(logits_ptr="bf16", b_ptr="fp32"),
    "gradient of the forward KL": REFERENCE | dict(logits_ptr="bf16", d_ptr="fp32"),
}
KERNEL = rows_triton.statistics_kernel
ROW_CASES = {name: (KERNEL, LOGPROB | case) for name, case in LOGPROB_CASES.items()}
ROW_CASES |= {name: (KERNEL, case) for name, case in KL_CASES.items()}
KERNEL = gradient_triton.gradient_kernel
ROW_CASES |= {name: (KERNEL, GRADIENT | case) for name, case in GRADIENT_CASES.items()}
BN, BV, BD, _ = linear_triton.blocks(N, V, D)
PARTIAL = dict(hidden_ptr="bf16", weight_ptr="bf16", targets_ptr="i64", parts_ptr="fp32")
PARTIAL |= dict(scale_ptr="fp32", n="i32", V="i32", D="i32", hidden_row="i32", hidden_column=1)
PARTIAL |= dict(weight_row="i32", weight_column=1, tiles="i32", UPCAST=False, BN=BN, BV=BV, BD=BD)
SMALL = dict(zip(("BN", "BV", "BD"), linear_triton.blocks(N, V, D, small=True)))
COMBINE = dict(parts_ptr="fp32", stats_ptr="fp32", splits="i32", n="i32", stats_stride="i32")
COMBINE |= dict(ENTROPY=True, B=256)
PARTIAL_CASES = {
    "fused linear": dict(ENTROPY=False),
    "fused linear, entropy": dict(ENTROPY=True),
    "fused linear, one token": dict(ENTROPY=True, n=1, tiles=1, BN=16),
}
for dtype in ("fp32", "fp64"):
    pointers = dict.fromkeys("hidden_ptr weight_ptr parts_ptr scale_ptr".split(), dtype)
    PARTIAL_CASES[f"fused linear, {dtype}"] = SMALL | pointers | dict(ENTROPY=True)
LINEAR_CASES = {
    name: (linear_triton.partial_kernel, PARTIAL | case, linear_triton.WARPS, linear_triton.STAGES)
    for name, case in PARTIAL_CASES.items()
}
ONE_TOKEN = COMBINE | dict(n=1, splits=1, stats_stride=1)
LINEAR_CASES |= {
    "combine, one token": (linear_triton.combine_kernel, ONE_TOKEN, 4, 3),
    "combine": (linear_triton.combine_kernel, COMBINE, 4, 3),
}
WARPS = {True: rows_triton.UNIT_WARPS, False: rows_triton.WARPS}  # a unit gradient of one row
CASES = {}
for name, (kernel, case) in ROW_CASES.items():
    large = case.get("unit_ptr") is not None and case["q_ptr"] is None
    CASES[name] = (kernel, case, WARPS[large], 3)
CASES |= LINEAR_CASES


def needs_a_compiler():
    if dispatch.interpreting():
        pytest.skip("TRITON_INTERPRET=1: the kernels are Python functions here, nothing to compile")
    if not (BIN / "cuobjdump").exists() or not (BIN / "ptxas").exists():
        pytest.skip(
            f"{BIN}: this Triton wheel has no ptxas or no cuobjdump, the resources cannot be read"
        )


# a default that Triton is about to change; either will do
@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
@pytest.mark.parametrize("name", CASES)
def test_kernel_compiles_for_hopper_without_spills(name, tmp_path, record_property):
    """And within shared memory."""
    needs_a_compiler()
    usage, asm = resources(*CASES[name], tmp_path=tmp_path)
    print(f"{name}: {usage}")
    record_property("resources", str(usage))
    assert usage["STACK"] == usage["LOCAL"] == 0, f"{name} spills: {usage}"
    assert usage["SHARED"] <= SHARED_LIMIT and usage["REG"] <= 255, usage
    if "i32" in (CASES[name][1].get(stride) for stride in ("logits_stride", "p_stride")):
        assert re.search(r"arith\.muli .*: (i64|tensor<\d+x1xi64>)", asm["ttir"]), (
            "row x stride is not computed in 64 bits"
        )
    if name in ("fused linear", "fused linear, entropy"):
        assert "wgmma" in asm["ptx"], "the product does not run on Hopper's own matrix instructions"
        assert 2 * usage["SHARED"] > SHARED_LIMIT, "two programs fit: PROGRAMS counts with one"
    if name == "unit gradient":
        registers = usage["REG"] * 32 * rows_triton.UNIT_WARPS  # of one program
        assert 2 * registers > REGISTERS, "two programs fit: UNIT_TILE counts with one"
    if "bf16 logits" in name:
        assert re.search(r"ld\.global[.\w]*\.v4\.b32", asm["ptx"]), (
            "bf16 logits are not read 16 bytes at a time"
        )
    if "gradient of bf16" in name:
        assert re.search(r"st\.global[.\w]*\.v4\.b32", asm["ptx"]), (
            "their gradient is not written 16 bytes at a time"
        )


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
@pytest.mark.parametrize("architecture", [80, 100])
def test_no_kernel_spills_on_an_a100_or_a_b200(architecture, tmp_path):
    """And all fit in shared memory."""
    needs_a_compiler()
    for name, usage in usage_on(architecture, tmp_path).items():
        assert isinstance(usage, dict), f"{name} does not compile: {usage}"
        spilled = usage["STACK"] + usage["LOCAL"]
        assert not spilled or (architecture, name) in NOT_LAUNCHED, f"{name} spills: {usage}"
        assert usage["SHARED"] <= SHARED_LIMITS[architecture], f"{name}: {usage}"


def test_every_kernel_is_covered():
    kernels = {
        value
        for module in (rows_triton, gradient_triton, linear_triton)
        for name, value in vars(module).items()
        if name.endswith("_kernel")
    }
    assert len(kernels) == 4 and kernels == {case[0] for case in CASES.values()}


def usage_on(architecture, tmp_path):
    """-> {kernel: its resources, or why it does not compile}."""
    usages = {}
    for name, case in CASES.items():
        try:
            usages[name], _ = resources(*case, tmp_path=tmp_path, architecture=architecture)
        except Exception as error:  # of the compiler, in its own words
            usages[name] = f"{type(error).__name__}: {str(error).strip()[-100:]!r}"
    return usages


def main():
    """Prints the table."""
    print(f"Triton {triton.__version__}; registers / spilled bytes / shared KiB of a program")
    with tempfile.TemporaryDirectory() as folder:
        table = {a: usage_on(a, Path(folder)) for a in SHARED_LIMITS}
    print(" ".join(["kernel".ljust(36), *(f"sm_{a}".ljust(16) for a in SHARED_LIMITS)]))
    errors = []
    for name in CASES:
        cells = []
        for architecture, usages in table.items():
            usage = usages[name]
            if isinstance(usage, str):
                errors.append(f"sm_{architecture}, {name}: {usage}")
                cells.append("error")
                continue
            spilled, shared = usage["STACK"] + usage["LOCAL"], usage["SHARED"]
            over = "!" if shared > SHARED_LIMITS[architecture] else ""
            cells.append(f"{usage['REG']} / {spilled} / {shared / 1024:.0f}{over}")
        print(" ".join([name.ljust(36), *(cell.ljust(16) for cell in cells)]))
    print("!: more shared memory than a program may have there", *errors, sep="\n")


if __name__ == "__main__":
    main()
