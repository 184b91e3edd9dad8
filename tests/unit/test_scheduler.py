"""What the scheduler plans, what it does with results, and how requests end. The runner checks every plan."""

from __future__ import annotations

import time
from collections import Counter

import pytest
from scheduler_harness import (
    Engine,
    expected_scores,
    expected_tokens,
    generate_request,
    rank_request,
    score_request,
)

from uma_engine.core import (
    NO_PARENT,
    FinishReason,
    Request,
    RequestKind,
    SamplingParams,
    SchedulerOutput,
    Segment,
    StepResult,
    background,
)
from uma_engine.errors import InvalidRequest, InvariantViolation, Overloaded, TooLarge
from uma_engine.scheduler import Finished, ScoreReady, TokenReady
from uma_engine.scheduler.step_planner import PATIENCE


def work(output: SchedulerOutput) -> list[tuple[str, int, int, int]]:
    return [(c.request.request_id, c.segment_index, c.start, c.num_tokens) for c in output.chunks]


def scores(events) -> dict[str, dict[int, list[float]]]:
    result: dict[str, dict[int, list[float]]] = {}
    for event in events:
        if isinstance(event, ScoreReady):
            assert event.segment_index not in result.setdefault(event.request.request_id, {}), "scored twice"
            result[event.request.request_id][event.segment_index] = event.logits
    return result


def ends(outputs, events) -> dict[str, FinishReason]:
    pairs = [pair for output in outputs for pair in output.finished]
    pairs += [(event.request, event.reason) for event in events if isinstance(event, Finished)]
    result = {request.request_id: reason for request, reason in pairs}
    assert len(result) == len(pairs), "a request ended twice"
    return result


# ---- scoring ----


def test_a_rank_request_is_scored_in_one_step_with_its_prefix_before_its_leaves():
    engine = Engine()
    request = rank_request("r", range(6), [[1, 2], [3], [4, 5, 6]])
    engine.add(request)
    output, events = engine.step()
    assert work(output) == [("r", 0, 0, 6), ("r", 1, 0, 2), ("r", 2, 0, 1), ("r", 3, 0, 3)]
    assert [c.wants_output for c in output.chunks] == [False, True, True, True]
    assert scores(events) == {"r": expected_scores(request)}
    assert events[-1] == Finished(request, FinishReason.SCORED)
    assert not engine.scheduler.has_unfinished()
    assert engine.pool.num_used == 0
    assert request.num_computed_tokens == 12


def test_leaves_have_no_blocks_and_the_prefix_gives_its_own_back():
    engine = Engine()
    engine.add(rank_request("r", range(6), [[1, 2]] * 5))
    output = engine.scheduler.schedule()
    assert engine.pool.num_used == 2
    assert all(c.segment.transient and not c.segment.block_ids for c in output.chunks[1:])
    engine.scheduler.update(output, engine.runner.run(output))
    assert engine.pool.num_used == 0


def test_a_leaf_waits_for_a_step_that_holds_it_whole():
    engine = Engine(max_num_batched_tokens=10)
    request = rank_request("r", range(4), [[1] * 5, [2] * 5, [3] * 10])
    engine.add(request)
    outputs, events = engine.drain()
    assert [work(o) for o in outputs] == [
        [("r", 0, 0, 4), ("r", 1, 0, 5)],
        [("r", 2, 0, 5)],
        [("r", 3, 0, 10)],
    ]
    assert scores(events) == {"r": expected_scores(request)}


def test_a_leaf_longer_than_a_step_gets_blocks_until_it_is_scored():
    engine = Engine(max_num_batched_tokens=8)
    request = rank_request("r", range(4), [list(range(21)), [1, 2]])
    engine.add(request)
    outputs, events = engine.drain()
    assert not request.segments[1].transient
    assert max(o.num_tokens for o in outputs) <= 8
    assert [n for o in outputs for (_, index, _, n) in work(o) if index == 1] == [4, 8, 8, 1]
    assert scores(events) == {"r": expected_scores(request)}


