"""jit_flash on an NVIDIA GPU: what it launches, in which configuration, and that every configuration compiles.

What the kernel computes is in test_jit_flash_gpu.py, which takes a GPU.
"""

from __future__ import annotations

import ctypes
import dataclasses
import gc
import itertools
import math
import re
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attnbench import jit
from attnbench.problem import Problem
from attnbench_plugins.jit_flash import cuda, cuda_config, cuda_driver, cuda_sm80
from attnbench_plugins.jit_flash.cuda import Divisor, JitFlashCuda, Params, StridedParams
from attnbench_plugins.jit_flash.cuda_config import Config, choose, configs, packed_heads, predicted_us, units
from attnbench_plugins.jit_flash.cuda_sm80 import Gpu
from attnbench_plugins.jit_flash.cuda_workspace import Workspaces

ROOT = Path(__file__).parents[1]
H100 = 132
"""SMs of one."""
GPUS = {
    "A100": Gpu(sms=108, block_bytes=166_912, sm_bytes=167_936),
    "L40S": Gpu(sms=142, block_bytes=101_376, sm_bytes=102_400),
    "H100": Gpu(sms=132, block_bytes=232_448, sm_bytes=233_472),
}


def problem(seqlen_q: int, seqlen_k: int, **fields) -> Problem:
    return Problem(seqlen_q=seqlen_q, seqlen_k=seqlen_k, **{"dtype": "fp16", **fields})


# --- which configuration ----------------------------------------------------------------------------------------------


CASES = [
    problem(128, 1024),
    problem(2048, 8192),
    problem(1, 1),
    problem(1, 131072, batch=4, heads_q=32, heads_kv=8),
    problem(4096, 4096, batch=4, heads_q=16, causal=True),
    problem(300, 2049, head_dim=256),
    problem(77, 100, head_dim=72, head_dim_v=200, window=50),
    problem(5, 7, heads_q=40, heads_kv=1, head_dim=8),
    problem(9, 300, causal=True),
    problem(300, 9, causal=True),  # most queries see no key
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.case_id)
def test_a_configuration_is_chosen_that_a_block_has_room_for(case: Problem) -> None:
    config = choose(case, H100)
    assert config in set(configs(case, H100))
    assert config.shared_bytes(case.head_dim, case.head_dim_v) <= cuda_config.SHARED_BYTES
    consumers = config.parts * config.shared_rows
    assert consumers * config.keys < case.seqlen_k + config.keys or consumers == 1  # none without keys of its own
    assert config.columns(case.head_dim_v) * config.split_v >= case.head_dim_v
    assert config.columns(case.head_dim_v) * (config.split_v - 1) < case.head_dim_v
    assert math.isfinite(predicted_us(case, config, H100))


def test_what_no_window_shows_is_not_read() -> None:
    """4096 of 32768 keys fit into L2, all of them do not."""
    case = problem(1, 32768, heads_q=32, heads_kv=8, causal=True)
    window = dataclasses.replace(case, window=4096)
    keys = 8 * 4096 * 256 * 2
    assert (cuda_config._read_bytes(case), cuda_config._read_bytes(window)) == (8 * keys, keys)
    assert keys < cuda_config.L2_BYTES < 8 * keys


def test_keys_are_split_over_all_sms_where_they_are_worth_it() -> None:
    for case in (problem(2048, 8192), problem(512, 8192), problem(1, 131_072, heads_q=32, heads_kv=8)):
        config = choose(case, H100)
        assert config.parts > 1
        assert 120 <= units(case, config) * config.parts <= 132


def test_all_parts_of_all_tiles_can_run_at_once() -> None:
    for case, sms in itertools.product(CASES, (132, 114, 78)):
        for config in configs(case, sms):
            assert config.parts == 1 or units(case, config) * config.parts <= sms
            assert config.parts <= cuda_config.MAX_PARTS
    assert predicted_us(problem(128, 8192), Config(64, 64, 4, 32, 2), 100) == math.inf


def test_of_numbers_of_parts_that_leave_the_largest_as_large_the_least_is_looked_at() -> None:
    """Of ten key blocks, six parts have two at most, as five have."""
    case = problem(64, 640)
    found = {config.parts for config in configs(case, H100) if (config.keys, config.shared_rows) == (64, 1)}
    assert found == {1, 2, 3, 4, 5, 10}


def test_much_work_is_not_split() -> None:
    assert choose(problem(8192, 8192, heads_q=32), H100) == Config(128, 128, 2, persistent=True)
    assert choose(problem(8192, 8192, heads_q=32, causal=True), H100) == Config(128, 128, 2, persistent=True)
    narrow = problem(8192, 8192, heads_q=32, head_dim=64)
    assert choose(narrow, H100) == Config(128, 176, 4, persistent=True)
    assert choose(problem(128, 8192, heads_q=4096), H100).parts == 1


def test_blocks_take_tiles_only_where_each_has_keys() -> None:
    for window in (None, 100):
        case = problem(8192, 8191, heads_q=32, causal=True, window=window)
        assert not any(config.persistent for config in configs(case, H100))
        assert choose(dataclasses.replace(case, seqlen_k=8192), H100).persistent


def test_many_heads_that_are_large_have_whole_tiles_too() -> None:
    """Where there is no room for the next tile's queries, a block does not go on to it."""
    for dims, causal in itertools.product(((192, 128), (256, 256), (256, 192), (256, 128)), (False, True)):
        case = problem(4096, 4096, batch=4, heads_q=16, head_dim=dims[0], head_dim_v=dims[1], causal=causal)
        config = choose(case, H100)
        assert (config.rows, config.parts, config.shared_rows) == (128, 1, 1)
        assert config.persistent == (dims == (256, 128))


def test_what_a_tile_sees_is_looked_at_in_few_of_many_tiles() -> None:
    case = problem(1 << 20, 1 << 20, causal=True)
    found = cuda_config.key_blocks(case, 128, 128)
    assert len(found) <= cuda_config.MOST_TILES
    assert max(found) == (1 << 20) // 128  # of the last


