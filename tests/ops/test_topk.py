"""The k best rows: against fp64 for every format and back end, ties by index, filters, and bits that no neighbour changes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.conftest import BACKENDS
from uma_kernels import dispatch
from uma_kernels.check import ShapeError
from uma_kernels.testing import FLOOR, NEAR, assert_best, assert_exact, assert_invariant, reduction_bound
from uma_kernels.topk import FORMATS, MOST_K, Corpus, pack_corpus, pack_filter, topk
from uma_kernels.topk.cases import CASES, LARGE_CASES, TopkCase

ALL = [*BACKENDS, "numba"] if dispatch.numba_error() is None else BACKENDS
every_backend = pytest.mark.parametrize("backend", ALL, indirect=True)
# torch's own products depend on the batch
invariant_backend = pytest.mark.parametrize("backend", [b for b in ALL if b != "reference"], indirect=True)
triton_alone = pytest.mark.parametrize("backend", [b for b in ALL if b == "triton"], indirect=True)
ON_CPU = ("fp32", "fp16", "int8")


def skip_unless_fit(backend: str, case: TopkCase) -> None:
    """The interpreter takes seconds for what a GPU does in microseconds."""
    if (
        backend == "triton"
        and dispatch.interpreted()
        and case.queries * (case.rows + 16 * case.k) * case.width > 300_000
    ):
        pytest.skip("too large for the interpreter")


def bound(queries: torch.Tensor, corpus: Corpus, true: torch.Tensor) -> float:
    """Largest error of a score, by the class of the arithmetic: REDUCTION; NEAR where queries are rounded to 16 bits; on a
    GPU, queries are rounded to the type that is multiplied, for fp8 rows to fp16."""
    if true.numel() == 0:
        return 0.0
    name = dispatch.choose("topk", corpus.device.type)
    largest = float((queries.double().abs() @ corpus.rows().double().abs().T).max())
    if name in ("cpp", "triton") and corpus.format == "int8":
        return NEAR * largest
    if name == "triton" and corpus.format != "fp32":
        return FLOOR[torch.bfloat16 if corpus.format == "bf16" else torch.float16] * largest
    return max(reduction_bound(queries @ corpus.rows().T, true), FLOOR[torch.float32] * largest)


def check_case(case: TopkCase, format: str, share: float | None) -> None:
    queries, corpus = torch.randn(case.queries, case.width), pack_corpus(torch.randn(case.rows, case.width), format)
    allowed = torch.ones(case.rows, dtype=torch.bool) if share is None else torch.rand(case.rows) < share
    scores, indices = topk(queries, corpus, case.k, None if share is None else pack_filter(allowed))
    true = queries.double() @ corpus.rows().double().T
    assert_best(scores, indices, true, allowed, case.k, bound(queries, corpus, true))


@every_backend
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)
def test_the_best_rows_match_fp64(case: TopkCase, format: str, backend: str) -> None:
    skip_unless_fit(backend, case)
    check_case(case, format, None)


@every_backend
@pytest.mark.parametrize("format", ON_CPU)
@pytest.mark.parametrize("case", LARGE_CASES, ids=lambda c: c.id)
def test_many_rows_match_fp64(case: TopkCase, format: str, backend: str) -> None:
    skip_unless_fit(backend, case)
    check_case(case, format, None)


@every_backend
@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 1.0])
@pytest.mark.parametrize("format", ON_CPU)
def test_rows_outside_the_filter_never_appear(format: str, share: float, backend: str) -> None:
    check_case(TopkCase(2, 477, 20, 30), format, share)


@every_backend
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("order", ["random", "rising", "falling", "equal"])
def test_equal_scores_come_by_index(order: str, format: str, backend: str) -> None:
    """Small integers: every product is exact in every format, and most scores occur often."""
    small = backend == "triton" and dispatch.interpreted()
    values = torch.randint(-3, 4, (300 if small else 1500, 1)).float()
    if order in ("rising", "falling"):
        values = values.sort(dim=0, descending=order == "falling").values
    if order == "equal":
        values.fill_(2.0)
    # The last column is the largest of each row: for int8 and fp8 it makes every scale 1, so that rounding changes nothing.
    largest = {"int8": 127.0, "fp8": 448.0}.get(format, 7.0)
    rows = torch.cat([values, torch.full_like(values, largest)], dim=1)
    queries = torch.tensor([[1.0, 0.0], [-2.0, 0.0], [0.0, 0.0]])
    corpus = pack_corpus(rows, format)
    for k in (40,) if small else (1, 40, 600):
        scores, indices = topk(queries, corpus, k)
        expected = (queries @ rows.T).sort(dim=1, descending=True, stable=True)
        assert_exact(indices, expected.indices[:, :k])
        if not (
            backend.startswith("cpp") and format == "int8"
        ):  # 16 bits of a query of 2 are not a whole number of its scale
            assert_exact(scores, expected.values[:, :k] + 0.0)


@invariant_backend
@pytest.mark.parametrize("format", FORMATS)
def test_a_query_has_the_same_bits_in_every_batch(format: str, backend: str) -> None:
    if backend != "triton" and format not in ON_CPU:
        pytest.skip("torch's own products on the CPU")
    small = backend == "triton" and dispatch.interpreted()
    count, rows = (18, 150) if small else (130, 1111)
    queries, corpus = torch.randn(count, 72), pack_corpus(torch.randn(rows, 72), format)
    together = topk(queries, corpus, 25)
    for q in (count - 1,) if small else (0, 1, count - 1):
        for size in (1, 4) if small else (1, 2, 4):
            others = torch.randn(size, 72)
            others[size - 1] = queries[q]
            scores, indices = topk(others, corpus, 25)
            assert_invariant(scores[size - 1], together[0][q])
            assert_exact(indices[size - 1], together[1][q])


@pytest.mark.parametrize("backend", [b for b in ALL if b not in ("reference", "triton")], indirect=True)
def test_the_result_does_not_depend_on_threads(backend: str) -> None:
    if dispatch.C is None:
        pytest.skip("threads are set through the extension")
    queries, corpus = torch.randn(5, 40), pack_corpus(torch.randn(1500, 40).round(), "fp32")
    before = dispatch.num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            dispatch.C.set_num_threads(threads)
            results.append(topk(queries, corpus, 50))
    finally:
        dispatch.C.set_num_threads(before)
    for scores, indices in results[1:]:
        assert_invariant(scores, results[0][0])
        assert_exact(indices, results[0][1])


@triton_alone
@pytest.mark.parametrize("share", [None, 0.3])
@pytest.mark.parametrize("counted", [True, False])
def test_more_levels_and_entries_than_a_program_holds(
    counted: bool, share: float | None, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from uma_kernels.topk import triton_select

    for name in ("TOP", "TOP_COUNTED"):
        monkeypatch.setattr(triton_select, name, 2)
    for name in ("CHUNK", "SCAN", "OTHERS"):
        monkeypatch.setattr(triton_select, name, 64)
    if not counted:
        monkeypatch.setattr(triton_select, "COUNTED", 0)
    check_case(TopkCase(2, 700, 16, 20), "fp32", share)


@triton_alone
def test_both_ways_to_select_find_the_same_rows(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small integers: most scores occur often, and groups with equal maxima lie far apart."""
    from uma_kernels.topk import triton_select

    rows, queries = torch.randint(-2, 3, (400, 3)).float(), torch.randint(-2, 3, (3, 3)).float()
    corpus = pack_corpus(rows)
    words = pack_filter(torch.rand(400) < 0.1)
    for k, filter in ((1, None), (37, None), (37, words), (50, words)):
        by_count = topk(queries, corpus, k, filter)
        with monkeypatch.context() as patch:
            patch.setattr(triton_select, "COUNTED", 0)
            by_bits = topk(queries, corpus, k, filter)
        assert_exact(by_count[0], by_bits[0])
        assert_exact(by_count[1], by_bits[1])