def test_the_tree_is_walked_a_branch_at_a_time_so_that_few_blocks_are_held():
    tree = [(range(4), NO_PARENT, False)]
    for branch in range(12):
        kept = len(tree)
        tree += [([branch] * 4, 0, False), ([branch, 1], kept, True), ([branch, 2], kept, True)]
    engine = Engine(num_blocks=4, max_num_batched_tokens=8)
    request = score_request("r", tree)
    engine.add(request)
    _, events = engine.drain()
    assert scores(events) == {"r": expected_scores(request)}
    assert request.num_preemptions == 0


def test_a_scored_segment_with_children_is_scored_once_and_read_by_them():
    tree = [(range(5), NO_PARENT, True), ([1, 2], 0, True), ([3], 0, True)]
    engine = Engine()
    first, second = score_request("a", tree), score_request("b", tree)
    engine.add(first)
    _, events = engine.drain()
    engine.add(second)
    outputs, more = engine.drain()
    assert scores(events + more) == {"a": expected_scores(first), "b": expected_scores(second)}
    # the last token must be run again for its logits, so the tail is computed although it is cached
    assert work(outputs[0])[0] == ("b", 0, 4, 1)


def test_a_segment_that_is_neither_scored_nor_read_is_computed_and_let_go():
    engine = Engine()
    request = score_request("r", [(range(5), NO_PARENT, False), ([9] * 3, NO_PARENT, False), ([1], 0, True)])
    engine.add(request)
    outputs, events = engine.drain()
    assert sorted(index for o in outputs for (_, index, _, _) in work(o)) == [0, 1, 2]
    assert ends(outputs, events) == {"r": FinishReason.SCORED}


def test_a_segment_that_nobody_reads_is_let_go_at_once_when_the_cache_has_it():
    engine = Engine(max_num_batched_tokens=8)
    for name in "ab":
        engine.add(score_request(name, [(range(5), NO_PARENT, False), *(([n] * 8, NO_PARENT, True) for n in range(3))]))
        outputs, _ = engine.drain() if name == "a" else ([engine.step()[0]], [])
    assert work(outputs[0])[0] == ("b", 1, 0, 8)
    assert engine.scheduler.num_running == 1
    assert engine.pool.num_used == 0
    engine.drain()


def test_several_roots_are_independent_trees():
    engine = Engine()
    request = score_request("r", [([1], NO_PARENT, True), ([2, 3], NO_PARENT, False), ([4], 1, True)])
    engine.add(request)
    _, events = engine.drain()
    assert scores(events) == {"r": expected_scores(request)}


# ---- generation ----


def test_a_prompt_is_prefilled_in_chunks_then_grows_by_one_token_a_step():
    engine = Engine(max_num_batched_tokens=8)
    request = generate_request("g", range(18), max_tokens=5)
    engine.add(request)
    outputs, events = engine.drain()
    assert [work(o)[0][2:] for o in outputs] == [(0, 8), (8, 8), (16, 2), (18, 1), (19, 1), (20, 1), (21, 1)]
    tokens = [e for e in events if isinstance(e, TokenReady)]
    assert [e.token_id for e in tokens] == expected_tokens(range(18), request.sampling)
    assert [e.finish_reason for e in tokens] == [None] * 4 + [FinishReason.LENGTH]
    assert request.output_token_ids == request.segments[0].token_ids[18:]
    assert ends(outputs, events) == {"g": FinishReason.LENGTH}


def test_the_last_segment_of_a_path_grows_and_the_ones_above_are_reused_whole():
    engine = Engine(max_num_batched_tokens=8)
    ranked = rank_request("r", [1, 2, 3, 4, 5, 6], [[7], [8]])
    request = generate_request("g", [1, 2, 3, 4, 5, 6, 9, 10, 11], max_tokens=5, cuts=(6,))
    engine.add(ranked)
    engine.drain()
    engine.add(request)
    _, events = engine.drain()
    tokens = [e.token_id for e in events if isinstance(e, TokenReady)]
    assert tokens == expected_tokens([1, 2, 3, 4, 5, 6, 9, 10, 11], request.sampling)
    assert request.segments[0].num_cached_tokens == 6, "the partly filled tail block included"
    assert request.segments[1].token_ids == [9, 10, 11, *tokens]
    assert request.segments[0].token_ids == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("parents", [(-1, -1), (-1, 0, 0)])
def test_a_generate_request_that_is_no_path_is_refused(parents):
    with pytest.raises(InvalidRequest, match="single path"):
        Request(
            "g",
            RequestKind.GENERATE,
            [Segment([1], parent=parent) for parent in parents],
            sampling=SamplingParams(),
        )