@given(rows=st.sampled_from((64, 128)), group=st.integers(1, 200), seqlen_q=st.integers(1, 300))
def test_a_tile_holds_whole_queries_of_heads_that_share_a_key_head(rows: int, group: int, seqlen_q: int) -> None:
    case = problem(seqlen_q, 64, heads_q=2 * group, heads_kv=2, batch=3)
    heads = packed_heads(case, rows)
    assert group % heads == 0
    assert heads == 1 or (heads <= rows and seqlen_q < rows)
    tiles = -(-seqlen_q // (rows // heads))
    assert units(case, Config(rows, 64, 4)) == 3 * (2 * group // heads) * tiles


@pytest.mark.parametrize("gpu", GPUS.values(), ids=GPUS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.case_id)
def test_without_tma_too_a_configuration_is_chosen_that_a_block_has_room_for(case: Problem, gpu: Gpu) -> None:
    found = list(cuda_sm80.configs(case, gpu))
    assert [config.rows for config in found] == [128, 64, 32, 16]
    chosen = cuda_sm80.choose(case, gpu)
    assert dataclasses.replace(chosen, parts=1) in found
    assert chosen.parts == 1 or cuda_sm80.units(case, chosen) * chosen.parts <= 2 * gpu.sms
    assert chosen.parts == 1 or chosen.parts * chosen.keys * 2 <= case.seqlen_k + chosen.keys
    assert chosen.parts <= cuda_sm80.MAX_PARTS
    for config in found:
        assert config.shared_bytes(case.head_dim, case.head_dim_v) <= gpu.block_bytes
        assert config.rows % (16 * config.row_warps) == 0
        assert config.keys % (16 * config.key_warps) == 0
        # O and S of a warp with 32 rows have 255 registers a thread.
        assert config.rows // config.row_warps == 16 or case.head_dim_v <= 128
        assert config.parts == 1


@pytest.mark.parametrize(
    ("case", "gpu", "rows"),
    [
        (problem(4096, 4096, heads_q=16), "A100", 128),
        (problem(1024, 1024, heads_q=13), "A100", 128),  # 104 tiles for 108 SMs
        (problem(128, 64), "A100", 16),  # of which keys cannot be split
        (problem(2048, 64), "A100", 32),  # 64 tiles, where 16 rows would be 128 for 108 SMs
        (problem(2048, 64), "H100", 16),
        (problem(2048, 8192, causal=True, window=100), "H100", 16),
        (problem(1, 4096, batch=64, heads_q=32, heads_kv=8), "A100", 16),  # no tile has more than 4 rows
        (problem(1, 4096, batch=128, heads_q=64, heads_kv=1), "A100", 64),  # all heads of a batch element
    ],
)
def test_without_tma_too_tiles_are_as_large_as_keeps_all_sms_busy(case: Problem, gpu: str, rows: int) -> None:
    config = cuda_sm80.choose(case, GPUS[gpu])
    assert (config.rows, config.parts) == (rows, 1)


@pytest.mark.parametrize("gpu", GPUS.values(), ids=GPUS)
@pytest.mark.parametrize(
    ("case", "rows"),
    [
        (problem(128, 8192), {16}),
        (problem(2048, 8192), {64, 128}),  # which read keys from L2 a quarter as often as 16, and less
        (problem(2048, 8192, causal=True), {64}),
        (problem(1, 131072, heads_q=32, heads_kv=8), {16}),
        (problem(1, 4096, batch=32, heads_q=128, heads_kv=1), {64, 128}),
    ],
)
def test_without_tma_too_keys_are_split_where_sms_have_no_tile(case: Problem, rows: set[int], gpu: Gpu) -> None:
    config = cuda_sm80.choose(case, gpu)
    assert config.rows in rows
    assert config.parts > 1
    assert 0.75 * gpu.sms <= cuda_sm80.units(case, config) * config.parts <= 2 * gpu.sms
    whole = dataclasses.replace(config, parts=1)
    assert cuda_sm80.predicted_us(case, config, gpu) < cuda_sm80.predicted_us(case, whole, gpu)


def test_what_a_split_is_expected_to_cost() -> None:
    """Of 128 key blocks in tiles of 16 rows: each takes an SM 800 cycles and 16 × 64 × 256 products; or 8 of them, and
    16 parts to add up."""
    case, gpu = problem(128, 8192), GPUS["H100"]
    whole = cuda_sm80.Config(16, 64, 1, 4, stages=2)
    split = dataclasses.replace(whole, parts=16)

    def cycles(case: Problem, config: cuda_sm80.Config) -> float:
        return (cuda_sm80.predicted_us(case, config, gpu) - 2.6) * 1755

    block, bytes_a_row = 800 + 16 * 64 * 256 / 1010, 128 * 4 + 8
    assert cycles(case, whole) == pytest.approx(128 * block)
    assert cycles(case, split) == pytest.approx(8 * block + 1240 + 16 * 16 * bytes_a_row / 27)
    one_query = dataclasses.replace(case, seqlen_q=1)
    assert cycles(one_query, split) == pytest.approx(8 * block + 1240 + 16 * bytes_a_row / 27)


def test_what_a_warp_reads_counts_where_it_is_alone() -> None:
    """64 keys of 256 columns take a warp 0.178 cycles each, more than 64 rows take the tensor cores; with two blocks on
    an SM, what both multiply is more."""
    gpu = GPUS["H100"]
    config = cuda_sm80.Config(64, 64, 4, stages=2, q_registers=True)
    alone = cuda_sm80.predicted_us(problem(64 * 132, 64), config, gpu)
    assert (alone - 2.6) * 1755 == pytest.approx(64 * 256 * 0.178)
    both = cuda_sm80.predicted_us(problem(64 * 264, 64), config, gpu)
    assert (both - 2.6) * 1755 == pytest.approx(2 * (800 + 64 * 64 * 256 / 1010))


def test_two_blocks_run_on_an_sm_where_they_can() -> None:
    """An L40S has no room for two tiles of 128 rows with key blocks of 64 of 128 columns, an A100 has."""
    case = problem(4096, 4096, heads_q=16)
    assert [cuda_sm80.choose(case, GPUS[gpu]).keys for gpu in ("A100", "L40S")] == [64, 32]


@pytest.mark.parametrize(
    ("places", "size"),
    [([4096, 256], 16), ([4096, 0], 16), ([4096, 144], 16), ([4104, 256], 8), ([4096, 136, 12], 4), ([4098, 256], 2)],
)
def test_as_much_is_copied_at_once_as_all_rows_are_aligned_to(places: list[int], size: int) -> None:
    assert cuda_sm80.copy_bytes(places) == size


# --- what is launched -------------------------------------------------------------------------------------------------


@given(st.integers(1, 2**31 - 1), st.integers(0, 2**31 - 1))
def test_the_kernels_division_is_exact(value: int, dividend: int) -> None:
    divisor = Divisor.of(value)
    assert divisor.factor < 2**32
    for n in (dividend, value * (dividend // value), max(value * (dividend // value) - 1, 0)):
        assert ((n * divisor.factor >> 32) + n) >> divisor.shift == n // value


class FakeDriver:
    """Takes the driver's calls, and keeps what was asked of it."""

    def __init__(self) -> None:
        self.maps: list[SimpleNamespace] = []
        self.launches: list[SimpleNamespace] = []
        self.attributes: list[tuple[int, int]] = []
        self.memory: list[ctypes.Array] = []
        self.freed: list[int] = []
        self.capture_mode = 0
        self.fails = ""
        self.cubins: list[tuple[int, str]] = []

    def asked(self, copy: int, arch: str) -> Path:
        self.cubins.append((copy, arch))
        return Path(__file__)

    def __getattr__(self, name: str):
        def call(*arguments):
            if name == self.fails:
                return 1
            handler = getattr(type(self), f"_{name}", None)
            return 0 if handler is None else handler(self, *arguments) or 0

        return call

    def _cuGetErrorString(self, status, text):
        text._obj.value = b"invalid argument"

    def _cuMemAlloc_v2(self, address, size):
        self.memory.append(ctypes.create_string_buffer(b"\xff" * size.value, size.value))
        address._obj.value = ctypes.addressof(self.memory[-1])

    def _cuMemsetD8Async(self, address, value, size, stream):
        ctypes.memset(address.value, value.value, size.value)

    def _cuMemFree_v2(self, address):
        self.freed.append(address.value)

    def _cuThreadExchangeStreamCaptureMode(self, mode):
        self.capture_mode, mode._obj.value = mode._obj.value, self.capture_mode

    def _cuFuncSetAttribute(self, function, attribute, value):
        self.attributes.append((attribute, value))

    def _cuTensorMapEncodeTiled(self, made, dtype, rank, address, sizes, strides, box, steps, *modes):
        assert ctypes.addressof(made._obj) % 64 == 0
        self.maps.append(
            SimpleNamespace(
                dtype=dtype, address=address.value, sizes=list(sizes), strides=list(strides), box=list(box), modes=modes
            )
        )

    def _cuLaunchKernelEx(self, config, function, arguments, extra):
        config = config._obj
        attributes = [config.attributes[i] for i in range(config.attribute_count)]
        params = Params.from_address(arguments[3]) if len(arguments) == 4 else StridedParams.from_address(arguments[0])
        self.launches.append(
            SimpleNamespace(
                grid=list(config.grid),
                block=list(config.block),
                shared_bytes=config.shared_bytes,
                stream=config.stream,
                attributes={attribute.id for attribute in attributes},
                params=params,
                arguments=arguments,
            )
        )

    def _cuDeviceGetAttribute(self, value, what, device):
        value._obj.value = {16: 108, 97: 166_912, 81: 167_936}[what]


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> FakeDriver:
    fake = FakeDriver()
    monkeypatch.setattr(cuda_driver, "_driver", lambda **_: fake)
    monkeypatch.setattr(cuda, "cubin", lambda case, config: Path(__file__))
    monkeypatch.setattr(cuda, "strided_cubin", lambda case, config, copy, arch: fake.asked(copy, arch))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 9))
    cuda._kernel.cache_clear()
    yield fake
    cuda._kernel.cache_clear()


def launched(driver: FakeDriver, case: Problem, config: Config, *tensors: torch.Tensor) -> SimpleNamespace:
    q, k, v = tensors or (
        torch.empty(shape, dtype=torch.float16) for shape in (case.q_shape, case.k_shape, case.v_shape)
    )
    out = torch.empty(case.out_shape, dtype=torch.float16)
    launch = cuda._launch(case, config, q, k, v, out, None)
    launch(0xABC)
    (made,) = driver.launches
    made.kept = (q, k, v, out)
    made.launch = launch  # which owns what the driver was given
    return made


def test_the_launch_of_a_split_problem(driver: FakeDriver) -> None:
    case = problem(100, 1000, batch=2, heads_q=4, heads_kv=2, head_dim=72, head_dim_v=136)
    config = Config(64, 128, 2, parts=2, split_v=3)
    made = launched(driver, case, config)
    q, k, v, out = made.kept
    assert made.grid == [2 * 3 * 2, 4, 2]  # tiles, columns and parts; heads; batch
    assert made.block == [256, 1, 1]
    assert made.attributes == {2}  # cooperative
    assert made.stream == 0xABC
    assert made.shared_bytes == config.shared_bytes(72, 136)
    assert (8, made.shared_bytes) in driver.attributes
    p = made.params
    assert (p.out, p.lse, p.seqlen_q, p.seqlen_k, p.head_dim_v) == (out.data_ptr(), None, 100, 1000, 136)
    assert [getattr(p, name).value for name in ("tiles", "groups", "key_groups")] == [2, 4, 2]
    assert (p.all_groups, p.wave.value, p.last_wave.value) == (8, 1, 1)
    assert p.ahead >= 1100  # nothing is hidden
    assert p.behind >= 1099
    assert p.scale_log2 == pytest.approx(math.log2(math.e) / math.sqrt(72))
    maps = driver.maps
    assert [m.address for m in maps] == [q.data_ptr(), k.data_ptr(), v.data_ptr()]
    assert maps[0].sizes == [72, 1, 100, 4, 2]
    assert maps[0].strides == [2 * 100 * 72, 144, 2 * 100 * 72, 2 * 4 * 100 * 72]
    assert maps[0].box == [64, 1, 64, 1, 1]
    assert maps[1].sizes == [72, 1000, 2, 2]
    assert maps[1].strides == [144, 144000, 288000]
    assert maps[2].box == [64, 128, 1, 1]
    assert {m.dtype for m in maps} == {6}
    assert {m.modes for m in maps} == {(0, 3, 3, 0)}  # 128-byte swizzle, zeros beyond the shape


def test_heads_of_few_queries_share_a_tile(driver: FakeDriver) -> None:
    case = problem(3, 500, batch=2, heads_q=12, heads_kv=2)
    made = launched(driver, case, Config(64, 64, 4, parts=2))
    assert made.grid == [2, 2, 2]  # 10 queries of 6 heads fit into 64 rows
    assert driver.maps[0].sizes == [128, 6, 3, 2, 2]
    assert driver.maps[0].box == [64, 6, 10, 1, 1]
    assert [getattr(made.params, name).value for name in ("tiles", "groups", "key_groups")] == [1, 2, 1]


@pytest.mark.parametrize(
    ("fields", "ahead", "behind"),
    [
        ({"causal": True}, 1, 299),
        ({"window": 7}, 7, 6),
        ({"causal": True, "window": 7}, 1, 6),
        ({"window": 10**9}, 300, 299),
    ],
)
def test_which_keys_a_query_sees(driver: FakeDriver, fields: dict, ahead: int, behind: int) -> None:
    case = problem(100, 200, **fields)
    params = launched(driver, case, Config(64, 64, 4)).params
    assert (params.ahead, params.behind) == (ahead, behind)
    for row in (0, 50, 99):
        position = row + 100
        assert case.key_range(row) == (max(0, position - behind), min(200, position + ahead))


def test_causal_tiles_are_dealt_out_by_waves_of_heads(driver: FakeDriver) -> None:
    params = launched(driver, problem(100, 200, heads_q=10, causal=True), Config(64, 64, 4)).params
    assert (params.wave.value, params.last_wave.value, params.all_groups) == (4, 2, 10)


def test_a_stride_of_a_dimension_of_one_is_none_that_tma_refuses(driver: FakeDriver) -> None:
    case = problem(64, 64)
    q = torch.empty(64 * 128 + 1, dtype=torch.float16)[: 64 * 128].as_strided((1, 1, 64, 128), (3, 5, 128, 1))
    launched(driver, case, Config(64, 64, 4), q, *(torch.empty(case.k_shape, dtype=torch.float16) for _ in range(2)))
    assert all(stride % 16 == 0 for stride in driver.maps[0].strides)


def test_a_call_of_the_driver_that_fails_is_named(driver: FakeDriver) -> None:
    driver.fails = "cuTensorMapEncodeTiled"
    with pytest.raises(cuda_driver.DriverError, match=r"^cuTensorMapEncodeTiled: invalid argument$"):
        launched(driver, problem(64, 64), Config(64, 64, 4))


def test_blocks_that_wait_for_each_other_are_launched_together(driver: FakeDriver) -> None:
    """And what they meet in belongs to one stream, or to one capture of it."""
    case, config = problem(200, 4096), Config(64, 128, 2, parts=8)
    made = launched(driver, case, config)
    assert made.grid == [4 * 8, 1, 1]
    assert made.attributes == {2}  # cooperative
    for stream, capture in ((0xABC, 0), (0xDEF, 0), (0xABC, 1), (0xABC, 2), (0xABC, 1)):
        made.launch(stream, capture)
    params = [launch.params for launch in driver.launches]
    places = [(p.launches, p.parts) for p in params]
    assert places[1] == places[0]
    assert places[5] == places[3]
    assert len(set(places)) == len({place for pair in places for place in pair}) / 2 == 4
    assert all(p.taken is None for p in params)
    counters, room = 4 * 8 * 4, 4 * 8 * config.part_bytes(128)
    assert config.part_bytes(128) == 64 * (128 * 4 + 16)
    for launches, parts in set(places):
        assert parts - launches == counters
        assert parts % 16 == 0
        # What an earlier launch left there would be taken for this one's.
        assert ctypes.string_at(launches, counters + room) == bytes(counters + room)
    assert [len(memory) for memory in driver.memory] == [counters + room] * 4
    assert driver.capture_mode == 0  # as it was


def test_more_parts_than_sms_are_refused(driver: FakeDriver) -> None:
    """They would wait for those that cannot start."""
    with pytest.raises(ValueError, match=r"32 tiles of 4 parts are more than the 108 SMs"):
        launched(driver, problem(2048, 4096), Config(64, 128, 2, parts=4))


def test_blocks_that_take_tiles_count_them(driver: FakeDriver) -> None:
    case = problem(2048, 2048, heads_q=16)
    made = launched(driver, case, Config(128, 128, 2, persistent=True))
    assert made.grid == [108, 1, 1]
    assert made.attributes == set()
    assert (made.params.tiles_in_all, made.params.parts, made.params.launches) == (16 * 16, None, None)
    assert ctypes.cast(made.params.taken, ctypes.POINTER(ctypes.c_uint64))[0] == 0
    driver.launches.clear()
    small = launched(driver, problem(2048, 2048), Config(128, 128, 2, persistent=True))
    assert small.grid == [16, 1, 1]


@pytest.mark.parametrize(
    ("case", "config", "why"),
    [
        (problem(65, 64, heads_q=200, causal=True), Config(128, 128, 2, persistent=True), "a tile may see no key"),
        (problem(65, 64, heads_q=200, window=3), Config(128, 128, 2, persistent=True), "a tile may see no key"),
        (problem(64, 640), Config(64, 64, 4, parts=2, persistent=True), "share a tile"),
        (problem(64, 640), Config(64, 64, 4, shared_rows=2, persistent=True), "share a tile"),
    ],
)
def test_what_would_wait_for_ever_is_refused(driver: FakeDriver, case: Problem, config: Config, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        launched(driver, case, config)


def test_what_blocks_meet_in_lives_as_long_as_the_output(driver: FakeDriver) -> None:
    """A graph may be replayed when nobody has the call any more, but somebody has the output."""
    made = launched(driver, problem(64, 4096), Config(64, 64, 4, parts=2))
    out, place = made.kept[3], made.params.launches
    del made.launch
    gc.collect()
    assert place not in driver.freed
    del out, made
    driver.launches.clear()
    gc.collect()
    assert place in driver.freed


def test_threads_that_launch_on_new_streams_at_once_get_workspaces_of_their_own(driver: FakeDriver) -> None:
    workspaces = Workspaces(counter_bytes=20, part_bytes=256)
    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(lambda _: workspaces.another(), range(200)))
    assert len({counters for counters, _ in found}) == len({parts for _, parts in found}) == 200
    assert {parts - counters for counters, parts in found} == {32}  # at a multiple of 16 bytes
    assert {len(memory) for memory in driver.memory} == {32 + 256}


def test_where_blocks_do_not_meet_no_memory_is_taken(driver: FakeDriver) -> None:
    assert Workspaces(*cuda_config.workspace_bytes(problem(64, 4096), Config(64, 64, 4))).another() == (None, None)
    assert driver.memory == []


@pytest.mark.parametrize("captured", [False, True])
def test_memory_that_torch_keeps_for_later_is_asked_for(
    driver: FakeDriver, monkeypatch: pytest.MonkeyPatch, captured: bool
) -> None:
    kept = [True]
    take = FakeDriver._cuMemAlloc_v2
    monkeypatch.setattr(
        FakeDriver, "_cuMemAlloc_v2", lambda self, address, size: 2 if kept else take(self, address, size)
    )
    monkeypatch.setattr(torch.cuda, "empty_cache", kept.clear)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: captured)
    if captured:  # giving it back would break the capture
        with pytest.raises(cuda_driver.OutOfMemory, match=r"^cuMemAlloc_v2: invalid argument$"):
            Workspaces(16, 64)
    else:
        assert Workspaces(16, 64).another() == (address := ctypes.addressof(driver.memory[0]), address + 16)


def test_memory_that_is_not_there_is_the_drivers_error_and_captures_go_on(driver: FakeDriver) -> None:
    for fails, freed in (("cuMemAlloc_v2", 0), ("cuMemsetD8Async", 1)):
        gc.collect()  # what earlier tests have left
        driver.fails = fails
        driver.freed.clear()
        with pytest.raises(cuda_driver.DriverError, match=f"^{fails}: invalid argument$"):
            cuda_driver.Memory(64)
        gc.collect()
        assert (driver.capture_mode, len(driver.freed)) == (0, freed)


def test_a_capture_is_known_by_its_number(driver: FakeDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    def info(self, stream, status, number, *rest):
        status._obj.value, number._obj.value = (1, 77) if stream.value == 5 else (0, 99)

    monkeypatch.setattr(FakeDriver, "_cuStreamGetCaptureInfo_v2", info, raising=False)
    assert (cuda_driver.capture_of(5), cuda_driver.capture_of(6)) == (77, 0)


def test_the_launch_of_tensors_of_any_strides(driver: FakeDriver) -> None:
    case = problem(200, 1000, batch=2, heads_q=6, heads_kv=3, head_dim=72, head_dim_v=136, causal=True)
    config = cuda_sm80.Config(64, 64, 4, stages=2)
    room = torch.empty(2, 200, 6, 73, dtype=torch.float16)
    q, k = room.transpose(1, 2)[..., 1:], torch.empty(1, 3, 1000, 72, dtype=torch.float16).expand(case.k_shape)
    v, out = torch.empty(case.v_shape, dtype=torch.float16), torch.empty(case.out_shape, dtype=torch.float16)
    launch = cuda._launch_strided(case, config, q, k, v, out, None)
    launch(0xABC)
    (made,) = driver.launches
    assert made.grid == [2 * 6 * 4, 1, 1]
    assert made.block == [128, 1, 1]
    assert made.attributes == set()  # of which a device may know none
    assert driver.attributes == [(8, made.shared_bytes)]
    assert made.shared_bytes == config.shared_bytes(72, 136) == 64 * 80 * 2 + 2 * 64 * (80 + 144) * 2
    assert driver.cubins == [(2, "sm_89")]
    p = made.params
    assert [p.q.data, p.k.data, p.v.data, p.out] == [tensor.data_ptr() for tensor in (q, k, v, out)]
    assert (p.q.batch, p.q.head, p.q.row) == (200 * 6 * 73, 73, 6 * 73)
    assert (p.k.batch, p.k.head, p.k.row) == (0, 72_000, 72)
    assert [getattr(p, name).value for name in ("tiles", "groups", "key_groups", "wave")] == [4, 6, 2, 4]
    assert (p.all_groups, p.lse, p.seqlen_q, p.seqlen_k, p.ahead, p.behind) == (12, None, 200, 1000, 1, 1199)
    assert p.scale_log2 == pytest.approx(math.log2(math.e) / math.sqrt(72))
    assert (p.arrived, p.parts, driver.memory) == (None, None, [])


def launched_strided(driver: FakeDriver, case: Problem, config: cuda_sm80.Config) -> SimpleNamespace:
    q, k, v = (torch.empty(shape, dtype=torch.float16) for shape in (case.q_shape, case.k_shape, case.v_shape))
    out = torch.empty(case.out_shape, dtype=torch.float16)
    launch = cuda._launch_strided(case, config, q, k, v, out, None)
    return SimpleNamespace(launch=launch, out=out)


def test_the_launch_of_a_split_problem_of_any_strides(driver: FakeDriver) -> None:
    """What its blocks meet in belongs to one stream, or to one capture of it, and lives as long as the output."""
    case, config = problem(100, 1000, heads_q=3, head_dim_v=72), cuda_sm80.Config(16, 64, 1, 4, parts=5)
    made = launched_strided(driver, case, config)
    for stream, capture in ((1, 0), (2, 0), (1, 0), (1, 7), (1, 8), (1, 7)):
        made.launch(stream, capture)
    assert {tuple(launch.grid) for launch in driver.launches} == {(3 * 7 * 5, 1, 1)}
    assert {frozenset(launch.attributes) for launch in driver.launches} == {frozenset()}  # no block waits for another
    places = [(launch.params.arrived, launch.params.parts) for launch in driver.launches]
    assert (places[2], places[5]) == (places[0], places[3])
    assert len(set(places)) == len({place for pair in places for place in pair}) / 2 == 4
    counters, room = 96, 3 * 7 * 5 * 16 * (80 * 4 + 8)  # 21 tiles' counters, up to a multiple of 16 bytes
    assert [len(memory) for memory in driver.memory] == [counters + room] * 4
    for arrived, parts in set(places):
        assert parts - arrived == counters
        assert ctypes.string_at(arrived, counters) == bytes(counters)
    out, place = made.out, places[0][0]
    driver.launches.clear()
    del made
    gc.collect()
    assert place not in driver.freed
    del out
    gc.collect()
    assert place in driver.freed


def test_more_blocks_than_a_grid_may_have_are_refused(driver: FakeDriver) -> None:
    case = problem(1, 1, batch=70_000_000, head_dim=8)
    assert JitFlashCuda().unsupported(case) is None
    none = torch.empty(0)
    config = cuda_sm80.Config(16, 64, 1, 4, parts=31)
    with pytest.raises(ValueError, match=r"2170000000 blocks are more than a grid may have"):
        cuda._launch_strided(case, config, none, none, none, none, None)
    assert driver.memory == []


def test_what_a_gpu_has_is_the_drivers_word(driver: FakeDriver) -> None:
    assert cuda.current_gpu() == GPUS["A100"]


# --- what it refuses --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        (problem(8, 8, direction="bwd"), "direction bwd: the kernel only runs forward"),
        (problem(8, 8, dtype="fp32"), "fp32: the kernel takes fp16 and bf16"),
        (problem(8, 8, head_dim=44), "head_dim 44 is no multiple of 8 up to 256"),
        (problem(8, 8, head_dim_v=264), "head_dim_v 264 is no multiple of 8 up to 256"),
        (problem(8, 8, softmax_scale=1e-40), "softmax_scale 1e-40 is not between 1e-38 and 1e+06"),
        (problem(8, 8, softmax_scale=2e6), "softmax_scale 2e+06 is not between 1e-38 and 1e+06"),
        (problem(8, 8, softmax_scale=1e6), None),
        (problem(8, 2**29 + 1), "more than 536870912 queries or keys"),
        (problem(2**20, 8, batch=2**16), "more blocks than a grid may have"),
        (problem(8, 8, dtype="bf16", head_dim=8, head_dim_v=256, causal=True, window=3, heads_q=6, heads_kv=2), None),
        (problem(1, 1, batch=70_000, heads_q=2), None),  # more than a grid's y and z have
    ],
)
def test_what_it_does_not_support(case: Problem, reason: str | None) -> None:
    assert JitFlashCuda().unsupported(case) == reason


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda q: q[:, :, 1:], r"q is \(1, 1, 63, 64\) of torch.float16, not what"),
        (lambda q: q.bfloat16(), "of torch.bfloat16, not what"),
        (lambda q: q, "q is on cpu, not on a GPU"),
    ],
)
def test_tensors_that_are_not_the_problems(spoil, message: str) -> None:
    case = problem(64, 64, head_dim=64)
    q, k, v = (torch.zeros(case.q_shape, dtype=torch.float16) for _ in range(3))
    with pytest.raises(ValueError, match=message):
        JitFlashCuda().prepare(case, spoil(q), k, v)


