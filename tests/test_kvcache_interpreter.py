"""Some of the cache tests on the Triton kernels, in Triton's interpreter.

The interpreter has to be chosen before Triton is imported, so a child process runs them. CPU
tensors are appended to by PyTorch otherwise; the child has the Triton backend append and rotate.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

HERE = Path(__file__).parent
_CHILD = """
import sys
import pytest
from flash_attn.core import registry
registry.cache_writer = lambda device: registry.load("triton")
sys.exit(pytest.main(sys.argv[1:]))
"""
TESTS = {
    "test_kvcache.py": [
        "test_append[cpu-torch.float32-2-19-True]",
        "test_append[cpu-torch.float16-4-1-False]",
        "test_rotary[cpu-torch.float16-True-causal]",
        "test_rotary[cpu-torch.float32-False-full]",
        "test_cache_batch_idx[cpu-2]",
        "test_cache_leftpad[cpu-3-causal-left]",
        "test_head_dims[cpu-torch.float16-59]",
        "test_num_splits_with_everything[cpu-3]",
        "test_cache_strides[cpu-headdim-slice-4]",
        "test_rows_without_keys[cpu]",
        "test_empty_batch[cpu]",
        "test_no_queries[cpu]",
        "test_poison[cpu-3-5-torch.float16]",
        "test_poison_before_the_window[cpu-1]",
    ],
    "test_paged.py": [
        "test_cache_pages[cpu-torch.float16-21-19]",
        "test_shared_pages[cpu-3]",
        "test_poisoned_pages[cpu-2-19-4]",
        "test_packed_queries[cpu-torch.float32-local-19]",
        "test_packed_queries[cpu-torch.float16-causal-1]",
        "test_seqused_k[cpu-causal-19]",
        "test_leftpad_k[cpu-True-local]",
        "test_rows_of_no_sequence_are_zero[cpu]",
    ],
    "test_hopper_kvcache.py": [
        "test_cache_seqlens[cpu-[3, 0, 2]-tensor]",
        "test_pages[cpu-[9, 0, 2]-[5, 0, 19]-None]",
        "test_rotation[cpu-True-full-torch.float16]",
        "test_rotary_seqlens[cpu-True-False]",
        "test_rotary_seqlens[cpu-True-True]",
        "test_rows_between_packed_sequences[cpu]",
        "test_packed_rows_for_a_cache_without_room[cpu]",
        "test_empty_batch_and_no_queries[cpu]",
        "test_hostile_bounds_of_new_rows[cpu-4-highest]",
        "test_hostile_bounds_of_new_rows[cpu-None-decreasing]",
        "test_hostile_bounds_of_queries[cpu-False-lowest]",
        "test_hostile_positions[cpu-False-(-1, -2147483648, 5)]",
        "test_hostile_rows[cpu-None-(-1, 2, -2147483648)]",
        "test_rows_that_do_not_fit_are_dropped[cpu-[39, 41, 36]-[5, 0, 9]]",
    ],
    "test_hostile_indices.py": [
        "test_cache_seqlens[cpu-highest-5-3]",
        "test_cache_seqlens[cpu-lowest-5-1]",
        "test_rotary_positions[cpu-highest-True]",
        "test_block_table[cpu-highest-5-19]",
        "test_block_table[cpu-minus-one-5-1]",
        "test_cache_batch_idx[cpu-negative-2]",
        "test_cache_leftpad[cpu-lowest-3]",
        "test_append_past_the_end_drops_rows[cpu]",
        "test_appended_rows_of_neighbours_stay[cpu]",
        "test_cu_seqlens[cpu-both-highest-None-causal]",
        "test_cu_seqlens[cpu-both-decreasing-16-causal]",
    ],
}


def selected(file: str) -> list[str]:
    return [f"{HERE / file}::{name}" for name in TESTS[file]]


@pytest.mark.parametrize("file", list(TESTS))
def test_in_the_interpreter(file: str) -> None:
    env = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        "TRITON_INTERPRET": "1",
        "FLASH_ATTN_TEST_BACKEND": "triton",
        "CUDA_VISIBLE_DEVICES": "",
    }
    arguments = ["-q", "-x", "-p", "no:cacheprovider", "-o", "addopts=", *selected(file)]
    child = subprocess.run(
        [sys.executable, "-c", _CHILD, *arguments],
        env=env, cwd=HERE.parent, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert child.returncode == 0, child.stdout[-6000:] + child.stderr[-2000:]