def test_the_output_counts_for_the_last_segment_alone():
    engine = Engine(num_blocks=8, block_size=4, max_model_len=20)
    engine.add(generate_request("fits", [1] * 10, max_tokens=10, cuts=(3, 6)))
    with pytest.raises(TooLarge, match="ends at 21 tokens with its output"):
        engine.add(generate_request("long", [1] * 10, max_tokens=11, cuts=(3, 6)))
    engine.drain()


@pytest.mark.parametrize("where", ["request", "sampling"])
def test_a_stop_token_ends_the_output_and_is_its_last_token(where):
    sampling = SamplingParams(max_tokens=50)
    stop = expected_tokens(range(7), sampling)[3]
    options = {"stop_token_ids": frozenset([stop])}
    if where == "sampling":
        options = {"sampling": SamplingParams(max_tokens=50, stop_token_ids=(stop,))}
    engine = Engine()
    request = generate_request("g", range(7), max_tokens=50, **options)
    engine.add(request)
    outputs, events = engine.drain()
    assert request.output_token_ids == expected_tokens(range(7), sampling, stops=[stop])
    assert ends(outputs, events) == {"g": FinishReason.STOP}


def test_decoding_goes_before_prefill_and_both_share_a_step():
    engine = Engine(max_num_batched_tokens=16)
    engine.add(generate_request("a", [1, 2], max_tokens=9), generate_request("b", [3, 4], max_tokens=9))
    engine.step()
    engine.add(rank_request("r", range(100, 120), [[1], [2]]))
    output, _ = engine.step()
    assert work(output) == [("a", 0, 2, 1), ("b", 0, 2, 1), ("r", 0, 0, 12)]
    engine.drain()


def test_a_leaf_as_long_as_a_step_is_not_kept_out_by_decoding():
    engine = Engine(max_num_batched_tokens=16, max_num_seqs=4)
    engine.add(*(generate_request(f"g{n}", [n], max_tokens=40) for n in range(3)))
    engine.step()
    engine.add(rank_request("r", [1], [[7] * 16]))
    for _ in range(3):
        output, events = engine.step()
        if scores(events):
            break
    assert output.num_tokens == 16 + 3
    engine.drain()


def test_the_engine_can_end_a_request_at_a_stop_string():
    engine = Engine()
    engine.add(generate_request("g", [1, 2, 3], max_tokens=50))
    engine.step()
    assert engine.scheduler.finish("g")
    assert not engine.scheduler.finish("g")
    assert engine.pool.num_used == 0
    outputs, events = engine.drain()
    assert ends(outputs, events) == {"g": FinishReason.STOP}
    assert engine.scheduler.counters.finished == 1


# ---- prefix cache ----


def test_a_second_request_reuses_the_prefix_with_its_tail():
    engine = Engine()
    engine.add(rank_request("a", range(10), [[1], [2]]))
    engine.drain()
    second = rank_request("b", range(10), [[3], [4]])
    engine.add(second)
    outputs, events = engine.drain()
    assert work(outputs[0]) == [("b", 1, 0, 1), ("b", 2, 0, 1)]
    assert scores(events) == {"b": expected_scores(second)}
    assert (second.num_cached_tokens, second.num_computed_tokens) == (10, 2)
    assert second.segments[0].num_cached_tokens == 10


def test_what_an_ended_request_held_is_evicted_from_its_leaves_to_its_root():
    engine = Engine(num_blocks=6)
    root, child = [1] * 8, [2] * 8
    engine.add(
        score_request("a", [(root, NO_PARENT, False), (child, 0, False), *(([n] * 30, 1, True) for n in (3, 4))])
    )
    engine.step()
    engine.scheduler.cancel("a")
    engine.add(generate_request("g", [9] * 16, max_tokens=1))  # takes the 2 blank blocks and 2 cached ones
    engine.drain()
    again = score_request("b", [(root, NO_PARENT, False), (child, 0, False), ([3], 1, True)])
    engine.add(again)
    engine.drain()
    assert again.segments[0].num_cached_tokens == 8
    assert again.segments[1].num_cached_tokens == 0