def layout(tensor: torch.Tensor, *, offset: int = 0, neg: bool = False) -> SimpleNamespace:
    """What `_require` asks of a tensor, as if it were on a GPU."""
    return SimpleNamespace(
        shape=tensor.shape,
        dtype=tensor.dtype,
        device=torch.device("cuda:0"),
        element_size=tensor.element_size,
        is_neg=lambda: neg,
        stride=tensor.stride,
        data_ptr=lambda: 4096 + offset,
    )


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (layout(torch.zeros(2, 3, 64, 128)[..., ::2]), "last dimension of q must be contiguous: its stride is 2"),
        (layout(torch.zeros(2, 3, 64, 64), neg=True), "q is a negated view"),
        (layout(torch.zeros(1, 3, 64, 64).expand(2, 3, 64, 64), offset=2), None),
        (layout(torch.zeros(2, 3, 64, 65)[..., :64]), None),
    ],
)
def test_layouts_that_no_kernel_takes(tensor: SimpleNamespace, message: str | None) -> None:
    case = problem(64, 64, batch=2, heads_q=3, head_dim=64)
    if message is None:
        cuda._require(case, "q", tensor, torch.float32, torch.device("cuda:0"))
    else:
        with pytest.raises(ValueError, match=message):
            cuda._require(case, "q", tensor, torch.float32, torch.device("cuda:0"))


