"""All kernels compile for all GPUs, with registers and shared memory to spare, without a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("triton", reason="Triton exists on Linux only")

import aot
import triton
from cases import KNOWN_SPILLS, Case, run_case

from flash_attn.backends.triton.extended_plans import converts_float8_ahead
from flash_attn.backends.triton.heuristics import dkdv_kernels, plan_for
from flash_attn.core.plan import PlanKey, TilePlan

_SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "compile_matrix.py"
_ARCHS = ("sm80", "sm86", "sm89", "sm90", "sm100", "sm120", "gfx942")


def _compile(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Compile in processes of their own: the compiler aborts where it does not know its way."""
    return subprocess.run(
        [sys.executable, str(_SCRIPT), *arguments], capture_output=True, text=True, check=False
    )


@pytest.mark.slow
@pytest.mark.parametrize("arch", _ARCHS)
def test_kernels_fit_without_spilling(arch: str) -> None:
    done = _compile("--quick", "--arch", arch)
    assert done.returncode == 0, done.stdout + done.stderr
    kernels = int(done.stdout.split(":")[1].split()[0])
    assert kernels >= 25, done.stdout


@pytest.mark.slow
@pytest.mark.skipif(not triton.__version__.startswith("3.6."), reason="figures of Triton 3.6")
@pytest.mark.parametrize("case", sorted(KNOWN_SPILLS), ids=lambda case: " ".join(case))
def test_known_spills_are_what_they_were(case: tuple[str, str, str]) -> None:
    """Neither more nor none: a kernel that spills no longer has to leave the list."""
    arch, kernel, label = case
    done = _compile("--arch", arch, "--match", f"backward {label}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{KNOWN_SPILLS[case]} spilled" in done.stdout
    assert kernel in done.stdout


@pytest.mark.parametrize(
    ("arch", "plan", "complaint"),
    [
        ("sm80", "forward=128,128,4,2", "spilled"),
        ("sm86", "forward=64,64,8,3", "bytes of shared memory"),
        ("gfx942", "forward=128,128,4,1", "spilled"),
    ],
)
def test_tiles_that_do_not_fit_are_found(arch: str, plan: str, complaint: str) -> None:
    arguments = ("--quick", "--arch", arch, "--match", "forward d256", "--plan", plan)
    done = _compile(*arguments)
    assert done.returncode == 1, done.stdout + done.stderr
    assert complaint in done.stdout


@pytest.mark.skipif(triton.knobs.runtime.interpret, reason="nothing is compiled")
@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION is unset")
def test_a_limit_of_registers_is_kept() -> None:
    (one,) = aot.record(lambda: run_case(Case("forward", 64)), "sm90")
    limited = one.under(TilePlan(64, 64, 4, 2, max_registers=128))
    assert limited.plan == [64, 64, 4, 2, 128]
    assert limited.under(TilePlan(64, 64, 4, 2)).plan == [64, 64, 4, 2]
    assert aot.compile_launch(limited, "sm90").registers <= 128
    assert aot.compile_launch(one, "sm90").registers > 128


@pytest.mark.skipif(triton.knobs.runtime.interpret, reason="nothing is compiled")
@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION is unset")
@pytest.mark.parametrize(("arch", "code"), [("sm90", "cubin"), ("gfx942", "amdgcn")])
def test_machine_code_alone_tells_registers_and_spills(arch: str, code: str) -> None:
    """A cache may hold no more than that."""
    (one,) = aot.record(lambda: run_case(Case("forward", 64)), arch)
    _, compiled = aot.compile_kernel(one, arch)
    whole = aot.resources_of(compiled, arch)
    alone = SimpleNamespace(asm={code: compiled.asm[code]})
    assert aot.usage_of(alone, arch) == (whole.registers, whole.spilled)
    assert whole.registers > 0


def _float8_key(block_d: int, masked: bool, **more: Any) -> PlanKey:
    return PlanKey("forward", "sm90", (3, 6), 1, block_d, masked, False, block_dv=block_d, **more)


@pytest.mark.parametrize(
    ("key", "first"),
    [
        (_float8_key(64, False), 8192),
        (_float8_key(64, True), None),
        (_float8_key(64, True)._replace(block_dv=512), 8192),
        (_float8_key(128, False), 8192),
        (_float8_key(128, True), 8192),
        (_float8_key(256, False), None),
        (_float8_key(256, True), None),
        (_float8_key(64, True)._replace(arch="sm80"), 1024),
        (_float8_key(256, False)._replace(arch="sm80"), 1024),
    ],
)
def test_rows_from_which_float8_is_converted_before(key: PlanKey, first: int | None) -> None:
    assert not converts_float8_ahead(key, (first or 2**20) - 1)
    assert converts_float8_ahead(key, first or 2**20) is (first is not None)


def test_the_limit_of_registers_is_that_of_plain_float8_on_hopper() -> None:
    key = _float8_key(64, True)
    assert plan_for(key) == TilePlan(64, 64, 4, 3, max_registers=128)
    others = {
        "heavy": True, "windowed": True, "padded": True, "few_rows": True, "itemsize": 2,
        "triton": (3, 9), "arch": "sm89", "block_d": 128,
    }  # fmt: skip
    for name, value in others.items():
        assert plan_for(key._replace(**{name: value})).max_registers is None, name


@pytest.mark.parametrize("arch", [*_ARCHS, "sm75", "sm103", "sm121", "gfx90a", "gfx950", "gfx1100"])
@pytest.mark.parametrize("block_d", [16, 32, 64, 128, 256])
def test_every_gpu_has_plans(arch: str, block_d: int) -> None:
    for kernel in ("forward", "dkdv", "dq"):
        for itemsize in (2, 4):
            for flags in range(8):
                masked, heavy, few_rows = (bool(flags >> bit & 1) for bit in range(3))
                key = PlanKey(kernel, arch, (3, 6), itemsize, block_d, masked, heavy, few_rows)
                plan = plan_for(key)
                sizes = (plan.block_m, plan.block_n, plan.num_warps)
                assert all(x > 0 and x & (x - 1) == 0 for x in sizes), (key, plan)
                assert min(plan.block_m, plan.block_n) >= 16


def _wide_key(kernel: str, **more: Any) -> PlanKey:
    key = PlanKey(kernel, "sm90", (3, 6), 2, 256, True, False, block_dv=256)
    return key._replace(**more)


def test_where_dk_and_dv_are_apart() -> None:
    """At head dim 256 on Hopper, full and causal; nowhere else."""
    for triton_version in ((3, 6), (3, 9)):
        for more in ({}, {"masked": False}, {"packed": True}, {"padded": True, "alignment": 8}):
            key = _wide_key("dkdv", triton=triton_version, **more)
            assert dkdv_kernels(key) == ("dk", "dv"), more
            for kernel in ("dk", "dv"):
                assert plan_for(key._replace(kernel=kernel)).block_n == 128
    for more in (
        {"heavy": True}, {"windowed": True}, {"alignment": 4}, {"mask_tensor": True},
        {"itemsize": 4}, {"block_d": 128, "block_dv": 128}, {"block_dv": 512}, {"arch": "sm80"},
        {"arch": "gfx942"}, {"arch": "sm100"}, {"arch": "interpreter"},
    ):  # fmt: skip
        assert dkdv_kernels(_wide_key("dkdv", **more)) == ("dkdv",), more


@pytest.mark.parametrize(
    ("facts", "plan", "newer"),
    [
        ({}, (128, 32, 8, 2), (128, 32, 8, 2)),
        ({"packed": True}, (128, 16, 8, 2), (128, 32, 8, 2)),
        ({"packed": True, "masked": False}, (128, 32, 8, 2), (128, 32, 8, 2)),
        ({"padded": True}, (128, 16, 8, 2), (128, 32, 8, 2)),
        ({"padded": True, "masked": False}, (128, 32, 8, 2), (128, 32, 8, 2)),
        ({"padded": True, "masked": False, "alignment": 8}, (128, 16, 8, 2), (128, 32, 8, 2)),
        ({"padded": True, "masked": False, "alignment": 2}, (32, 32, 8, 2), (32, 32, 8, 2)),
        ({"padded": True, "heavy": True, "alignment": 8}, (32, 64, 8, 1), (32, 32, 8, 2)),
        ({"windowed": True}, (32, 32, 8, 2), (32, 32, 8, 2)),
    ],
    ids=str,
)
def test_plans_of_dq_at_head_dim_256(
    facts: dict[str, Any], plan: tuple[int, ...], newer: tuple[int, ...]
) -> None:
    """What packs, pads or cuts rows takes registers from the larger tile, by compiler."""
    for triton_version, expected in (((3, 6), plan), ((3, 9), newer)):
        assert plan_for(_wide_key("dq", triton=triton_version, **facts)) == TilePlan(*expected)


@pytest.mark.parametrize(
    ("case", "packed", "alignment"),
    [
        (Case("backward", 256), False, 16),
        (Case("backward", 256, feature="varlen"), True, 16),
        (Case("backward", 200), False, 8),
        (Case("backward", 250), False, 2),
        (Case("backward", 200, headdim_v=30), False, 2),
        (Case("forward", 33), False, 1),
    ],
    ids=lambda value: value.label if isinstance(value, Case) else str(value),
)
def test_plans_know_packing_and_strides(case: Case, packed: bool, alignment: int) -> None:
    keys = [one.key for one in aot.record(lambda: run_case(case), "sm90") if one.key]
    assert keys
    assert all((key.packed, key.alignment) == (packed, alignment) for key in keys)


_PLANS = """
import itertools, hashlib
from flash_attn.backends.triton.heuristics import dkdv_kernels, plan_for
from flash_attn.core.plan import PlanKey
digest = hashlib.sha256()
flags = [(False, True)] * 5
for arch in ("sm80", "sm86", "sm90", "sm100", "gfx942", "interpreter"):
    for kernel, triton, size, block_d, *rest in itertools.product(
        ("forward", "dkdv", "dq"), [(3, 6), (3, 9)], (2, 4), (16, 32, 64, 128, 256), *flags
    ):
        digest.update(repr(plan_for(PlanKey(kernel, arch, triton, size, block_d, *rest))).encode())
print(digest.hexdigest())
"""


def test_processes_agree_on_plans() -> None:
    """Nothing but the key counts: not the order of sets, not what ran before, not time."""
    digests = set()
    for seed in range(8):
        done = subprocess.run(
            [sys.executable, "-c", _PLANS],
            env={
                **os.environ,
                "PYTHONHASHSEED": str(seed),
                "PYTHONPATH": str(_SCRIPT.parents[1] / "src"),
            },
            capture_output=True,
            text=True,
            check=True,
        )
        digests.add(done.stdout)
    assert len(digests) == 1