def test_another_cache_root_shares_nothing():
    engine = Engine()
    engine.add(rank_request("a", range(10), [[1]], cache_root=b"one adapter"))
    engine.drain()
    second = rank_request("b", range(10), [[1]], cache_root=b"another")
    engine.add(second)
    engine.drain()
    assert second.num_cached_tokens == 0


def test_a_disabled_cache_computes_everything():
    engine = Engine(enable_prefix_cache=False)
    for name in "ab":
        request = rank_request(name, range(10), [[1]])
        engine.add(request)
        engine.drain()
        assert (request.num_cached_tokens, request.num_computed_tokens) == (0, 11)


def test_kept_children_are_reused_below_a_reused_parent():
    tree = [(range(6), NO_PARENT, False), ([7] * 5, 0, False), ([1], 1, True)]
    engine = Engine()
    engine.add(score_request("a", tree))
    engine.drain()
    second = score_request("b", [*tree, ([2], 1, True)])
    engine.add(second)
    outputs, events = engine.drain()
    assert work(outputs[0]) == [("b", 2, 0, 1), ("b", 3, 0, 1)]
    assert scores(events) == {"b": expected_scores(second)}


@pytest.mark.parametrize("num_twins", [2, 5])
@pytest.mark.parametrize("prefix", [10, 40, 75])
def test_requests_that_arrive_together_compute_their_common_prefix_once(num_twins, prefix):
    engine = Engine(max_num_batched_tokens=32)
    requests = [rank_request(f"r{n}", range(prefix), [[n, 1], [n, 2]]) for n in range(num_twins)]
    engine.add(*requests)
    outputs, events = engine.drain()
    assert sum(o.num_tokens for o in outputs) == prefix + 4 * num_twins
    assert scores(events) == {r.request_id: expected_scores(r) for r in requests}


def test_equal_prompts_share_all_but_the_block_of_their_last_token():
    engine = Engine(max_num_batched_tokens=64)
    requests = [generate_request(f"g{n}", range(22), max_tokens=3) for n in range(3)]
    engine.add(*requests)
    engine.drain()
    assert [r.num_cached_tokens for r in requests] == [0, 20, 20]
    assert all(r.output_token_ids == expected_tokens(range(22), r.sampling) for r in requests)


# ---- fairness ----


def test_a_large_rank_request_does_not_keep_small_ones_waiting():
    engine = Engine(max_num_batched_tokens=64)
    engine.add(rank_request("large", range(20), [[n % 50] * 10 for n in range(1000)]))
    engine.step()
    small = [rank_request(f"s{n}", [n] * 8, [[1] * 10, [2] * 10]) for n in range(3)]
    engine.add(*small)
    waited = {}
    for step in range(1, 30):
        _, events = engine.step()
        waited |= {e.request.request_id: step for e in events if isinstance(e, Finished)}
    # 28 tokens each at a fair share of 16 a step, and one leaf more for pieces that do not divide evenly
    assert set(waited) == {"s0", "s1", "s2"}
    assert max(waited.values()) <= 4


def test_every_request_is_served_at_a_like_pace_although_pieces_are_larger_than_shares():
    engine = Engine(max_num_batched_tokens=32, max_num_seqs=16)
    engine.add(*(rank_request(f"r{n}", [n], [[n] * 20 for _ in range(50)]) for n in range(16)))
    served = dict.fromkeys(range(16), 0)
    for _ in range(160):
        output, _ = engine.step()
        for name, _, _, num_tokens in work(output):
            served[int(name[1:])] += num_tokens
    assert max(served.values()) - min(served.values()) <= 2 * 21


def test_a_newcomer_neither_waits_for_the_others_past_nor_overtakes_them():
    engine = Engine(max_num_batched_tokens=32, max_num_seqs=16)
    leaves = [[5] * 20 for _ in range(50)]
    engine.add(*(rank_request(f"r{n}", [n], leaves) for n in range(4)))
    for _ in range(60):
        engine.step()
    engine.add(*(rank_request(f"r{n}", [n], leaves) for n in range(4, 6)))
    served = Counter()
    for _ in range(60):
        output, _ = engine.step()
        for name, _, _, num_tokens in work(output):
            served[name] += num_tokens
    assert len(served) == 6
    assert max(served.values()) - min(served.values()) <= 2 * 21