LAYOUTS = [
    (layout(torch.zeros(2, 3, 64, 64).half(), offset=2), False),
    (layout(torch.zeros(2, 3, 64, 66).half()[..., :64]), False),
    (layout(torch.zeros(1, 3, 64, 64).half().expand(2, 3, 64, 64)), False),
    (layout(torch.zeros(2, 64, 3, 64).half().transpose(1, 2)), True),
    (layout(torch.zeros(2, 3, 64, 72).half()[..., :64]), True),
    (layout(torch.zeros(6 * 64 * 64).half().as_strided((1, 1, 64, 64), (3, 5, 64, 1))), True),  # of one
]


@pytest.mark.parametrize(("tensor", "takes"), LAYOUTS)
def test_which_kernel_has_which_gpu_and_which_layouts(
    monkeypatch: pytest.MonkeyPatch, tensor: SimpleNamespace, takes: bool
) -> None:
    assert cuda._suits_tma(tensor) is takes
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(cuda, "current_sms", lambda: H100)
    monkeypatch.setattr(cuda, "current_gpu", lambda: GPUS["H100"])
    right = layout(torch.zeros(2, 3, 64, 64).half())
    case = problem(64, 64, batch=2, heads_q=3, head_dim=64)
    for capability, expected in (((9, 0), Config if takes else cuda_sm80.Config), ((8, 0), cuda_sm80.Config)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda capability=capability: capability)
        for tensors in ((tensor, right, right), (right, right, tensor)):
            assert isinstance(cuda._chosen(case, *tensors), expected)