@triton_alone
def test_each_byte_of_fp8_counts_as_its_value(backend: str) -> None:
    """Every value in every place of a word, subnormal ones too: a query of one 1 finds it as it is."""
    data = ((7 * torch.arange(256)[:, None] + 13 * torch.arange(64)[None, :]) % 256).to(torch.uint8)
    data[data & 127 == 127] = 0  # NaN
    corpus = Corpus("fp8", 64, 256, data.view(torch.float8_e4m3fn), torch.ones(256))
    queries = torch.eye(64)[[0, 1, 2, 3, 4, 62]]
    scores, indices = topk(queries, corpus, 256)
    expected = (queries @ corpus.rows().T).sort(dim=1, descending=True, stable=True)
    assert_exact(scores, expected.values)
    assert_exact(indices, expected.indices)


@triton_alone
@pytest.mark.parametrize("largest", [3e38, 32768.0, 32700.0, 1.0, 1e-30, 1e-36, 1e-42, 0.0])
def test_parts_of_a_query_add_up(largest: float, backend: str) -> None:
    from uma_kernels.topk.triton_bytes import prepare

    queries = torch.rand(2, 100) * 2 - 1
    queries[:, 50] = 1.0
    queries = (queries.double() * largest).float()
    parts, scales = prepare(queries, 128, int8=True)
    assert_exact(torch.frexp(scales)[0], torch.full((2,), 0.5))
    whole = parts.double()[:, 0] * 256 + parts.double()[:, 1]
    assert_exact(whole[:, 100:], torch.zeros(2, 28, dtype=torch.float64))
    step = torch.tensor(max(1.004 * largest / 2**14, 2.0**-126))  # the least scale is the least normal number
    assert bool((scales <= step).all())
    assert bool(((whole[:, :100] * scales.double()[:, None] - queries).abs() <= 0.5 * scales.double()[:, None]).all())
    parts, again = prepare(queries, 128, int8=False)
    assert_exact(again, scales)
    in_order = parts.transpose(1, 2).reshape(2, 128)[:, :100]
    assert_exact(in_order, (queries / scales[:, None]).half())