def background_rank(*args, **options):
    with background():
        return rank_request(*args, **options)


def test_background_work_comes_in_small_steps_and_after_all_others():
    engine = Engine(max_num_batched_tokens=64)
    engine.scheduler.background_tokens = 16
    engine.add(background_rank("batch", range(8), [[n % 50] * 4 for n in range(200)]))
    for _ in range(5):
        output, _ = engine.step()
        assert 16 <= output.num_tokens < 16 + 4, "small steps, but for the last piece"
    engine.add(rank_request("asked", [7] * 8, [[n] * 4 for n in range(8)]))
    output, events = engine.step()
    assert work(output)[0][0] == "asked"
    assert any(isinstance(e, Finished) and e.request.request_id == "asked" for e in events), "all of it in one step"
    assert sum(n for name, _, _, n in work(output) if name == "batch") == 0, "40 tokens are more than 16"
    engine.drain()


def test_background_work_is_not_starved():
    engine = Engine(max_num_batched_tokens=32)
    engine.scheduler.background_tokens = 16
    engine.add(background_rank("batch", [1] * 4, [[2] * 4 for _ in range(4)]))
    ended = None
    for step in range(200):
        engine.add(rank_request(f"r{step}", [step % 50] * 8, [[3] * 8 for _ in range(6)]))
        _, events = engine.step()
        if any(isinstance(e, Finished) and e.request.request_id == "batch" for e in events):
            ended = step
            break
    assert ended is not None
    assert PATIENCE <= ended <= 4 * PATIENCE
    engine.drain()


def test_what_is_asked_inside_background_is_background_work_and_nothing_else():
    assert not rank_request("a", [1], [[2]]).background
    assert background_rank("b", [1], [[2]]).background
    with background(), background():
        pass
    assert not rank_request("c", [1], [[2]]).background


def test_what_is_left_of_the_budget_goes_to_the_earliest():
    engine = Engine(max_num_batched_tokens=32)
    engine.add(rank_request("a", [1], [[1] * 3 for _ in range(40)]), rank_request("b", [2], [[2]]))
    output, _ = engine.step()
    assert sum(n for name, _, _, n in work(output) if name == "b") == 2
    assert sum(n for name, _, _, n in work(output) if name == "a") >= 28
    engine.drain()


def test_a_request_whose_prompt_finds_no_room_is_not_admitted_only_to_be_preempted():
    engine = Engine(num_blocks=11, max_num_batched_tokens=16)
    engine.add(generate_request("a", range(24), max_tokens=4), generate_request("b", range(50, 62), max_tokens=4))
    engine.step()
    engine.add(generate_request("c", range(70, 80), max_tokens=4))
    engine.step()
    assert (engine.scheduler.num_running, engine.scheduler.num_waiting) == (2, 1)
    engine.drain()
    assert engine.scheduler.counters.preempted == 0


def test_requests_are_admitted_in_order_of_arrival_up_to_max_num_seqs():
    engine = Engine(max_num_seqs=2)
    engine.add(*(generate_request(f"g{n}", [n, n], max_tokens=3) for n in range(5)))
    assert engine.scheduler.num_waiting == 5
    output, _ = engine.step()
    assert [name for name, *_ in work(output)] == ["g0", "g1"]
    assert (engine.scheduler.num_running, engine.scheduler.num_waiting) == (2, 3)
    first_seen = [name for o in engine.drain()[0] for name, _, start, _ in work(o) if start == 0]
    assert first_seen == ["g2", "g3", "g4"]


# ---- limits ----


def test_a_full_queue_is_an_error_that_says_so():
    engine = Engine(max_waiting=2)
    engine.add(generate_request("a", [1]), generate_request("b", [1]))
    with pytest.raises(Overloaded, match="`max_waiting` is 2"):
        engine.add(generate_request("c", [1]))
    engine.step()
    engine.add(generate_request("c", [1]))
    engine.drain()