def test_a_given_configuration_of_hoppers_kernel_is_for_tensors_that_tma_takes(driver: FakeDriver) -> None:
    case = problem(64, 64)
    q, k, v = (torch.empty(case.q_shape, dtype=torch.float16) for _ in range(3))
    k = torch.empty(k.numel() + 1, dtype=torch.float16)[1:].view(k.shape)
    with pytest.raises(ValueError, match="k must start, and its rows, heads and batch elements follow, at multiples"):
        launched(driver, case, Config(64, 64, 4), q, k, v)
    assert driver.maps == driver.launches == []


def test_all_tensors_are_on_one_gpu() -> None:
    case = problem(64, 64, batch=2, heads_q=3, head_dim=64)
    with pytest.raises(ValueError, match="k is on cuda:0, and q on cuda:1"):
        cuda._require(case, "k", layout(torch.zeros(case.k_shape)), torch.float32, torch.device("cuda:1"))


def test_a_problem_that_it_does_not_support_is_refused_by_prepare_too() -> None:
    case = problem(64, 64, dtype="fp32")
    with pytest.raises(ValueError, match="fp32: the kernel takes fp16 and bf16"):
        JitFlashCuda().prepare(case, *(torch.zeros(case.q_shape) for _ in range(3)))


def test_two_threads_launch_on_streams_of_their_own(driver: FakeDriver) -> None:
    """What is handed to the driver for one stream is never changed for another."""
    case = problem(64, 64)
    q, k, v = (torch.empty(case.q_shape, dtype=torch.float16) for _ in range(3))
    launch = cuda._launch(case, Config(64, 64, 4), q, k, v, torch.empty_like(q), None)
    seen = []
    launch._launch = lambda config, *rest: seen.append(config._obj) or 0
    for stream in (1, 2, 1):
        launch(stream)
    assert [config.stream for config in seen] == [1, 2, 1]
    assert seen[0] is seen[2]