@triton_alone
def test_int8_rows_too_wide_for_exact_sums_are_refused(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from uma_kernels.topk import triton_bytes

    monkeypatch.setattr(triton_bytes, "MOST_WIDE", 64)
    topk(torch.randn(1, 64), pack_corpus(torch.randn(3, 64), "int8"), 1)
    with pytest.raises(ShapeError, match="128 columns"):
        topk(torch.randn(1, 65), pack_corpus(torch.randn(3, 65), "int8"), 1)


@every_backend
@pytest.mark.parametrize("format", ["int8", "fp8"])
@pytest.mark.parametrize("kept", ["fp32", "fp16"])
def test_survivors_are_scored_by_the_originals(format: str, kept: str, backend: str) -> None:
    queries, rows = torch.randn(2, 64), torch.randn(300, 64)
    coarse = pack_corpus(rows, format, originals=kept)
    scores, indices = topk(queries, coarse, 5)
    exact = topk(queries, pack_corpus(rows, kept), 5)
    assert_exact(indices, exact[1])  # 42 survivors of 300 rows hold the best 5
    original = pack_corpus(rows, kept)
    true = queries.double() @ original.rows().double().T
    assert_best(scores, indices, true, torch.ones(300, dtype=torch.bool), 5, bound(queries, original, true))


@every_backend
def test_survivors_are_fewer_than_k(backend: str) -> None:
    corpus = pack_corpus(torch.randn(50, 16), "int8", originals="fp32")
    mask = torch.zeros(50, dtype=torch.bool)
    mask[[3, 41]] = True
    scores, indices = topk(torch.randn(2, 16), corpus, 4, pack_filter(mask))
    assert_exact(indices[:, :2].sort(dim=1).values, torch.tensor([[3, 41], [3, 41]]))
    assert_exact(indices[:, 2:], torch.full((2, 2), -1))
    assert bool(scores[:, 2:].isneginf().all())


@every_backend
def test_a_score_that_overflows_below_or_to_nan_is_never_found(backend: str) -> None:
    rows = torch.tensor([[-1e20, -1e20], [1.0, 0.0], [1e20, 1e20], [1e20, -1e20]])
    scores, indices = topk(torch.tensor([[1e20, 0.0]]), pack_corpus(rows, "fp32"), 4)
    assert indices[0].tolist() == [2, 3, 1, -1]
    assert scores[0, 0] == scores[0, 1] == float("inf")


def test_appended_rows_are_found() -> None:
    rows, queries = torch.randn(90, 33), torch.randn(2, 33)
    for format in FORMATS:
        corpus = pack_corpus(rows[:10], format, originals="fp16" if format == "int8" else None)
        for first in range(10, 90, 16):
            corpus.append(rows[first : first + 16])
        whole = pack_corpus(rows, format, originals="fp16" if format == "int8" else None)
        assert corpus.count == 90
        assert_exact(corpus.rows(), whole.rows())
        assert_exact(topk(queries, corpus, 7)[1], topk(queries, whole, 7)[1])


@pytest.mark.parametrize("format", ON_CPU)
def test_a_corpus_can_be_mapped_from_a_file(format: str, tmp_path: Path) -> None:
    corpus, queries = pack_corpus(torch.randn(64, 20), format), torch.randn(2, 20)
    path = tmp_path / "rows"
    corpus.data.numpy().tofile(path)
    mapped = np.memmap(path, corpus.data.numpy().dtype, "c", shape=tuple(corpus.data.shape))
    again = Corpus(format, corpus.width, corpus.count, torch.from_numpy(mapped), corpus.scales)
    for ours, expected in zip(topk(queries, again, 9), topk(queries, corpus, 9), strict=True):
        assert_exact(ours, expected)


def test_a_filter_has_a_bit_a_row() -> None:
    words = pack_filter(torch.tensor([True] + [False] * 30 + [True, True]))
    assert_exact(words, torch.tensor([-(2**31) + 1, 1], dtype=torch.int32))


def test_bad_input_is_refused(backend: str) -> None:
    corpus = pack_corpus(torch.randn(40, 8))
    query = torch.randn(1, 8)
    for k in (0, MOST_K + 1):
        with pytest.raises(ShapeError, match="`k`"):
            topk(query, corpus, k)
    with pytest.raises(ShapeError, match="queries"):
        topk(torch.randn(1, 7), corpus, 1)
    with pytest.raises(ShapeError, match="filter"):
        topk(query, corpus, 1, torch.zeros(1, dtype=torch.int32))
    for bad in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match=r"queries\[0, 3\]"):
            topk(query.clone().index_fill_(1, torch.tensor([3]), bad), corpus, 1)
        with pytest.raises(ValueError, match=r"rows\[0, 3\]"):
            pack_corpus(query.clone().index_fill_(1, torch.tensor([3]), bad))
    with pytest.raises(ValueError, match="65504"):
        pack_corpus(torch.full((1, 2), 7e4), "fp16")
    with pytest.raises(ShapeError, match="format"):
        pack_corpus(query, "fp4")
    with pytest.raises(ShapeError, match="width 0"):
        pack_corpus(torch.zeros(3, 0))
    with pytest.raises(ShapeError, match="scales"):
        Corpus("int8", 8, 1, torch.zeros(1, 64, dtype=torch.int8))
    with pytest.raises(ShapeError, match="count"):
        Corpus("fp32", 16, 2, torch.zeros(1, 16))