def test_paths_that_can_never_fit_are_refused():
    engine = Engine(num_blocks=8, max_model_len=40)
    too_large = [
        generate_request("g", range(37), max_tokens=4),  # 41 tokens
        rank_request("r", range(30), [[1] * 11]),
        generate_request("blocks", range(30), max_tokens=4),  # 33 tokens with KV: 9 blocks
        score_request("s", [(range(16), NO_PARENT, False), (range(17), 0, False), ([1], 1, True)]),
    ]
    for request in too_large:
        with pytest.raises(TooLarge):
            engine.add(request)
    fitting = [
        generate_request("g", range(29), max_tokens=4),
        rank_request("r", range(30), [[1] * 10]),
        score_request("s", [(range(16), NO_PARENT, False), (range(16), 0, False), ([1], 1, True)]),
    ]
    engine.add(*fitting)
    outputs, events = engine.drain()
    assert len(ends(outputs, events)) == 3
    assert engine.scheduler.counters.accepted == 3


def test_bad_submissions_are_refused_and_leave_no_trace():
    engine = Engine()
    first = generate_request("a", [1, 2])
    engine.add(first)
    with pytest.raises(InvalidRequest, match="in use"):
        engine.add(generate_request("a", [1]))
    with pytest.raises(InvalidRequest, match="nan"):
        engine.add(generate_request("n", [1], deadline=float("nan")))
    with pytest.raises(InvalidRequest, match="32-bit"):
        engine.add(generate_request("t", [1, 2**40]))
    engine.drain()
    with pytest.raises(InvalidRequest, match="submitted before"):
        engine.add(first)
    engine.add(generate_request("a", [1]))  # the id is free again
    engine.drain()
    assert engine.scheduler.counters.accepted == 2


# ---- ends ----


def test_cancelling_frees_at_once_and_is_reported_once():
    engine = Engine(max_num_batched_tokens=4)
    engine.add(rank_request("r", range(12), [[1]]), generate_request("w", [1], max_tokens=2))
    engine.step()
    assert engine.pool.num_used > 0
    assert engine.scheduler.cancel("r")
    assert not engine.scheduler.cancel("r")
    assert not engine.scheduler.cancel("never seen")
    assert engine.scheduler.has_unfinished()
    engine.scheduler.check_integrity()
    outputs, events = engine.drain()
    assert ends(outputs, events) == {"r": FinishReason.CANCELLED, "w": FinishReason.LENGTH}
    assert scores(events) == {}


def test_cancelling_what_is_in_flight_drops_its_results_and_frees_at_update():
    engine = Engine()
    engine.add(rank_request("r", range(6), [[1], [2]]), generate_request("g", range(50, 55), max_tokens=2))
    output = engine.scheduler.schedule()
    used = engine.pool.num_used
    assert engine.scheduler.cancel("r")
    assert not engine.scheduler.cancel("r")
    assert engine.pool.num_used == used, "the step still writes to these blocks"
    events = engine.scheduler.update(output, engine.runner.run(output))
    assert scores(events) == {}
    outputs, more = engine.drain()
    assert ends([output, *outputs], events + more) == {"r": FinishReason.CANCELLED, "g": FinishReason.LENGTH}
    assert engine.scheduler.counters.cancelled == 1


def test_a_waiting_request_can_be_cancelled_while_a_step_is_in_flight():
    engine = Engine(max_num_seqs=1)
    engine.add(generate_request("a", [1], max_tokens=1), generate_request("b", [1], max_tokens=1))
    output = engine.scheduler.schedule()
    assert engine.scheduler.cancel("b")
    engine.scheduler.update(output, engine.runner.run(output))
    outputs, events = engine.drain()
    assert ends(outputs, events) == {"b": FinishReason.CANCELLED}


def test_passed_deadlines_end_waiting_and_running_requests():
    engine = Engine(max_num_seqs=1)
    engine.add(
        generate_request("runs", [1, 2], max_tokens=50, deadline=2.0),
        generate_request("waits", [1, 2], max_tokens=50, deadline=1.0),
        generate_request("done", [1, 2], max_tokens=2, deadline=9.0),
    )
    engine.step()
    engine.now = 1.0
    output, _ = engine.step()
    assert [(r.request_id, reason) for r, reason in output.finished] == [("waits", FinishReason.DEADLINE)]
    engine.now = 2.5
    outputs, events = engine.drain()
    assert ends(outputs, events) == {"runs": FinishReason.DEADLINE, "done": FinishReason.LENGTH}
    counters = engine.scheduler.counters
    assert (counters.failed, counters.finished) == (2, 1)