def test_how_many_sms_have_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(cuda, "current_sms", lambda: H100)
    for case in (problem(128, 1024), problem(8192, 8192, heads_q=8), problem(1, 32768, heads_q=32)):
        config = choose(case, H100)
        assert JitFlashCuda().parallel_units(case) == min(units(case, config) * config.parts, 132)


def test_how_many_sms_have_work_before_hopper(driver: FakeDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    assert JitFlashCuda().parallel_units(problem(128, 64)) == 8
    assert JitFlashCuda().parallel_units(problem(128, 1024)) == 8 * 8  # two key blocks a part
    assert JitFlashCuda().parallel_units(problem(8192, 8192, heads_q=8)) == 108


@pytest.mark.parametrize("there", [(), ("nvcc",), ("nvrtc",), ("nvcc", "nvrtc")])
def test_nvrtc_is_taken_before_nvcc_and_asked_for_where_there_is_neither(
    monkeypatch: pytest.MonkeyPatch, there: tuple[str, ...]
) -> None:
    def toolchain(name: str):
        def make(arch: str, **options: bool) -> str:
            if name not in there:
                raise jit.ToolchainMissing(f"there is no {name}", f"install {name}")
            return f"{name} {arch} {options}"

        return make

    monkeypatch.setattr(jit, "nvrtc_toolchain", toolchain("nvrtc"))
    monkeypatch.setattr(jit, "cuda_toolchain", toolchain("nvcc"))
    if not there:
        assert jit.missing(cuda._toolchain) == "there is no nvrtc: install nvrtc"
    else:
        expected = {"nvrtc": "nvrtc sm_90a {}", "nvcc": "nvcc sm_90a {'cubin': True}"}
        assert cuda._toolchain() == expected[there[-1]]
        assert cuda._toolchain("sm_80") == expected[there[-1]].replace("sm_90a", "sm_80")


@pytest.mark.parametrize(
    ("capability", "reason"),
    [
        ((9, 0), None),
        ((8, 0), None),
        ((12, 0), None),
        ((7, 5), "the kernels are for compute capability 8.0 (Ampere) and up, and this GPU has 7.5"),
    ],
)
def test_which_gpus_it_takes(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], reason: str | None) -> None:
    monkeypatch.setattr("attnbench.devices.cuda.CudaDevice.unavailable", lambda self: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    assert JitFlashCuda().unavailable() == reason


# --- that it compiles -------------------------------------------------------------------------------------------------

VARIANTS = [
    (problem(128, 1024), Config(64, 64, 4, 16, 2)),
    (problem(128, 1024), Config(64, 128, 2, 8, 2)),
    (problem(128, 1024), Config(128, 128, 2, 1)),
    (problem(2048, 8192, causal=True), Config(128, 128, 2, 6)),
    (problem(2048, 8192), Config(128, 128, 3, 8)),
    (problem(1024, 8192, causal=True), Config(64, 64, 4, 8, 1, 2)),
    (problem(512, 2048, dtype="bf16"), Config(64, 128, 2, 3, 1, 2)),
    (problem(128, 8192), Config(64, 64, 4, 31, 2)),
    (problem(8192, 8192, heads_q=32), Config(128, 128, 2, persistent=True)),
    (problem(8192, 8192, heads_q=32, head_dim=64, dtype="bf16"), Config(128, 176, 4, persistent=True)),
    (problem(8192, 8192, heads_q=32, causal=True), Config(128, 128, 2, persistent=True)),
    (problem(8192, 8192, heads_q=32, causal=True, head_dim=64), Config(128, 128, 4, persistent=True)),
    (problem(1, 8192, batch=64, heads_q=32, heads_kv=8), Config(64, 64, 4, persistent=True)),
    (problem(64, 64, head_dim=256, dtype="bf16"), Config(128, 64, 2, 1)),
    (problem(64, 640, head_dim=192, head_dim_v=128, window=9), Config(64, 64, 3, 7)),
    (problem(3, 640, head_dim=64, heads_q=5, heads_kv=1, dtype="bf16"), Config(64, 128, 3, 3)),
]


def cubin(case: Problem, config: Config, toolchain: jit.Toolchain) -> tuple[bytes, str]:
    flags = [f"-D{name}={value}" for name, value in cuda.macros(case, config).items()]
    source = ROOT / "kernels" / "cuda" / "flash_attention_sm90.cu"
    return jit.compile(source, toolchain=toolchain, flags=flags).path.read_bytes(), " ".join(flags)


@pytest.mark.parametrize(("case", "config"), VARIANTS, ids=lambda value: getattr(value, "case_id", str(value)))
def test_nvrtc_compiles_it_without_a_cuda_toolkit(case: Problem, config: Config) -> None:
    code, _ = cubin(case, config, jit.nvrtc_toolchain("sm_90a"))
    assert code.startswith(b"\x7fELF")
    assert b"flash_attention" in code


STRIDED_VARIANTS = [
    ("sm_80", problem(4096, 4096), cuda_sm80.Config(128, 64, 4), 16),
    ("sm_80", problem(64, 640, head_dim=192, head_dim_v=128, window=9), cuda_sm80.Config(16, 64, 1, 4, 2), 8),
    ("sm_86", problem(64, 64, head_dim=256, dtype="bf16"), cuda_sm80.Config(128, 32, 8), 4),
    ("sm_89", problem(64, 64, head_dim=64, causal=True), cuda_sm80.Config(128, 96, 4), 16),
    ("sm_90", problem(3, 9, heads_q=5, heads_kv=1, head_dim=72), cuda_sm80.Config(32, 64, 2, 2, 2, True), 2),
    ("sm_120", problem(64, 64, dtype="bf16"), cuda_sm80.Config(64, 64, 4, 1, 1, True), 16),
    ("sm_80", problem(128, 8192), cuda_sm80.Config(16, 64, 1, 4, 2, True, parts=17), 16),
    ("sm_90", problem(2048, 8192, causal=True), cuda_sm80.Config(64, 64, 4, 1, 2, True, parts=8), 16),
]


@pytest.mark.parametrize(
    ("arch", "case", "config", "copy"), STRIDED_VARIANTS, ids=lambda value: getattr(value, "case_id", str(value))
)
def test_nvrtc_compiles_the_kernel_of_any_strides(arch: str, case: Problem, config: object, copy: int) -> None:
    code = cuda.strided_cubin(case, config, copy, arch).read_bytes()
    assert code.startswith(b"\x7fELF")
    assert b"flash_attention" in code


def test_the_kernel_and_the_plugin_agree_on_shared_memory() -> None:
    """The kernel refuses to compile where what it lays out does not fit; the plugin must not ask for such a thing."""
    case = problem(128, 8192, head_dim=256)
    too_large = Config(128, 128, 2)
    assert too_large.shared_bytes(256, 256) is None
    with pytest.raises(jit.CompileError, match="room"):
        cubin(case, too_large, jit.nvrtc_toolchain("sm_90a"))


@pytest.mark.skipif(jit.missing(lambda: jit.cuda_toolchain("sm_90a")) is not None, reason="no nvcc")
@pytest.mark.parametrize(("case", "config"), VARIANTS, ids=lambda value: getattr(value, "case_id", str(value)))
def test_nvcc_compiles_it_without_a_warning_a_spill_or_products_one_after_the_other(
    case: Problem, config: Config, tmp_path: Path
) -> None:
    tools = jit.cuda_toolchain("sm_90a", cubin=True)
    flags = [f"-D{name}={value}" for name, value in cuda.macros(case, config).items()]
    source = ROOT / "kernels" / "cuda" / "flash_attention_sm90.cu"
    command = [tools.compiler, *tools.flags, "-Werror", "all-warnings", "-Xptxas", "-v", *flags, source, "-o", "out"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    assert "0 bytes spill stores, 0 bytes spill loads" in said
    assert "C75" not in said  # of wgmma that waits for itself


@pytest.mark.skipif(jit.missing(lambda: jit.cuda_toolchain("sm_80")) is not None, reason="no nvcc")
@pytest.mark.parametrize(("arch", "case", "config", "copy"), [*STRIDED_VARIANTS[:2], *STRIDED_VARIANTS[-2:]])
def test_nvcc_compiles_the_other_too(arch: str, case: Problem, config, copy: int, tmp_path: Path) -> None:
    tools = jit.cuda_toolchain(arch, cubin=True)
    flags = [f"-D{name}={value}" for name, value in cuda_sm80.macros(case, config, copy).items()]
    source = ROOT / "kernels" / "cuda" / "flash_attention_sm80.cu"
    words = ["-Werror", "all-warnings", *flags]
    tools.run(str(source), "out.cubin", cwd=tmp_path, include=(), flags=words, timeout_s=120)
    assert (tmp_path / "out.cubin").read_bytes().startswith(b"\x7fELF")


def test_an_error_of_nvrtc_is_one_line_with_its_place() -> None:
    with pytest.raises(jit.CompileError) as error:
        jit.compile('extern "C" __global__ void f() { int x = y; }', toolchain=jit.nvrtc_toolchain("sm_90a"))
    assert re.match(r'^source\.cpp\(1\): error: identifier "y" is undefined \| extern "C"', error.value.message)
    assert "y" in error.value.log


def test_without_nvrtc_the_hint_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr("attnbench.settings.cuda_homes", lambda: [str(tmp_path)])
    with pytest.raises(jit.ToolchainMissing) as error:
        jit.nvrtc_toolchain("sm_90a")
    assert (error.value.message, error.value.hint) == ("there is no NVRTC", "pip install 'attnbench[cuda]'")


def test_a_library_that_is_no_nvrtc_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "lib64").mkdir()
    other = jit.compile("int x;").path
    (tmp_path / "lib64" / "libnvrtc.so.13").write_bytes(other.read_bytes())
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr("attnbench.settings.cuda_homes", lambda: [str(tmp_path)])
    with pytest.raises(jit.ToolchainMissing, match=r"NVRTC does not load: .*nvrtcGet"):
        jit.nvrtc_toolchain("sm_90a")


def test_an_nvrtc_that_does_not_load_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "lib64").mkdir()
    (tmp_path / "lib64" / "libnvrtc.so.13").write_text("no library")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr("attnbench.settings.cuda_homes", lambda: [str(tmp_path)])
    with pytest.raises(jit.ToolchainMissing, match=r"NVRTC does not load: .*libnvrtc"):
        jit.nvrtc_toolchain("sm_90a")