def test_far_deadlines_do_not_keep_ended_requests_alive():
    engine = Engine()
    for n in range(500):
        engine.add(generate_request(f"g{n}", [1], max_tokens=1, deadline=1e9))
        engine.drain()
    assert len(engine.scheduler._deadlines) < 100


def test_a_failed_step_ends_all_its_requests_and_nothing_else():
    engine = Engine(max_num_seqs=2)
    engine.add(*(generate_request(f"g{n}", [n] * 6, max_tokens=2) for n in range(3)))
    output = engine.scheduler.schedule()
    engine.scheduler.cancel("g1")
    error = RuntimeError("the kernel failed")
    events = engine.scheduler.abort_step(output, error)
    engine.scheduler.check_integrity()
    assert [(e.request.request_id, e.reason, e.error) for e in events] == [
        ("g0", FinishReason.ERROR, error),
        ("g1", FinishReason.CANCELLED, None),
    ]
    assert engine.pool.num_cached == 0, "what a failed step wrote must never be found"
    outputs, events = engine.drain()
    assert ends(outputs, events) == {"g2": FinishReason.LENGTH}


def test_results_that_do_not_belong_to_the_step_are_refused_without_effect():
    engine = Engine()
    engine.add(rank_request("r", range(6), [[1], [2]]))
    output = engine.scheduler.schedule()
    with pytest.raises(InvariantViolation, match="2 chunks with output but 1 outputs"):
        engine.scheduler.update(output, StepResult([[0.0, 0.0]]))
    with pytest.raises(InvariantViolation, match="not the one in flight"):
        engine.scheduler.update(SchedulerOutput([], 0), StepResult([]))
    with pytest.raises(InvariantViolation, match="in flight"):
        engine.scheduler.schedule()
    result = engine.runner.run(output)
    engine.scheduler.update(output, result)
    with pytest.raises(InvariantViolation, match="not the one in flight"):
        engine.scheduler.update(output, result)
    assert engine.pool.num_used == 0


def test_an_empty_step_may_be_updated():
    engine = Engine()
    output = engine.scheduler.schedule()
    assert output.chunks == []
    assert engine.scheduler.update(output, StepResult([])) == []


# ---- preemption ----


def test_the_latest_arrival_gives_its_blocks_up_and_its_output_is_the_same():
    engine = Engine(num_blocks=8, max_model_len=64)
    requests = [generate_request(f"g{n}", [n] * 8, max_tokens=20) for n in range(3)]
    engine.add(*requests)
    outputs, events = engine.drain()
    assert engine.scheduler.counters.preempted > 0
    assert requests[0].num_preemptions == 0
    for n, request in enumerate(requests):
        assert request.output_token_ids == expected_tokens([n] * 8, request.sampling)
    assert set(ends(outputs, events).values()) == {FinishReason.LENGTH}


@pytest.mark.parametrize("cut", range(14))
def test_preemption_at_any_step_changes_no_output_and_repeats_no_score(cut):
    tree = [(range(6), NO_PARENT, True)]
    tree += [([50 + n] * 5, 0, n % 2 == 0) for n in range(3)]
    tree += [([n, 9], 1 + n % 3, True) for n in range(9)]
    engine = Engine(num_blocks=32, max_num_batched_tokens=9)
    scored, grown = score_request("s", tree), generate_request("g", range(11), max_tokens=6)
    engine.add(scored, grown)
    events = []
    for _ in range(cut):
        if not engine.scheduler.has_unfinished():
            break
        events += engine.step()[1]
    for state in [state for state in engine.scheduler._running if state.held]:
        engine.scheduler._planner._preempt(state)
        engine.scheduler.check_integrity()
    _, more = engine.drain()
    assert scores(events + more) == {"s": expected_scores(scored)}
    assert grown.output_token_ids == expected_tokens(range(11), grown.sampling)


@pytest.mark.parametrize("cancelled", [False, True])
def test_a_victim_that_is_in_the_step_leaves_it(cancelled):
    # the late one decodes first in the step; then the early one needs the last block for its second segment
    engine = Engine(num_blocks=5, max_num_batched_tokens=8)
    early = score_request("early", [(range(4), NO_PARENT, False), (range(16), 0, False), ([1], 1, True)])
    late = generate_request("late", [7, 7], max_tokens=12)
    engine.add(early, late)
    events = []
    while not late.num_preemptions:
        output = engine.scheduler.schedule()
        if late.num_preemptions:
            assert [name for name, *_ in work(output)] == ["early"]
            assert output.num_tokens == sum(c.num_tokens for c in output.chunks)
            assert engine.scheduler.num_waiting == 1
            if cancelled:
                engine.scheduler.cancel("late")
                assert not engine.scheduler.num_waiting, "nothing of it is in flight"
        events += engine.scheduler.update(output, engine.runner.run(output))
        engine.scheduler.check_integrity()
    outputs, more = engine.drain()
    assert scores(events + more) == {"early": expected_scores(early)}
    assert early.num_preemptions == 0
    if cancelled:
        assert ends(outputs, events + more)["late"] is FinishReason.CANCELLED
    else:
        assert late.output_token_ids == expected_tokens([7, 7], late.sampling)


def test_a_later_request_waits_for_blocks_and_never_takes_those_of_an_earlier_one():
    engine = Engine(num_blocks=4, max_num_batched_tokens=8)
    early = score_request(
        "early", [(range(4), NO_PARENT, False), (range(12), 0, False), *([[n] * 4, 1, True] for n in range(30))]
    )
    leaves = [[n] * 4 for n in range(10)]
    late = score_request(
        "late", [*((leaf, NO_PARENT, True) for leaf in leaves), ([9] * 8, NO_PARENT, False), ([1], len(leaves), True)]
    )
    engine.add(early, late)
    _, events = engine.drain()
    assert scores(events) == {"early": expected_scores(early), "late": expected_scores(late)}
    assert engine.scheduler.counters.preempted == 0
    finished = [e.request.request_id for e in events if isinstance(e, Finished)]
    assert finished == ["early", "late"]


def test_a_preempted_request_goes_before_those_that_have_not_started():
    engine = Engine(num_blocks=8, max_num_seqs=3)
    requests = [generate_request(f"g{n}", [n] * 8, max_tokens=20) for n in range(6)]
    engine.add(*requests)
    _, events = engine.drain()
    order = [e.request.request_id for e in events if isinstance(e, Finished)]
    assert engine.scheduler.counters.preempted > 0
    assert order == sorted(order)


def test_what_was_preempted_finds_its_blocks_again_if_nobody_took_them():
    engine = Engine(num_blocks=16, max_num_batched_tokens=16)
    request = generate_request("g", range(13), max_tokens=8)
    engine.add(request)
    for _ in range(4):
        engine.step()
    engine.scheduler._planner._preempt(engine.scheduler._running[0])
    output, _ = engine.step()
    assert work(output) == [("g", 0, 16, 1)]
    engine.drain()
    assert request.output_token_ids == expected_tokens(range(13), request.sampling)


# ---- cost ----


def median_cost_us(engine: Engine, num_steps: int) -> float:
    """CPU microseconds of schedule and update for each chunk."""
    scheduler, costs = engine.scheduler, []
    for _ in range(num_steps):
        start = time.process_time()
        output = scheduler.schedule()
        planned = time.process_time()
        result = StepResult([[0.0, 0.0] if c.segment.scored else 1 for c in output.chunks if c.wants_output])
        resumed = time.process_time()
        scheduler.update(output, result)
        costs.append((time.process_time() - resumed + planned - start) / len(output.chunks) * 1e6)
    return sorted(costs)[len(costs) // 2]


def test_the_host_cost_of_a_step_is_small_for_decoding_and_for_large_trees():
    """The aim is 5 us on an idle machine; the bound leaves room for a busy one."""
    decoding = Engine(num_blocks=4096, block_size=16, max_model_len=4096, max_num_batched_tokens=1024)
    decoding.add(*(generate_request(f"g{n}", [n] * 8, max_tokens=400) for n in range(64)))
    decoding.scheduler.update(output := decoding.scheduler.schedule(), StepResult([1] * len(output.chunks)))
    assert median_cost_us(decoding, 200) < 15
    scoring = Engine(num_blocks=4096, block_size=16, max_model_len=4096, max_num_batched_tokens=1024)
    scoring.add(rank_request("r", range(300), [[n % 50] * 20 for n in range(5000)]))
    assert median_cost_us(scoring, 90) < 15
